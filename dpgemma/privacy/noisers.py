"""The generators of noise, one for every class of accounting.mechanism.noise: a closed registry.

There is no hook for another generator: noise that the accountant does not know would be no guarantee.
"""

import dataclasses
from typing import Any, Protocol

from accounting.mechanism import Gaussian, Mechanism
from dpgemma.privacy.clipping import ClippedSum
from dpgemma.privacy.noise import NoisedSum, add_gaussian_noise

State = Any


class Noiser(Protocol):
    """Adds noise to the sums of a run, one after the other.

    Attributes:
      multiplier: standard deviation of the noise on the gradients, in units of the sensitivity.
    """

    @property
    def multiplier(self) -> float: ...

    def init(self, params: Any) -> State:
        """The state before the first step, a tree of arrays; () where steps have independent noise."""
        ...

    def add(self, clipped: ClippedSum, state: State, key_data: Any, multiplier: Any) -> tuple[NoisedSum, State]:
        """The noised sum of one step and the next state.

        Args:
          key_data: of noise.noise_keys, for this step.
          multiplier: that of this noiser; traced, so that runs which differ in noise alone share one program.
        """
        ...


@dataclasses.dataclass(frozen=True)
class GaussianNoiser:
    """Independent Gaussian noise in every step.

    Attributes:
      multiplier: standard deviation of the noise on the gradients, in units of the sensitivity.
      count_noise: standard deviation of the noise on the count of clipped units; None where none are counted.
    """

    multiplier: float
    count_noise: float | None = None

    def init(self, params: Any) -> State:
        return ()

    def add(self, clipped: ClippedSum, state: State, key_data: Any, multiplier: Any) -> tuple[NoisedSum, State]:
        noise_multiplier = multiplier if self.multiplier > 0 else 0.0
        return add_gaussian_noise(clipped, noise_multiplier, key_data, self.count_noise), state


def noiser_of(mechanism: Mechanism) -> Noiser:
    """The generator of a mechanism's noise.

    >>> from accounting.mechanism import dp_sgd
    >>> noiser_of(dp_sgd(1000, 10, None, noise_multiplier=1.1, clip_norm=1.0, steps=5))
    GaussianNoiser(multiplier=1.1, count_noise=None)

    Raises:
      TypeError: noise that has no generator.
      InputError: the count of clipped units leaves no noise for the gradients.
    """
    if type(mechanism.noise) is Gaussian:
        count_noise = mechanism.count_noise if mechanism.clip.adapts else None
        return GaussianNoiser(mechanism.gradient_noise_multiplier, count_noise)
    raise TypeError(f"noise of type {type(mechanism.noise).__name__} has no generator")
