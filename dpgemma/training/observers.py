"""What a run tells while it is prepared and trained.

The library prints nothing; whoever wants to know gives an observer.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from dpgemma.training.plan import Plan


@dataclasses.dataclass(frozen=True)
class Released:
    """What is public after a step.

    Attributes:
      steps: taken so far.
      epsilon: spent so far, an upper bound.
      learning_rate: of the step.
    """

    steps: int
    epsilon: float
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Private:
    """Raw values of a step's batch. The guarantee does not cover them: they may be shown to the operator alone.

    Attributes:
      units: that were drawn.
      loss: mean over them.
      norm_quantiles: of their gradients' norms, at 0.1, 0.5 and 0.9; empty for an empty batch.
    """

    units: int
    loss: float
    norm_quantiles: list[float]


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Figures of units that the model is not trained on.

    Attributes:
      steps: taken so far.
      figures: by name, as the objective calls them.
      what: whose they are, in words.
      is_public: whether the operator declared the units to be nobody's secret. If not, figures are private.
    """

    steps: int
    figures: Mapping[str, float]
    what: str
    is_public: bool


# Is told how much more is done.
Advance = Callable[[int], None]


class Observer(Protocol):
    """Is told what happens. Settings in messages stand in backquotes, as in accounting.errors."""

    def inform(self, message: str) -> None:
        """A public fact."""
        ...

    def warn(self, message: str) -> None:
        """Something that the operator should look at; a public fact too."""
        ...

    def confide(self, message: str) -> None:
        """Something that depends on the content of the data: for the operator alone, as raw losses are."""
        ...

    def phase(self, name: str, total: int | None = None) -> contextlib.AbstractContextManager[Advance]:
        """Something that may take a while goes on within the context; it yields what is told how much more is done.

        Args:
          total: how much there is, if that is known; private, as how much is done is.
        """
        ...

    def begin(self, plan: Plan, first_step: int, volume: tuple[str, int]) -> None:
        """Steps are about to be taken, from `first_step` on; a row holds `volume`, as (name, number)."""
        ...

    def evaluated(self, evaluated: Evaluated) -> None:
        """Units were measured."""
        ...

    def step(self, released: Released, private: Private) -> None:
        """A step has been taken."""
        ...

    def end(self) -> None:
        """No more steps are taken, whatever the reason."""
        ...


class Silent:
    """An observer that does nothing; a base for those that care for a part."""

    def inform(self, message: str) -> None:
        pass

    def warn(self, message: str) -> None:
        pass

    def confide(self, message: str) -> None:
        pass

    @contextlib.contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Advance]:
        yield lambda done: None

    def begin(self, plan: Plan, first_step: int, volume: tuple[str, int]) -> None:
        pass

    def evaluated(self, evaluated: Evaluated) -> None:
        pass

    def step(self, released: Released, private: Private) -> None:
        pass

    def end(self) -> None:
        pass


@contextlib.contextmanager
def phase(observers: Sequence[Observer], name: str, total: int | None = None) -> Iterator[Advance]:
    """A phase that all observers are told of."""
    with contextlib.ExitStack() as stack:
        told = [stack.enter_context(observer.phase(name, total)) for observer in observers]

        def advance(done: int) -> None:
            for each in told:
                each(done)

        yield advance
