"""What decides the last bits of a step, besides the run's settings: versions, source code, flags and devices.

With equal noise on gradients that are rounded differently, two results would differ by something that has no noise on
it. So noise is bound to the environments that a run has been in, and a step that is executed again in another one has
other noise and is charged again (accounting.ledger.history).
"""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
from typing import Any

import accounting
import dpgemma
from dpgemma.sharding import processes
from dpgemma.sharding.rules import MeshShape

# With this flag in XLA_FLAGS a GPU adds up in a fixed order.
DETERMINISTIC_SUMS = "--xla_gpu_deterministic_ops=true"

_OPTIONS = ("jax_threefry_partitionable", "jax_enable_x64", "jax_disable_most_optimizations", "jax_disable_jit")
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "ml_dtypes")
# Libraries of accelerators: whatever of these is installed.
_ACCELERATORS = ("libtpu", "jax-cuda", "nvidia-", "jax-rocm")

# Variables that compilers and libraries of products read: whatever begins so.
_VARIABLES = (
    "JAX_", "XLA_", "PJRT_", "NPROC", "DNNL_", "ONEDNN_", "OMP_", "MKL_", "OPENBLAS_", "EIGEN_", "TF_", "LIBTPU_",
    "CUBLAS_", "CUDNN_", "NVIDIA_TF32",
)  # fmt: skip
# Of variables and of jax's own settings, those that name places, say what is written down, or are stated otherwise.
_OTHERWISE = (
    "XLA_FLAGS", "JAX_PLATFORM", "JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE",
    "JAX_ENABLE_COMPILATION_CACHE", "JAX_RAISE_PERSISTENT_CACHE", "JAX_LOG", "JAX_DUMP", "JAX_EXPLAIN", "JAX_TRACEBACK",
    "JAX_PPRINT", "TF_CPP", "JAX_COORDINATOR", "JAX_LOCAL_DEVICE_IDS", "JAX_PARTITION_INDEX", "JAX_SLICE_INDEX",
    "JAX_ENABLE_PREEMPTION",
)  # fmt: skip


def description(mesh: MeshShape, sums_are_exact: bool = True, num_processes: int | None = None) -> str:
    """The environment of a run's processes, as each of them describes it, for the ledger.

    The mesh is part of it, because compilers make other programs of a step on another mesh. So is the number of a CPU's
    threads, by which XLA divides large products: there is one for each core, and at least one for each device. Where
    floats are added over devices, along a model axis or because the release is not exact, their order may depend on how
    the mesh is divided among processes, so the number of processes is part of it too. Whole numbers have one sum in any
    order.

    Formal guarantee: another mesh, another number of threads, and another number of processes where they add floats are
    other environments, so that keys and charges follow them. Tested by tests/training/moving_test.py::
    test_meshes_variables_and_settings_that_change_roundings_are_part_of_the_environment and
    ::test_the_number_of_processes_is_part_of_the_environment_where_floats_are_added_over_them.

    Args:
      mesh: of the run.
      sums_are_exact: whether the run adds up whole numbers.
      num_processes: of the run; by default as many as there are.
    """
    import jax

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(cores, jax.local_device_count())
    kind = f"{_cpu()}, {threads} threads" if device.platform == "cpu" else device.device_kind
    num_processes = processes.count() if num_processes is None else num_processes
    if (mesh.model > 1 or not sums_are_exact) and num_processes > 1:
        kind += f", {num_processes} processes"
    settings = jax.config.values
    options = [name for name in _OPTIONS if settings[name]]
    options.append(f"matmul precision {settings['jax_default_matmul_precision'] or 'default'}")
    options.append(f"settings {_digest(sorted((k, str(v)) for k, v in settings.items() if _matters(k.upper())))}")
    options += [f"{name} {_digest(os.environ[name])}" for name in sorted(os.environ) if _is_read_by_compilers(name)]
    # In the order given, because the last of two equal flags holds. Left out: the number of devices, which is stated
    # above, and dump flags, which change no result.
    options += [
        flag for flag in xla_flags() if not flag.startswith(("--xla_force_host_platform_device_count", "--xla_dump"))
    ]
    place = f"{kind}; mesh {mesh}"
    return f"{', '.join(_versions())}; {place}; {', '.join(options)}; code {source_digest()[:16]}"


def xla_flags() -> list[str]:
    """The flags of XLA_FLAGS, in order; those of the file that it names, where it names one."""
    given = os.environ.get("XLA_FLAGS", "").strip()
    if given and not given.startswith("-"):
        try:
            given = pathlib.Path(given).read_text()
        except OSError:  # XLA complains
            return [given]
    return given.split()


def _matters(name: str) -> bool:
    return not name.startswith(_OTHERWISE) and not name.endswith("_VISIBLE_DEVICES")


def _is_read_by_compilers(name: str) -> bool:
    return name.startswith(_VARIABLES) and _matters(name)


def _digest(value: Any) -> str:
    """Of a value that may name what the public ledger should not."""
    return hashlib.sha256(str(value).encode()).hexdigest()[:8]


def _versions() -> list[str]:
    installed = sorted(
        {str(d.name).lower() for d in importlib.metadata.distributions() if d.name and _is_accelerator(d.name)}
    )
    return [f"{name} {importlib.metadata.version(name)}" for name in (*_PACKAGES, *installed)]


def _is_accelerator(name: str) -> bool:
    return name.lower().startswith(_ACCELERATORS)


@functools.cache
def source_digest() -> str:
    """SHA-256 of the source code of this program: of every module of dpgemma and accounting, with its path."""
    total = hashlib.sha256()
    for package in (dpgemma, accounting):
        folder = pathlib.Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            total.update(f"{package.__name__}/{path.relative_to(folder).as_posix()} {len(content)}\n".encode())
            total.update(content)
    return total.hexdigest()


def _cpu(cpuinfo: str = "/proc/cpuinfo") -> str:
    """The processor, with a digest of its features: some hypervisors hide its name, and its instructions decide how
    numbers are rounded.
    """
    try:
        with open(cpuinfo) as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): value.strip() for name, _, value in reversed(lines)}
    features = " ".join(sorted((facts.get("flags") or facts.get("Features") or "").split()))
    name = facts.get("model name") or platform.processor() or platform.machine()
    return f"{name} (features {hashlib.sha256(features.encode()).hexdigest()[:8]})"


def is_deterministic(here: str, platform: str) -> bool:
    """Whether a step that is executed again in an environment gives the same bits.

    Args:
      here: its description().
      platform: of its devices, as jax calls it. Assumed: CPUs and TPUs add up in a fixed order by themselves.
    """
    name = DETERMINISTIC_SUMS.partition("=")[0]
    given = [flag for part in here.split("; ") for flag in part.split(", ") if flag.partition("=")[0] == name]
    return platform in ("cpu", "tpu") or given[-1:] == [DETERMINISTIC_SUMS]  # the last of equal flags holds


def differing(there: str, here: str) -> str:
    """The parts in which two descriptions of environments differ."""
    parts = [set(re.split("[,;] ", place)) for place in (there, here)]
    only = [", ".join(sorted(parts[i] - parts[1 - i])) or "nothing further" for i in (0, 1)]
    return f"there {only[0]}; here {only[1]}"
