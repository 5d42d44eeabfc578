"""The two metric files of a run.

The public one holds public values only. Losses, norms and batch sizes of private data go to the private one.
"""

import contextlib
import hashlib
import json
import pathlib
import warnings
from typing import Any

import numpy as np

from dpgemma.privacy.clipping import PrivateStats


class MetricsFile:
    """One JSON object per step; lines from beyond a resumed step are dropped, because they will be written again. So
    are lines that are damaged.

    Attributes:
      digest: SHA-256 of what the file holds, by which a checkpoint event of the ledger knows it.
    """

    def __init__(self, path: pathlib.Path, resumed_step: int) -> None:
        kept = _kept(path, resumed_step)
        self._hash = hashlib.sha256(kept.encode())
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(kept)
        temporary.replace(path)
        self._file = open(path, "a")

    def write(self, **values: Any) -> None:
        line = json.dumps(values) + "\n"
        self._hash.update(line.encode())
        self._file.write(line)
        self._file.flush()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _kept(path: pathlib.Path, resumed_step: int) -> str:
    """The lines of a file of metrics that belong to steps before the resumed one."""
    kept = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            # A crash may have cut a line off.
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                if json.loads(line)["step"] < resumed_step:
                    kept.append(line + "\n")
    return "".join(kept)


def digest_before(path: pathlib.Path, resumed_step: int) -> str:
    """SHA-256 of the lines that belong to steps before the resumed one, as a checkpoint event has it."""
    return hashlib.sha256(_kept(path, resumed_step).encode()).hexdigest()


def private_summary(stats: PrivateStats, drawn: int) -> dict[str, Any]:
    """Loss and gradient norms of one batch, for private/ only."""
    norms, losses = np.asarray(stats.norms), np.asarray(stats.losses)
    norms, losses = norms[norms != 0], losses[losses != 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # else standard error would tell that a gradient of this batch was not finite
        quantiles = np.nanquantile(norms, (0.1, 0.5, 0.9)).tolist() if norms.size else []
        mean = float(losses.mean()) if losses.size else 0.0
    return {"units": drawn, "loss": mean, "norm_quantiles": quantiles}
