"""Which numbers of units and epsilons the figures show: those of arXiv 2501.18914, or what suits laws of small
models."""

import dataclasses

from experiments.laws.law import Law

# A law whose largest model is below this cannot answer for the paper's data sets: its models are full long before.
_SMALL = 3e6


@dataclasses.dataclass(frozen=True)
class Scale:
    """Which units and epsilons the figures show.

    Attributes:
      num_units: N of the lines of figure 3a and b, and of the second row of figure 6.
      table_units: N of table 2.
      epsilons: of figure 1, table 2 and the first row of figure 6.
      loss_epsilons: of figures 3a and 3b.
      ratio_epsilons: of figure 3c.
      swept_epsilons: the axis of figure 5.
    """

    num_units: tuple[float, ...]
    table_units: tuple[float, ...]
    epsilons: tuple[float, ...]
    loss_epsilons: tuple[float, float]
    ratio_epsilons: tuple[float, ...]
    swept_epsilons: tuple[float, ...]


PAPER = Scale(
    num_units=(1e6, 1e7, 1e8, 1e9),
    table_units=(1e5, 1e6, 1e7, 1e8, 1e9),
    epsilons=(1.0, 4.0, 16.0, 64.0),
    loss_epsilons=(1.0, 8.0),
    ratio_epsilons=tuple(10.0**k for k in range(7)),
    swept_epsilons=tuple(2.0**k for k in range(14)),
)
# Few different epsilons: each needs the noise of thousands of configurations.
SMALL = Scale(
    num_units=(1e4, 1e5, 1e6),
    table_units=(1e4, 1e5, 1e6),
    epsilons=(1.0, 4.0, 16.0, 64.0),
    loss_epsilons=(1.0, 16.0),
    ratio_epsilons=(1.0, 4.0, 16.0, 64.0),
    swept_epsilons=tuple(2.0**k for k in range(7)),
)


def of_law(law: Law) -> Scale:
    return SMALL if law.domain.parameters[1] < _SMALL else PAPER
