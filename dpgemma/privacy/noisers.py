"""The generators of noise, one for every class of accounting.mechanism.noise: a closed registry.

There is no hook for another generator: noise that the accountant does not know would be no guarantee.
"""

import dataclasses
from typing import Any, Protocol

import jax

from accounting.mechanism import Gaussian, Mechanism, grid
from dpgemma.privacy.clipping import ClippedSum
from dpgemma.privacy.integer_noise import InShards
from dpgemma.privacy.noise import NoisedSum, add_gaussian_noise, release_on_grid

State = Any


class Noiser(Protocol):
    """Adds noise to the sums of a run, one after the other.

    Attributes:
      multiplier: standard deviation of the noise on the gradients, in units of the sensitivity.
    """

    @property
    def multiplier(self) -> float: ...

    def steps(self, multiplier: Any) -> Any:
        """The sensitivity in steps of the grid on which `clipped_sum` shall add; None for float32 sums."""
        ...

    def init(self, params: Any) -> State:
        """The state before the first step, a tree of arrays; () where steps have independent noise."""
        ...

    def add(
        self, clipped: ClippedSum, state: State, key_data: Any, multiplier: Any, in_shards: InShards | None = None
    ) -> tuple[NoisedSum, State]:
        """The noised sum of one step and the next state.

        Args:
          key_data: of noise.noise_keys, for this step.
          multiplier: that of this noiser; traced, so that runs which differ in noise alone share one program.
          in_shards: how the sum is spread over devices; the result does not depend on it.
        """
        ...


@dataclasses.dataclass(frozen=True)
class GaussianNoiser:
    """Independent Gaussian noise in every step.

    Attributes:
      multiplier: standard deviation of the noise on the gradients, in units of the sensitivity.
      count_noise: standard deviation of the noise on the count of clipped units; None where none are counted.
      grid_bits: of an exact release; None where sums and noise are floats.
    """

    multiplier: float
    count_noise: float | None = None
    grid_bits: int | None = None

    def steps(self, multiplier: Any) -> Any:
        return None if self.grid_bits is None else grid.sensitivity_steps(self.grid_bits, multiplier)

    def init(self, params: Any) -> State:
        return ()

    def add(
        self, clipped: ClippedSum, state: State, key_data: Any, multiplier: Any, in_shards: InShards | None = None
    ) -> tuple[NoisedSum, State]:
        if self.grid_bits is not None:
            steps = self.steps(multiplier)
            known = not any(isinstance(x, jax.core.Tracer) for x in (clipped.steps, steps))
            if known and clipped.steps is not None and clipped.steps != steps:
                raise ValueError(
                    f"the sum has {clipped.steps} steps to its sensitivity and the noise is made for {steps}: give"
                    " clipped_sum the `steps` of this noiser"
                )
            return release_on_grid(clipped, self.grid_bits, key_data, self.count_noise, in_shards), state
        noise_multiplier = multiplier if self.multiplier > 0 else 0.0
        return add_gaussian_noise(clipped, noise_multiplier, key_data, self.count_noise), state


def noiser_of(mechanism: Mechanism) -> Noiser:
    """The generator of a mechanism's noise.

    >>> from accounting.mechanism import dp_sgd
    >>> noiser_of(dp_sgd(1000, 10, None, noise_multiplier=1.1, clip_norm=1.0, steps=5))
    GaussianNoiser(multiplier=1.1, count_noise=None, grid_bits=None)

    Raises:
      TypeError: noise that has no generator.
      InputError: the count of clipped units leaves no noise for the gradients.
    """
    if type(mechanism.noise) is Gaussian:
        count_noise = mechanism.count_noise if mechanism.clip.adapts else None
        bits = mechanism.noise.grid_bits if mechanism.noise.is_exact else None
        return GaussianNoiser(mechanism.gradient_noise_multiplier, count_noise, bits)
    raise TypeError(f"noise of type {type(mechanism.noise).__name__} has no generator")
