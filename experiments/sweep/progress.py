"""A live table of a sweep, on standard error: per model what is done, what is running and the lowest loss so far."""

import math
import sys
import threading
import time

from experiments.sweep.folder import SweepFolder
from experiments.sweep.grid import Grid

_INTERVAL = 2.0
_PLAIN_INTERVAL = 60.0


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Display:
    """Draws the table again and again on a terminal; elsewhere it prints one line a minute."""

    def __init__(self, folder: SweepFolder, grid: Grid, slots: int):
        self._folder, self._grid, self._slots = folder, grid, slots
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._draw, daemon=True)
        self._start, self._lines = time.monotonic(), 0
        self._at_start = self._steps()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._show(last=True)

    def _steps(self) -> float:
        """Operations done so far, in units of one step of one parameter and one token: what is left takes time in proportion."""
        return sum(self._weight(run) * self._folder.steps_taken(run) for run in self._grid.runs)

    def _weight(self, run) -> float:
        from experiments.sweep.sweep import operations

        return operations(run) / run.config.steps

    def _draw(self) -> None:
        live = sys.stderr.isatty()
        while not self._stop.wait(_INTERVAL if live else _PLAIN_INTERVAL):
            self._show(last=False)

    def _show(self, *, last: bool) -> None:
        grid, folder = self._grid, self._folder
        done = [run for run in grid.runs if folder.is_done(run)]
        all_work = sum(self._weight(run) * run.config.steps for run in grid.runs)
        now = self._steps()
        speed = (now - self._at_start) / max(time.monotonic() - self._start, 1e-9)
        left = (all_work - now) / speed if speed > 0 else math.inf
        line = f"{len(done)} of {len(grid.runs)} runs, {100 * now / all_work:.0f} % of the work, {clock(left)} left"
        if not sys.stderr.isatty():
            note(line)
            return
        lines = [line, *table(folder, grid)]
        up = f"\x1b[{self._lines}A" if self._lines else ""
        sys.stderr.write(up + "".join(f"\x1b[2K{text}\n" for text in lines))
        sys.stderr.flush()
        self._lines = 0 if last else len(lines)


def table(folder: SweepFolder, grid: Grid) -> list[str]:
    """The lines of the table."""
    lines = [f"{'model':<14} {'done':>9} {'in flight':>24} {'lowest loss':>12}"]
    for model in dict.fromkeys(run.config.model for run in grid.runs):
        runs = [run for run in grid.runs if run.config.model == model]
        done = [run for run in runs if folder.is_done(run)]
        flying = [f"{folder.steps_taken(run)}/{run.config.steps}" for run in runs if run not in done and folder.steps_taken(run)]
        ends = [folder.result(run)["curve"][-1][1] for run in done]
        lowest = min((loss for loss in ends if loss is not None), default=math.nan)
        lines.append(f"{model or 'tiny':<14} {f'{len(done)}/{len(runs)}':>9} {' '.join(flying[:4]):>24} {lowest:>12.4f}")
    return lines


def clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown time"
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
