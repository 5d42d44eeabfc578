"""dpgemma plan --topology: what a training run needs on a machine that is not at hand, or on this computer."""

import dataclasses
import os
import sys
from typing import Any

from absl import flags

from accounting import rounding
from accounting.errors import InputError, as_flags
from dpgemma.choices import AUTO, CLIPPING, DTYPES, EXAMPLE_SCAN, REMAT_POLICIES
from dpgemma.commands import command_flags
from dpgemma.sharding.rules import SYNTAX
from experiments.hardware import machines

FLAGS = (
    "model", "topology", "num_slices", "batch_size", "steps", "noise_multiplier", "sequence_length", "clipping",
    "microbatch_size", "mesh", "lora_rank", "dtype", "remat", "search",
)  # fmt: skip


def define_flags(fv: flags.FlagValues) -> None:
    command_flags.string("topology", None, f"A machine to plan for: {machines.SYNTAX}.", fv)
    command_flags.count("num_slices", 1, "Slices of that shape that work together.", fv)
    command_flags.string("model", None, "The model to train on it, by the names that dpgemma train knows.", fv)
    command_flags.count("batch_size", None, "Expected number of privacy units in a batch.", fv)
    command_flags.count("steps", None, "Number of updates.", fv)
    command_flags.number(
        "noise_multiplier", None, "Noise in clip norms. With `epsilon` in its place, the noise is solved for.", fv
    )
    command_flags.count("sequence_length", None, "Tokens of a row; by default 1024, or the model's context.", fv)
    command_flags.choice("clipping", AUTO, CLIPPING, "How clipped gradients are computed; auto is example_scan.", fv)
    command_flags.count("microbatch_size", 1, "Rows that each row of chips computes at once.", fv)
    command_flags.string(
        "mesh",
        AUTO,
        f"The mesh: {SYNTAX}. auto takes the smallest model axis, a power of two, with which what follows"
        " from shapes fits with a fifth to spare.",
        fv,
    )
    command_flags.count("lora_rank", None, "Train adapters of this rank instead of the whole model.", fv)
    command_flags.choice("dtype", "bfloat16", DTYPES, "Type of weights in use and of activations.", fv)
    command_flags.choice("remat", "block", REMAT_POLICIES, "What the backward pass computes again.", fv)
    command_flags.switch(
        "search",
        "Compile every combination of what is not given, out of model axes up to 64, 1, 2 or 4 rows at once,"
        " example_scan and ghost, remat block and none; and rank them.",
        fv,
    )


def answer(fv: flags.FlagValues) -> dict[str, Any]:
    """What the run needs on the machine, and its privacy if its data are given; with --search, of the best way, and
    `ways` has them all.

    Raises:
      InputError: a missing or an impossible setting.
    """
    for name in ("model", "batch_size", "steps"):
        if fv[name].value is None:
            raise InputError(f"--{name} is missing: a plan for a machine needs --model, --batch_size and --steps")
    for name in ("batch_size", "steps", "num_units", "sequence_length", "microbatch_size", "lora_rank"):
        if fv[name].value is not None and fv[name].value < 1:
            raise InputError(f"--{name} must be at least 1, got {fv[name].value}")
    topology = machines.parse(fv.topology, fv.num_slices)
    privacy = _privacy(fv)
    _compile_without_a_machine(topology)
    from dpgemma.gemma import lora, presets, start
    from dpgemma.privacy.clipping import Strategy
    from experiments.hardware import estimate, search

    config = presets.named(fv.model)
    if fv.lora_rank:
        config = dataclasses.replace(config, lora=lora.adapters(config, fv.lora_rank, float(fv.lora_rank), "all"))
    how = Strategy(EXAMPLE_SCAN if fv.clipping == AUTO else fv.clipping, fv.microbatch_size)
    length = fv.sequence_length or min(1024, config.max_length)
    start.check(start.StartingPoint(fv.model, config), length, AUTO)
    request = estimate.Request(config, topology, fv.mesh, length, fv.batch_size, fv.steps, how, fv.dtype, fv.remat)
    if not fv.search:
        return {"model": fv.model, **estimate.answer(request), **privacy}
    free = [name for name in search.OPEN if not fv[name].present]
    ways = search.ranked(request, free, lambda message: print(message, file=sys.stderr, flush=True))
    if not ways[0].get("fits"):
        raise InputError(f"no way fits on {topology}: use more chips, or adapters (`lora_rank`)")
    return {"model": fv.model, **ways[0], **privacy, "ways": ways}


def _privacy(fv: flags.FlagValues) -> dict[str, Any]:
    """Epsilon of Poisson batches without a cap, or the noise that a target needs; nulls where no data are given."""
    given = [name for name in ("num_units", "delta") if fv[name].value is not None]
    targets = [name for name in ("noise_multiplier", "epsilon") if fv[name].value is not None]
    if not given and not targets:
        return {"epsilon": None, "delta": None, "noise_multiplier": None}
    if len(given) < 2 or len(targets) != 1:
        raise InputError(
            "the privacy of a run follows from --num_units, --delta and one of --noise_multiplier and --epsilon: give"
            " all of them, or none"
        )
    from accounting.accountant import Accountant
    from dpgemma.commands import account

    names = ("epsilon", "noise_multiplier", "steps", "batch_size", "num_units")
    mechanism, _ = account.solve({name: fv[name].value for name in names}, fv.delta, None, fv.neighbouring_relation)
    return {
        "epsilon": float(Accountant(mechanism).epsilon(fv.delta).upper),
        "delta": fv.delta,
        "noise_multiplier": mechanism.noise_multiplier,
        "neighbouring_relation": mechanism.neighbouring_relation,
    }


def _compile_without_a_machine(topology: machines.Topology) -> None:
    """Has jax look for no accelerator: a program is compiled for one that is described to it."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",  # the compiler would ask the network what machine this is,
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        TPU_ACCELERATOR_TYPE="v6e-1",  # of this host; any will do
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # and a lock file whether another process has a TPU
    )
    if not topology.is_compiled_for:
        from dpgemma.commands import process

        process.split_cpu(f"data:{topology.chips}")


def text(result: dict[str, Any]) -> str:
    """The answer for a terminal."""
    gib = 2**30
    low, high = result["seconds_per_step_range"]
    remark = {True: "", False: ": IT DOES NOT FIT", None: ", and more"}[result["fits"]]
    lines = [
        f"{'machine':<32} {result['topology']}"
        + (f", {result['num_slices']} slices" if result["num_slices"] > 1 else "")
        + f": {result['chips']} chips, mesh {result['mesh']}",
        f"{'model':<32} {result['model']}, {result['trained_parameters']:,} of {result['parameters']:,} parameters"
        " trained",
        f"{'memory of a chip':<32} {result['hbm_bytes_per_chip'] / gib:.2f} GiB of"
        f" {result['hbm_limit_bytes'] / gib:.1f}{remark}",
        *(f"  {name:<30} {size / gib:.3f} GiB" for name, size in result["memory"].items() if size),
        f"{'matrix products of a step':<32} {result['flops_per_step']:.4g} operations",
        f"{'time of a step':<32} {result['seconds_per_step']:.3g} s ({low:.3g} to {high:.3g})",
    ]
    if result["cycles_per_step"] is not None:
        lines += [
            f"  {'computing':<30} {result['seconds_computing']:.3g} s ({result['cycles_per_step']:.4g} cycles;"
            f" {result['seconds_at_peak']:.3g} s at peak)",
            f"  {'in links':<30} {result['seconds_in_links']:.3g} s",
            f"  {'between slices':<30} {result['seconds_between_slices']:.3g} s",
        ]
    lines.append(f"{'the whole run':<32} {result['days']:.3g} days, {result['chip_hours']:.4g} chip-hours")
    if result["epsilon"] is not None:
        lines.append(
            f"{'privacy':<32} epsilon {rounding.upper(rounding.round_up(result['epsilon']))} at delta"
            f" {result['delta']:g}, noise multiplier {rounding.upper(result['noise_multiplier'])},"
            " of batches without a cap"
        )
    if result["collectives"]:
        lines += ["", f"{'transfers of a step':<32} {'array':>12} {'times':>6} {'chips':>6}"]
    for each in result["collectives"]:
        name = each["kind"] + (" between slices" if each["crosses_slices"] else "")
        lines.append(f"  {name:<30} {each['bytes'] / 2**20:>8.2f} MiB {each['times']:>6} {each['chips']:>6}")
    lines += ["", "assumed"] + [f"  {each}" for each in result["assumptions"]]
    if "ways" in result:
        lines += ["", f"{'ways, the fastest first':<64} {'memory':>10} {'a step':>10}"]
        lines += [_way(each) for each in result["ways"]]
    return "\n".join(lines)


def _way(each: dict[str, Any]) -> str:
    """One line of a search."""
    name = f"{each['mesh']}, {each['microbatch_size']} at once, {each['clipping']}, remat {each['remat']}"
    if "refused" in each:
        return f"  {name:<62} {as_flags(each['refused'])}"
    remark = "" if each["fits"] else " does not fit"
    return f"  {name:<62} {each['hbm_bytes_per_chip'] / 2**30:>6.2f} GiB {each['seconds_per_step']:>8.3g} s{remark}"
