"""The privacy report of a run: what was spent, in numbers and in a paragraph that a lawyer can read."""

import hashlib
import json
import math
import pathlib

from accounting.accountant import EpsilonBracket
from accounting.mechanism import ADD_OR_REMOVE, DpSgdMechanism

_UNITS = {"sequence": "one row of {sequence_length} consecutive tokens of the packed training text"}
_RELATIONS = {
    "zero_out": "the two data sets differ in the content of one unit, which one of them replaces by an empty unit; the number of"
    " units is public",
    ADD_OR_REMOVE: "the two data sets differ in the presence of one unit; the number of units was declared by the operator and not"
    " taken from the data",
}


def round_up(value: float, digits: int = 4) -> float:
    """The smallest decimal of `digits` places that is not below `value`: an upper bound must not be rounded down."""
    if not math.isfinite(value):
        return value
    rounded = math.ceil(value * 10**digits) / 10**digits
    return rounded if rounded >= value else math.nextafter(value, math.inf)


def encode(value):
    """JSON has no infinity: it becomes the string "inf", at any depth."""
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return "inf" if value == math.inf else value


def dumps(value: dict) -> str:
    """JSON text with infinities encoded; NaN is refused."""
    return json.dumps(encode(value), indent=1, allow_nan=False) + "\n"


def statement(
    mechanism: DpSgdMechanism, bracket: EpsilonBracket, delta: float, privacy_unit: str, sequence_length: int, held_out: int | None
) -> str:
    """One paragraph: what is protected, how far, against whom, and what is not."""
    m = mechanism
    unit = _UNITS[privacy_unit].format(sequence_length=sequence_length)
    if not m.is_private:
        return (
            "NO PRIVACY: this is a non-private baseline, trained without noise"
            + (" and without clipping" if math.isinf(m.clip_norm) else "")
            + ". The model may reveal anything about its training data, and nothing of it should be released."
        )
    count = "An undisclosed number of" if held_out is None else held_out
    held = (
        f" {count} further units were held out by a secret random assignment, are not among the {m.num_units}, and are NOT covered:"
        " the loss measured on them was shown to the operator, and any choice based on it may reveal something about them."
        if held_out != 0
        else ""
    )
    return (
        f"The trained parameters are ({round_up(bracket.upper)}, {delta:g})-differentially private with respect to one unit, which is"
        f" {unit}. Neighbouring data sets: {_RELATIONS[m.neighbouring_relation]}. This covers the final parameters and every"
        f" checkpoint together, after {m.steps} steps of DP-SGD (per-unit gradients clipped to norm {m.clip_norm:g}, Gaussian noise of"
        f" {m.noise_multiplier:.6g} times that norm on their sum, batches drawn by Poisson sampling with probability"
        f" {m.sampling_probability:.6g} from {m.num_units} units)."
        " It bounds how much anyone who sees them, whatever else they know, can learn about whether and with what content one unit took"
        " part. It does not hide facts that many units share: a person who appears in k units is protected less, roughly k times"
        " epsilon and worse. It does not cover the folder private/ (secret keys, raw losses and norms), the progress shown on the"
        " operator's terminal, the choice of settings by earlier runs on the same data, or the tokenizer." + held
    )


def build(
    mechanism: DpSgdMechanism,
    bracket: EpsilonBracket,
    *,
    target_epsilon: float,
    delta: float,
    privacy_unit: str,
    sequence_length: int,
    held_out: int | None,
    deviations: list[str],
    finished: bool,
    ledger_head: str,
) -> dict:
    """The content of report.json. `mechanism.steps` is the number of executed steps."""
    m = mechanism
    return {
        "target_epsilon": target_epsilon,
        "epsilon": round_up(bracket.upper),
        "epsilon_lower_numeric": bracket.lower,
        "delta": delta,
        "privacy_unit": privacy_unit,
        "num_units": m.num_units,
        "held_out_units": held_out,
        "neighbouring_relation": m.neighbouring_relation,
        "sampler": "poisson" if m.max_batch_size is None else "truncated_poisson",
        "expected_batch_size": m.expected_batch_size,
        "max_batch_size": m.max_batch_size,
        "sampling_probability": m.sampling_probability,
        "noise_multiplier": m.noise_multiplier,
        "clip_norm": m.clip_norm,
        "steps": m.steps,
        "finished": finished,
        "accountant": "pld",
        "cross_check": bracket.cross_check,
        "statement": statement(m, bracket, delta, privacy_unit, sequence_length, held_out),
        "deviations": deviations,
        "ledger_head": ledger_head,
    }


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, by which the ledger knows an export."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: pathlib.Path, report: dict) -> None:
    """Replaces the file in one step, so that a reader sees the old report or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(dumps(report))
    temporary.replace(path)
