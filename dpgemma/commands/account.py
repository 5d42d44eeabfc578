"""dpgemma account: solves a privacy budget for the one quantity that is left out, or adds up runs on the same data."""

import json
import math
import pathlib
import sys
from typing import TYPE_CHECKING, Any

from absl import flags

from accounting.errors import InputError
from accounting.mechanism import ADD_OR_REMOVE, FIXED, POISSON, RELATIONS, SAMPLERS, Mechanism, dp_sgd, histogram
from dpgemma import choices
from dpgemma.commands import command_flags

if TYPE_CHECKING:
    from accounting.accountant import Accountant
    from accounting.risk import Risk

DESCRIPTION = "Solve a privacy budget: leave out one of epsilon, noise_multiplier, steps, batch_size and num_units."

_QUANTITIES = ("epsilon", "noise_multiplier", "steps", "batch_size", "num_units")
_RESULT_NAMES = {"batch_size": "expected_batch_size"}


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.number("epsilon", None, "Target epsilon.", fv)
    command_flags.number("delta", 1e-5, "Target delta; with --compose by default that of the runs.", fv)
    command_flags.number("noise_multiplier", None, "Noise on the sum, in clip norms.", fv)
    command_flags.count("steps", None, "Number of updates.", fv)
    command_flags.count(
        "batch_size", None, "EXPECTED Poisson batch, in units (with --user_sampling=example in rows).", fv
    )
    command_flags.count("num_units", None, "Number of privacy units.", fv)
    command_flags.choice(
        "user_sampling", choices.USER, choices.USER_SAMPLING, "Whether users are drawn, or each of their rows.", fv
    )
    command_flags.count("rows_per_unit", None, "Rows of every user that are drawn with --user_sampling=example.", fv)
    command_flags.count("max_batch_size", None, "Truncation cap of a batch; omitted, plain Poisson sampling.", fv)
    command_flags.count("batch_multiple", None, "Plan the cap, a multiple of this, at a cost of 0.1 % of delta.", fv)
    command_flags.choice("neighbouring_relation", ADD_OR_REMOVE, RELATIONS, "Neighbouring data sets.", fv)
    command_flags.choice(
        "sampler", POISSON, SAMPLERS, "How batches are formed; fixed is what no sampling at all would cost.", fv
    )
    command_flags.number(
        "histogram_noise",
        None,
        "Noise on the counts of a histogram that is released besides, in units, as train has it.",
        fv,
    )
    command_flags.string(
        "solve_for_risk",
        None,
        "In the place of --epsilon, the most that an attack may reach: advantage:A (of telling whether a unit took"
        " part), detection:RATE@FALSE_POSITIVE_RATE, or inference:RATE@PRIOR (right guesses about what a unit holds,"
        " where PRIOR are right without it).",
        fv,
    )
    command_flags.switch("tables", "Also say what epsilon means: owners of several units, attacks, other deltas.", fv)
    command_flags.string(
        "plot", None, "Write epsilon over the steps and the trade-off curve to this .svg, .png or .pdf file.", fv
    )
    command_flags.number(
        "trials",
        None,
        "Expected number of random-search trials of which only the best is released, chosen by no loss on the units"
        " themselves.",
        fv,
    )
    command_flags.choice(
        "trials_distribution", "geometric", choices.TRIALS, "Distribution from which the number of trials is drawn.", fv
    )
    command_flags.string(
        "compose", None, "Folders of runs on the same data, separated by commas: epsilon of all together.", fv
    )
    command_flags.switch("json", "Print one JSON object.", fv)


def run(fv: flags.FlagValues) -> int:
    if not 0 < fv.delta < 1:
        raise InputError(f"--delta must lie between 0 and 1, got {fv.delta:g}")
    if fv.plot:
        from accounting.report import figures

        figures.check_format(pathlib.Path(fv.plot))
    return _compose(fv) if fv.compose else _plan(fv)


def _plan(fv: flags.FlagValues) -> int:
    given = {name: fv[name].value for name in _QUANTITIES}
    omitted = [name for name, value in given.items() if value is None]
    if fv.solve_for_risk is not None:
        if given["epsilon"] is not None or len(omitted) != 2 or fv.trials is not None:
            raise InputError(
                "--solve_for_risk stands in the place of --epsilon: leave that out, and one more of"
                f" {', '.join('--' + name for name in _QUANTITIES[1:])}, the one to solve for; and drop --trials"
            )
        omitted.remove("epsilon")
    elif len(omitted) != 1:
        raise InputError(
            f"leave out exactly one of {', '.join('--' + name for name in _QUANTITIES)}, the one to solve for; "
            + (f"{len(omitted)} are missing: {', '.join(omitted)}" if omitted else "all five are given")
        )
    for name in ("steps", "batch_size", "num_units"):
        value = given[name]
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if given["epsilon"] is not None and not given["epsilon"] > 0:
        raise InputError(f"--epsilon must be positive, got {given['epsilon']:g}")
    from accounting import risk, tuning
    from accounting.accountant import Accountant

    items = _items(fv)
    cap, noise = _cap(fv, given, items), fv.histogram_noise
    if noise is not None and fv.trials is not None:
        raise InputError("--trials has no proof for trials that release a histogram too: drop --histogram_noise")
    facts = (fv.delta, cap, fv.neighbouring_relation, fv.sampler, items, noise)
    wanted = None if fv.solve_for_risk is None else risk.Risk.of_text(fv.solve_for_risk)
    mechanism, also = solve(given, *facts, wanted)
    accountant = Accountant(mechanism, also=also)
    result = {
        **(
            {} if wanted is None else {"risk": fv.solve_for_risk, "reached": risk.reached(wanted, accountant, fv.delta)}
        ),
        **_bracket(accountant, fv.delta),
        "noise_multiplier": mechanism.noise_multiplier,
        "noise_batch_ratio": mechanism.noise_batch_ratio,
        "steps": mechanism.steps,
        "expected_batch_size": mechanism.expected_batch_size,
        "max_batch_size": mechanism.max_batch_size,
        "sampling_probability": mechanism.sampling_probability,
        "num_units": mechanism.num_units,
        **({"items_per_unit": items} if items > 1 else {}),
        **({} if noise is None else {"histogram_noise": noise}),
        "neighbouring_relation": mechanism.neighbouring_relation,
        "sampler": mechanism.scheme,
    }
    if fv.trials is not None:
        result["trials"] = {"mean": fv.trials, "distribution": fv.trials_distribution}
        result["epsilon_best_trial"] = tuning.random_search_epsilon(
            mechanism, fv.trials, fv.trials_distribution, fv.delta
        )
    _print(fv, result, accountant, given["epsilon"], solved=_RESULT_NAMES.get(omitted[0], omitted[0]))
    if result["delta"] > 1 / result["num_units"]:
        print(
            f"warning: delta is above 1/N = {1 / result['num_units']:.3g}: choose a delta well below it",
            file=sys.stderr,
        )
    return 0


def _items(fv: flags.FlagValues) -> int:
    """The rows of a unit that are drawn by themselves; 1 where units are drawn."""
    by_row = fv.user_sampling == choices.BY_EXAMPLE
    if by_row != (fv.rows_per_unit is not None):
        raise InputError(
            "--user_sampling=example and --rows_per_unit belong together: where users are drawn, epsilon does not"
            " depend on how many rows they have; give both, or neither"
        )
    return fv.rows_per_unit if by_row else 1


def _cap(fv: flags.FlagValues, given: dict[str, Any], items: int) -> int | None:
    """The truncation cap: none, the one given, or one that is planned."""
    if fv.batch_multiple is None:
        return fv.max_batch_size
    if fv.batch_multiple < 1 or fv.max_batch_size is not None:
        raise InputError("--batch_multiple must be at least 1, and plans the cap in the place of --max_batch_size")
    missing = [name for name in ("steps", "batch_size", "num_units") if given[name] is None]
    if missing:
        raise InputError(f"--batch_multiple plans a cap for a batch that is known: give --{missing[0]} too")
    from accounting.loss_distribution import truncation

    target = math.inf if given["epsilon"] is None else given["epsilon"]
    return truncation.plan_max_batch_size(
        given["num_units"] * items, given["batch_size"], given["steps"], target, fv.delta, multiple=fv.batch_multiple
    )


def solve(
    given: dict[str, Any],
    delta: float,
    cap: int | None,
    relation: str,
    sampler: str = POISSON,
    items: int = 1,
    histogram_noise: float | None = None,
    wanted: "Risk | None" = None,
) -> tuple[Mechanism, tuple[Mechanism, ...]]:
    """The mechanism with the omitted (None) quantity filled in, and what is released besides.

    Args:
      items: of every unit, which are drawn by themselves.
      wanted: a risk that stands in the place of the epsilon.
    """
    from accounting import calibration, risk

    mechanism, also = _known(given, cap, relation, sampler, items, histogram_noise)
    if wanted is not None:
        omitted = next(name for name in _QUANTITIES[1:] if given[name] is None)
        return risk.solved(mechanism, omitted, wanted, delta, also=also), also
    target = given["epsilon"]
    if given["noise_multiplier"] is None:
        mechanism = calibration.noise_multiplier(mechanism, target, delta, also=also)
    elif given["steps"] is None:
        mechanism = calibration.steps(mechanism, target, delta, also=also)
        if mechanism.steps == 0:
            raise InputError(f"even one step exceeds epsilon {target:g} at delta {delta:g}: raise --noise_multiplier")
    elif given["batch_size"] is None:
        mechanism = calibration.expected_batch_size(mechanism, target, delta, also=also)
    elif given["num_units"] is None:
        mechanism = calibration.num_units(mechanism, target, delta, also=also)
    return mechanism, also


def _known(
    given: dict[str, Any], cap: int | None, relation: str, sampler: str, items: int, histogram_noise: float | None
) -> tuple[Mechanism, tuple[Mechanism, ...]]:
    """The mechanism with something in the place of the omitted quantity, and what is released besides."""
    from accounting import support

    if cap is not None and sampler == FIXED:
        raise InputError("a cap truncates Poisson batches: drop --max_batch_size under --sampler=fixed")
    units = given["num_units"] or 10 * given["batch_size"]
    mechanism = dp_sgd(
        num_units=units,
        expected_batch_size=given["batch_size"] or 1,
        max_batch_size=cap,
        noise_multiplier=1.0 if given["noise_multiplier"] is None else given["noise_multiplier"],
        clip_norm=1.0,
        steps=given["steps"] or 1,
        neighbouring_relation=relation,
        sampler=sampler,
        items_per_unit=items,
    )
    support.check(mechanism.sampling, relation)
    return mechanism, () if histogram_noise is None else (histogram(units, histogram_noise, relation),)


def _compose(fv: flags.FlagValues) -> int:
    given = [
        name for name in (*_QUANTITIES, "max_batch_size", "batch_multiple", "trials") if fv[name].value is not None
    ]
    optional = (
        "solve_for_risk",
        "histogram_noise",
        "neighbouring_relation",
        "sampler",
        "trials_distribution",
        "user_sampling",
        "rows_per_unit",
    )
    given += [name for name in optional if fv[name].present]
    if given:
        raise InputError(f"--compose takes everything from the runs' ledgers: drop --{given[0]}")
    from accounting import tuning
    from accounting.accountant import Accountant

    runs = tuning.runs([pathlib.Path(folder) for folder in fv.compose.split(",") if folder])
    deltas = {run.delta for run in runs.values()}
    if len(deltas) > 1 and not fv["delta"].present:
        raise InputError(
            f"the runs have different deltas ({', '.join(f'{d:g}' for d in sorted(deltas))}): say which with --delta"
        )
    delta = fv.delta if fv["delta"].present else deltas.pop()
    released = tuning.released(runs)
    accountant = tuning.accountant(runs)
    result = _bracket(accountant, delta)
    result["steps"] = accountant.steps
    result["statement"] = tuning.statement(runs, result["epsilon"], delta)
    result["runs"] = [
        {
            "workdir": str(folder),
            "run_id": run.declared["run_id"],
            "steps": run.steps,
            "steps_of_runs_before": run.steps - sum(mechanism.steps for mechanism in released[folder]),
            "noise_multiplier": run.planned.noise_multiplier,
            **({"histogram_noise": run.also[0].noise_multiplier} if run.also else {}),
            "sampling_probability": run.planned.sampling_probability,
            "epsilon": float(Accountant(run.mechanisms or run.planned, also=run.also).epsilon(delta, run.steps).upper),
            "deviations": run.deviations,
        }
        for folder, run in runs.items()
    ]
    _print(fv, result, accountant, None)
    return 0


def _bracket(accountant: "Accountant", delta: float) -> dict[str, Any]:
    bracket = accountant.epsilon(delta)
    return {
        "epsilon": float(bracket.upper),
        # A large epsilon may have no useful lower end.
        "epsilon_lower_numeric": float(bracket.lower) if bracket.lower > 0 or bracket.upper < 0.01 else None,
        "delta": delta,
        "cross_check": float(bracket.cross_check),
    }


def _print(
    fv: flags.FlagValues, result: dict[str, Any], accountant: "Accountant", target: float | None, solved: str = ""
) -> None:
    """The result as a table or as JSON, with the tables and the plot that were asked for."""
    from accounting import run_files
    from accounting.report import figures, tables

    meaning = tables.meaning(accountant, result["delta"]) if fv.tables or fv.plot else None
    if meaning is not None and fv.plot:
        points = figures.epsilon_points(accountant, result["delta"]) if meaning.profile is not None else []
        figures.save(pathlib.Path(fv.plot), points, target, meaning.profile)
    if fv.json:
        print(json.dumps(run_files.encode(result | (meaning.as_dict() if meaning is not None and fv.tables else {}))))
        return
    for name, value in result.items():
        if isinstance(value, list):
            for item in value:
                print(" ".join(f"{key} {_shown(key, part)}" for key, part in item.items()))
        else:
            print(f"{name:<24} {_shown(name, value)}{'   (solved)' if name == solved else ''}")
    if meaning is not None and fv.tables:
        print(
            ("" if fv.trials is None else "\nof a single trial, all of whose results may be seen:")
            + tables.text(meaning)
        )


def _shown(name: str, value: Any) -> str:
    from accounting import rounding

    if value is None:
        return "none"
    if isinstance(value, list):
        return "; ".join(value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(key, part)}" for key, part in value.items())
    if name.startswith("epsilon") and not name.endswith("numeric"):
        return rounding.upper(rounding.round_up(value), 10)
    if name == "delta":
        return repr(value)
    if name == "noise_multiplier":
        return rounding.upper(value)  # somebody may train with what is printed
    return f"{value:.6g}" if isinstance(value, float) else str(value)
