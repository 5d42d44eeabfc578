"""What an attacker who sees every release observes of gradient canaries, step by step, kept in private/.

Beside the releases it tells their noise, so it is as secret as the keys.
"""

import pathlib

import numpy as np

from accounting.errors import InputError


class ObservedFile:
    """An array float32 [steps, m] on a disk, NaN where a step was not taken yet.

    A step that is executed again after a crash writes its row again. If that is in another environment, with other
    noise, only the later execution is looked at, though the report charges both.
    """

    def __init__(self, path: pathlib.Path, steps: int, count: int) -> None:
        """Opens the file, or begins one where there is none of this shape."""
        try:
            self._values = np.lib.format.open_memmap(path, mode="r+")
            fits = self._values.shape == (steps, count) and self._values.dtype == np.float32
        except (OSError, ValueError):
            fits = False
        if not fits:
            temporary = path.with_name(path.name + ".tmp")
            new = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(steps, count))
            new[:] = np.nan
            new.flush()
            temporary.chmod(0o600)
            temporary.replace(path)
            self._values = np.lib.format.open_memmap(path, mode="r+")

    def write(self, step: int, observed: np.ndarray) -> None:
        """Keeps the row of a step."""
        self._values[step] = observed

    def flush(self) -> None:
        """Returns when what was written is on the disk."""
        self._values.flush()


def read(path: pathlib.Path, steps: int, count: int) -> np.ndarray:
    """What was observed, float32 [steps, m], not in memory.

    Raises:
      InputError: no such file, one of another shape, or one in which a step was not observed.
    """
    try:
        values: np.ndarray = np.lib.format.open_memmap(path, mode="r")
        sound = values.shape == (steps, count) and values.dtype == np.float32 and np.isfinite(values).all()
    except (OSError, ValueError):
        sound = False
    if not sound:
        raise InputError(
            f"{path} is not there, damaged, or lacks steps: without it nothing can be said of the canaries"
        )
    return values
