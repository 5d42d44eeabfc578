"""The public facts of a DP-SGD run. Trainer, accountant, ledger and report are all built from this one object."""

import dataclasses
import math

from accounting.errors import InputError

ZERO_OUT = "zero_out"
ADD_OR_REMOVE = "add_or_remove"
RELATIONS = (ZERO_OUT, ADD_OR_REMOVE)

POISSON = "poisson"
FIXED = "fixed"
SAMPLERS = (POISSON, FIXED)

# What floating point can still account for.
SMALLEST_NOISE, LARGEST_NOISE, MOST_UNITS, MOST_STEPS = 1e-3, 1e8, 10**16, 10**12


@dataclasses.dataclass(frozen=True)
class DpSgdMechanism:
    """`steps` releases of a Poisson-sampled sum of clipped gradients plus Gaussian noise, divided by a public constant.

    Attributes:
      num_units: N, privacy units that can be drawn. Public: under zero_out because neighbours have the same N, under
        add_or_remove because the user declares it.
      expected_batch_size: B = q N, in units; also the divisor of the noised sum.
      max_batch_size: truncation cap (a uniformly random subset of an overfull batch is kept), or None for plain
        Poisson.
      noise_multiplier: sigma, standard deviation of the noise in units of the clip norm; 0 means no privacy.
      clip_norm: C, L2 bound of one unit's contribution; inf means no privacy.
      steps: T, number of releases.
      neighbouring_relation: zero_out (one unit replaced by an empty one, which keeps its place in every draw) or
        add_or_remove.
      sampler: poisson, or fixed: batches laid out beforehand, each unit in at most ceil(T B / N) of them, and no help
        from sampling.
    """

    num_units: int
    expected_batch_size: float
    max_batch_size: int | None
    noise_multiplier: float
    clip_norm: float
    steps: int
    neighbouring_relation: str = ADD_OR_REMOVE
    sampler: str = POISSON

    def __post_init__(self):
        if self.neighbouring_relation not in RELATIONS:
            raise InputError(
                f"neighbouring relation must be one of {', '.join(RELATIONS)}, got {self.neighbouring_relation!r}"
            )
        if self.sampler not in SAMPLERS:
            raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}")
        if self.num_units < 1 or self.steps < 0:
            raise InputError(
                f"need at least one unit and no negative steps, got {self.num_units} units, {self.steps} steps"
            )
        if self.num_units > MOST_UNITS or self.steps > MOST_STEPS:
            raise InputError(f"there may be at most {MOST_UNITS:.0e} units and {MOST_STEPS:.0e} steps")
        if not 0 < self.expected_batch_size <= self.num_units:
            raise InputError(
                f"expected batch size {self.expected_batch_size:g} must be above 0 and at most the {self.num_units}"
                " privacy units:"
                " lower the batch size or use more data"
            )
        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise InputError(f"maximum batch size must be at least 1, got {self.max_batch_size}")
        if not 0 <= self.noise_multiplier < math.inf:
            raise InputError(f"noise multiplier must be finite and not negative, got {self.noise_multiplier}")
        if self.noise_multiplier and not SMALLEST_NOISE <= self.noise_multiplier <= LARGEST_NOISE:
            raise InputError(
                f"a noise multiplier must be 0 or lie between {SMALLEST_NOISE:g} and {LARGEST_NOISE:g}, got"
                f" {self.noise_multiplier:g}: less"
                " hides nothing, and more leaves nothing to learn"
            )
        if not self.clip_norm > 0:
            raise InputError(f"clip norm must be positive, got {self.clip_norm}")
        if self.noise_multiplier > 0 and math.isinf(self.clip_norm):
            raise InputError(
                "an infinite clip norm has no finite noise: give a finite --clip_norm, or --epsilon=inf for no privacy"
            )

    @property
    def sampling_probability(self) -> float:
        """q = B / N."""
        return self.expected_batch_size / self.num_units

    @property
    def noise_batch_ratio(self) -> float:
        """sigma / B: the noise on the mean gradient in units of the clip norm, which scaling laws for private training
        are written in.
        """
        return self.noise_multiplier / self.expected_batch_size

    @property
    def is_private(self) -> bool:
        return self.noise_multiplier > 0 and math.isfinite(self.clip_norm)

    @property
    def scheme(self) -> str:
        """How batches are formed, as accounting.support names it."""
        if self.sampler == FIXED:
            return "fixed"
        if self.max_batch_size is not None:
            return "truncated_poisson"
        return "full_batch" if self.sampling_probability == 1 else "poisson"

    @property
    def inclusion_probability(self) -> float:
        """Probability that a unit takes part in a release that can contain it."""
        return 1.0 if self.sampler == FIXED else self.sampling_probability

    def releases(self, steps: int) -> int:
        """In how many of `steps` steps one unit can take part."""
        return min(steps, math.ceil(steps * self.sampling_probability)) if self.sampler == FIXED else steps

    @property
    def group(self) -> dict:
        """What one step releases, as the ledger records it."""
        return {
            "sampling_probability": self.sampling_probability,
            "noise_multiplier": self.noise_multiplier,
            "max_batch_size": self.max_batch_size,
        }

    def event(self, releases: int):
        """The dp-accounting event of `releases` releases without truncation, whose cost the accountant adds to
        delta."""
        import dp_accounting

        release = dp_accounting.PoissonSampledDpEvent(
            self.inclusion_probability, dp_accounting.GaussianDpEvent(self.noise_multiplier)
        )
        return dp_accounting.SelfComposedDpEvent(release, releases)
