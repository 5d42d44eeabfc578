"""dpgemma account: solves a privacy budget for the one quantity that is left out."""

import json
import sys

from absl import flags

from accounting.errors import InputError
from accounting.mechanism import ADD_OR_REMOVE, RELATIONS
from dpgemma.commands import command_flags

DESCRIPTION = "Solve a privacy budget: leave out one of epsilon, noise_multiplier, steps, batch_size and num_units."

_QUANTITIES = ("epsilon", "noise_multiplier", "steps", "batch_size", "num_units")


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.number("epsilon", None, "Target epsilon.", fv)
    command_flags.number("delta", 1e-5, "Target delta.", fv)
    command_flags.number("noise_multiplier", None, "Noise on the sum, in clip norms.", fv)
    command_flags.count("steps", None, "Number of updates.", fv)
    command_flags.count("batch_size", None, "EXPECTED Poisson batch, in units.", fv)
    command_flags.count("num_units", None, "Number of privacy units.", fv)
    command_flags.count("max_batch_size", None, "Truncation cap of a batch; omitted, plain Poisson sampling.", fv)
    command_flags.choice("neighbouring_relation", ADD_OR_REMOVE, RELATIONS, "Neighbouring data sets.", fv)
    command_flags.switch("json", "Print one JSON object.", fv)


def run(fv: flags.FlagValues) -> int:
    given = {name: fv[name].value for name in _QUANTITIES}
    omitted = [name for name, value in given.items() if value is None]
    if len(omitted) != 1:
        raise InputError(
            f"leave out exactly one of {', '.join('--' + name for name in _QUANTITIES)}, the one to solve for; "
            + (f"{len(omitted)} are missing: {', '.join(omitted)}" if omitted else "all five are given")
        )
    for name in ("steps", "batch_size", "num_units"):
        if given[name] is not None and given[name] < 1:
            raise InputError(f"--{name} must be at least 1, got {given[name]}")
    if not 0 < fv.delta < 1:
        raise InputError(f"--delta must lie between 0 and 1, got {fv.delta:g}")
    if given["epsilon"] is not None and not given["epsilon"] > 0:
        raise InputError(f"--epsilon must be positive, got {given['epsilon']:g}")
    from accounting import report

    result = solve(given, fv.delta, fv.max_batch_size, fv.neighbouring_relation)
    if fv.json:
        print(json.dumps(report.encode(result)))
        return 0
    for name, value in result.items():
        value = report.round_up(value) if name == "epsilon" else value
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        print(f"{name:<24} {shown}{'   (solved)' if name in (omitted[0], _RESULT_NAMES.get(omitted[0])) else ''}")
    if result["delta"] > 1 / result["num_units"]:
        print(f"warning: delta is above 1/N = {1 / result['num_units']:.3g}: choose a delta well below it", file=sys.stderr)
    return 0


_RESULT_NAMES = {"batch_size": "expected_batch_size"}


def solve(given: dict, delta: float, max_batch_size: int | None, relation: str) -> dict:
    """The plan with its one missing quantity, as scripts read it.

    Args:
      given: the five quantities by flag name, exactly one of them None.
    """
    from accounting import calibration
    from accounting.accountant import Accountant
    from accounting.mechanism import DpSgdMechanism

    target = given["epsilon"]
    batch = given["batch_size"] or 1
    mechanism = DpSgdMechanism(
        num_units=given["num_units"] or batch,
        expected_batch_size=batch,
        max_batch_size=max_batch_size,
        noise_multiplier=1.0 if given["noise_multiplier"] is None else given["noise_multiplier"],
        clip_norm=1.0,
        steps=given["steps"] or 1,
        neighbouring_relation=relation,
    )
    if given["noise_multiplier"] is None:
        mechanism = calibration.noise_multiplier(mechanism, target, delta)
    elif given["steps"] is None:
        mechanism = calibration.steps(mechanism, target, delta)
        if mechanism.steps == 0:
            raise InputError(f"even one step exceeds epsilon {target:g} at delta {delta:g}: raise --noise_multiplier")
    elif given["batch_size"] is None:
        mechanism = calibration.expected_batch_size(mechanism, target, delta)
    elif given["num_units"] is None:
        mechanism = calibration.num_units(mechanism, target, delta)
    bracket = Accountant(mechanism).epsilon(delta)
    return {
        "epsilon": float(bracket.upper),
        "epsilon_lower_numeric": float(bracket.lower),
        "delta": delta,
        "noise_multiplier": mechanism.noise_multiplier,
        "steps": mechanism.steps,
        "expected_batch_size": mechanism.expected_batch_size,
        "max_batch_size": mechanism.max_batch_size,
        "sampling_probability": mechanism.sampling_probability,
        "num_units": mechanism.num_units,
        "neighbouring_relation": mechanism.neighbouring_relation,
        "cross_check": float(bracket.cross_check),
    }
