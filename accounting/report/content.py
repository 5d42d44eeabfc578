"""The privacy report of a run: what was spent, in numbers and in a paragraph that a lawyer can read.

Everything in it is a function of the ledger up to one line, whose hash it names; so whoever holds the ledger can write
it again.
"""

from typing import Any

from accounting.ledger import events, histogram
from accounting.ledger.executed import Executed
from accounting.report.spending import Spent
from accounting.report.words import assumptions, statement
from accounting.rounding import round_up
from accounting.run_files import WEIGHTS_SUFFIX


def build(executed: Executed, spent: Spent, ledger_head: str) -> dict[str, Any]:
    """The content of report.json.

    Args:
      executed: what the ledger says, up to the line with the hash `ledger_head`.
    """
    m, declared, bracket = executed.planned, executed.declared, spent.bracket
    replaced = {} if spent.replaced is None else {"epsilon_replace_one": round_up(spent.replaced)}
    return {
        "run_id": declared["run_id"],
        "target_epsilon": declared["epsilon"],
        "epsilon": round_up(bracket.upper),
        "epsilon_lower_numeric": bracket.lower,
        **replaced,
        "delta": executed.delta,
        "privacy_unit": declared["privacy_unit"],
        "num_units": m.num_units,
        **({"items_per_unit": m.items_per_unit} if m.items_per_unit > 1 else {}),
        **({} if m.sampling.shared_items is None else {"shared_items": m.num_items}),
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
        **_histogram(executed),
        **({"repeated_steps": executed.repeated_steps} if executed.version >= events.PLACES else {}),
        **_canaries(executed),
        "finished": executed.finished,
        "accountant": "pld",
        **_receipt(executed),
        "cross_check": bracket.cross_check,
        "statement": statement(executed, spent),
        **({"assumptions": assumptions(executed)} if executed.version >= events.PLACES else {}),
        "deviations": executed.deviations,
        "trained_parameters": declared["trained_parameters"],
        "init_sha256": declared["init_sha256"],
        **({events.TOKENIZER: declared[events.TOKENIZER]} if events.TOKENIZER in declared else {}),
        "exports": [exported_weights(event) for event in executed.events if event["kind"] == events.EXPORT],
        "ledger_seal": declared["seal"],
        "ledger_head": ledger_head,
    }


def _histogram(executed: Executed) -> dict[str, Any]:
    found = histogram.of(executed.events, executed.planned.num_units)
    return {} if found is None else {"histogram": {"labels": len(found.labels), "noise": found.noise}}


def _canaries(executed: Executed) -> dict[str, Any]:
    """What was planted, how it was to be attacked, and what came of it."""
    declared = executed.declared
    if "canaries" not in declared:
        return {}
    names = ("canaries", "canary_kind", "canary_repeats", "canary_sha256", "audit_protocol")
    attacks = [event.get("assessment") for event in executed.events if event["kind"] == events.ATTACK]
    # That of gradient canaries is kept in private/.
    shown = {"attack": attacks[0] and {name: x for name, x in attacks[0].items() if name != "roc"}} if attacks else {}
    return {name: declared.get(name) for name in names} | shown


def _receipt(executed: Executed) -> dict[str, Any]:
    """What somebody needs who repeats or checks the run: versions, and what the noised sum was divided by."""
    if executed.version < events.CANARIES:
        return {}
    parts = str(executed.declared["environment"]).split("; ")
    return {
        "accountant_version": executed.declared["program"],
        "divisor": executed.planned.expected_batch_size,
        "divisor_is": "the public expected batch size: never the number of units that were drawn",
        "program": executed.declared["program"],
        "program_sha256": parts[-1].removeprefix("code "),
        "libraries": parts[0],
    }


def exported_weights(event: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the weight files that an export event names, by file name."""
    return {name: digest for name, digest in sorted(event["files"].items()) if name.endswith(WEIGHTS_SUFFIX)}
