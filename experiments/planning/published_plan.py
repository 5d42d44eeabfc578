"""Answers `dpgemma plan --law=published`: model size, batch and steps at the scale of arXiv 2501.18914, between which
ends they lie, and how far that can be trusted.
"""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable

import numpy as np

from accounting.errors import InputError
from accounting.rounding import round_up
from experiments.laws.forms import Parametric
from experiments.planning import optimum, plan
from experiments.planning.noise import CorrectedNoise, certified
from experiments.planning.optimum import Budget, Candidates
from experiments.planning.plan import Request
from experiments.planning.published import TABLE_2
from experiments.planning.published_law import SMALLEST_BATCH, PublishedLaw

WHAT_IT_IS = (
    "fitted to table 2 of arXiv 2501.18914 (BERT, rows of 512 tokens, batches of the paper's scale); its loss is nats"
    " per masked token there, and what carries over to other models are size, batch, steps and ratios of losses"
)
_AT_END = 0.97
_HALVINGS = 14  # of the compute, that are tried too
_NEIGHBOURS = 8


def answer(law: PublishedLaw, request: Request, cache: pathlib.Path | None, certify=certified) -> dict:
    """The best configuration with the ends of what forms and left-out rows say, as `dpgemma plan --json` prints it.

    Args:
      cache: folder where noise and certificates are kept; None for none.
      certify: the noise of one configuration by the accountant, as noise.certified gives it.

    Raises:
      InputError: no configuration of this budget lies where the law can be asked.
    """
    start = time.perf_counter()
    budget, judged = request.budget, law.judged
    search = _Search(law, request, cache)
    search.correct(search.of_less(budget)[0][1])
    by_compute = search.of_less(budget)
    spent, found = min(by_compute, key=lambda each: float(each[1].loss[0]))
    lowest = float(found.loss[0])
    enough, at_enough = min((each for each in by_compute if each[1].loss[0] <= lowest * (1 + optimum.NEAR)), key=_first)
    chosen = _configuration(found, 0)
    others = [*judged.left_out, *(form.whole for form in law.forms.values())]
    places = np.array([_place(found, _best_by(each, found)) for each in others])
    ends = {
        name: (float(column.min()), float(column.max()))
        for name, column in zip(("parameters", "expected_batch_size", "steps"), places.T, strict=True)
    }
    proof = plan.certificate(budget, chosen["expected_batch_size"], chosen["steps"], request.relation, cache, certify)
    ratio = proof.noise_multiplier / chosen["expected_batch_size"]
    place = chosen["parameters"], chosen["steps"], ratio
    beyond = law.domain.leaves(*place)
    target = budget.epsilon if proof.epsilon > 0.99 * budget.epsilon else round_up(proof.epsilon)
    return {
        **chosen,
        "ends": ends,
        "law": WHAT_IT_IS,
        "noise_multiplier": proof.noise_multiplier,
        "noise_batch_ratio": ratio,
        "learning_rate": None,
        "predicted_loss": float(law.loss(*place)),
        "prediction_error": judged.ninety,
        "extrapolated": bool(beyond),
        "notes": [*request.assumed, *_notes(law, place, beyond, spent, budget.compute)],
        "epsilon": proof.epsilon,
        "target_epsilon": target,
        "delta": budget.delta,
        "num_units": budget.num_units,
        "compute": spent,
        "sequence_length": budget.sequence_length,
        "sampling_probability": chosen["expected_batch_size"] / budget.num_units,
        "epochs": chosen["steps"] * chosen["expected_batch_size"] / budget.num_units,
        "tokens_per_parameter": spent / 6 / chosen["parameters"] ** 2,
        "neighbouring_relation": request.relation,
        "compute_that_suffices": enough,
        "loss_of_the_compute_that_suffices": float(at_enough.loss[0]),
        "near_optimal": _near(found),
        "forms": [
            {
                "form": name,
                **_configuration(found, i),
                "predicted_loss": float(form.whole.loss(found.parameters[i], found.steps[i], found.ratio[i])),
                "left_out_error": form.ninety,
            }
            for name, form in law.forms.items()
            for i in [_best_by(form.whole, found)]
        ],
        "rows_within_two": dict(zip(("parameters", "batch", "steps"), judged.within_two(), strict=True)),
        "search_seconds": time.perf_counter() - start,
    }


def lowest_loss(law: PublishedLaw, request: Request, cache: pathlib.Path | None) -> Callable[[Budget], float]:
    """The lowest loss of any budget under a request, to a few parts in a thousand: of less compute it tries an eighth
    and so on alone.
    """

    @functools.cache
    def search(epsilon: float, num_units: float) -> _Search:
        budget = dataclasses.replace(request.budget, epsilon=epsilon, num_units=num_units)
        return _Search(law, dataclasses.replace(request, budget=budget), cache)

    def of(budget: Budget) -> float:
        by_compute = search(budget.epsilon, budget.num_units).of_less(budget, every=3)
        return min(float(found.loss[0]) for _, found in by_compute)

    return of


class _Search:
    """Everything that spends a compute under a request, from the lowest loss up."""

    def __init__(self, law: PublishedLaw, request: Request, cache: pathlib.Path | None):
        self._law, self._request = law, request
        self._noise = CorrectedNoise(request.budget.epsilon, request.budget.delta, cache)
        if request.model is None:
            self._sizes = np.geomspace(1.01 * law.domain.parameters[0], 0.99 * law.domain.parameters[1], 60)
            if request.extrapolate:
                last = np.log(optimum.BELIEVED * law.domain.parameters[1])
                self._sizes = np.append(self._sizes, np.exp(np.arange(np.log(self._sizes[-1]) + 0.07, last, 0.07)))
        else:
            from experiments.sweep.checks import parameters

            self._sizes = np.array([float(parameters(request.model))])
            _check_size(law, request, self._sizes[0])
        self._sizes = plan.small_enough(self._sizes, request)
        self._found: dict[float, Candidates] = {}

    def correct(self, found: Candidates) -> None:
        """Corrects the noise around the best configuration, where it must be; then what was found is forgotten."""
        if self._noise.correct_around(found.steps[0], found.batch_size[0] / self._request.budget.num_units):
            self._found.clear()

    def of_less(self, budget: Budget, every: int = 1) -> list[tuple[float, Candidates]]:
        """(compute, what it can be spent on) for the whole compute, its half, its quarter and so on, if there are any.

        All of a compute must be spent on sizes and steps that were trained, so more of it is not always better.

        Args:
          every: halvings at once.

        Raises:
          InputError: there are none.
        """
        found, refused = [], None
        for halvings in range(0, _HALVINGS, every):
            compute = budget.compute / 2**halvings
            try:
                if compute not in self._found:
                    self._found[compute] = self(dataclasses.replace(budget, compute=compute))
                found.append((compute, self._found[compute]))
            except InputError as error:
                refused = refused or error
        if not found:
            raise refused
        return found

    def __call__(self, budget: Budget) -> Candidates:
        def noise(steps, sampling_probability):
            shares = np.where(sampling_probability * budget.num_units < SMALLEST_BATCH, np.nan, sampling_probability)
            return self._noise(steps, shares)

        how = {name: getattr(self._request, name) for name in ("extrapolate", "batch_size", "steps")}
        return optimum.search(self._law, noise, budget, self._sizes, **how)


def _check_size(law: PublishedLaw, request: Request, size: float) -> None:
    """Refuses a model that is smaller or larger than the law can be asked for.

    Raises:
      InputError: says the ends.
    """
    smallest, largest = law.domain.parameters
    far = optimum.BELIEVED if request.extrapolate else 1.0
    if not smallest / far <= size <= largest * far:
        raise InputError(
            f"`model`={request.model} has {size:.3g} parameters, and the law knows {smallest:.3g} to {largest:.3g}:"
            + (
                " that far outside nothing is said"
                if request.extrapolate
                else " choose another, or allow extrapolation"
            )
        )


def _first(pair: tuple[float, Candidates]) -> float:
    return pair[0]


def _best_by(law: Parametric, found: Candidates) -> int:
    return int(np.argmin(law.loss(found.parameters, found.steps, found.ratio)))


def _place(found: Candidates, i: int) -> tuple[float, float, float]:
    return float(found.parameters[i]), float(found.batch_size[i]), float(found.steps[i])


def _configuration(found: Candidates, i: int) -> dict:
    size, batch, steps = _place(found, i)
    return {
        "model": f"{size:.2g} parameters",
        "parameters": round(size),
        "expected_batch_size": max(1, round(batch)),
        "steps": max(1, round(steps)),
    }


def _near(found: Candidates) -> list[dict]:
    """The best configuration of each factor of two in size, within 1 % of the lowest loss."""
    near, listed, seen = optimum.near_optimal(found), [], set()
    for i in range(len(near)):
        doubling = round(math.log2(near.parameters[i] / near.parameters[0]))
        if doubling not in seen:
            seen.add(doubling)
            listed.append(_configuration(near, i) | {"predicted_loss": float(near.loss[i])})
    return listed[:_NEIGHBOURS]


def _notes(
    law: PublishedLaw, place: tuple[float, float, float], beyond: list[str], spent: float, compute: float
) -> list[str]:
    """What must be said of a configuration at or beyond the ends of what was trained, or that spends less than all."""
    notes = [] if spent == compute else [
        f"of {compute:.3g} operations {spent:.3g} are spent: by this law more do not help these data and this epsilon"
    ]  # fmt: skip
    notes += [f"extrapolated: {text}; the stated error is that of rows inside" for text in beyond]
    low, high = law.domain.parameters
    if _AT_END * high <= place[0] <= high:
        notes.append(f"the size is at the end of what was trained, {high:.3g}: a bound from below (`extrapolate`)")
    if low <= place[0] <= low / _AT_END:
        notes.append(f"the size is at the end of what was trained, {low:.3g}: smaller ones may be better")
    if _AT_END * law.domain.steps[1] <= place[1] <= law.domain.steps[1]:
        notes.append(f"the number of steps is at the end of what was trained, {law.domain.steps[1]:g} (`extrapolate`)")
    if place[1] <= law.domain.steps[0] / _AT_END:
        notes.append(f"the number of steps is the least that was trained, {law.domain.steps[0]:g}")
    return notes


def text(result: dict) -> str:
    """The answer for a terminal."""
    ends = {name: f"({low:.2g} to {high:.2g})" for name, (low, high) in result["ends"].items()}
    rows, within = len(TABLE_2), result["rows_within_two"]
    suffices = result["compute_that_suffices"]
    lines = [
        f"law                   {result['law']}",
        f"model                 {result['model']} {ends['parameters']}",
        f"expected batch        {result['expected_batch_size']} of {result['num_units']:g} units"
        f" {ends['expected_batch_size']}",
        f"steps                 {result['steps']} {ends['steps']}, which draw each unit {result['epochs']:.3g} times",
        "  in brackets         what the other forms, and fits without each row of the table, choose",
        f"noise multiplier      {result['noise_multiplier']:.5g} (epsilon {result['epsilon']:.5g} at delta"
        f" {result['delta']:g}, certified)",
        f"noise-batch ratio     {result['noise_batch_ratio']:.4g}",
        "learning rate         the table has none; its noisy runs tried 2^-7 to 2^-9 (Adam, clip norm 1)",
        f"predicted loss        {result['predicted_loss']:.3f} nats per masked token (nine of ten rows, left out,"
        f" within {100 * result['prediction_error']:.1f} %){' EXTRAPOLATED' if result['extrapolated'] else ''}",
        f"  of {rows} rows left out, size, batch and steps are chosen within a factor of 2 on {within['parameters']},"
        f" {within['batch']} and {within['steps']}",
        f"tokens a parameter    {result['tokens_per_parameter']:.3g}",
        *(f"note                  {note}" for note in result["notes"]),
    ]
    if suffices < result["compute"]:
        lines.append(
            f"compute that suffices {suffices:.3g} operations end within 1 % of this loss"
            f" ({result['loss_of_the_compute_that_suffices']:.3f})"
        )
    lines += ["", "what each form would choose, and the error of nine of ten rows left out"]
    lines += [
        f"  {c['form']:<18} {c['parameters']:>12} {c['expected_batch_size']:>9} {c['steps']:>9}"
        f" {c['predicted_loss']:>7.3f} {100 * c['left_out_error']:>6.1f} %"
        for c in result["forms"]
    ]
    lines += ["", "within 1 % of the lowest loss, the best of each doubling of the size"]
    lines += [
        f"  {'':<18} {c['parameters']:>12} {c['expected_batch_size']:>9} {c['steps']:>9} {c['predicted_loss']:>7.3f}"
        for c in result["near_optimal"]
    ]
    return "\n".join(lines)
