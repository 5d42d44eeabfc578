"""Which steps a ledger says were executed, and in which places: what makes an execution of a step a release of its own.

A place is the environment of a process: versions, code, flags and processor. Where sums have no fixed order, each
continuation is a place of its own. The lineage of a step lists the places in which this step and all steps before it
were executed. Equal lineages give equal bits, so a step that is executed again under an equal lineage releases nothing
new, and has no second line. Under another lineage it has other batches and other noise, is another release, and has a
line of its own, which is charged. Copies of a run that went on in different places share the steps whose lineages are
equal, and no others.
"""

from typing import Any

from accounting.ledger import events

# (first step, place), for each change of place; steps in order.
Lineage = tuple[tuple[int, str], ...]


class History:
    """The executions of one ledger, in order; fed with its records, one by one.

    Ledgers from before places had a meaning are taken for runs in one place.

    >>> history = History()
    >>> history.add({"kind": "start", "format": 4, "environment": "laptop"})
    >>> for step in range(3):
    ...     history.add({"kind": "step", "step": step})
    >>> history.add({"kind": "resume", "step": 1, "environment": "server"})
    >>> history.updates, len(history.executions), history.lineage
    (1, 3, ((0, 'laptop'), (1, 'server')))

    Attributes:
      lineage: of the next step.
      executions: the record of every step that was executed, by step and lineage.
    """

    def __init__(self) -> None:
        self.lineage: Lineage = ()
        self.executions: dict[tuple[int, Lineage], dict[str, Any]] = {}
        self._has_places = False
        self._resumed = 0
        self._states: dict[tuple[int, Lineage], str] = {}

    @classmethod
    def of(cls, records: list[dict[str, Any]]) -> "History":
        """The history of a whole ledger."""
        history = cls()
        for record in records:
            history.add(record)
        return history

    @property
    def updates(self) -> int:
        """Steps that are recorded under the present lineage, from the first without a gap: 0 .. updates - 1."""
        step = self._resumed
        while (step, self.lineage) in self.executions:
            step += 1
        self._resumed = step
        return step

    @property
    def repeated(self) -> int:
        """Executions that do not belong to the present lineage: their updates were lost, and they are charged."""
        return len(self.executions) - self.updates

    def add(self, record: dict[str, Any]) -> None:
        """Takes the next record of the ledger."""
        kind = record["kind"]
        if kind == events.START:
            self._has_places = events.version_of(record) >= events.PLACES
            self._enter(0, record)
        elif kind == events.RESUME:
            self._enter(record["step"], record)
        elif kind == events.STEP:
            self.executions.setdefault((record["step"], self.lineage), record)
        elif kind == events.CHECKPOINT and "state_sha256" in record:
            self._states.setdefault((record["step"], _before(record["step"], self.lineage)), record["state_sha256"])

    def state_at(self, step: int) -> str | None:
        """SHA-256 of the state that the first checkpoint after `step` steps of the present lineage recorded, if any."""
        return self._states.get((step, _before(step, self.lineage)))

    def way_to(self, step: int) -> Lineage:
        """The lineage of the steps before a step."""
        return _before(step, self.lineage)

    def executed(self, step: int) -> dict[str, Any] | None:
        """The record of a step under the present lineage, or None."""
        return self.executions.get((step, self.lineage))

    def with_resume(self, record: dict[str, Any]) -> "History":
        """What the history would be after a resume event."""
        after = History()
        after.lineage, after.executions, after._has_places = self.lineage, self.executions, self._has_places
        after._states = self._states
        after.add(record)
        return after

    def _enter(self, step: int, record: dict[str, Any]) -> None:
        lineage = _before(step, self.lineage)
        place = place_of(record) if self._has_places else ""
        if not lineage or lineage[-1][1] != place:
            lineage = (*lineage, (step, place))
        self.lineage, self._resumed = lineage, step


def place_of(record: dict[str, Any]) -> str:
    """The place that a start or resume event names."""
    continuation = record.get("continuation")
    return str(record.get("environment")) + ("" if continuation is None else f"; continuation {continuation}")


def _before(step: int, lineage: Lineage) -> Lineage:
    """The lineage of the steps before a step."""
    return tuple(entry for entry in lineage if entry[0] < step)
