"""What the rest of a sweep costs on machines that are not at hand: chip-hours and money, by the rule 6 M B S T and a
share of the chips' peak that is assumed.
"""

import dataclasses
from collections.abc import Sequence

from experiments.hardware.machines import Topology
from experiments.sweep.checks import operations
from experiments.sweep.grid import Grid, Run


@dataclasses.dataclass(frozen=True)
class Price:
    """What the rest of a sweep costs on a machine.

    Attributes:
      runs: of the grid.
      pending: those that are left.
      flops: of those, 6 M B S T each.
      flops_by_model: of those, by the model's name.
      machine: as --chips says it.
      chips: that it has.
      mfu: share of their peak that is assumed.
      chip_hours: of all runs.
      hours: where all chips are always busy.
      dollars: None where no price of a chip-hour is given.
    """

    runs: int
    pending: int
    flops: float
    flops_by_model: dict[str, float]
    machine: str
    chips: int
    mfu: float
    chip_hours: float
    hours: float
    dollars: float | None

    def text(self) -> str:
        lines = [
            f"{self.pending} of {self.runs} runs are left: {self.flops:.4g} floating-point operations (6 M B S T)",
            *(f"  {model}: {flops:.3g}" for model, flops in self.flops_by_model.items()),
            f"{self.chip_hours:.4g} chip-hours of {self.machine}, or {self.hours:.4g} hours of its {self.chips} chips,"
            f" if they are always busy and reach {self.mfu:.0%} of their peak (--mfu), which nobody has measured",
        ]
        if self.dollars is not None:
            lines.append(f"{self.dollars:,.0f} dollars, at the price that was given (--dollars_per_chip_hour)")
        return "\n".join(lines)


def of_pending(
    grid: Grid, pending: Sequence[Run], machine: str, topology: Topology, mfu: float, dollars: float | None
) -> Price:
    """The price of the runs that are left.

    Args:
      machine: `topology` as the user wrote it.
      dollars: of one chip-hour.
    """
    by_model: dict[str, float] = {}
    for run in pending:
        by_model[run.config.model] = by_model.get(run.config.model, 0.0) + operations(run)
    flops = float(sum(by_model.values()))
    chip_hours = flops / (topology.chip.flops * mfu) / 3600
    return Price(
        runs=len(grid.runs), pending=len(pending), flops=flops, flops_by_model=by_model, machine=machine,
        chips=topology.chips, mfu=mfu, chip_hours=chip_hours, hours=chip_hours / topology.chips,
        dollars=None if dollars is None else chip_hours * dollars,
    )  # fmt: skip
