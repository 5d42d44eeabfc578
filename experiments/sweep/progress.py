"""A live table of a sweep, on standard error: per model what is done, what is running and the lowest loss so far."""

import math
import sys
import threading
import time

from experiments.sweep.checks import operations
from experiments.sweep.folder import SweepFolder
from experiments.sweep.grid import Grid

_INTERVAL = 2.0
_PLAIN_INTERVAL = 60.0


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Seen:
    """What a folder showed of a grid's runs when it was looked at last. Of a finished run nothing is read twice.

    Attributes:
      steps: steps that each run has taken, by its id.
      losses: the last loss of each finished run, by its id; None where it is not finite.
    """

    def __init__(self, folder: SweepFolder, grid: Grid):
        self._folder, self._grid = folder, grid
        self.steps: dict[str, int] = {}
        self.losses: dict[str, float | None] = {}
        self.look()

    def look(self) -> None:
        for run in self._grid.runs:
            if run.id in self.losses:
                continue
            if self._folder.is_done(run):
                self.losses[run.id] = self._folder.result(run)["curve"][-1][1]
            self.steps[run.id] = self._folder.steps_taken(run)

    @property
    def work(self) -> float:
        """Operations done so far: what is left takes time in proportion."""
        return sum(operations(run) * self.steps[run.id] / run.config.steps for run in self._grid.runs)

    def table(self) -> list[str]:
        """The lines of the table. A loss of private data is for the operator's terminal alone."""
        lines = [f"{'model':<14} {'done':>9} {'in flight':>24} {'lowest loss':>12}"]
        for model in dict.fromkeys(run.config.model for run in self._grid.runs):
            runs = [run for run in self._grid.runs if run.config.model == model]
            done = [run for run in runs if run.id in self.losses]
            flying = [
                f"{self.steps[run.id]}/{run.config.steps}"
                for run in runs
                if run.id not in self.losses and self.steps[run.id]
            ]
            lowest = min((loss for run in done if (loss := self.losses[run.id]) is not None), default=math.nan)
            lines.append(f"{model:<14} {f'{len(done)}/{len(runs)}':>9} {' '.join(flying[:4]):>24} {lowest:>12.4f}")
        return lines


class Display:
    """Draws the table again and again on a terminal; elsewhere it prints one line a minute."""

    def __init__(self, folder: SweepFolder, grid: Grid):
        self._seen, self._runs = Seen(folder, grid), len(grid.runs)
        self._all = sum(map(operations, grid.runs))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)
        self._start, self._lines = time.monotonic(), 0
        self._at_start = self._seen.work

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._show()

    def _draw(self) -> None:
        while not self._stop.wait(_INTERVAL if sys.stderr.isatty() else _PLAIN_INTERVAL):
            self._show()

    def _show(self) -> None:
        self._seen.look()
        now = self._seen.work
        speed = (now - self._at_start) / max(time.monotonic() - self._start, 1e-9)
        left = 0 if now == self._all else (self._all - now) / speed if speed > 0 else math.inf
        share = 100 * now / self._all
        line = f"{len(self._seen.losses)} of {self._runs} runs, {share:.0f} % of the work, {clock(left)} left"
        if not sys.stderr.isatty():
            note(line)
            return
        lines = [line, *self._seen.table()]
        up = f"\x1b[{self._lines}A" if self._lines else ""
        sys.stderr.write(up + "".join(f"\x1b[2K{text}\n" for text in lines))
        sys.stderr.flush()
        self._lines = len(lines)


def clock(seconds: float) -> str:
    """A duration in words."""
    if not math.isfinite(seconds):
        return "unknown time"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
