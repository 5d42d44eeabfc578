"""What steps need, prepared ahead of them by Grain while devices compute.

Formal guarantee: what step t gets is `make(t)` and nothing else, whatever came before it and wherever a run began; so
batches stay functions of keys, data and t. Tested by tests/data/data_test.py::test_batches_are_prepared_in_order.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

Prepared = TypeVar("Prepared")

_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class _Steps(Generic[Prepared]):
    """A data set of Grain with one element for each step."""

    make: Callable[[int], Prepared]
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, t: Any) -> Prepared:
        return self.make(int(t))


def prepared(make: Callable[[int], Prepared], first: int, steps: int) -> Iterator[Prepared]:
    """Yields make(first), .., make(steps - 1), prepared up to two steps ahead by one background thread.

    Raises:
      Exception: whatever make(t) raises, when element t is asked for.
    """
    import grain

    source: Any = _Steps(make, steps)
    dataset = grain.MapDataset.source(source)[first:]
    yield from dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD))
