"""The privacy report of a run: what was spent, in numbers and in a paragraph that a lawyer can read.

Everything in it is a function of the ledger up to one line, whose hash it names; so whoever holds the ledger can write
it again.
"""

import decimal
import hashlib
import json
import math
import pathlib
from collections.abc import Sequence

from accounting.accountant import EpsilonBracket
from accounting.errors import InputError
from accounting.executed import Executed
from accounting.ledger import CHAIN, KEYED_CHAIN
from accounting.mechanism import ADD_OR_REMOVE, DpSgdMechanism

WEIGHTS_SUFFIX = ".safetensors"

_UNITS = {
    "sequence": "one row of {sequence_length} consecutive tokens of the packed training text",
    "example": "one record of the training data, of which the first {sequence_length} tokens are used",
}
_RELATIONS = {
    "zero_out": "the two data sets differ in the content of one unit, which one of them replaces by an empty unit; the"
    " number of"
    " units is public",
    ADD_OR_REMOVE: "the two data sets differ in the presence of one unit; the number of units was declared by the"
    " operator and not"
    " taken from the data",
}


def round_up(value: float, digits: int = 4) -> float:
    """The smallest decimal of `digits` places that is not below `value`: an upper bound must not be rounded down.

    A number that is such a decimal already stays as it is, so an auditor who rounds a reported number again gets the
    same.
    """
    if not math.isfinite(value):
        return value
    # In decimals: 0.1569 * 10**4 is 1569.0000000000002 in binary, and would go up to 0.157.
    enough = decimal.Context(prec=400)
    return float(
        decimal.Decimal(repr(float(value))).quantize(decimal.Decimal(1).scaleb(-digits), decimal.ROUND_CEILING, enough)
    )


def upper(value: float, digits: int = 6) -> str:
    """An upper bound with so many significant digits, rounded up."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exact = decimal.Decimal(repr(float(value)))
    last = decimal.Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{float(exact.quantize(last, decimal.ROUND_CEILING, decimal.Context(prec=400))):.{digits}g}"


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


def unit_text(declared: dict) -> str:
    """What one privacy unit is, in words.

    Raises:
      InputError: the ledger names a unit that does not exist.
    """
    if declared["privacy_unit"] not in _UNITS:
        raise InputError(f"the ledger names an unknown privacy unit {declared['privacy_unit']!r}")
    return _UNITS[declared["privacy_unit"]].format(sequence_length=declared["sequence_length"])


def relation_text(mechanism: DpSgdMechanism) -> str:
    return _RELATIONS[mechanism.neighbouring_relation]


def mechanism_text(mechanism: DpSgdMechanism) -> str:
    """One run of equal steps, in words."""
    m = mechanism
    cap = "" if m.max_batch_size is None else f", at most {m.max_batch_size} of them"
    return (
        f"{m.steps} steps of DP-SGD (per-unit gradients clipped to norm {m.clip_norm:g}, Gaussian noise of"
        f" {m.noise_multiplier:.6g} times"
        f" that norm on their sum, batches drawn by Poisson sampling with probability {m.sampling_probability:.6g} from"
        f" {m.num_units} units{cap})"
    )


def clipping_text(declared: dict) -> str:
    """What is to be said of gradients that are not plainly clipped to a constant norm; empty where they are."""
    quantile = declared.get("clip_quantile")
    if quantile is not None:
        return (
            f" The clip norm was that value at first and then followed the {quantile:g} quantile of the units' norms,"
            " by counts whose own"
            " noise is part of the noise multiplier."
        )
    if declared.get("clip_scaling") == "automatic":
        return " Instead of being clipped, gradients were divided by their norm, which makes that norm their largest."
    return ""


def origin_text(declared: Sequence[dict]) -> str:
    """What is not covered where training started from somebody's checkpoint; nothing where it did not."""
    digests = sorted({facts["init_sha256"] for facts in declared} - {None})
    if not digests:
        return ""
    return (
        f" Training started from an existing checkpoint (SHA-256 {', '.join(digests)}): what that one reveals about"
        " the data it was made"
        " from is NOT covered."
    )


def statement(executed: Executed, bracket: EpsilonBracket) -> str:
    """One paragraph: what is protected, how far, against whom, and what is not."""
    m, declared = executed.planned, executed.declared
    mechanisms = executed.mechanisms or (m,)
    if not all(x.is_private for x in mechanisms):
        return (
            "NO PRIVACY: this is a non-private baseline, trained without noise"
            + (" and without clipping" if math.isinf(m.clip_norm) else "")
            + ". The model may reveal anything about its training data, and nothing of it should be released."
        )
    if not executed.claims_privacy:
        return (
            f"NO PRIVACY CLAIMED: the target epsilon is infinite. Noise of {m.noise_multiplier:.6g} times the clip"
            " norm was added to"
            " every sum, as in a study of what noise costs, but no guarantee was derived, and nothing should be"
            " released as private."
            + (
                ""
                if executed.has_secret_keys
                else " That noise was made from a public seed and can be taken off again."
            )
        )
    held_out = declared.get("held_out_units")
    count = "An undisclosed number of" if held_out is None else held_out
    held = (
        f" {count} further units were held out by a secret random assignment, are not among the {m.num_units}, and are"
        " NOT covered:"
        " the loss measured on them was shown to the operator, and any choice based on it may reveal something about"
        " them."
        if held_out != 0
        else ""
    )
    origin = origin_text([declared])
    return (
        f"The trained parameters are ({round_up(bracket.upper)}, {float(executed.delta)!r})-differentially private"
        " with respect to one"
        f" unit, which is {unit_text(declared)}. Neighbouring data sets: {relation_text(m)}. This covers the final"
        " parameters and every"
        f" checkpoint together, after {', then '.join(map(mechanism_text, mechanisms))}."
        + clipping_text(declared)
        + " It bounds how much anyone who sees them, whatever else they know, can learn about whether and with what"
        " content one unit took"
        " part. It does not hide facts that many units share: a person who appears in k units is protected less,"
        " roughly k times"
        " epsilon and worse. It does not cover the folder private/ (secret keys, raw losses and norms), the progress"
        " shown on the"
        " operator's terminal, the choice of settings by earlier runs on the same data, or the tokenizer."
        + origin
        + held
    )


def build(executed: Executed, bracket: EpsilonBracket, ledger_head: str) -> dict:
    """The content of report.json.

    Args:
      executed: what the ledger says, up to the line with the hash `ledger_head`.
    """
    m, declared = executed.planned, executed.declared
    return {
        "run_id": declared["run_id"],
        "target_epsilon": declared["epsilon"],
        "epsilon": round_up(bracket.upper),
        "epsilon_lower_numeric": bracket.lower,
        "delta": executed.delta,
        "privacy_unit": declared["privacy_unit"],
        "num_units": m.num_units,
        "held_out_units": declared["held_out_units"],
        "neighbouring_relation": m.neighbouring_relation,
        "sampler": m.scheme,
        "expected_batch_size": m.expected_batch_size,
        "max_batch_size": m.max_batch_size,
        "sampling_probability": m.sampling_probability,
        "noise_multiplier": m.noise_multiplier,
        "noise_batch_ratio": m.noise_batch_ratio,
        "clip_norm": m.clip_norm,
        "clip_scaling": declared.get("clip_scaling", "clip"),
        "clip_quantile": declared.get("clip_quantile"),
        "steps": executed.steps,
        "finished": executed.finished,
        "accountant": "pld",
        "cross_check": bracket.cross_check,
        "statement": statement(executed, bracket),
        "deviations": executed.deviations,
        "trained_parameters": declared["trained_parameters"],
        "init_sha256": declared["init_sha256"],
        "exports": [exported_weights(event) for event in executed.events if event["kind"] == "export"],
        "ledger_seal": declared["seal"],
        "ledger_head": ledger_head,
    }


def exported_weights(event: dict) -> dict[str, str]:
    """SHA-256 of the weight files that an export event names, by file name."""
    return {name: digest for name, digest in sorted(event["files"].items()) if name.endswith(WEIGHTS_SUFFIX)}


def seal_text(declared: dict) -> str:
    """What the ledger's chain can and cannot show."""
    if declared["seal"] == KEYED_CHAIN:
        return (
            "Every line carries an HMAC under a key in private/: nobody without that key can rewrite the ledger"
            " unnoticed."
        )
    assert declared["seal"] == CHAIN
    return (
        "The chain has no key: it finds accidents and partial edits. Deposit the head hash elsewhere to rule out a"
        " rewritten ledger."
    )


def digest(content: bytes) -> str:
    """SHA-256, by which the ledger knows a file."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: pathlib.Path) -> str:
    """SHA-256 of a file that may be large."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: pathlib.Path, text: str) -> None:
    """Replaces the file in one step, so that a reader sees the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def model_card(report: dict, step: int) -> str:
    """README.md of an export: the run's privacy statement and the numbers behind it."""
    rows = [
        "epsilon", "epsilon_lower_numeric", "delta", "privacy_unit", "neighbouring_relation", "num_units", "sampler",
        "expected_batch_size", "max_batch_size", "sampling_probability", "noise_multiplier", "noise_batch_ratio",
        "clip_norm", "steps",
        "accountant", "cross_check", "run_id", "ledger_head",
    ]  # fmt: skip
    table = "\n".join(f"| {name} | {report[name]} |" for name in rows)
    deviations = "\n".join(f"- {line}" for line in report["deviations"]) or "- none"
    unfinished = "" if report["finished"] else f"\nThis is an unfinished run, exported at step {step}.\n"
    return f"""# Model trained with dpgemma
{unfinished}
## Privacy

{report["statement"]}

| | |
|---|---|
{table}

Deviations:

{deviations}
"""


def plain_card() -> str:
    """README.md of a model that dpgemma wrote without having trained it."""
    return """# Model converted with dpgemma

## Privacy

No differentially private training was done here: these are the weights of another directory in another layout of
files. Whatever guarantee they came with is stated there, and nothing is added to it.
"""
