"""Answers `dpgemma plan`: the configuration to train under a compute, a privacy and a data budget, and how sure that
is.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable

import numpy as np

from accounting.errors import InputError
from accounting.rounding import round_up
from dpgemma import user_cache
from experiments.laws import validation
from experiments.laws.fitting import FittedLaw
from experiments.planning import optimum
from experiments.planning.noise import Certified, CorrectedNoise, NoiseSurface, certified, estimate
from experiments.planning.optimum import Budget, Candidates

_MOST_NEIGHBOURS = 20
_AT_END = 0.84  # within one step of the search's grid of batches


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to `dpgemma plan`: a budget, and what the search may consider.

    Attributes:
      any_size: search model sizes between those that were trained, too, and not only the ones that have a name.
      extrapolate: allow sizes, steps and noise outside of what the law was fitted to.
      relation: neighbouring data sets for which the winner's noise is certified.
      model: the only one that is considered; None for all.
      batch_size, steps: one of them, where it is fixed.
      assumed: what the budget rests on, in sentences.
      rows_per_unit: of which the budget's sequence length holds the tokens.
      most_parameters: of a model that is considered.
    """

    budget: Budget
    any_size: bool = False
    extrapolate: bool = False
    relation: str = "add_or_remove"
    model: str | None = None
    batch_size: int | None = None
    steps: int | None = None
    assumed: tuple[str, ...] = ()
    rows_per_unit: int = 1
    most_parameters: float = math.inf


def answer(fitted: FittedLaw, request: Request, cache: pathlib.Path | None, certify=certified) -> dict:
    """The best configuration and its neighbourhood, as `dpgemma plan --json` prints it.

    Args:
      cache: folder where noise and certificates are kept; None for none.
      certify: the noise of one configuration by the accountant, as noise.certified gives it.

    Raises:
      InputError: no configuration of this budget lies where the law can be asked.
    """
    start = time.perf_counter()
    budget, law = request.budget, fitted.law
    noise = CorrectedNoise(budget.epsilon, budget.delta, cache)
    sizes = sizes_to_search(fitted, request)
    how = {"extrapolate": request.extrapolate, "batch_size": request.batch_size, "steps": request.steps}
    found = optimum.search(law, noise, budget, sizes, **how)
    if noise.correct_around(found.steps[0], found.batch_size[0] / budget.num_units):
        found = optimum.search(law, noise, budget, sizes, **how)
    best = optimum.preferred(found)
    searched = time.perf_counter() - start

    names = _names(fitted, request)
    chosen = _configuration(names, found, best)
    proof = certificate(budget, chosen["expected_batch_size"], chosen["steps"], request.relation, cache, certify)
    ratio = proof.noise_multiplier / chosen["expected_batch_size"]
    effective = float(law.effective(ratio, chosen["expected_batch_size"], chosen["parameters"]))
    counted = max(effective, law.domain.ratio[0]) if not request.extrapolate else effective
    place = (chosen["parameters"], chosen["steps"], counted)
    beyond = law.domain.leaves(*place)
    error = validation.expected_error(fitted.errors, law, *place)
    rate = float(law.learning_rate(*place))

    notes = [*request.assumed, *(f"extrapolated: {text}" for text in beyond)]
    if fitted.left_out:
        further = f", and {len(fitted.left_out) - 1} more" if len(fitted.left_out) > 1 else ""
        notes.append(f"a run is not fitted: {fitted.left_out[0]}{further}")
    if effective < law.domain.ratio[0]:
        notes.append(
            f"the noise-batch ratio {effective:.3g} is below the least that was measured, {law.domain.ratio[0]:.3g}, at"
            " which the loss is predicted: a bound from above"
        )
    if chosen["expected_batch_size"] > law.sampling.largest_batch:
        notes.append(
            f"the batch is larger than all that were measured, {law.sampling.largest_batch:g}: the noise of its"
            " sampling is taken to fall with it as it did up to there"
        )
    ends = {"model size": (place[0], law.domain.parameters[1]), "number of steps": (place[1], law.domain.steps[1])}
    notes += [
        f"the {name} is at the end of what was measured, {end:.4g}: beyond it there may be better ones (`extrapolate`)"
        for name, (value, end) in ends.items()
        if _AT_END * end <= value <= end
    ]
    # Where the least noise that is sensible gives less than the budget allows, that is what can be trained for.
    target = budget.epsilon if proof.epsilon > 0.99 * budget.epsilon else round_up(proof.epsilon)
    as_forms = []
    if not law.domain.contains(*place):
        for form, alone in fitted.forms.items():
            other = optimum.search(alone, noise, budget, sizes, **how)
            place_of_other = _configuration(names, other, optimum.preferred(other))
            as_forms.append({"form": form, **place_of_other, "predicted_loss": float(other.loss[0])})
    return {
        **chosen,
        "forms": as_forms,
        "epochs": chosen["steps"] * chosen["expected_batch_size"] / budget.num_units,
        "command": _command(chosen, request, target, rate),
        "noise_multiplier": proof.noise_multiplier,
        "noise_batch_ratio": ratio,
        "effective_ratio": effective,
        "learning_rate": rate,
        "predicted_loss": float(law.loss(*place)),
        "prediction_error": error,
        "extrapolated": bool(beyond),
        "notes": notes,
        "epsilon": proof.epsilon,
        "delta": budget.delta,
        "num_units": budget.num_units,
        "compute": budget.compute,
        "sequence_length": budget.sequence_length,
        "sampling_probability": chosen["expected_batch_size"] / budget.num_units,
        "neighbouring_relation": request.relation,
        "near_optimal": neighbours(names, found),
        "marginal_values": optimum.marginal_values(lowest_loss(fitted, request, cache), budget),
        "non_private": non_private(fitted, budget),
        "search_seconds": searched,
    }


def lowest_loss(fitted: FittedLaw, request: Request, cache: pathlib.Path | None) -> Callable[[Budget], float]:
    """The lowest loss of any budget under a request, with noise that is estimated alone."""
    how = {"extrapolate": request.extrapolate, "batch_size": request.batch_size, "steps": request.steps}
    sizes = sizes_to_search(fitted, request)

    @functools.cache
    def surface(epsilon: float, delta: float) -> NoiseSurface:
        return NoiseSurface(epsilon, delta, cache, estimate)

    def of(budget: Budget) -> float:
        noise = surface(budget.epsilon, budget.delta)
        return float(optimum.search(fitted.law, noise, budget, sizes, **how).loss[0])

    return of


def sizes_to_search(fitted: FittedLaw, request: Request) -> np.ndarray:
    """Sizes that have a name, or all in between; with extrapolation also the named presets beyond."""
    if request.any_size and request.model is None:
        low, high = fitted.law.domain.parameters
        sizes = np.geomspace(low, optimum.BELIEVED * high if request.extrapolate else high, 100)
    else:
        sizes = np.array(sorted(_names(fitted, request)))
    return small_enough(sizes, request)


def small_enough(sizes: np.ndarray, request: Request) -> np.ndarray:
    """Those of the sizes that the request allows.

    Raises:
      InputError: there are none.
    """
    kept = sizes[sizes <= request.most_parameters]
    if not len(kept):
        raise InputError(
            f"`memory` holds a model of {request.most_parameters:.3g} parameters at most, and the smallest of this law"
            f" has {sizes.min():.3g}: give more, or another law"
        )
    return kept


def _names(fitted: FittedLaw, request: Request) -> dict[float, str]:
    names = {float(size): name for name, size in fitted.sizes.items()}
    if request.extrapolate:
        from dpgemma.gemma.presets import PRESETS
        from experiments.sweep.checks import parameters

        names = {float(parameters(name)): name for name in PRESETS} | names
    if request.model is None:
        return names
    chosen = {size: name for size, name in names.items() if name == request.model}
    if not chosen:
        raise InputError(
            f"`model`={request.model} is none that the law knows: choose one of {', '.join(names.values())}"
            + ("" if request.extrapolate else ", or allow extrapolation")
        )
    return chosen


def _command(chosen: dict, request: Request, epsilon: float, rate: float) -> str | None:
    """The training of a plan, with a constant rate as the law's runs had; None where its model has no name in this
    package.

    Args:
      epsilon: that the plan's noise gives, below the budget's where that asks for hardly any noise.
    """
    from dpgemma.gemma.presets import BLOCK, PRESETS

    if chosen["model"] not in PRESETS and not chosen["model"].startswith(BLOCK):
        return None
    budget, rows = request.budget, request.rows_per_unit
    settings = {
        "model": chosen["model"], "sequence_length": budget.sequence_length // rows,
        "batch_size": chosen["expected_batch_size"], "steps": chosen["steps"], "learning_rate": f"{rate:.3g}",
        "schedule": "constant", "epsilon": f"{min(budget.epsilon, epsilon):g}", "delta": f"{budget.delta:g}",
        "neighbouring_relation": request.relation,
    }  # fmt: skip
    if rows > 1:
        settings |= {"privacy_unit": "user", "user_field": "FIELD", "rows_per_unit": rows}
    return "dpgemma train --data=FILE " + " ".join(f"--{name}={value}" for name, value in settings.items())


def without_privacy(fitted: FittedLaw, compute: float, assumed: tuple[str, ...] = ()) -> dict:
    """What is best for a compute budget where nobody's privacy has to be kept."""
    budget = Budget(compute, 1, 1.0, 0.5, fitted.sequence_length)  # of which the compute alone counts
    return {"epsilon": math.inf, "compute": compute, "notes": list(assumed), "non_private": non_private(fitted, budget)}


def _configuration(names: dict[float, str], found: Candidates, i: int) -> dict:
    size = float(found.parameters[i])
    return {
        "model": names.get(size, f"{size:.4g} parameters"),
        "parameters": round(size),
        "expected_batch_size": max(1, round(float(found.batch_size[i]))),
        "steps": max(1, round(float(found.steps[i]))),
    }


def neighbours(names: dict[float, str], found: Candidates) -> list[dict]:
    """Configurations within 1 % of the lowest loss: the best first, one for each model and doubling of the batch."""
    near, listed, seen = optimum.near_optimal(found), [], set()
    for i in range(len(near)):
        key = near.parameters[i], round(math.log2(near.batch_size[i]))
        if key not in seen:
            seen.add(key)
            listed.append(
                _configuration(names, near, i)
                | {"noise_multiplier": float(near.noise_multiplier[i]), "predicted_loss": float(near.loss[i])}
            )
    return listed[:_MOST_NEIGHBOURS]


def non_private(fitted: FittedLaw, budget: Budget) -> dict:
    """What would be best for the same compute without any privacy, by Chinchilla's form."""
    parameters, tokens = fitted.non_private.optimum(budget.compute)
    low, high = fitted.law.domain.parameters
    longest = fitted.law.domain.steps[1] * fitted.physical_batch * fitted.sequence_length
    return {
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
        "predicted_loss": float(fitted.non_private.loss(parameters, tokens)),
        "extrapolated": not (low <= parameters <= high and tokens <= longest),
    }


def certificate(
    budget: Budget, batch_size: int, steps: int, relation: str, cache: pathlib.Path | None, certify
) -> Certified:
    """The winner's noise by the accountant, kept for the next time that it is asked for."""
    if batch_size > budget.num_units:
        raise InputError("the batch is larger than the number of units: raise `num_units` or lower `compute`")
    key = json.dumps([2, int(budget.num_units), batch_size, steps, budget.epsilon, budget.delta, relation])
    path = None if cache is None else cache / f"certified_{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    stored = user_cache.read(path) if path else {}
    if stored.get("key") == key:
        with contextlib.suppress(KeyError, TypeError):
            return Certified(**stored["certified"])
    proof = certify(int(budget.num_units), batch_size, steps, budget.epsilon, budget.delta, relation)
    if path is not None:
        with contextlib.suppress(OSError):
            user_cache.write(path, {"key": key, "certified": dataclasses.asdict(proof)})
    return proof


def text(result: dict) -> str:
    """The answer for a terminal."""
    error = result["prediction_error"]
    trust = "never tested this far" if error is None else f"within {100 * error:.1f} % nine times out of ten"
    lines = [
        f"model                 {result['model']} ({result['parameters']} parameters)",
        f"expected batch        {result['expected_batch_size']} of {result['num_units']:g} units",
        f"steps                 {result['steps']}, which draw each unit {result['epochs']:.3g} times",
        f"noise multiplier      {result['noise_multiplier']:.5g} (epsilon {result['epsilon']:.5g} at delta"
        f" {result['delta']:g}, certified)",
        f"noise-batch ratio     {result['noise_batch_ratio']:.4g}"
        + (
            ""
            if result["effective_ratio"] == result["noise_batch_ratio"]
            else f" (with the noise of sampling {result['effective_ratio']:.4g})"
        ),
        f"learning rate         {result['learning_rate']:.3g}",
        f"predicted loss        {result['predicted_loss']:.4f} nats per token"
        f" ({trust}){' EXTRAPOLATED' if result['extrapolated'] else ''}",
        *(f"note                  {note}" for note in result["notes"]),
        "",
        "within 1 % of the lowest loss (of which the smallest model is planned; the noise here is an estimate)",
        f"  {'model':<16} {'batch':>9} {'steps':>9} {'noise':>9} {'loss':>8}",
    ]
    lines += [
        f"  {c['model']:<16} {c['expected_batch_size']:>9} {c['steps']:>9} {c['noise_multiplier']:>9.4g}"
        f" {c['predicted_loss']:>8.4f}"
        for c in result["near_optimal"]
    ]
    if result["forms"]:
        lines += ["", "beyond the data a law is a form: what each would choose by itself"]
        lines += [
            f"  {c['form']:<16} {c['model']:<16} {c['expected_batch_size']:>9} {c['steps']:>9}"
            f" {c['predicted_loss']:>8.4f}"
            for c in result["forms"]
        ]
    gains = {"compute": "compute", "epsilon": "epsilon", "num_units": "the number of units"}
    lines += ["", "what doubling one budget would take off the loss"]
    for name, value in result["marginal_values"].items():
        lines.append(f"  {gains[name]:<20} {'outside of the data' if math.isnan(value) else f'{100 * value:.2f} %'}")
    if result["command"]:
        lines += ["", "to train it, with a constant rate as the runs of the law had", f"  {result['command']}"]
    return "\n".join([*lines, "", text_without_privacy(result)])


def text_without_privacy(result: dict) -> str:
    """What the same compute would give without privacy, for a terminal."""
    clean = result["non_private"]
    return (
        f"without privacy {result['compute']:.3g} operations would go to {clean['parameters']:.3g} parameters and"
        f" {clean['tokens']:.3g} tokens: loss {clean['predicted_loss']:.4f}"
        + (" (extrapolated)" if clean["extrapolated"] else "")
    )
