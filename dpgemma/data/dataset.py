"""Packed rows split into training units and held-out units, and the padded batch of a Poisson draw."""

import dataclasses

import numpy as np

from accounting.errors import InputError
from dpgemma.data import holdout
from dpgemma.data.text.rows import Rows


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Training unit u is row training[u]."""

    rows: Rows
    training: np.ndarray
    held_out: np.ndarray

    @property
    def num_units(self) -> int:
        return len(self.training)

    def batch(self, units: np.ndarray, slots: int) -> tuple[dict, np.ndarray]:
        """Rows (arrays [slots, S]) of the drawn units in front and zeros behind, and the mask of the drawn. Shapes are
        public constants.

        Where more units were declared than there are, the numbers beyond the last one stand for units without content.
        """
        units = units[units < self.num_units]
        return self.rows.take(self.training[units], slots), np.arange(slots) < len(units)


def spread(batch: dict, mask: np.ndarray, devices: int) -> tuple[dict, np.ndarray]:
    """Deals slots out to devices in turn, so that each has its units in front and as many as any other, to
    within one."""

    def deal(x):
        return np.ascontiguousarray(np.swapaxes(x.reshape(-1, devices, *x.shape[1:]), 0, 1)).reshape(x.shape)

    return {name: deal(column) for name, column in batch.items()}, deal(mask)


def split(rows: Rows, secret: bytes, fraction: float) -> Dataset:
    """Assigns every row to training or hold-out by a keyed hash of its number.

    Raises:
      InputError: nothing left to train on.
    """
    is_held_out = holdout.held_out(secret, len(rows), fraction)
    if is_held_out.all():
        raise InputError(f"all {len(rows)} rows are held out: lower `holdout_fraction` or use more data")
    return Dataset(rows, np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out))
