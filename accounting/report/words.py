"""The sentences of a privacy report: unit, neighbouring data sets, mechanism, what is covered and what is not."""

import math
from collections.abc import Sequence
from typing import Any

from accounting.errors import InputError
from accounting.ledger.executed import Executed
from accounting.ledger.seals import CHAIN, KEYED_CHAIN, SIGNED_CHAIN
from accounting.mechanism import ADD_OR_REMOVE, Mechanism
from accounting.report.spending import Spent
from accounting.rounding import round_up

_UNITS = {
    "sequence": "one row of {sequence_length} consecutive tokens of the packed training text",
    "example": "one record of the training data, of which the first {sequence_length} tokens are used",
    "document": "one record of the training data with all of its text, of which at most {rows_per_unit} rows of"
    " {sequence_length} tokens are used ({which})",
    "user": "all records of the training data whose field {user_field!r} has one value, of which at most"
    " {rows_per_unit} rows of {sequence_length} tokens are used ({which})",
}
_OF_SEVERAL_USERS = (
    "all records of the training data whose field {user_field!r} names one user, beside others or not, of which at most"
    " {rows_per_unit} are used, the first {sequence_length} tokens of each; whom a record names is public, and not"
    " protected"
)
_ROWS_KEPT = {
    "uniform": "where there are more, rows chosen at random",
    "first": "where there are more, the first ones",
}
_RELATIONS = {
    "zero_out": "the two data sets differ in the content of one unit, which one of them replaces by an empty unit; the"
    " number of"
    " units is public",
    ADD_OR_REMOVE: "the two data sets differ in the presence of one unit; the number of units was declared by the"
    " operator and not"
    " taken from the data",
}


def unit_text(declared: dict[str, Any]) -> str:
    """What one privacy unit is, in words.

    Raises:
      InputError: the ledger names a unit that does not exist.
    """
    if declared["privacy_unit"] not in _UNITS:
        raise InputError(f"the ledger names an unknown privacy unit {declared['privacy_unit']!r}")
    text = _OF_SEVERAL_USERS if declared.get("ownership") == "public" else _UNITS[declared["privacy_unit"]]
    try:
        which = _ROWS_KEPT[declared["rows_kept"]] if "{which}" in text else None
        return text.format(which=which, **declared)
    except KeyError as missing:
        raise InputError(f"the ledger does not say {missing} of its privacy units") from None


def relation_text(mechanism: Mechanism) -> str:
    return _RELATIONS[mechanism.neighbouring_relation]


def mechanism_text(mechanism: Mechanism) -> str:
    """One run of equal steps, in words."""
    m = mechanism
    cap = "" if m.max_batch_size is None else f", at most {m.max_batch_size} of them"
    noise = f"Gaussian noise of {m.noise_multiplier:.6g} times that norm on their sum"
    if m.noise.is_exact:
        noise = (
            f"{noise}, both in whole numbers of 2^-{m.noise.grid_bits} of that noise, whose law hides a unit at least"
            " as well as a Gaussian does but for 2^-99 for each number and step, which delta includes"
        )
    what, drawn = "unit", f"{m.num_units} units"
    if m.items_per_unit > 1:
        what = "row"
        drawn = (
            f"{m.num_items} places for rows, {m.items_per_unit} for each of {m.num_units} units, empty ones included"
        )
    if m.sampling.shared_items is not None:
        what, drawn = "record", f"{m.num_items} records of {m.num_units} units"
    return (
        f"{m.steps} steps of DP-SGD (per-{what} gradients clipped to norm {m.clip_norm:g}, {noise}, batches drawn by"
        f" Poisson sampling with probability {m.sampling_probability:.6g} from {drawn}{cap})"
    )


def histogram_text(mechanism: Mechanism) -> str:
    """A release beside the steps, in words."""
    return (
        "one release of how many units fall under each of some public labels (each unit counted at most once, Gaussian"
        f" noise of {mechanism.noise_multiplier:g} units on every count, both in whole numbers of"
        f" 2^-{mechanism.noise.grid_bits} of that noise)"
    )


def clipping_text(declared: dict[str, Any]) -> str:
    """Returns a sentence about an adaptive clip norm or automatic clipping; otherwise an empty text."""
    quantile = declared.get("clip_quantile")
    if quantile is not None:
        return (
            f" The clip norm was that value at first and then followed the {quantile:g} quantile of the units' norms,"
            " by counts whose own noise is part of the noise multiplier."
        )
    if declared.get("clip_scaling") == "automatic":
        return " Instead of being clipped, gradients were divided by their norm, which makes that norm their largest."
    return ""


def origin_text(declared: Sequence[dict[str, Any]]) -> str:
    """What is not covered where training started from somebody's checkpoint; nothing where it did not."""
    digests = sorted({facts["init_sha256"] for facts in declared} - {None})
    if not digests:
        return ""
    return (
        f" Training started from an existing checkpoint (SHA-256 {', '.join(digests)}): what that one reveals about the"
        " data it was made from is NOT covered."
    )


def seal_text(declared: dict[str, Any]) -> str:
    """What the ledger's chain can and cannot show."""
    if declared["seal"] == KEYED_CHAIN:
        return (
            "Every line carries an HMAC under a key in private/: nobody without that key can rewrite the ledger"
            " unnoticed."
        )
    if declared["seal"] == SIGNED_CHAIN:
        return (
            f"Every line carries a signature that the public key {declared['seal_key']} checks: nobody without its"
            " secret half can rewrite the ledger unnoticed by those who have the public key from elsewhere."
        )
    assert declared["seal"] == CHAIN
    return (
        "The chain has no key: it finds accidents and partial edits. Deposit the head hash elsewhere to rule out a"
        " rewritten ledger."
    )


def contents_text(spent: Spent, delta: float) -> str:
    """What can be learned of one unit, and with which number."""
    if spent.replaced is None:
        return (
            " It bounds how much anyone who sees them, whatever else they know, can learn about whether and with what"
            " content one unit took part."
        )
    return (
        " It bounds how much anyone who sees them, whatever else they know, can learn about whether one unit took part."
        f" With what content it took part, one or any other, they are ({round_up(spent.replaced)}, {float(delta)!r})-"
        "differentially private."
    )


def assumptions(executed: Executed) -> list[str]:
    """What the guarantee rests on beside what is proved and checked, one sentence each; nothing without a guarantee."""
    m, declared = executed.planned, executed.declared
    if not (executed.claims_privacy and all(x.is_private for x in executed.mechanisms or (m,))):
        return []
    found = [
        "Randomness: batches and noise come from secret keys of the operating system by ChaCha20, BLAKE2b and"
        " Threefry-2x32; whoever could tell their output from random numbers would have no bound.",
        "Arithmetic: each unit's gradient, its norm and its clip factor are computed in floating point; the rounding"
        " of norms is bounded and paid for by the clip factor. "
        + (
            "From the clipped gradient to the released number only whole numbers are added."
            if m.noise.is_exact
            else "The rounding of sums and of noise is not covered."
        ),
        "Program and machine: this program, its libraries and the processor compute what they are written to compute,"
        " and repeat the bits of a step in the same environment.",
        "Copies: no copy or backup of this run's folder was trained further in another environment (versions, source"
        " code, flags, processor and its cores). One that was had other noise and costs its steps once more: dpgemma"
        " account --compose adds them up. In the same environment a copy repeats this run's own bits.",
        "Time: how long steps took, when files were written and how much memory was used is not covered"
        + (
            ", and shows how many units there are, which this relation would hide."
            if m.neighbouring_relation == ADD_OR_REMOVE
            else ", and shows how many rows the drawn units have."
            if "user_sampling" in declared and m.sampling.shared_items is None
            else "."
        ),
    ]
    if declared["held_out_units"] != 0:
        found.append(
            "Hold-out: which units are held out is decided by a secret key, so an owner does not know whether a unit is"
            " covered; those that are held out are not."
        )
    if executed.also:
        found.append(
            "Histogram: its labels are a public list, which nobody chose by looking at the data. How long it took to"
            " count is not covered."
        )
    if declared.get("skip_bad_records"):
        found.append(
            "Records left out: records that cannot be read were left out. How many units there are, and which of them"
            " are held out, depends on which records can be read; that is not covered."
        )
    if declared["privacy_unit"] == "user":
        found.append(
            "Users: whom a record belongs to is what its field says. Somebody whose records carry several values is"
            " several units, and what a record says of somebody else is protected with the user that it belongs to."
            + (
                " A record that names no user is a unit of its own."
                if declared.get("records_without_user") == "own"
                else ""
            )
        )
    if declared["privacy_unit"] == "sequence":
        found.append(
            "Packed text: a unit is a row, wherever its text begins and ends. To leave it out is to empty this row and"
            " no other; text of one person that runs over several rows is several units."
        )
    return found


def statement(executed: Executed, spent: Spent) -> str:
    """One paragraph: what is protected, how far, against whom, and what is not."""
    m, declared, bracket = executed.planned, executed.declared, spent.bracket
    mechanisms = executed.mechanisms or (m,)
    if not all(x.is_private for x in mechanisms):
        return (
            "NO PRIVACY: this is a non-private baseline, trained without noise"
            + (" and without clipping" if math.isinf(m.clip_norm) else "")
            + ". The model may reveal anything about its training data, and nothing of it should be released."
        )
    if not executed.claims_privacy:
        return (
            f"NO PRIVACY CLAIMED: the target epsilon is infinite. Noise of {m.noise_multiplier:.6g} times the clip norm"
            " was added to every sum, as in a study of what noise costs, but no guarantee was derived, and nothing"
            " should be released as private."
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
        " NOT covered: the loss measured on them was shown to the operator, and any choice based on it may reveal"
        " something about them."
        if held_out != 0
        else ""
    )
    origin = origin_text([declared])
    rounding = (
        ", by a proof for real numbers that does not cover the float32 numbers which were added,"
        if executed.has_float_release
        else ""
    )
    spent_text = f"({round_up(bracket.upper)}, {float(executed.delta)!r})-differentially private"
    return (
        f"The trained parameters are {spent_text}{rounding} with respect to one unit, which is {unit_text(declared)}."
        f" Neighbouring data sets: {relation_text(m)}. This covers the final parameters"
        f"{', the histogram in the ledger' if executed.also else ''} and every checkpoint together,"
        f" after {', then '.join([*map(histogram_text, executed.also), *map(mechanism_text, mechanisms)])}."
        + (
            f" {executed.repeated_steps} of these steps were lost and executed once more in another environment, with"
            " other noise."
            if executed.repeated_steps
            else ""
        )
        + clipping_text(declared)
        + contents_text(spent, executed.delta)
        + " It does not hide facts that many units share: a person who appears in k units is"
        " protected less, roughly k times epsilon and worse. It does not cover the folder private/ (secret keys, raw"
        " losses and norms), the progress shown on the operator's terminal, the choice of settings by earlier runs on"
        " the same data, or the tokenizer." + origin + held
    )
