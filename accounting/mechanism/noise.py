"""The noise that is added to a sum: public facts only. The generators are in `dpgemma.privacy.noisers`."""

import dataclasses
import math

from accounting.errors import InputError

# Less hides nothing, and more leaves nothing to learn.
SMALLEST_NOISE, LARGEST_NOISE = 1e-3, 1e8


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Independent Gaussian noise in every coordinate and every step.

    Attributes:
      multiplier: sigma, the standard deviation in units of the sensitivity; 0 means no privacy.
    """

    multiplier: float

    def __post_init__(self) -> None:
        if not 0 <= self.multiplier < math.inf:
            raise InputError(f"noise multiplier must be finite and not negative, got {self.multiplier}")
        if self.multiplier and not SMALLEST_NOISE <= self.multiplier <= LARGEST_NOISE:
            raise InputError(
                f"a noise multiplier must be 0 or lie between {SMALLEST_NOISE:g} and {LARGEST_NOISE:g}, got"
                f" {self.multiplier:g}: less hides nothing, and more leaves nothing to learn"
            )
