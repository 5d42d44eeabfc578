"""What a ledger proves: which mechanisms were executed, how often, and under which declared facts."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from accounting import run_files
from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.ledger import events
from accounting.ledger.history import History
from accounting.mechanism import Mechanism, dp_sgd, grid, histogram
from accounting.mechanism.mechanism import FACTS, GROUP


@dataclasses.dataclass(frozen=True)
class Executed:
    """What a ledger proves.

    Attributes:
      declared: the facts of the start event; infinities decoded.
      planned: the mechanism that the start event declares, with all its steps.
      mechanisms: what the step lines say was executed, in order, one entry for each change of sampling, noise or cap.
      also: what was released beside the steps: one entry for each histogram.
      events: the records that are neither start nor step.
      history: which steps were executed, and where.
    """

    declared: dict[str, Any]
    planned: Mechanism
    mechanisms: tuple[Mechanism, ...]
    also: tuple[Mechanism, ...]
    events: tuple[dict[str, Any], ...]
    history: History

    @property
    def version(self) -> int:
        """The ledger's format."""
        version: int = events.version_of(self.declared)
        return version

    @property
    def steps(self) -> int:
        """Executions of steps: the releases that are charged."""
        return sum(m.steps for m in self.mechanisms)

    @property
    def has_spent(self) -> bool:
        """Whether anything was released."""
        return bool(self.steps or self.also)

    @property
    def repeated_steps(self) -> int:
        """Those of the steps whose updates were lost, and which were executed again with other noise."""
        return self.history.repeated

    @property
    def updates(self) -> int:
        """Steps without the repeated ones: those that made the parameters."""
        return self.steps - self.repeated_steps

    @property
    def finished(self) -> bool:
        return any(event["kind"] == events.FINISH for event in self.events)

    @property
    def delta(self) -> float:
        return self.declared["delta"]

    @property
    def is_as_planned(self) -> bool:
        """Whether every step had the declared sampling, noise and cap, and none was beyond the plan."""
        return self.updates <= self.planned.steps and all(
            m == self.planned.replace(steps=m.steps) for m in self.mechanisms
        )

    @property
    def claims_privacy(self) -> bool:
        """Whether a guarantee is claimed: secret keys and a finite target. If not, every epsilon is infinite."""
        return self.has_secret_keys and math.isfinite(self.declared["epsilon"])

    @property
    def has_secret_keys(self) -> bool:
        """Whether sampling and noise came from the operating system's randomness, not from a seed that anyone
        may know."""
        return self.declared["secret_keys"]

    @property
    def has_float_release(self) -> bool:
        """Whether a guarantee is claimed for sums and noise of float32 numbers, by a run that could have had others."""
        m = self.planned
        return m.is_private and self.claims_privacy and "grid_bits" in self.declared and not m.noise.is_exact

    def accountant(self) -> Accountant:
        """Returns the accountant of all that was executed, with the planned mechanism if no step was."""
        return Accountant(self.mechanisms or (self.planned,), also=self.also, claimed=self.claims_privacy)

    @property
    def deviations(self) -> list[str]:
        """Returns what falls short of a sound private run, one sentence each; empty if nothing does."""
        m, found = self.planned, []
        if not m.is_private:
            found.append("non-private baseline: no noise is added and no guarantee holds")
        elif not self.claims_privacy:
            found.append("the target epsilon is infinite: noise is added, but no guarantee is claimed")
        elif self.delta > 1 / m.num_units:
            found.append(
                f"delta {self.delta:g} is above 1/N = {1 / m.num_units:.3g}: at such a delta a mechanism may publish"
                " some unit in the clear and still satisfy the definition; choose a delta well below 1/N"
            )
        if planted := self.declared.get("canaries", 0):
            found.append(
                f"this is a model for audits: {planted} canaries of the kind {self.declared.get('canary_kind')} were"
                " planted among the training units, each by a secret fair coin, and are among the units counted here;"
                " what the model writes is not what the data alone would give"
            )
        if self.has_float_release:
            found.append(
                "sums and noise are float32 numbers: the guarantee is proved for real ones, and the rounding of sums"
                " and the low bits of noise can reveal more than it says; train with an exact release"
            )
        if m.noise.is_exact and self.declared["trained_parameters"] > grid.MOST_COORDINATES:
            found.append(
                f"{self.declared['trained_parameters']} numbers are trained: the law of the noise is certified for"
                f" {grid.MOST_COORDINATES}"
            )
        if not self.has_secret_keys:
            found.append(
                "sampling and noise were made from a public seed: they hide nothing, and no guarantee can hold"
            )
        if not self.is_as_planned:
            found.append(
                "the executed steps differ from the declared mechanism; epsilon is derived from what was executed"
            )
        return found


def of(records: Sequence[dict[str, Any]]) -> Executed:
    """What a ledger's records say.

    Raises:
      InputError: they do not begin with a start event, or a record lacks or garbles a fact.
    """
    if not records or records[0].get("kind") != events.START:
        raise InputError("the ledger does not begin with a start event")
    declared = run_files.decode(records[0])
    version = events.version_of(declared)
    if version not in range(events.OLDEST_FORMAT, events.FORMAT + 1):
        raise InputError(
            f"the ledger has format {version}, and this program reads {events.OLDEST_FORMAT} to {events.FORMAT}: use"
            " the version of dpgemma that wrote it"
        )
    if garbled := events.unsound(events.START, declared, version):
        raise InputError(f"the ledger's start event has no sound {', '.join(garbled)}")
    if not (0 < declared["delta"] < 1 and declared["epsilon"] >= 0):
        raise InputError("the ledger's start event has no sound epsilon and delta")
    items, by_row = declared.get("items_per_unit", 1), declared.get("user_sampling") == "example"
    if items != (expected := declared.get("rows_per_unit") if by_row else 1):
        raise InputError(
            f"the ledger's start event contradicts itself: items_per_unit is {items}, and user_sampling and"
            f" rows_per_unit make it {expected}"
        )
    if (declared.get("shared_items") is not None) != (declared.get("ownership") == "public"):
        raise InputError("the ledger's start event contradicts itself: shared_items and ownership do not go together")
    try:
        planned = dp_sgd(**{name: declared[name] for name in FACTS if name in declared})
        steps = [record for record in records if record["kind"] == events.STEP]
        mechanisms = mechanisms_of(planned, steps)
        also = tuple(
            histogram(planned.num_units, record["noise"], planned.neighbouring_relation)
            for record in records
            if record["kind"] == events.HISTOGRAM
        )
        history = History.of(list(records))
    except (KeyError, TypeError, OverflowError) as error:
        raise InputError(f"a ledger record lacks or garbles a fact ({error})") from None
    others = tuple(record for record in records[1:] if record["kind"] != events.STEP)
    return Executed(declared, planned, mechanisms, also, others, history)


def mechanisms_of(planned: Mechanism, steps: Sequence[dict[str, Any]]) -> tuple[Mechanism, ...]:
    """What step records say was executed, one entry for each change of sampling, noise or cap."""
    groups = [tuple(record[name] for name in GROUP) for record in steps]
    return tuple(_mechanism(planned, group, len(list(run))) for group, run in itertools.groupby(groups))


def _mechanism(planned: Mechanism, group: tuple[Any, ...], steps: int) -> Mechanism:
    probability, noise, cap = group
    # The declared batch is kept where it gives the recorded probability: dividing back would round.
    same = probability == planned.sampling_probability
    batch = planned.expected_batch_size if same else probability * planned.num_items
    return planned.replace(expected_batch_size=batch, noise_multiplier=noise, max_batch_size=cap, steps=steps)
