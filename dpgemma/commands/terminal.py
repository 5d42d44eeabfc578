"""What the operator sees on standard error while a run goes on.

What depends on the content of private data (losses, remarks about records) is shown on a terminal only: where standard
error is none, somebody else may keep it.
"""

import sys

import tqdm

from accounting.errors import as_flags
from dpgemma.training.observers import Private, Released
from dpgemma.training.plan import Plan


class Terminal:
    """An observer that writes sentences and a progress bar to standard error."""

    def __init__(self) -> None:
        self._shows_private = sys.stderr.isatty()
        self._bar: tqdm.tqdm | None = None

    def inform(self, message: str) -> None:
        print(as_flags(message), file=sys.stderr, flush=True)

    def warn(self, message: str) -> None:
        print(f"warning: {as_flags(message)}", file=sys.stderr, flush=True)

    def confide(self, message: str) -> None:
        if self._shows_private:
            print(f"private: {as_flags(message)}", file=sys.stderr, flush=True)

    def begin(self, plan: Plan, first_step: int, volume: tuple[str, int]) -> None:
        self._target, self._volume = plan.epsilon, volume
        self._items = plan.mechanism.items_per_unit
        self._units = plan.mechanism.expected_batch_size  # public, as the drawn batch is not
        self._bar = tqdm.tqdm(
            total=plan.mechanism.steps, initial=first_step, file=sys.stderr, unit="step",
            mininterval=0.5 if self._shows_private else 10,
            bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
        )  # fmt: skip

    def step(self, released: Released, private: Private) -> None:
        assert self._bar is not None
        units = (self._bar.format_dict["rate"] or 0.0) * self._units
        name, number = self._volume
        parts = [
            f"epsilon {released.epsilon:.3g}/{self._target:.3g}",
            f"{units:.0f} {'units' if self._items == 1 else 'rows'}/s",
            f"{units * number:.0f} {name}/s",
        ]
        if self._shows_private:
            parts.append(f"private loss {private.loss:.3f}")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update()

    def end(self) -> None:
        if self._bar is not None:
            self._bar.close()
