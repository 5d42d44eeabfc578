"""What the operator sees while a run goes on, and the two metric files.

metrics.jsonl holds public values only. Losses, norms and batch sizes of private data go to private/metrics.jsonl, and
the loss to the operator's terminal; where standard error is no terminal it may be kept by somebody else, so the loss is
left out.
"""

import hashlib
import json
import pathlib
import sys
import warnings

import numpy as np
import tqdm


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def inform(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Progress:
    """A progress bar on standard error, with rates from the expected (public) batch."""

    def __init__(self, total: int, start: int, units_per_step: int, tokens_per_unit: int, target_epsilon: float):
        self._shows_loss = sys.stderr.isatty()
        self._units, self._tokens, self._target = units_per_step, tokens_per_unit, target_epsilon
        self._bar = tqdm.tqdm(
            total=total, initial=start, file=sys.stderr, unit="step", mininterval=0.5 if self._shows_loss else 10,
            bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )  # fmt: skip

    def update(self, epsilon: float, loss: float) -> None:
        rate = self._bar.format_dict["rate"] or 0.0
        units = rate * self._units
        parts = [
            f"epsilon {epsilon:.3g}/{self._target:.3g}",
            f"{units:.0f} units/s",
            f"{units * self._tokens:.0f} tokens/s",
        ]
        if self._shows_loss:
            parts.append(f"private loss {loss:.3f}")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()


class MetricsFile:
    """One JSON object per step; lines from beyond a resumed step are dropped, because they will be written again.

    Attributes:
      digest: SHA-256 of what the file holds, by which a checkpoint event of the ledger knows it.
    """

    def __init__(self, path: pathlib.Path, resumed_step: int):
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] < resumed_step:
                        kept.append(line + "\n")
                except ValueError:  # a line that a crash cut off
                    continue
        self._hash = hashlib.sha256("".join(kept).encode())
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(path)
        self._file = open(path, "a")

    def write(self, **values) -> None:
        line = json.dumps(values) + "\n"
        self._hash.update(line.encode())
        self._file.write(line)
        self._file.flush()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def private_summary(stats, drawn: int) -> dict:
    """Loss and gradient norms of one batch, for private/ only."""
    norms, losses = np.asarray(stats.norms), np.asarray(stats.losses)
    norms, losses = norms[norms != 0], losses[losses != 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # else standard error would tell that a gradient of this batch was not finite
        quantiles = np.nanquantile(norms, (0.1, 0.5, 0.9)).tolist() if norms.size else []
        mean = float(losses.mean()) if losses.size else 0.0
    return {"units": drawn, "loss": mean, "norm_quantiles": quantiles}
