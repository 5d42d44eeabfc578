"""From a results table to a law that says how far it can be trusted."""

import dataclasses
import json
import pathlib

import numpy as np

from accounting.errors import InputError
from experiments.laws import law as laws
from experiments.laws import mixture, points, sampling, soundness, validation
from experiments.laws.interpolated import Interpolated
from experiments.laws.law import SemiParametric
from experiments.laws.mixture import Mixture
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
      forms: what each form would say without the others.
    """

    law: SemiParametric
    errors: dict[str, Error]
    non_private: NonPrivate
    sizes: dict[str, float]
    sequence_length: int
    physical_batch: float
    left_out: tuple[str, ...] = ()
    forms: dict[str, SemiParametric] = dataclasses.field(default_factory=dict)

    def save(self, path: pathlib.Path) -> None:
        content = {
            "law": self.law.as_dict(),
            "errors": {kind: dataclasses.asdict(error) for kind, error in self.errors.items()},
            "non_private": dataclasses.asdict(self.non_private),
            "sizes": self.sizes,
            "sequence_length": self.sequence_length,
            "physical_batch": self.physical_batch,
            "left_out": list(self.left_out),
            "forms": {name: form.as_dict() for name, form in self.forms.items()},
        }
        path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


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
            {name: SemiParametric.from_dict(form) for name, form in stored["forms"].items()},
        )
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: give the law that dpgemma sweep has fitted, or a results table"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} holds no law, or one of another version: give the law.json of a sweep, or its results table (.csv"
            " or .parquet), to which a law is fitted now"
        ) from None


def fit(table: Table) -> FittedLaw:
    """The default law of a table: points by the revised pipeline, and the mixture of forms that is kriged through them.

    Raises:
      InputError: too few models, steps or noise levels to say anything.
    """
    whole, (table, drawn) = table, sampling.with_effective_ratio(table)
    left_out = soundness.sound(table.rows(~table.held_out))[1]
    kept = points.with_fewer_steps(points.kept_runs(table))
    measured, _ = points.of_kept_runs(kept)
    needed = {
        "model sizes": (measured.parameters, 2),
        "numbers of steps": (measured.steps, 4),
        "noise levels": (measured.ratio, 3),
    }
    for name, (values, least) in needed.items():
        count = len(set(values.tolist()))
        if count < least:
            raise InputError(f"a law needs at least {least} {name}, the table has {count}: run a larger sweep")
    several = mixture.fit(points.thinned(measured))
    errors, widened = validation.cross_validate(kept, several)

    def law_of(members: Mixture) -> SemiParametric:
        return laws.tabulated(members, measured, drawn, widened)

    batch = _commonest_batch(whole)
    clean = measured if whole is table else points.revised(_without_noise(whole, batch))
    return FittedLaw(
        law=law_of(several),
        errors=errors,
        non_private=optimum.fit_non_private(clean, batch * table.sequence_length),
        sizes=table.rows(~table.held_out).sizes,
        sequence_length=table.sequence_length,
        physical_batch=batch,
        left_out=left_out,
        forms={member.form: law_of(several.alone(member.form)) for member in several.members},
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
