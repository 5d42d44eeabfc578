"""The figures of a report, computed from the ledger by code that writes no report, so that errors there show."""

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accounting.accountant import Accountant
from accounting.audit.findings import Finding
from accounting.audit.tolerance import is_close, same_rounded
from accounting.ledger import events
from accounting.ledger.chain import Line
from accounting.ledger.executed import Executed
from accounting.mechanism import Mechanism, dp_sgd, grid

Stated = Callable[[str], Any]


def figures(lines: Sequence[Line], executed: Executed, accountant: Callable[..., Accountant]) -> dict[str, Any]:
    """What a report that was written behind the last of these lines must state, by name; infinities are floats.

    Args:
      executed: what the lines say; used for what was declared, not for what was executed.
    """
    facts = lines[0].record
    steps = [line.record for line in lines if line.record["kind"] == events.STEP]
    kinds = collections.Counter(
        (step["sampling_probability"], step["noise_multiplier"], step["max_batch_size"]) for step in steps
    )
    parts = [_mechanism(facts, executed, *kind, count) for kind, count in kinds.items()]
    claimed = facts["secret_keys"] and math.isfinite(executed.declared["epsilon"])
    counted = [line.record for line in lines if line.record["kind"] == events.HISTOGRAM]
    also = tuple(_histogram(facts, record["noise"]) for record in counted)
    known = accountant(tuple(parts) or (executed.planned,), also=also, claimed=claimed)
    epsilon = known.epsilon(executed.delta, len(steps)).upper
    items = _items(facts)
    found = {
        "run_id": facts["run_id"],
        "epsilon": epsilon,
        "delta": facts["delta"],
        "privacy_unit": facts["privacy_unit"],
        "neighbouring_relation": facts["neighbouring_relation"],
        "num_units": facts["num_units"],
        "sampler": facts["sampler"] if facts["max_batch_size"] is None else f"truncated_{facts['sampler']}",
        "steps": len(steps),
        "ledger_head": lines[-1].hash,
    }
    if counted:
        found["histogram"] = {"labels": len(counted[0]["labels"]), "noise": counted[0]["noise"]}
    if len(kinds) == 1:
        ((probability, noise, cap),) = kinds
        found |= {
            "sampling_probability": probability,
            "noise_multiplier": noise,
            "max_batch_size": cap,
            "expected_batch_size": probability * items,
            "noise_batch_ratio": noise / (probability * items),
        }
    return found


def _mechanism(
    facts: dict[str, Any], executed: Executed, probability: float, noise: float, cap: int | None, steps: int
) -> Mechanism:
    items = _items(facts)
    batch = probability * items
    declared = executed.declared["expected_batch_size"]
    return dp_sgd(
        facts["num_units"],
        declared if declared / items == probability else batch,
        cap,
        noise,
        executed.declared["clip_norm"],
        steps,
        facts["neighbouring_relation"],
        facts["sampler"],
        facts.get("clip_scaling", "clip"),
        facts.get("clip_quantile"),
        facts.get("grid_bits"),
        facts.get("items_per_unit", 1),
        facts.get("shared_items"),
    )


def _histogram(facts: dict[str, Any], noise: float) -> Mechanism:
    """Every unit takes part in it, and moves it by at most 1."""
    units = facts["num_units"]
    return dp_sgd(units, units, None, noise, 1.0, 1, facts["neighbouring_relation"], grid_bits=grid.LAW_BITS)


def _items(facts: dict[str, Any]) -> int:
    """What batches are drawn from, by the facts of a start event."""
    shared = facts.get("shared_items")
    return facts["num_units"] * facts.get("items_per_unit", 1) if shared is None else shared


def disagreements(where: str, kind: str, stated: Stated, own: dict[str, Any]) -> Iterator[Finding]:
    """What a document states otherwise than the ledger's lines give it.

    Args:
      stated: the document's value of a figure.
    """
    for name, wanted in own.items():
        have = stated(name)
        if name == "epsilon":
            agrees = isinstance(have, float) and same_rounded(have, wanted)
        else:
            agrees = have == wanted or (isinstance(wanted, float) and is_close(have, wanted))
        if not agrees:
            yield Finding(kind, f"{where} {name}", f"{str(have)[:80]} there, {str(wanted)[:80]} by the ledger's lines")
