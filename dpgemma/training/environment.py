"""What decides the last bits of a step, besides the run's settings: versions, source code, flags and devices.

A step that is executed again must give the very same bits. With equal noise on sums that are rounded differently, two
results would differ by something that has no noise on it; with other noise, a step would be released twice and charged
once.
"""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import accounting
import dpgemma
from accounting.errors import InputError
from accounting.ledger import events

# With this flag in XLA_FLAGS a GPU adds up in a fixed order.
DETERMINISTIC_SUMS = "--xla_gpu_deterministic_ops=true"

_OPTIONS = ("jax_threefry_partitionable", "jax_enable_x64", "jax_disable_most_optimizations", "jax_disable_jit")
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "ml_dtypes")
# Libraries of accelerators: whatever of these is installed.
_ACCELERATORS = ("libtpu", "jax-cuda", "nvidia-", "jax-rocm")


def description() -> str:
    """The environment of this process, for the ledger."""
    import jax

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = f"{_cpu()}, {cores} cores" if device.platform == "cpu" else device.device_kind
    options = [name for name in _OPTIONS if jax.config.values[name]]
    options.append(f"matmul precision {jax.config.values['jax_default_matmul_precision'] or 'default'}")
    # In the order given, because the last of two equal flags holds. Left out: the number of devices, which the settings
    # state, and dump flags, which change no result.
    options += [
        flag
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if not flag.startswith(("--xla_force_host_platform_device_count", "--xla_dump"))
    ]
    return f"{', '.join(_versions())}; {kind}; {', '.join(options)}; code {source_digest()[:16]}"


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


def _cpu() -> str:
    """The processor, with a digest of its features: some hypervisors hide its name, and its instructions decide how
    numbers are rounded.
    """
    try:
        with open("/proc/cpuinfo") as file:
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


def check_repeats(records: list[dict[str, Any]], step: int, here: str, platform: str) -> None:
    """Refuses to execute steps again elsewhere than where they were executed first, or where sums have no fixed order.

    Formal guarantee: whatever is lost and executed again in the run's folder, no step releases a second time anything
    but the bits that it released before, because it is repeated only in the environment in which they are the same.
    Tested by
    tests/training/run_test.py::test_steps_are_repeated_in_their_own_environment_alone.

    Args:
      records: of the ledger.
      step: at which the run goes on.
      here: description() of this process.
      platform: of its devices.

    Raises:
      InputError: a step from there on was executed in another environment, or this one adds up in any order.
    """
    there = records[0].get("environment")
    for record in records:
        if record["kind"] == events.RESUME:
            there = record["environment"]
        if record["kind"] != events.STEP or record["step"] < step:
            continue
        if there != here:
            raise InputError(
                f"step {record['step']} was executed before, with {there}, and must not be repeated with {here}: it"
                " would release a second time, with other bits, what is charged once; go on where it was executed, or"
                " start another run in a new `workdir`"
            )
        if not is_deterministic(here, platform):
            raise InputError(
                f"step {record['step']} was executed before and must not be repeated where sums have no fixed order:"
                " its noise would be the same and its rounding not; start another run in a new `workdir`, with"
                f" XLA_FLAGS={DETERMINISTIC_SUMS} set before jax is imported"
            )
