"""What is learned from one privacy unit."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from dpgemma.data.batch import Unit
from dpgemma.data.spec import RowSpec

Params = Any


class Objective(Protocol):
    """A model, and the loss of one unit under it.

    Parameters come as two trees: `trainable` is differentiated, clipped and noised; `frozen` is public and stays as it
    is.

    Attributes:
      name: one word, for records.
      spec: the columns of a row.
      volume: what one row holds, as (name, number), for rates: ("tokens", 128).
      operations_per_row: floating-point operations of forward and backward pass.
      identity: public facts by which two objectives compile to the same program.
      facts: public facts for the ledger's start event: model, architecture, init_sha256, sequence_length,
        tokenizer_sha256.
    """

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> RowSpec: ...

    @property
    def volume(self) -> tuple[str, int]: ...

    @property
    def operations_per_row(self) -> float: ...

    @property
    def identity(self) -> Mapping[str, Any]: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def init(self, seed: int, shardings: tuple[Any, Any] | None = None) -> tuple[Params, Params]:
        """(trainable, frozen) parameters at the start; what is random comes from the public seed.

        Args:
          shardings: trees like the two results, of every array's sharding; by default the first device.
        """
        ...

    def shapes(self) -> tuple[Params, Params]:
        """The trees of `init` as shapes and types."""
        ...

    def axes(self) -> tuple[Params, Params]:
        """The trees of `init` with a tuple of logical axis names, one for each axis, in the place of every array."""
        ...

    def join(self, trainable: Params, frozen: Params) -> Params:
        """The whole model, for evaluation and export."""
        ...

    def cast(self, trainable: Params) -> Params:
        """The parameters in the types in which the loss multiplies them: one cast a step in place of one a use."""
        ...

    def loss(self, trainable: Params, frozen: Params, unit: Unit) -> jax.Array:
        """The scalar loss of ONE unit: the mean over its rows.

        It must depend on this unit and the parameters alone; what stands in places that hold no row has no part in it.
        """
        ...

    def measures(
        self, trainable: Params, frozen: Params, rows: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Figures of rows that are evaluated by name, as (numerators [R], denominators [R]), which add up.

        Args:
          rows: columns [R, ...].
        """
        ...

    def noise_rows(self, count: int) -> dict[str, np.ndarray]:
        """Columns [count, ...] of rows that are made of no data, for trials of speed."""
        ...
