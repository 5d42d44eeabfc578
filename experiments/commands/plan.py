"""dpgemma plan: the configuration to train under a compute, a privacy and a data budget, by a scaling law; or what a
run needs on a machine (hardware.py).
"""

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

# Flags of a plan for a machine that fix something of a plan by a law too.
_OF_BOTH = ("model", "batch_size", "steps")

DESCRIPTION = (
    "Find the best model, batch and number of steps for a compute, a privacy and a data budget, by a scaling law; or,"
    " with --topology, what a run needs on a machine."
)


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.number(
        "compute", None, "Floating-point operations to spend: 6 x parameters x batch x tokens x steps.", fv
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
        "law.json of a sweep, or a results table (.csv, .parquet) to fit first; by default the law of this package.",
        fv,
    )
    command_flags.switch("any_size", "Search model sizes between those that were trained too.", fv)
    command_flags.switch("extrapolate", "Allow sizes, steps and noise outside of what the law was fitted to.", fv)
    command_flags.string(
        "figures", None, "Also draw the scaling figures for this law into a new folder, with a page.", fv
    )
    hardware.define_flags(fv)
    command_flags.switch("json", "Print one JSON object.", fv)


def run(fv: flags.FlagValues) -> int:
    if fv.topology:
        for name in ("compute", "chips", "hours", "mfu", "law", "any_size", "extrapolate", "figures"):
            if fv[name].present:
                raise InputError(f"--{name} belongs to a plan by a scaling law: drop it, or --topology")
        result = hardware.answer(fv)
        print(json.dumps(run_files.encode(result)) if fv.json else hardware.text(result))
        return 0
    for name in hardware.FLAGS:
        if name not in _OF_BOTH and fv[name].present:
            raise InputError(f"--{name} belongs to a plan for a machine: give --topology too, or drop it")
    for name in ("num_units", "epsilon"):
        if fv[name].value is None:
            raise InputError(
                f"--{name} is missing: a plan needs --compute (or --chips and --hours), --num_units, --epsilon"
            )
    if fv.num_units < 1:
        raise InputError(f"--num_units must be at least 1, got {fv.num_units}")
    if fv.batch_size is not None and not 1 <= fv.batch_size <= fv.num_units:
        raise InputError(f"--batch_size must lie between 1 and the number of units, got {fv.batch_size}")
    if fv.steps is not None and fv.steps < 1:
        raise InputError(f"--steps must be at least 1, got {fv.steps}")
    if fv.batch_size is not None and fv.steps is not None:
        raise InputError("with compute, model and --batch_size the steps follow: drop --steps or --batch_size")
    compute, assumed = _compute(fv)
    delta = fv.delta
    if delta is None and math.isfinite(fv.epsilon):
        delta = float(fv.num_units) ** -1.1
        assumed.append(f"delta is {delta:.3g}, the number of units to the power of -1.1 (`delta`)")
    if delta is not None and not 0 < delta < 1:
        given = f"got {delta:g}" if fv.delta is not None else f"and {fv.num_units} units give {delta:g}: give another"
        raise InputError(f"--delta must lie between 0 and 1, {given}")
    if delta is not None and delta > 1 / fv.num_units:
        assumed.append(
            f"delta is above 1 / num_units: it allows that some units are shown whole; {1 / fv.num_units:.3g}"
            " at most is usual"
        )
    if not fv.epsilon > 0:
        raise InputError(f"--epsilon must be positive, got {fv.epsilon:g}")
    from experiments.laws import fitting
    from experiments.planning import plan
    from experiments.planning.optimum import Budget

    fitted = fitting.of_file(None if fv.law is None else pathlib.Path(fv.law))
    if math.isinf(fv.epsilon):
        for name in ("model", "batch_size", "steps", "any_size"):
            if fv[name].present:
                raise InputError(f"--{name} has no meaning with --epsilon=inf, whose answer is in closed form: drop it")
        result = plan.without_privacy(fitted, compute, tuple(map(as_flags, assumed)))
        lines = [*(f"note                  {note}" for note in result["notes"]), plan.text_without_privacy(result)]
        print(json.dumps(run_files.encode(result)) if fv.json else "\n".join(lines))
        return 0
    budget = Budget(compute, fv.num_units, fv.epsilon, delta, fitted.sequence_length)
    fixed = {"model": fv.model, "batch_size": fv.batch_size, "steps": fv.steps}
    request = plan.Request(
        budget, fv.any_size, fv.extrapolate, fv.neighbouring_relation, assumed=tuple(assumed), **fixed
    )
    result = plan.answer(fitted, request, user_cache.folder())
    result["notes"] = [as_flags(note) for note in result["notes"]]
    if fv.figures:
        from experiments.figures import page

        result["figures"] = str(page.write(fitted, budget, pathlib.Path(fv.figures)))
    # JSON has no NaN: what lies outside of the data is null.
    clean = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in result["marginal_values"].items()}
    print(json.dumps(run_files.encode(result | {"marginal_values": clean})) if fv.json else plan.text(result))
    return 0


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

    try:
        topology = machines.parse(fv.chips, 1)
    except InputError as error:
        raise InputError(str(error).replace("`topology`", "`chips`")) from None
    if topology.is_at_hand:
        raise InputError("--chips names accelerators, such as h100:8: for this computer give --compute")
    compute = topology.chips * topology.chip.flops * fv.mfu * fv.hours * 3600
    return compute, [
        f"{topology.chips} chips of {topology.chip.flops:.3g} operations a second at peak, of which {fv.mfu:.0%} are"
        f" assumed (`mfu`), give {compute:.3g} in {fv.hours:g} hours"
    ]
