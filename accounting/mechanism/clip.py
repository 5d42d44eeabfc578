"""How one unit's gradient is bounded: public facts only. `dpgemma.privacy.clipping` does it."""

import dataclasses
import math

from accounting.errors import InputError

CLIP = "clip"  # g min(1, C / |g|): norm at most C
NORMALISE = "normalise"  # g min(1, C / |g|) / C: norm at most 1
AUTOMATIC = "automatic"  # g / (|g| + gamma): norm below 1, whatever it was (arXiv 2206.07136)
SCALINGS = (CLIP, NORMALISE, AUTOMATIC)

# One unit moves a count of +1/2 or -1/2 by at most this when it goes, or when an empty unit takes its place.
COUNT_SENSITIVITY = 0.5
# Noise on the count as a share of the batch, and the step of C on a logarithmic scale: the published choices of Andrew
# et al. 2021 (arXiv 1905.03871, sections 2.1 and 3.2).
COUNT_NOISE = 1 / 20
LEARNING_RATE = 0.2


@dataclasses.dataclass(frozen=True)
class Clip:
    """The bound on one unit's contribution to a sum.

    >>> Clip(0.5).sensitivity, Clip(0.5, "normalise").sensitivity
    (0.5, 1.0)

    Attributes:
      norm: C, L2 bound of one unit's gradient; inf means no privacy. Where a quantile is followed, the first C.
      scaling: one of SCALINGS.
      quantile: share of the units whose norm shall be at most C, which C then follows; None where C stays.
    """

    norm: float
    scaling: str = CLIP
    quantile: float | None = None

    def __post_init__(self) -> None:
        if not self.norm > 0:
            raise InputError(f"clip norm must be positive, got {self.norm}")
        if self.scaling not in SCALINGS:
            raise InputError(f"`clip_scaling` must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")
        if self.quantile is not None and not 0 < self.quantile < 1:
            raise InputError(f"`clip_quantile` must lie between 0 and 1, got {self.quantile:g}")
        if self.quantile is not None and self.scaling == AUTOMATIC:
            raise InputError("automatic clipping has no clip norm that could adapt: drop `clip_quantile`")

    @property
    def adapts(self) -> bool:
        """Whether C follows a quantile; the units with a norm of at most C are then counted, under noise."""
        return self.quantile is not None

    @property
    def kind(self) -> str:
        """The scaling of what is summed. A C that moves divides the gradients, so that their sensitivity stays 1."""
        return NORMALISE if self.adapts else self.scaling

    @property
    def sensitivity(self) -> float:
        """The most that one unit changes the sum, in L2."""
        return self.norm if self.kind == CLIP else 1.0

    def count_noise(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """Standard deviation of the noise on the count, in units; none where nothing is noised or counted."""
        return expected_batch_size * COUNT_NOISE if self.adapts and noise_multiplier > 0 else 0.0

    def gradient_noise_multiplier(self, noise_multiplier: float, expected_batch_size: float) -> float:
        """Noise on the gradients, so that gradients and count together cost what `noise_multiplier` alone would.

        With sigma_b the count's noise: (sigma^-2 - (2 sigma_b)^-2)^(-1/2) (Andrew et al. 2021, theorem 1).

        Raises:
          InputError: the noise leaves nothing for the gradients.
        """
        count_noise = self.count_noise(noise_multiplier, expected_batch_size)
        if count_noise == 0:
            return noise_multiplier
        if noise_multiplier * COUNT_SENSITIVITY >= count_noise:
            raise InputError(
                f"`clip_quantile` cannot be followed: a noise multiplier of {noise_multiplier:g} leaves nothing for the"
                f" gradients at batch {expected_batch_size:g}: the count's noise of {count_noise:g} units must exceed"
                " half of it; raise `batch_size`, or drop it"
            )
        return float((noise_multiplier**-2 - (COUNT_SENSITIVITY / count_noise) ** 2) ** -0.5)

    @property
    def is_bounded(self) -> bool:
        return math.isfinite(self.norm)
