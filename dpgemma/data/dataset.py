"""Packed rows split into training units and held-out units, and the padded batch of a Poisson draw."""

import dataclasses

import numpy as np

from accounting.errors import InputError
from dpgemma.data import holdout


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Rows int32 [M, S]; training unit u is row training[u]."""

    rows: np.ndarray
    training: np.ndarray
    held_out: np.ndarray

    @property
    def num_units(self) -> int:
        return len(self.training)

    def batch(self, units: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [slots, S] of the drawn units in front and zeros behind, and the mask of what is drawn. Shapes are public constants.

        Where more units were declared than there are, the numbers beyond the last one stand for units without content.
        """
        units = units[units < self.num_units]
        batch = np.zeros((slots, self.rows.shape[1]), np.int32)
        mask = np.arange(slots) < len(units)
        batch[: len(units)] = self.rows[self.training[units]]
        return batch, mask


def spread(batch: np.ndarray, mask: np.ndarray, devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals slots out to devices in turn, so that each has its units in front and as many as any other, to within one."""
    deal = lambda x: np.ascontiguousarray(np.swapaxes(x.reshape(-1, devices, *x.shape[1:]), 0, 1)).reshape(x.shape)
    return deal(batch), deal(mask)


def split(rows: np.ndarray, secret: bytes, fraction: float) -> Dataset:
    """Assigns every row to training or hold-out by a keyed hash of its number.

    Raises:
      InputError: nothing left to train on.
    """
    is_held_out = holdout.held_out(secret, len(rows), fraction)
    if is_held_out.all():
        raise InputError(f"all {len(rows)} rows are held out: lower --holdout_fraction or use more data")
    return Dataset(rows, np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out))
