"""What the operator sees on standard error while a run goes on, and what is kept for him where he sees nothing.

What depends on the content of private data (losses, remarks about records) is shown on a terminal only: where standard
error is none, somebody else may keep it, and it goes to private/log instead.
"""

import contextlib
import pathlib
import sys
import time
from typing import IO

import tqdm

from accounting.errors import as_flags
from dpgemma.commands import progress
from dpgemma.training.observers import Advance, Evaluated, Private, Released
from dpgemma.training.plan import Plan

_SECONDS_BETWEEN_LINES = 2.0


class Terminal:
    """An observer that writes sentences and a progress bar to standard error."""

    def __init__(self) -> None:
        self._shows_private = sys.stderr.isatty()
        self._bar: tqdm.tqdm | None = None
        self._log: IO[str] | None = None
        self._not_logged: list[str] = []
        self._logged_at = -float("inf")

    def keep_log(self, path: pathlib.Path) -> None:
        """Where private lines go that no terminal shows; those of before are written now."""
        if not self._shows_private:
            self._log = open(path, "a")
            for line in self._not_logged:
                self._private(line)

    def _private(self, line: str) -> None:
        if self._shows_private:
            tqdm.tqdm.write(f"private: {line}", file=sys.stderr)
        elif self._log is None:
            self._not_logged.append(line)
        else:
            print(line, file=self._log, flush=True)

    def inform(self, message: str) -> None:
        print(as_flags(message), file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        print(f"warning: {as_flags(message)}", file=sys.stderr, flush=True)

    def confide(self, message: str) -> None:
        self._private(as_flags(message))

    def phase(self, name: str, total: int | None = None) -> contextlib.AbstractContextManager[Advance]:
        return progress.phase(name, total)

    def begin(self, plan: Plan, first_step: int, volume: tuple[str, int]) -> None:
        self._target, self._volume = plan.epsilon, volume
        self._items = plan.mechanism.items_per_unit
        self._steps = plan.mechanism.steps
        self._units = plan.mechanism.expected_batch_size  # public, as the drawn batch is not
        self._bar = tqdm.tqdm(
            total=self._steps, initial=first_step, file=sys.stderr, unit="step",
            mininterval=0.5 if self._shows_private else 10,
            ncols=progress.columns() if self._shows_private else None,
            bar_format="{percentage:3.0f}%|{bar:10}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )  # fmt: skip

    def step(self, released: Released, private: Private) -> None:
        assert self._bar is not None
        name, number = self._volume
        loss = f"loss {private.loss:.3f} nats/{name.removesuffix('s')}"
        epsilon = f"epsilon {released.epsilon:.3g}/{self._target:.3g}"
        units = (self._bar.format_dict["rate"] or 0.0) * self._units
        speed = f"{units:.0f} {'units' if self._items == 1 else 'rows'}/s, {units * number:.0f} {name}/s"
        self._bar.set_postfix_str(", ".join([*([loss] if self._shows_private else []), epsilon, speed]), refresh=False)
        self._bar.update()
        due = time.monotonic() - self._logged_at >= _SECONDS_BETWEEN_LINES or released.steps == self._steps
        if not self._shows_private and due:
            self._logged_at = time.monotonic()
            self._private(f"step {released.steps} of {self._steps}: {loss}, {private.units} units, {epsilon}")

    def evaluated(self, evaluated: Evaluated) -> None:
        figures = ", ".join(f"{value:.4g} {name.replace('_', ' ')}" for name, value in evaluated.figures.items())
        line = f"after step {evaluated.steps}, {evaluated.what}: {figures}"
        if evaluated.is_public:
            tqdm.tqdm.write(line, file=sys.stderr)
        else:
            self._private(line)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
