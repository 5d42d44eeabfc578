"""What a ledger can say: every kind of line, its facts, their types and their meaning.

Writers and auditors both go by this table, so a fact that is not in it can neither be written nor be taken for a public
one. Every line also has its number `n`, its `kind`, its `hash` and, under a seal, its `mac` or its `signature`.
"""

import dataclasses
from typing import Any

# 1: no `format` in the start event. 2: the start event names the format. 3: it says whether the release is exact, so a
# report can say that it is not. 4: a checkpoint names its whole state and its files; a step that is executed again
# elsewhere has another line. 5: a histogram may be released before the first step. 6: canaries may be planted, and what
# an attack on them shows is recorded; the start event names the version of the program. All are audited; reports of the
# older ones say no more than when they were written.
FORMAT = 6
OLDEST_FORMAT = 1
# From this format on, keys are bound to the places where steps are executed (accounting.ledger.history).
PLACES = 4
# From this format on, a ledger may hold a histogram.
HISTOGRAMS = 5
# From this format on, a ledger may register canaries, and knows the program's version.
CANARIES = 6

START, HISTOGRAM, STEP, RESUME, CHECKPOINT, STORED, EVALUATION, ATTACK, FINISH, EXPORT, REPORT = (
    "start", "histogram", "step", "resume", "checkpoint", "stored", "evaluation", "attack", "finish", "export",
    "report",
)  # fmt: skip

TOKENIZER = "tokenizer_sha256"

# What calculations with floats and with 64-bit counts can take.
_LARGEST_COUNT = 2**63 - 1

_NUMBER: tuple[type, ...] = (int, float)
_TEXT: tuple[type, ...] = (str,)
_COUNT: tuple[type, ...] = (int,)
_OR_NONE: tuple[type, ...] = (type(None),)


@dataclasses.dataclass(frozen=True)
class Fact:
    """One fact of a line.

    Attributes:
      types: that its value may have; a number that is infinite is written as the string "inf" and counts as a float.
      meaning: one line.
      required: whether a line without it is garbled.
      since: the format from which on it is required.
    """

    types: tuple[type, ...]
    meaning: str
    required: bool = True
    since: int = OLDEST_FORMAT

    def admits(self, value: object) -> bool:
        """Whether a decoded value has one of the types. A truth value is no number; an integer has at most 64 bits."""
        if isinstance(value, bool):
            return bool in self.types
        return isinstance(value, self.types) and not (isinstance(value, int) and abs(value) > _LARGEST_COUNT)


EVENTS: dict[str, dict[str, Fact]] = {
    START: {
        "format": Fact(_COUNT, "version of this table that the run was written by", since=2),
        "run_id": Fact(_TEXT, "public name at random, which tells this run's ledger from any other"),
        "config_sha256": Fact(_TEXT, "of config.json"),
        "seal": Fact(_TEXT, "how lines are bound to each other"),
        "seal_key": Fact(_TEXT + _OR_NONE, "public key of the lines' signatures", since=4),
        "num_units": Fact(_COUNT, "N, training units; counted under zero_out, declared under add_or_remove"),
        "expected_batch_size": Fact(_NUMBER, "B = q times the number of items"),
        "max_batch_size": Fact(_COUNT + _OR_NONE, "truncation cap of a batch, in items"),
        "noise_multiplier": Fact(_NUMBER, "sigma, in units of the sensitivity"),
        "clip_norm": Fact(_NUMBER, "C, L2 bound of one item's gradient; where it adapts, the first"),
        "steps": Fact(_COUNT, "T, planned number of steps"),
        "neighbouring_relation": Fact(_TEXT, "zero_out or add_or_remove"),
        "sampler": Fact(_TEXT, "poisson or fixed"),
        "clip_scaling": Fact(_TEXT, "clip, normalise or automatic", required=False),
        "clip_quantile": Fact(_NUMBER + _OR_NONE, "share of the items that C follows", required=False),
        "grid_bits": Fact(
            _COUNT + _OR_NONE, "sums are exact on a grid of sigma * C / 2^grid_bits; null: floats", since=3
        ),
        "items_per_unit": Fact(_COUNT, "k, items of a unit that are drawn by themselves; omitted: 1", required=False),
        "shared_items": Fact(_COUNT + _OR_NONE, "items, where one may be that of several units", required=False),
        "epsilon": Fact(_NUMBER, "the target"),
        "delta": Fact(_NUMBER, "at which epsilon is stated"),
        "privacy_unit": Fact(_TEXT, "what one unit is"),
        "rows_per_unit": Fact(_COUNT, "most rows of a unit that may have several", required=False),
        "rows_kept": Fact(_TEXT, "which rows of a unit with more: uniform or first", required=False),
        "user_field": Fact(_TEXT + _OR_NONE, "field of a record that names its user", required=False),
        "records_without_user": Fact(_TEXT + _OR_NONE, "refuse, or own: each is a unit", required=False),
        "skip_bad_records": Fact((bool,), "whether records that cannot be read were left out", required=False),
        "ownership": Fact(_TEXT + _OR_NONE, "one: a record has one user; public: several", required=False),
        "user_sampling": Fact(_TEXT + _OR_NONE, "what is drawn: a user, or example: rows", required=False),
        "sequence_length": Fact(_COUNT, "length of a row"),
        "model": Fact(_TEXT, "name of the preset or architecture"),
        "architecture": Fact((dict,), "of the model, adapters included"),
        "parameters": Fact(_COUNT, "numbers that the model has"),
        "trained_parameters": Fact(_COUNT, "numbers that are trained"),
        "init_sha256": Fact(_TEXT + _OR_NONE, "of the checkpoint that the run started from"),
        TOKENIZER: Fact(_TEXT, "of the tokenizer's kind, special ids and files", required=False),
        "histogram_sha256": Fact(_TEXT + _OR_NONE, "of the public labels whose units are counted", required=False),
        "histogram_noise": Fact(_NUMBER + _OR_NONE, "noise on these counts, in units", required=False),
        "canaries": Fact(_COUNT, "made-up units, each planted by a secret fair coin", required=False),
        "canary_kind": Fact(_TEXT, "what they are", required=False),
        "canary_repeats": Fact((list,), "as how many units they are planted, in turn", required=False),
        "canary_sha256": Fact(_TEXT, "binds their contents and coins, and hides them", required=False),
        "audit_protocol": Fact((dict,), "how an attack on them is measured", required=False),
        "secret_keys": Fact((bool,), "whether the keys came from the operating system's randomness"),
        "held_out_units": Fact(_COUNT + _OR_NONE, "held out for evaluation; undisclosed under add_or_remove"),
        "environment": Fact(_TEXT, "versions and devices that decide the last bits of a step", since=4),
        "program": Fact(_TEXT, "name and version of the program that began the run", since=6),
    },
    HISTOGRAM: {
        "labels": Fact((list,), "public texts"),
        "counts": Fact((list,), "how many units fall under each, noised"),
        "noise": Fact(_NUMBER, "standard deviation of the noise on each count, in units"),
    },
    STEP: {
        "step": Fact(_COUNT, "number of the step, from 0"),
        "sampling_probability": Fact(_NUMBER, "q"),
        "noise_multiplier": Fact(_NUMBER, "sigma"),
        "max_batch_size": Fact(_COUNT + _OR_NONE, "truncation cap"),
    },
    RESUME: {
        "step": Fact(_COUNT, "at which the run goes on"),
        "environment": Fact(_TEXT, "of the process that goes on"),
        "continuation": Fact(
            _TEXT,
            "name at random, where sums have no fixed order: nothing repeats the bits that follow",
            required=False,
        ),
    },
    CHECKPOINT: {
        "step": Fact(_COUNT, "number of steps taken"),
        "metrics_sha256": Fact(_TEXT, "of the public metrics so far"),
        "parameters_sha256": Fact(_TEXT, "of the trained parameters"),
        "state_sha256": Fact(_TEXT, "of everything that the checkpoint holds, optimizer included", since=4),
    },
    STORED: {
        "step": Fact(_COUNT, "of the checkpoint"),
        "files_sha256": Fact(_TEXT, "of the names and contents of the checkpoint's files"),
    },
    EVALUATION: {
        "step": Fact(_COUNT, "number of steps taken"),
        "units": Fact(_TEXT, "which units were looked at"),
    },
    ATTACK: {
        "step": Fact(_COUNT, "number of steps taken"),
        "assessment": Fact((dict,), "lower bounds of epsilon by the registered protocol, and rates", required=False),
        "kept_sha256": Fact(_TEXT, "keyed hash of an assessment that is kept in private/", required=False),
        "not_measured": Fact(_TEXT, "why there is no assessment", required=False),
    },
    FINISH: {"step": Fact(_COUNT, "number of steps taken")},
    EXPORT: {
        "step": Fact(_COUNT, "of the checkpoint"),
        "files": Fact((dict,), "SHA-256 of every written file, by name"),
    },
    REPORT: {"files": Fact((dict,), "SHA-256 of every written file, by name")},
}


def unknown(kind: str, facts: dict[str, Any]) -> list[str]:
    """The names of facts that a line of this kind must not have, in order."""
    return sorted(set(facts) - set(EVENTS.get(kind, {})))


def unsound(kind: str, facts: dict[str, Any], version: int = FORMAT) -> list[str]:
    """The names of facts that a line of this kind lacks, or has with a value of another type.

    Args:
      version: the ledger's format.
    """

    def is_required(fact: Fact) -> bool:
        return fact.required and version >= fact.since

    return [
        name
        for name, fact in EVENTS[kind].items()
        if (is_required(fact) or name in facts) and not (name in facts and fact.admits(facts[name]))
    ]


def version_of(start: dict[str, Any]) -> Any:
    """The format that a start event names."""
    return start.get("format", OLDEST_FORMAT)


def check_writable(kind: str, facts: dict[str, Any]) -> None:
    """Refuses to write what no auditor would take for a public fact.

    Raises:
      ValueError: a kind that is not in the table, a fact that its kind does not have, or one of another type.
    """
    if kind not in EVENTS:
        raise ValueError(f"a ledger has no event of kind {kind!r}")
    if names := unknown(kind, facts):
        raise ValueError(f"a {kind} event has no fact {', '.join(names)}")
    wrong = [name for name, value in facts.items() if value != "inf" and not EVENTS[kind][name].admits(value)]
    if wrong:
        raise ValueError(f"a {kind} event has {', '.join(wrong)} of another type")
