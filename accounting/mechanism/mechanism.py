"""The public facts of a DP-SGD run. Trainer, accountant, ledger and report are all built from this one object."""

import dataclasses
from typing import Any

from accounting.errors import InputError
from accounting.mechanism.clip import CLIP, Clip
from accounting.mechanism.noise import Gaussian
from accounting.mechanism.sampling import ADD_OR_REMOVE, MOST_STEPS, POISSON, RELATIONS, Sampling, sampling_of

# Names of the facts in a ledger's start event, as `dp_sgd` takes them.
FACTS = (
    "num_units", "expected_batch_size", "max_batch_size", "noise_multiplier", "clip_norm", "steps",
    "neighbouring_relation", "sampler", "clip_scaling", "clip_quantile", "grid_bits", "items_per_unit",
    "shared_items",
)  # fmt: skip
# What one step releases, as its line in the ledger records it.
GROUP = ("sampling_probability", "noise_multiplier", "max_batch_size")


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """`steps` releases of a sampled sum of bounded gradients plus noise, divided by a public constant.

    >>> from accounting.mechanism.sampling import Poisson
    >>> Mechanism(Poisson(60_000, 256), Gaussian(1.1), Clip(1.0), steps=1000).noise_batch_ratio
    0.004296875

    Attributes:
      sampling: how batches are formed; knows the number of units and the expected batch size.
      noise: what is added to each sum, in units of its sensitivity.
      clip: the bound on one unit's contribution.
      steps: T, number of releases.
      neighbouring_relation: one of RELATIONS.
    """

    sampling: Sampling
    noise: Gaussian
    clip: Clip
    steps: int
    neighbouring_relation: str = ADD_OR_REMOVE

    def __post_init__(self) -> None:
        if self.neighbouring_relation not in RELATIONS:
            raise InputError(
                f"neighbouring relation must be one of {', '.join(RELATIONS)}, got {self.neighbouring_relation!r}"
            )
        if not 0 <= self.steps <= MOST_STEPS:
            raise InputError(
                f"the number of steps must not be negative, and at most {MOST_STEPS:.0e}, got {self.steps}"
            )
        if self.noise_multiplier > 0 and not self.clip.is_bounded:
            raise InputError(
                "an infinite clip norm has no finite noise: give a finite `clip_norm`, or `epsilon`=inf for no privacy"
            )

    # The facts by the names that reports, formulas and ledgers use.

    @property
    def num_units(self) -> int:
        """N."""
        return self.sampling.num_units

    @property
    def expected_batch_size(self) -> float:
        """B, in items; the public divisor of the noised sum."""
        return self.sampling.expected_batch_size

    @property
    def items_per_unit(self) -> int:
        """k, items of a unit that are drawn by themselves; 1 where units are drawn."""
        return self.sampling.items_per_unit

    @property
    def num_items(self) -> int:
        """What batches are drawn from: N k items, or those that units share."""
        return self.sampling.num_items

    @property
    def max_batch_size(self) -> int | None:
        """Truncation cap of a batch, or None."""
        return self.sampling.max_batch_size

    @property
    def sampling_probability(self) -> float:
        """q = B / num_items."""
        return self.sampling.sampling_probability

    @property
    def scheme(self) -> str:
        """How batches are formed, as reports call it."""
        return self.sampling.scheme

    @property
    def noise_multiplier(self) -> float:
        """sigma of the whole step, in units of the sensitivity; what the accountant charges."""
        return self.noise.multiplier

    @property
    def clip_norm(self) -> float:
        """C; where it adapts, the first."""
        return self.clip.norm

    @property
    def noise_batch_ratio(self) -> float:
        """sigma / B: the noise on the mean gradient in units of the clip norm (arXiv 2501.18914)."""
        return self.noise_multiplier / self.expected_batch_size

    @property
    def gradient_noise_multiplier(self) -> float:
        """Noise multiplier of the gradients: above `noise_multiplier` if the clip norm adapts, else equal to it.

        Raises:
          InputError: the count of clipped units leaves nothing for the gradients.
        """
        return self.clip.gradient_noise_multiplier(self.noise_multiplier, self.expected_batch_size)

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on the count of clipped units, in units; 0 where none are counted."""
        return self.clip.count_noise(self.noise_multiplier, self.expected_batch_size)

    @property
    def is_private(self) -> bool:
        return self.noise_multiplier > 0 and self.clip.is_bounded

    @property
    def group(self) -> dict[str, Any]:
        """What one step releases, as its line in the ledger records it."""
        return {name: getattr(self, name) for name in GROUP}

    def facts(self) -> dict[str, Any]:
        """All facts by name, as a ledger's start event records them; `dp_sgd(**facts)` is the inverse."""
        return {
            "num_units": self.num_units,
            "expected_batch_size": self.expected_batch_size,
            "max_batch_size": self.max_batch_size,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "steps": self.steps,
            "neighbouring_relation": self.neighbouring_relation,
            "sampler": self.sampling.name,
            "clip_scaling": self.clip.scaling,
            "clip_quantile": self.clip.quantile,
            "grid_bits": self.noise.grid_bits,
            "items_per_unit": self.items_per_unit,
            "shared_items": self.sampling.shared_items,
        }

    def replace(self, **changes: Any) -> "Mechanism":
        """The mechanism with other facts, by the names of `facts`."""
        return dp_sgd(**{**self.facts(), **changes})

    def event(self, releases: int) -> Any:
        """The dp-accounting event of so many releases without truncation, whose cost the accountant adds to delta."""
        import dp_accounting

        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        release = dp_accounting.PoissonSampledDpEvent(self.sampling.inclusion_probability, gaussian)
        return dp_accounting.SelfComposedDpEvent(release, releases)


def dp_sgd(
    num_units: int,
    expected_batch_size: float,
    max_batch_size: int | None,
    noise_multiplier: float,
    clip_norm: float,
    steps: int,
    neighbouring_relation: str = ADD_OR_REMOVE,
    sampler: str = POISSON,
    clip_scaling: str = CLIP,
    clip_quantile: float | None = None,
    grid_bits: int | None = None,
    items_per_unit: int = 1,
    shared_items: int | None = None,
) -> Mechanism:
    """The mechanism with these facts, by the names under which a ledger records them.

    >>> dp_sgd(60_000, 256, None, noise_multiplier=1.1, clip_norm=1.0, steps=1000).sampling
    Poisson(num_units=60000, expected_batch_size=256, items_per_unit=1, shared_items=None)

    Args:
      max_batch_size: truncation cap, or None for plain Poisson sampling.
      grid_bits: fineness of an exact release (accounting.mechanism.grid); None for sums and noise of floats.
      items_per_unit: k, items of a unit that are drawn by themselves, as in example-level sampling of users' rows.
      shared_items: number of items where one may be that of several units.

    Raises:
      InputError: facts out of range, or that do not go together.
    """
    return Mechanism(
        sampling=sampling_of(sampler, num_units, expected_batch_size, max_batch_size, items_per_unit, shared_items),
        noise=Gaussian(noise_multiplier, grid_bits),
        clip=Clip(clip_norm, clip_scaling, clip_quantile),
        steps=steps,
        neighbouring_relation=neighbouring_relation,
    )
