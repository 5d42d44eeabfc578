"""The line of a ledger that holds a released histogram: how many units fall under each of some public labels."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from accounting.errors import InputError
from accounting.ledger import events
from accounting.mechanism.histogram import LARGEST_NOISE, SMALLEST_NOISE, unit_steps


@dataclasses.dataclass(frozen=True)
class ReleasedHistogram:
    """Noised counts of units under public labels.

    Attributes:
      labels: public texts, each once.
      counts: of units under each; with noise they may be negative.
      noise: standard deviation of the noise on each count, in units.
    """

    labels: tuple[str, ...]
    counts: tuple[float, ...]
    noise: float

    def facts(self) -> dict[str, Any]:
        """As a ledger's line records it."""
        return {"labels": list(self.labels), "counts": list(self.counts), "noise": self.noise}


def labels_sha256(labels: Sequence[str]) -> str:
    """By which a start event names the labels that are to be counted."""
    return hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()


def unsound(record: dict[str, Any], num_units: int) -> str | None:
    """What is wrong with the values of a histogram's line, whose facts have their types; None where nothing is."""
    labels, counts = record["labels"], record["counts"]
    if not labels or not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        return "its labels are not texts that differ"
    numbers = all(isinstance(count, float) and math.isfinite(count) for count in counts)
    if not numbers or len(counts) != len(labels):
        return "it has not one number for each label"
    if not SMALLEST_NOISE <= record["noise"] <= LARGEST_NOISE:
        return "its noise is none that a histogram may have"
    # Nothing can hide in digits that a count does not need, nor in counts of more units than there are. The law of the
    # noise ends at 32 standard deviations.
    unit, far = unit_steps(record["noise"]), 32 * record["noise"]
    if not all(-far <= count <= num_units + far for count in counts):
        return "a count is none of so many units"
    return None if all(round(count * unit) / unit == count for count in counts) else "a count has other digits"


def is_in(records: Sequence[dict[str, Any]]) -> bool:
    """Whether one of a ledger's records is a histogram."""
    return any(record["kind"] == events.HISTOGRAM for record in records)


def of(records: Sequence[dict[str, Any]], num_units: int) -> ReleasedHistogram | None:
    """The histogram that a ledger's records hold, if they hold one.

    Args:
      num_units: N, by the start event.

    Raises:
      InputError: one that this program did not write.
    """
    for record in records:
        if record["kind"] == events.HISTOGRAM:
            facts = {name: value for name, value in record.items() if name not in ("n", "kind")}
            if events.unsound(events.HISTOGRAM, facts) or unsound(record, num_units):
                raise InputError("the ledger's histogram is not what this program writes: run dpgemma audit")
            return ReleasedHistogram(tuple(record["labels"]), tuple(record["counts"]), record["noise"])
    return None
