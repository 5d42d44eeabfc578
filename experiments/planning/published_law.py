"""A law of the published scale: forms fitted to table 2 of arXiv 2501.18914, whose 20 rows are optima (optima.py).

    python -m experiments.planning.published_law        # fits it again and writes published_law.json

The losses are nats per masked token of BERT models on English text, and stand for no other task; what carries over are
model size, batch and steps, and ratios of losses.
"""

import dataclasses
import json
import pathlib

import numpy as np

from experiments.laws import optima
from experiments.laws.forms import FORMS_OF_OPTIMA, Parametric
from experiments.laws.law import Domain, as_tuples
from experiments.laws.optima import Choices, Optimum
from experiments.planning.noise import NoiseSurface, estimate
from experiments.planning.published import DELTA, SEQUENCE_LENGTH, TABLE_2, Row

NAME = "published"  # of --law
FILE = pathlib.Path(__file__).parent / "published_law.json"
# The paper's grid (section 3, appendix A and its code): 100 computes, sizes within the trained ones, batches, steps.
_COMPUTES = (1.26e16, 1.38e23, 100)
_SIZES = np.geomspace(1.01 * 4.5e6, 0.99 * 335e6, 24)
_BATCHES = 2.0 ** np.arange(4, 25.01, 0.25)
_STEPS = (1000, 8_192_000)
# Trained: 4.5M to 335M parameters, 1000 (warm-up) to 128,000 steps, ratios of 2^-23 to 2^-6.
DOMAIN = Domain((4.5e6, 335e6), (1000.0, 128_000.0), (2.0**-23, 2.0**-6))
# Below it the noise-batch ratio is above all that were trained, whatever the budget.
SMALLEST_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Judged:
    """A form fitted to the table.

    Attributes:
      whole: fitted to all rows.
      left_out: for each row, fitted without it.
      loss_errors: of these, relative, predicted against printed.
      places: of these, log2 of chosen over printed (parameters, batch size, steps) at the row's compute.
    """

    whole: Parametric
    left_out: tuple[Parametric, ...]
    loss_errors: tuple[float, ...]
    places: tuple[tuple[float, float, float], ...]

    @property
    def ninety(self) -> float:
        """The 90 % quantile of the relative error of the loss, of rows left out."""
        return float(np.quantile(np.abs(self.loss_errors), 0.9))

    def within_two(self) -> tuple[int, int, int]:
        """On how many rows left out parameters, batch and steps are chosen within a factor of two."""
        within = np.abs(self.places) <= 1 + 1e-9
        return tuple(int(count) for count in within.sum(axis=0))


@dataclasses.dataclass(frozen=True)
class PublishedLaw:
    """A law for searches (law.Law), by one form; its best learning rate is not known.

    Attributes:
      forms: all that were fitted, by name; the first is the one that predicts.
    """

    forms: dict[str, Judged]
    domain: Domain = DOMAIN

    @property
    def judged(self) -> Judged:
        return next(iter(self.forms.values()))

    def loss(self, parameters, steps, ratio) -> np.ndarray:
        return self.judged.whole.loss(parameters, steps, ratio)

    def learning_rate(self, parameters, steps, ratio) -> np.ndarray:
        return np.full(np.broadcast(parameters, steps, ratio).shape, np.nan)

    def effective(self, ratio, batch_size, parameters) -> np.ndarray:
        return np.asarray(ratio, float)  # as the paper plans: its runs all had one batch

    def save(self, path: pathlib.Path) -> None:
        content = {name: dataclasses.asdict(form) for name, form in self.forms.items()}
        path.write_text(json.dumps(content, indent=1) + "\n")


def load() -> PublishedLaw:
    """The law that comes with this package."""
    stored = json.loads(FILE.read_text())
    return PublishedLaw(
        {
            name: Judged(
                Parametric(**as_tuples(form["whole"])),
                tuple(Parametric(**as_tuples(each)) for each in form["left_out"]),
                tuple(form["loss_errors"]),
                tuple(map(tuple, form["places"])),
            )
            for name, form in stored.items()
        }
    )


def fit() -> PublishedLaw:
    """Fits all forms to the table, each once for every row that is left out. Takes minutes."""
    surfaces = {epsilon: NoiseSurface(epsilon, DELTA, None, estimate) for epsilon in {row.epsilon for row in TABLE_2}}
    rows = [_optimum(row, surfaces[row.epsilon]) for row in TABLE_2]
    return PublishedLaw({name: _judge(rows, name) for name in FORMS_OF_OPTIMA})


def _judge(rows: list[Optimum], form: str) -> Judged:
    whole = optima.fit(rows, form)
    left_out = optima.leave_one_out(rows, whole)
    errors, places = [], []
    for row, law in zip(rows, left_out, strict=True):
        errors.append(float(law.loss(row.parameters, row.steps, row.ratio)) / row.loss - 1)
        chosen = optima.best_choice(law, row.choices)
        printed = row.parameters, row.batch_size, row.steps
        places.append(tuple(float(np.log2(a / b)) for a, b in zip(chosen, printed, strict=True)))
    return Judged(whole, tuple(left_out), tuple(errors), tuple(places))


def _optimum(row: Row, noise: NoiseSurface) -> Optimum:
    low, high, count = _COMPUTES
    step = (high / low) ** (1 / (count - 1))
    dearer = dict.fromkeys(min(row.compute * times, high) for times in (step, 4.0, 30.0, 300.0))
    sigma = float(noise(row.steps, row.batch_size / row.num_units))
    return Optimum(
        row.parameters, row.steps, row.batch_size, sigma / row.batch_size, row.loss,
        _choices(row, row.compute, noise, 1),
        _choices(row, row.compute / step, noise, 2) if row.compute / step >= low else None,
        tuple(_choices(row, compute, noise, 2) for compute in dearer),
    )  # fmt: skip


def _choices(row: Row, compute: float, noise: NoiseSurface, thinned: int) -> Choices:
    """What a compute can be spent on under a row's budget.

    Args:
      thinned: of the batches every first, or every second.
    """
    m, b = (x.ravel() for x in np.meshgrid(_SIZES, _BATCHES[::thinned], indexing="ij"))
    t = compute / (6 * SEQUENCE_LENGTH * m * b)
    kept = (t >= _STEPS[0]) & (t <= _STEPS[1]) & (b <= row.num_units)
    m, b, t = m[kept], b[kept], t[kept]
    sigma = noise(t, b / row.num_units)
    known = np.isfinite(sigma)
    return Choices(m[known], t[known], b[known], (sigma / b)[known])


def text(law: PublishedLaw) -> str:
    """The rows, each left out, as a table for a terminal."""
    lines = [f"{'form':<18} {'units':>6} {'eps':>4} {'loss':>5} {'error':>7} {'size':>6} {'batch':>6} {'steps':>6}"]
    for name, form in law.forms.items():
        for row, error, places in zip(TABLE_2, form.loss_errors, form.places, strict=True):
            factors = " ".join(f"{2**place:>6.2f}" for place in places)
            lines.append(
                f"{name:<18} {row.num_units:>6.0e} {row.epsilon:>4g} {row.loss:>5} {100 * error:>6.1f}% {factors}"
            )
        counts = " / ".join(map(str, form.within_two()))
        lines.append(
            f"{name}: left out, nine of ten losses within {100 * form.ninety:.1f} %; size / batch / steps within a"
            f" factor of 2 on {counts} of {len(TABLE_2)} rows"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    found = fit()
    found.save(FILE)
    print(text(found))
