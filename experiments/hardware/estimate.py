"""Answers `dpgemma plan --topology`: memory, operations, transfers and time of one training step, chip by chip.

For TPUs the trainer's own step is compiled for the real machine. For GPUs, whose compiler needs one, only shapes and
the traced step are used. On this computer the step is compiled and timed over a few runs.
"""

import dataclasses
import importlib.metadata
import importlib.util
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from accounting.errors import InputError
from dpgemma.gemma import decoder
from dpgemma.gemma.config import GemmaConfig
from dpgemma.privacy.clipping import Strategy
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding import place
from dpgemma.sharding.rules import MeshShape, wanted
from dpgemma.training import clipping_choice, memory
from experiments.hardware import collectives, cycles, measured, operations
from experiments.hardware.machines import Topology
from experiments.hardware.step_program import StepProgram

_CYCLE_ERROR = 0.2  # of the compiler's cycles, between programs with a similar mix of operations
_GPU_SHARE_OF_PEAK = 0.4
_CPU_TIME_ERROR = 0.3


@dataclasses.dataclass(frozen=True)
class Request:
    """One training run on one machine.

    Attributes:
      config: of the model, its adapters included.
      topology: the machine.
      mesh: as `--mesh` names it; "auto" for the smallest model axis with which what follows from shapes fits.
      length: tokens of a row.
      batch_size: expected number of rows in a batch.
      steps: of the run.
      how: clipping, and how many rows are computed at once.
      dtype: of weights in use and of activations.
      remat: what the backward pass computes again.
    """

    config: GemmaConfig
    topology: Topology
    mesh: str
    length: int
    batch_size: int
    steps: int
    how: Strategy
    dtype: str
    remat: str


def answer(request: Request) -> dict[str, Any]:
    """What `dpgemma plan --topology --json` prints of the machine.

    Raises:
      InputError: a machine that there is no compiler for, a mesh that does not divide it or the model, or a step that
        does not fit.
    """
    topology, chip = request.topology, request.topology.chip
    program, shape = _program(request)
    start = time.perf_counter()
    traced = program.trace()
    flops = operations.of_products(traced.jaxpr.jaxpr, program.rounds) * shape.rows
    at_peak = None if topology.is_at_hand else flops / topology.chips / chip.flops
    parts = program.known_bytes()
    if at_peak is None:
        found = _of_this_computer(program, _compile(traced, request), topology)
    elif topology.is_compiled_for:
        found = _of_program(_compile(traced, request), topology, program.rounds, at_peak)
    else:
        found = _of_shapes(sum(parts.values()), topology, at_peak)
    if found["fits"] is not None:
        parts["activations and buffers"] = max(0, found["hbm_bytes_per_chip"] - sum(parts.values()))
    compilers = ("jax", "libtpu") if topology.is_compiled_for else ("jax",)
    days = request.steps * found["seconds_per_step"] / 86400
    return {
        "topology": str(topology),
        "num_slices": topology.slices,
        "chips": topology.chips,
        "mesh": str(shape),
        "parameters": sum(map(decoder.count, program.objective.shapes())),
        "trained_parameters": decoder.count(program.arrays.trainable),
        "hbm_limit_bytes": int(chip.memory),
        "memory": parts,
        "flops_per_step": flops,
        "seconds_at_peak": at_peak,
        **found,
        "days": days,
        "chip_hours": 24 * days * topology.chips,
        "compile_seconds": time.perf_counter() - start,
        "versions": {name: importlib.metadata.version(name) for name in compilers},
    }


def _of_program(compiled: Any, topology: Topology, rounds: int, at_peak: float) -> dict[str, Any]:
    """What the compiler says of a step."""
    chip, text = topology.chip, compiled.as_text()
    assert chip.clock is not None and chip.network is not None
    sent = collectives.of(text, rounds, topology.chips // topology.slices if topology.slices > 1 else None)
    estimated = cycles.of(text, rounds).corrected
    computing = max(at_peak, estimated / chip.clock)
    within = sum(each.sent for each in sent if not each.crosses_slices) / chip.link
    across = sum(each.sent for each in sent if each.crosses_slices) / chip.network
    assumed = [
        f"{chip.flops:.3g} bfloat16 operations a second at peak, at a clock of {chip.clock / 1e9:.3g} GHz",
        f"the compiler's own static estimate of cycles, which is good to some {_CYCLE_ERROR:.0%} between similar"
        " programs and was checked against no chip: the range is that, and at its lower end transfers cost nothing",
        f"links of {chip.link / 1e9:.3g} GB/s a chip in one direction, in rings; above the lower end nothing overlaps",
        "every batch is the expected one; time for data, checkpoints and restarts is not counted",
    ]
    if topology.slices > 1:
        assumed.append(f"a network of {chip.network / 1e9:.3g} GB/s a chip between slices")
    memory_of_a_chip = memory.held(compiled.memory_analysis())
    return {
        "hbm_bytes_per_chip": memory_of_a_chip,
        "fits": memory_of_a_chip <= chip.memory,
        "cycles_per_step": estimated,
        "collectives": [dataclasses.asdict(each) | {"bytes_sent": each.sent} for each in sent],
        "seconds_computing": computing,
        "seconds_in_links": within,
        "seconds_between_slices": across,
        "seconds_per_step": computing + within + across,
        "seconds_per_step_range": [
            max(at_peak, computing * (1 - _CYCLE_ERROR), within, across),
            computing * (1 + _CYCLE_ERROR) + within + across,
        ],
        "assumptions": assumed,
    }


def _of_shapes(known_bytes: int, topology: Topology, at_peak: float) -> dict[str, Any]:
    """What can be said of a step that nobody compiled."""
    seconds = at_peak / _GPU_SHARE_OF_PEAK
    return {
        "hbm_bytes_per_chip": known_bytes,
        "fits": None,
        "cycles_per_step": None,
        "collectives": [],
        "seconds_per_step": seconds,
        "seconds_per_step_range": [at_peak, 2 * seconds],
        "assumptions": [
            "nothing was compiled, because there is no compiler for this chip without one: memory leaves activations"
            " and buffers out, time is that of matrix products alone",
            f"{_GPU_SHARE_OF_PEAK:.0%} of a bfloat16 peak of {topology.chip.flops:.3g} a second; half of that at worst",
            "transfers between chips, time for data, checkpoints and restarts are not counted",
        ],
    }


def _of_this_computer(program: StepProgram, compiled: Any, topology: Topology) -> dict[str, Any]:
    """What a step takes here: its memory is the compiler's, its time is measured."""
    memory_of_a_device = memory.held(compiled.memory_analysis())
    in_a_save = memory.in_a_save(program.arrays)
    in_all = topology.chips * max(memory_of_a_device, in_a_save) + memory.PROCESS_BYTES
    if in_all > topology.chips * topology.chip.memory:
        raise InputError(
            f"the step needs {in_all / 2**30:.1f} GiB of this computer's"
            f" {topology.chips * topology.chip.memory / 2**30:.1f}: train a smaller model, adapters (`lora_rank`), or"
            " lower `microbatch_size`"
        )
    timed = measured.step_time(program, compiled)
    seconds = timed.of(program.rounds)
    return {
        "hbm_bytes_per_chip": memory_of_a_device,
        "process_bytes": in_all,
        "fits": True,
        "cycles_per_step": None,
        "collectives": [],
        "seconds_per_step": seconds,
        "seconds_per_step_range": [seconds * (1 - _CPU_TIME_ERROR), seconds * (1 + _CPU_TIME_ERROR)],
        "assumptions": [
            f"a step is {timed.fixed:.3g} s, and {timed.of_round:.3g} s for each of the {program.rounds} rounds of its"
            f" loop: measured here, with rows of noise; repetitions differed by {timed.error:.0%}",
            f"nothing else uses this computer's cores; the range is {_CPU_TIME_ERROR:.0%}, within which runs of `train`"
            " were found (experiments.benchmarks.plan_cpu)",
            f"the whole process takes {in_all / 2**30:.2f} GiB: {memory.PROCESS_BYTES / 2**30:.2f} for Python,"
            " libraries and compiled programs, and the devices' memory, or what is more: the state twice and its"
            " largest array once more, while a checkpoint is written; data are not counted",
            "every batch is the expected one; time for checkpoints and restarts is not counted",
        ],
    }


def _program(request: Request) -> tuple[StepProgram, MeshShape]:
    """The step on the mesh that was asked for, or on the one with the smallest model axis that fits."""
    devices, topology = _devices(request.topology), request.topology

    def known_bytes(shape: MeshShape) -> int:
        return sum(_on_mesh(request, devices, shape).known_bytes().values())

    def fitting() -> MeshShape | None:
        return memory.fitting(known_bytes, topology.chips, topology.slices, topology.chip.memory)

    given = wanted(request.mesh)
    if given is not None:
        shape = _with_slices(given, topology)
        least = known_bytes(shape)
        if least > topology.chip.memory:
            memory.refuse(request.mesh, least, topology.chip.memory, fitting())
        return _on_mesh(request, devices, shape), shape
    found = fitting()
    if found is None:
        raise InputError(
            f"the model does not fit on {topology} with a model axis of any power of two: use more chips, or adapters"
            " (`lora_rank`)"
        )
    return _on_mesh(request, devices, found), found


def _with_slices(given: MeshShape, topology: Topology) -> MeshShape:
    """A mesh over all chips, its data axis divided among the slices."""
    shape = given
    if shape.slices == 1 and shape.data % topology.slices == 0:
        shape = dataclasses.replace(shape, data=shape.data // topology.slices, slices=topology.slices)
    if (shape.devices, shape.slices) != (topology.chips, topology.slices):
        slices = "1 slice" if topology.slices == 1 else f"{topology.slices} slices"
        raise InputError(
            f"`mesh`={given} does not name all {topology.chips} chips of {slices}: use `mesh`=auto, or data:A,model:B"
            f" with A times B = {topology.chips}"
        )
    return shape


def _on_mesh(request: Request, devices: list[Any], shape: MeshShape) -> StepProgram:
    clipping_choice.check(request.how.name, request.remat, shape)
    mesh: Mesh = mesh_lib.of_devices(devices, shape)
    at_once = place.rows(mesh) * request.how.microbatch_size
    rows = -(-request.batch_size // at_once) * at_once
    # The rules of norms choose by the platform that a step is meant for, which is not this one.
    topology = request.topology
    platform = "cpu" if topology.is_at_hand else "tpu" if topology.is_compiled_for else "gpu"
    how = dataclasses.replace(request.how, platform=platform)
    program = StepProgram(request.config, mesh, request.length, rows, how, request.dtype, request.remat)
    _ = program.arrays  # refuses what does not divide
    return program


def _devices(topology: Topology) -> list[Any]:
    """Chips that need not exist."""
    if not topology.is_compiled_for:  # this computer's own, or stand-ins: nothing is compiled for GPUs
        return jax.devices()[: topology.chips]
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("compiling for a TPU needs the libtpu package: pip install 'dpgemma[tpu]'")
    options = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=str(topology), **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"`topology`={topology} is none that the TPU compiler knows ({_first_sentence(error)}): use a shape that is"
            " sold, such as v6e:2x2, v6e:2x4, v6e:4x4 or v6e:16x16"
        ) from None
    return list(devices)


def _compile(traced: Any, request: Request) -> Any:
    try:
        return traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the step does not fit on {request.topology} ({_first_sentence(error)}): use a larger model axis of"
            " `mesh`, a smaller `microbatch_size` or more chips"
        ) from None


def _first_sentence(error: Exception) -> str:
    return str(error).split("\n")[0].split(". ")[0][:200]
