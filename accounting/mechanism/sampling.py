"""How the batches of a run are formed: public facts only. The generators are in `dpgemma.privacy.samplers`."""

import dataclasses
import math
from typing import Any, ClassVar

from accounting.errors import InputError
from accounting.mechanism.bounds import ADDITIVE, DISPLACEMENT, LOSS, RENYI, TRUNCATED_LOSS

ZERO_OUT = "zero_out"  # one unit replaced by an empty one, which keeps its place in every draw
ADD_OR_REMOVE = "add_or_remove"  # one unit present or absent
RELATIONS = (ZERO_OUT, ADD_OR_REMOVE)

POISSON = "poisson"
FIXED = "fixed"

# What floating point can still account for.
MOST_UNITS, MOST_STEPS = 10**16, 10**12
# Of one unit; the accountant takes fewer.
MOST_ITEMS = 10**6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What every way of forming batches has.

    Attributes:
      num_units: N, privacy units. Public: under zero_out because neighbours have the same N, under add_or_remove
        because the user declares it.
      expected_batch_size: B, in items; also the divisor of the noised sum.
      items_per_unit: k, items of every unit that are drawn independently of each other; 1 where units are drawn. It
        counts empty ones, so that how many of its k items a unit fills is not public.
      shared_items: where one item may be that of several units, so that it is public which items a unit has: their
        number. None where every unit has k items of its own.
    """

    num_units: int
    expected_batch_size: float
    items_per_unit: int = dataclasses.field(default=1, kw_only=True)
    shared_items: int | None = dataclasses.field(default=None, kw_only=True)

    name: ClassVar[str]

    def __post_init__(self) -> None:
        if not 1 <= self.num_units <= MOST_UNITS:
            raise InputError(
                f"the number of units must be at least 1 and at most {MOST_UNITS:.0e}, got {self.num_units}"
            )
        if not 1 <= self.items_per_unit <= MOST_ITEMS:
            raise InputError(
                f"the items of a unit must be at least 1 and at most {MOST_ITEMS}, got {self.items_per_unit}"
            )
        if self.shared_items is not None and not 1 <= self.shared_items <= self.num_units * self.items_per_unit:
            raise InputError(
                f"{self.num_units} units with at most {self.items_per_unit} items each cannot share"
                f" {self.shared_items} items"
            )
        if not 0 < self.expected_batch_size <= self.num_items:
            raise InputError(
                f"expected batch size {self.expected_batch_size:g} must be above 0 and at most the {self.num_items}"
                f" {'privacy units' if self.items_per_unit == 1 else 'rows of all units'}: lower the batch size or use"
                " more data"
            )

    @property
    def num_items(self) -> int:
        """N k, or the number of shared items: what batches are drawn from."""
        return self.num_units * self.items_per_unit if self.shared_items is None else self.shared_items

    @property
    def sampling_probability(self) -> float:
        """q = B / num_items."""
        return self.expected_batch_size / self.num_items

    @property
    def max_batch_size(self) -> int | None:
        """The truncation cap, or None."""
        return None

    @property
    def scheme(self) -> str:
        """The name by which reports and refusals call it."""
        return self.name

    @property
    def inclusion_probability(self) -> float:
        """Probability that an item takes part in a release that can contain it."""
        return self.sampling_probability

    def releases(self, steps: int) -> int:
        """In how many of `steps` steps one item can take part."""
        return steps

    def bounds(self, relation: str) -> tuple[str, ...]:
        """The bounds of epsilon that are proved for it under a neighbouring relation; none where there is no proof."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Poisson(Sampling):
    """Every item is drawn independently with probability q in every step."""

    name: ClassVar[str] = POISSON

    @property
    def scheme(self) -> str:
        return "full_batch" if self.sampling_probability == 1 else POISSON

    def bounds(self, relation: str) -> tuple[str, ...]:
        return () if self.shared_items is not None and relation == ADD_OR_REMOVE else (LOSS, RENYI)


@dataclasses.dataclass(frozen=True)
class TruncatedPoisson(Sampling):
    """As Poisson; of an overfull batch a uniformly random subset of `cap` items is kept."""

    cap: int

    name: ClassVar[str] = POISSON

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.cap <= MOST_UNITS:
            raise InputError(f"maximum batch size must be at least 1 and at most {MOST_UNITS:.0e}, got {self.cap}")

    @property
    def max_batch_size(self) -> int | None:
        return self.cap

    @property
    def scheme(self) -> str:
        return "truncated_poisson"

    def bounds(self, relation: str) -> tuple[str, ...]:
        if relation == ZERO_OUT:
            return (LOSS, ADDITIVE, DISPLACEMENT, TRUNCATED_LOSS, RENYI)
        return () if self.shared_items is not None else (LOSS, ADDITIVE, RENYI)


@dataclasses.dataclass(frozen=True)
class Fixed(Sampling):
    """Batches laid out beforehand: each unit in at most ceil(T B / N) of them, and no help from sampling. Units with
    several items have no proof here.
    """

    name: ClassVar[str] = FIXED

    @property
    def inclusion_probability(self) -> float:
        return 1.0

    def releases(self, steps: int) -> int:
        return min(steps, math.ceil(steps * self.sampling_probability))

    def bounds(self, relation: str) -> tuple[str, ...]:
        return (LOSS, RENYI) if relation == ZERO_OUT and self.items_per_unit == 1 and not self.shared_items else ()


SAMPLERS = (POISSON, FIXED)


def sampling_of(
    name: str,
    num_units: int,
    expected_batch_size: float,
    max_batch_size: int | None = None,
    items_per_unit: int = 1,
    shared_items: int | None = None,
) -> Poisson | TruncatedPoisson | Fixed:
    """The sampling that flags and ledgers name.

    Raises:
      InputError: an unknown name, impossible sizes, or a cap on batches that are laid out beforehand.
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    items: dict[str, Any] = {"items_per_unit": items_per_unit, "shared_items": shared_items}
    if name == FIXED:
        if max_batch_size is not None:
            raise InputError("a cap truncates Poisson batches: drop `max_batch_size` under `sampler`=fixed")
        return Fixed(num_units, expected_batch_size, **items)
    if max_batch_size is None:
        return Poisson(num_units, expected_batch_size, **items)
    return TruncatedPoisson(num_units, expected_batch_size, max_batch_size, **items)
