"""From a results table to a law that says how far it can be trusted."""

import dataclasses
import json
import pathlib

import numpy as np

from accounting.errors import InputError
from experiments.laws import forms, points, sampling, soundness, validation
from experiments.laws.forms import Parametric
from experiments.laws.law import Interpolated, SemiParametric, as_tuples, fit_semiparametric
from experiments.laws.points import Points
from experiments.laws.validation import Error
from experiments.planning import optimum
from experiments.planning.optimum import NonPrivate
from experiments.sweep import results
from experiments.sweep.results import BATCH, RATIO, Table

# The sweep of this package: its grid, its table, the law fitted to it.
SHIPPED = pathlib.Path(__file__).parent.parent / "shakespeare"


@dataclasses.dataclass(frozen=True)
class FittedLaw:
    """A law with what a plan must say beside its predictions.

    Attributes:
      law: of the loss and the learning rate.
      errors: of points that were left out, by kind (validation.cross_validate).
      non_private: Chinchilla's form of the runs without noise.
      sizes: the models that were trained, by name.
      sequence_length: tokens of a row; compute is counted with it.
      physical_batch: rows of a batch that most runs were trained with, whatever batch their noise stands for.
      left_out: runs of the table that it was not fitted to, with the reason (soundness).
      forms: every form, fitted to the same points.
    """

    law: SemiParametric
    errors: dict[str, Error]
    non_private: NonPrivate
    sizes: dict[str, float]
    sequence_length: int
    physical_batch: float
    left_out: tuple[str, ...] = ()
    forms: dict[str, Parametric] = dataclasses.field(default_factory=dict)

    def going_on_as(self, form: str) -> SemiParametric:
        """The law as it would be if it followed one form beyond the largest model and beyond the most noise."""
        return dataclasses.replace(self.law, larger=self.forms[form], noisier=self.forms[form])

    def save(self, path: pathlib.Path) -> None:
        content = {
            "law": self.law.as_dict(),
            "errors": {kind: dataclasses.asdict(error) for kind, error in self.errors.items()},
            "non_private": dataclasses.asdict(self.non_private),
            "sizes": self.sizes,
            "sequence_length": self.sequence_length,
            "physical_batch": self.physical_batch,
            "left_out": list(self.left_out),
            "forms": {name: dataclasses.asdict(form) for name, form in self.forms.items()},
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: pathlib.Path) -> FittedLaw:
    """A law that was saved.

    Raises:
      InputError: no such file, or one that holds something else.
    """
    try:
        stored = json.loads(path.read_text())
        return FittedLaw(
            SemiParametric.from_dict(stored["law"]),
            {kind: Error(**error) for kind, error in stored["errors"].items()},
            NonPrivate(**stored["non_private"]),
            stored["sizes"],
            stored["sequence_length"],
            stored["physical_batch"],
            tuple(stored.get("left_out", ())),
            {name: Parametric(**as_tuples(form)) for name, form in stored.get("forms", {}).items()},
        )
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: give the law that dpgemma sweep has fitted, or a results table"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} holds no law: give the law.json of a sweep, or a results table (.csv or .parquet)"
        ) from None


def best_forms(measured: Points) -> tuple[dict[str, str], dict[str, Error]]:
    """Returns, for each kind of prediction (validation), the form whose 90 % error on left-out points is the lowest,
    and for each kind the errors with this form, at all distances.
    """

    def errors(name: str, *, only_first: bool) -> dict[str, Error]:
        whole = forms.fit(measured, name)
        return validation.cross_validate(
            measured, lambda some: fit_semiparametric(some, name, whole), only_first=only_first
        )

    nearest = {name: errors(name, only_first=True) for name in forms.FORMS}
    kinds = {kind for found in nearest.values() for kind in found}
    best = {kind: min(nearest, key=lambda name, kind=kind: nearest[name][kind].ninety) for kind in sorted(kinds)}
    at_all = {name: errors(name, only_first=False) for name in set(best.values())}
    # Near the edge the errors of the nearest part, which is the one that forms are compared by, are the figures.
    return best, {
        kind: dataclasses.replace(nearest[name][kind], at_edge=whole.at_edge, growth=whole.growth)
        for kind, name in best.items()
        if (whole := at_all[name][kind])
    }


def fit(table: Table) -> FittedLaw:
    """The default law of a table: points by the revised pipeline, the trend that predicts best, the residual
    interpolated.

    Raises:
      InputError: too few models, steps or noise levels to say anything.
    """
    whole, (table, drawn) = table, sampling.with_effective_ratio(table)
    measured = points.revised(table)
    if whole is not table:
        measured = points.thinned(measured)  # every batch has curves of its own
    needed = {
        "model sizes": (measured.parameters, 2),
        "numbers of steps": (measured.steps, 4),
        "noise levels": (measured.ratio, 3),
    }
    for name, (values, least) in needed.items():
        count = len(set(values.tolist()))
        if count < least:
            raise InputError(f"a law needs at least {least} {name}, the table has {count}: run a larger sweep")
    best, errors = best_forms(measured)
    trend = best.get(validation.BETWEEN, "coupled")
    larger, noisier = (best.get(kind, trend) for kind in (validation.LARGER, validation.NOISIER))
    batch = _commonest_batch(whole)
    law = fit_semiparametric(measured, trend, larger=larger, noisier=noisier)
    clean = measured if whole is table else points.revised(_without_noise(whole, batch))
    return FittedLaw(
        law=dataclasses.replace(law, sampling=drawn),
        errors=errors,
        non_private=optimum.fit_non_private(clean, batch * table.sequence_length),
        sizes=table.rows(~table.held_out).sizes,
        sequence_length=table.sequence_length,
        physical_batch=batch,
        left_out=soundness.sound(table.rows(~table.held_out))[1],
        forms={name: forms.fit(measured, name) for name in forms.FORMS},
    )


def _commonest_batch(table: Table) -> float:
    if BATCH not in table.columns:
        return 1024.0
    values, counts = np.unique(table[BATCH], return_counts=True)
    return float(values[np.argmax(counts)])


def _without_noise(table: Table, batch: float) -> Table:
    """The runs of one batch with the least noise."""
    of_batch = table.rows(table[BATCH] == batch)
    return of_batch.rows(of_batch[RATIO] == of_batch[RATIO].min())


def fit_published(table: Table) -> Interpolated:
    """The published pipeline, step for step: no parabola, no trend, interpolation alone."""
    return Interpolated(points.published(table))


def of_file(path: pathlib.Path | None) -> FittedLaw:
    """The law of a file: one that was fitted, or a results table that is fitted now; None for the law that this package
    ships.
    """
    if path is None:
        return load(SHIPPED / "law.json")
    if path.suffix in (".csv", ".parquet"):
        return fit(results.read(path))
    return load(path)
