"""dpgemma plan: the configuration to train under a compute, a privacy and a data budget, by a scaling law; or what a
run needs on a machine (hardware.py).
"""

import dataclasses
import json
import math
import pathlib

from absl import flags

from accounting import run_files
from accounting.errors import InputError, as_flags
from accounting.mechanism import RELATIONS, ZERO_OUT
from dpgemma import user_cache
from dpgemma.commands import command_flags
from experiments.commands import hardware
from experiments.planning import inverse, plan, published_law, published_plan
from experiments.planning.optimum import Budget

# Flags of a plan for a machine that fix something of a plan by a law too.
_OF_BOTH = ("model", "batch_size", "steps")

# In float32: parameters, both moments of Adam, the sum of gradients, the gradient of one row.
BYTES_PER_PARAMETER = 20

DESCRIPTION = (
    "Find the best model, batch and number of steps for a compute, a privacy and a data budget, by a scaling law; or,"
    " with --topology, what a run needs on a machine."
)


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.number(
        "compute",
        None,
        "Floating-point operations to spend: 6 x parameters x batch x tokens x steps.",
        fv,
        "give operations such as 1e20, or --chips=h100:8 --hours=72",
    )
    command_flags.string(
        "chips", None, "In place of --compute, with --hours: chips by kind and number, such as h100:8 or v6e:4x4.", fv
    )
    command_flags.number("hours", None, "How long the chips of --chips are there.", fv)
    command_flags.number("mfu", 0.4, "The share of their peak that a run reaches, which nobody knows beforehand.", fv)
    command_flags.count("num_units", None, "Number of privacy units that there are.", fv)
    command_flags.number("epsilon", None, "Target epsilon.", fv)
    command_flags.number("delta", None, "Target delta; by default num_units to the power of -1.1.", fv)
    command_flags.choice(
        "neighbouring_relation", ZERO_OUT, RELATIONS, "Neighbouring data sets, for which the noise is certified.", fv
    )
    command_flags.string(
        "law",
        None,
        "law.json of a sweep, or a results table (.csv, .parquet) to fit first; by default the law of this package, of"
        " models below 1M parameters. published: a law of table 2 of arXiv 2501.18914, of 4.5M to 335M parameters.",
        fv,
    )
    command_flags.number(
        "loss", None, "The least of what is not given, --epsilon, --num_units or --compute, that reaches this loss.", fv
    )
    command_flags.count(
        "rows_per_unit", 1, "Rows of each privacy unit, such as a person's: as many times the compute of a row.", fv
    )
    command_flags.number(
        "memory",
        None,
        "GiB of the devices that one model is divided among: only models are considered whose state fits, parameters,"
        " both moments of Adam, the sum of gradients and those of one row in float32; activations come on top.",
        fv,
    )
    command_flags.string("init_from", None, "Not answered yet: laws of training from scratch say nothing of it.", fv)
    command_flags.switch("any_size", "Search model sizes between those that were trained too.", fv)
    command_flags.switch("extrapolate", "Allow sizes, steps and noise outside of what the law was fitted to.", fv)
    command_flags.string(
        "figures", None, "Also draw the scaling figures for this law into a new folder, with a page.", fv
    )
    hardware.define_flags(fv)
    command_flags.switch("json", "Print one JSON object.", fv)


def run(fv: flags.FlagValues) -> int:
    if fv.topology:
        for name in (
            "compute",
            "chips",
            "hours",
            "mfu",
            "law",
            "loss",
            "rows_per_unit",
            "memory",
            "init_from",
            "any_size",
            "extrapolate",
            "figures",
        ):
            if fv[name].present:
                raise InputError(f"--{name} belongs to a plan by a scaling law: drop it, or --topology")
        result = hardware.answer(fv)
        print(json.dumps(run_files.encode(result)) if fv.json else hardware.text(result))
        return 0
    return _by_a_law(fv)


def _by_a_law(fv: flags.FlagValues) -> int:
    published = fv.law == published_law.NAME
    _check(fv, published)
    from experiments.laws import fitting

    law = published_law.load() if published else fitting.of_file(None if fv.law is None else pathlib.Path(fv.law))
    length = (fv.sequence_length or published_law.SEQUENCE_LENGTH) if published else law.sequence_length
    budget, assumed = _budget(fv, length)
    if math.isinf(budget.epsilon):
        return _without_privacy(fv, law, budget.compute, assumed)
    fixed = {
        "model": fv.model, "batch_size": fv.batch_size, "steps": fv.steps, "rows_per_unit": fv.rows_per_unit,
        "most_parameters": math.inf if fv.memory is None else fv.memory * 2**30 / BYTES_PER_PARAMETER,
    }  # fmt: skip
    request = plan.Request(
        budget, fv.any_size, fv.extrapolate, fv.neighbouring_relation, assumed=tuple(assumed), **fixed
    )
    if fv.loss is not None:
        request = _least(fv, law, request)
    if published:
        result = published_plan.answer(law, request, user_cache.folder())
    else:
        result = _answer_of_a_sweep(fv, law, request)
    result["notes"] = [as_flags(note) for note in result["notes"]]
    text = published_plan.text if published else plan.text
    # JSON has no NaN: what lies outside of the data is null.
    clean = {
        k: None if isinstance(v, float) and math.isnan(v) else v for k, v in result.get("marginal_values", {}).items()
    }
    shown = result | ({"marginal_values": clean} if clean else {})
    print(json.dumps(run_files.encode(shown)) if fv.json else text(result))
    return 0


def _answer_of_a_sweep(fv: flags.FlagValues, fitted, request: plan.Request) -> dict:
    try:
        result = plan.answer(fitted, request, user_cache.folder())
    except InputError as error:
        beyond = request.budget.compute > 6 * fitted.sequence_length * fitted.law.domain.parameters[1] * 1e6
        if fv.law is None and beyond:
            raise InputError(
                f"{error}. For models of 4.5M to 335M parameters there is a law of published runs: --law=published"
            ) from None
        raise
    if fv.figures:
        from experiments.figures import page

        result["figures"] = str(page.write(fitted, request.budget, pathlib.Path(fv.figures)))
    return result


def _check(fv: flags.FlagValues, published: bool) -> None:
    """Refuses flags that are impossible, or do not go together, before anything is searched."""
    for name in hardware.FLAGS:
        of_both = name in _OF_BOTH or (published and name == "sequence_length")
        if not of_both and fv[name].present:
            raise InputError(f"--{name} belongs to a plan for a machine: give --topology too, or drop it")
    if published:
        for name in ("figures", "any_size"):
            if fv[name].present:
                raise InputError(f"--{name} is not for --law=published, which is no law of a sweep: drop it")
        if fv.sequence_length is not None and fv.sequence_length < 1:
            raise InputError(f"--sequence_length must be at least 1, got {fv.sequence_length}")
    if fv.init_from is not None:
        raise InputError(
            "there is no law of fine-tuning: what the laws say holds for training from random parameters. Drop"
            " --init_from to plan that; or ask dpgemma account what noise an epsilon needs with a batch and a number of"
            " steps of your choice, and dpgemma plan --topology what the run needs on a machine"
        )
    if fv.memory is not None and not 0 < fv.memory < math.inf:
        raise InputError(f"--memory must be a positive number of GiB, got {fv.memory:g}")
    has_compute = fv.compute is not None or fv.chips is not None
    missing = [name for name in ("num_units", "epsilon") if fv[name].value is None]
    if fv.loss is None:
        if missing:
            raise InputError(
                f"--{missing[0]} is missing: a plan needs --compute (or --chips and --hours), --num_units, --epsilon"
            )
    elif len(missing) + (not has_compute) != 1:
        raise InputError(
            "--loss asks for the least of one budget: leave out one of --epsilon, --num_units and --compute, and give"
            " the other two"
        )
    elif not 0 < fv.loss < math.inf:
        raise InputError(f"--loss must be positive and finite, got {fv.loss:g}")
    if fv.num_units is not None and fv.num_units < 1:
        raise InputError(f"--num_units must be at least 1, got {fv.num_units}")
    if fv.batch_size is not None and not 1 <= fv.batch_size <= (fv.num_units or math.inf):
        raise InputError(f"--batch_size must lie between 1 and the number of units, got {fv.batch_size}")
    if fv.rows_per_unit < 1:
        raise InputError(f"--rows_per_unit must be at least 1, got {fv.rows_per_unit}")
    if fv.steps is not None and fv.steps < 1:
        raise InputError(f"--steps must be at least 1, got {fv.steps}")
    if fv.batch_size is not None and fv.steps is not None:
        raise InputError("with compute, model and --batch_size the steps follow: drop --steps or --batch_size")
    if fv.epsilon is not None and not fv.epsilon > 0:
        raise InputError(f"--epsilon must be positive, got {fv.epsilon:g}")
    if fv.epsilon is not None and math.isinf(fv.epsilon):
        if published:
            raise InputError("the published table has no run without noise: --epsilon=inf needs another --law")
        for name in ("model", "batch_size", "steps", "any_size", "loss"):
            if fv[name].present:
                raise InputError(f"--{name} has no meaning with --epsilon=inf, whose answer is in closed form: drop it")


def _budget(fv: flags.FlagValues, sequence_length: int) -> tuple[Budget, list[str]]:
    """What may be spent, and what that assumes; a one stands where --loss asks for the least."""
    if fv.loss is not None and fv.compute is None and fv.chips is None:
        compute, assumed = 1.0, []
    else:
        compute, assumed = _compute(fv)
    delta, num_units = fv.delta, fv.num_units
    if delta is None and num_units is None:
        raise InputError("--delta is missing: without --num_units no rule gives it")
    if delta is None and not math.isinf(fv.epsilon or 1.0):
        delta = float(num_units) ** -1.1
        assumed.append(f"delta is {delta:.3g}, the number of units to the power of -1.1 (`delta`)")
    if delta is not None and not 0 < delta < 1:
        given = f"got {delta:g}" if fv.delta is not None else f"and {num_units} units give {delta:g}: give another"
        raise InputError(f"--delta must lie between 0 and 1, {given}")
    if delta is not None and num_units is not None and delta > 1 / num_units:
        assumed.append(
            f"delta is above 1 / num_units: it allows that some units are shown whole; {1 / num_units:.3g}"
            " at most is usual"
        )
    if fv.rows_per_unit > 1:
        assumed.append(
            f"a unit is {fv.rows_per_unit} rows, whose mean gradient is clipped: the law, of units of one row, is taken"
            " to hold for it, and its compute is that of all its rows"
        )
    return Budget(compute, num_units or 1.0, fv.epsilon or 1.0, delta, sequence_length * fv.rows_per_unit), assumed


def _without_privacy(fv: flags.FlagValues, fitted, compute: float, assumed: list[str]) -> int:
    result = plan.without_privacy(fitted, compute, tuple(map(as_flags, assumed)))
    lines = [*(f"note                  {note}" for note in result["notes"]), plan.text_without_privacy(result)]
    print(json.dumps(run_files.encode(result)) if fv.json else "\n".join(lines))
    return 0


def _least(fv: flags.FlagValues, law, request: plan.Request) -> plan.Request:
    """The request with the least of the budget that was left out which reaches --loss."""
    missing = [name for name in ("epsilon", "num_units") if fv[name].value is None]
    what = missing[0] if missing else "compute"
    if isinstance(law, published_law.PublishedLaw):
        domain, lowest = law.domain, published_plan.lowest_loss(law, request, user_cache.folder())
    else:
        domain, lowest = law.law.domain, plan.lowest_loss(law, request, user_cache.folder())
    low, high = inverse.ends(what, domain, request.budget.num_units, request.budget.sequence_length)
    found = inverse.least(what, fv.loss, request.budget, lowest, low, high)
    if what == "num_units":
        found = dataclasses.replace(found, num_units=math.ceil(found.num_units))
    value = getattr(found, what)
    said = f"{value:.0f}" if what == "num_units" else f"{value:.4g}"
    note = f"{said} is about the least {inverse.NAMES[what]} whose plan reaches a loss of {fv.loss:g}, by this law"
    return dataclasses.replace(request, budget=found, assumed=(note, *request.assumed))


def _compute(fv: flags.FlagValues) -> tuple[float, list[str]]:
    """Operations that may be spent, and what that assumes."""
    if (fv.compute is None) == (fv.chips is None):
        raise InputError("say what may be spent: --compute, or --chips and --hours")
    if fv.compute is not None:
        if fv.hours is not None or fv["mfu"].present:
            raise InputError("--hours and --mfu belong to --chips: drop them, or --compute")
        return fv.compute, []
    if fv.hours is None or not 0 < fv.hours < math.inf:
        raise InputError("--chips needs --hours, a positive number")
    if not 0 < fv.mfu <= 1:
        raise InputError(f"--mfu must lie between 0 and 1, got {fv.mfu:g}")
    from experiments.hardware import machines

    topology = machines.accelerators(fv.chips)
    compute = topology.chips * topology.chip.flops * fv.mfu * fv.hours * 3600
    return compute, [
        f"{topology.chips} chips of {topology.chip.flops:.3g} operations a second at peak, of which {fv.mfu:.0%} are"
        f" assumed (`mfu`), give {compute:.3g} in {fv.hours:g} hours"
    ]
