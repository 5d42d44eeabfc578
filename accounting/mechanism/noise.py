"""The noise that is added to a sum: public facts only. The generators are in `dpgemma.privacy.noisers`."""

import dataclasses
import math

from accounting.errors import InputError
from accounting.mechanism import grid

# Less hides nothing, and more leaves nothing to learn.
SMALLEST_NOISE, LARGEST_NOISE = 1e-3, 1e8


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian noise in every coordinate and every step.

    Attributes:
      multiplier: sigma, the standard deviation in units of the sensitivity; 0 means no privacy.
      grid_bits: of an exact release, whose sums and noise are whole numbers of steps: the standard deviation of the
        noise is 2^grid_bits steps. None where sums and noise are floats.
    """

    multiplier: float
    grid_bits: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.multiplier < math.inf:
            raise InputError(f"noise multiplier must be finite and not negative, got {self.multiplier}")
        if self.multiplier and not SMALLEST_NOISE <= self.multiplier <= LARGEST_NOISE:
            raise InputError(
                f"a noise multiplier must be 0 or lie between {SMALLEST_NOISE:g} and {LARGEST_NOISE:g}, got"
                f" {self.multiplier:g}: less hides nothing, and more leaves nothing to learn"
            )
        if self.grid_bits is not None and not 1 <= self.grid_bits <= grid.LAW_BITS:
            raise InputError(f"`grid_bits` must lie between 1 and {grid.LAW_BITS}, got {self.grid_bits}")

    @property
    def is_exact(self) -> bool:
        """Whether sums and noise are whole numbers, which no rounding can tell apart."""
        return self.grid_bits is not None and self.multiplier > 0

    def tail_delta(self, releases: int, epsilon: float) -> float:
        """What the ends of the noise's law add to delta; nothing where noise is taken to be exactly Gaussian."""
        return grid.tail_delta(releases, epsilon) if self.is_exact else 0.0
