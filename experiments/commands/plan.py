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

DESCRIPTION = (
    "Find the best model, batch and number of steps for a compute, a privacy and a data budget, by a scaling law; or,"
    " with --topology, what a run needs on a machine."
)


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.number(
        "compute", None, "Floating-point operations to spend: 6 x parameters x batch x tokens x steps.", fv
    )
    command_flags.count("num_units", None, "Number of privacy units that there are.", fv)
    command_flags.number("epsilon", None, "Target epsilon.", fv)
    command_flags.number("delta", None, "Target delta.", fv)
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
        for name in ("compute", "law", "any_size", "extrapolate", "figures"):
            if fv[name].present:
                raise InputError(f"--{name} belongs to a plan by a scaling law: drop it, or --topology")
        result = hardware.answer(fv)
        print(json.dumps(run_files.encode(result)) if fv.json else hardware.text(result))
        return 0
    for name in hardware.FLAGS:
        if fv[name].present:
            raise InputError(f"--{name} belongs to a plan for a machine: give --topology too, or drop it")
    for name in ("compute", "num_units", "epsilon", "delta"):
        if fv[name].value is None:
            raise InputError(f"--{name} is missing: a plan needs --compute, --num_units, --epsilon and --delta")
    if not 0 < fv.delta < 1:
        raise InputError(f"--delta must lie between 0 and 1, got {fv.delta:g}")
    if not 0 < fv.epsilon < math.inf:
        raise InputError(
            f"--epsilon must be positive and finite, got {fv.epsilon:g}: without privacy no noise has to be planned"
        )
    from experiments.laws import fitting
    from experiments.planning import plan
    from experiments.planning.optimum import Budget

    fitted = fitting.of_file(None if fv.law is None else pathlib.Path(fv.law))
    budget = Budget(fv.compute, fv.num_units, fv.epsilon, fv.delta, fitted.sequence_length)
    request = plan.Request(budget, fv.any_size, fv.extrapolate, fv.neighbouring_relation)
    result = plan.answer(fitted, request, user_cache.folder())
    result["notes"] = [as_flags(note) for note in result["notes"]]
    if fv.figures:
        from experiments.figures import page

        result["figures"] = str(page.write(fitted, budget, pathlib.Path(fv.figures)))
    # JSON has no NaN: what lies outside of the data is null.
    clean = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in result["marginal_values"].items()}
    print(json.dumps(run_files.encode(result | {"marginal_values": clean})) if fv.json else plan.text(result))
    return 0
