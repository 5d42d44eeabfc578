"""What decides the last bits of a step, besides the run's settings: versions and devices.

A step that is executed again must give the very same sums: its noise is the same, so two results that are rounded
differently would differ by something that has no noise on it.
"""

import os
import platform
from typing import Any

from accounting.errors import InputError
from accounting.ledger import events

# With this flag in XLA_FLAGS a GPU adds up in a fixed order.
DETERMINISTIC_SUMS = "--xla_gpu_deterministic_ops=true"

_OPTIONS = ("jax_threefry_partitionable", "jax_enable_x64", "jax_disable_most_optimizations")


def description() -> str:
    """The environment of this process, for the ledger."""
    import jax
    import jaxlib.version
    import numpy as np

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = f"{_cpu()}, {cores} cores" if device.platform == "cpu" else device.device_kind
    options = [name for name in _OPTIONS if jax.config.values[name]]
    options.append(f"matmul precision {jax.config.values['jax_default_matmul_precision'] or 'default'}")
    # Left out: the number of devices, which the settings state, and dump flags, which change no result.
    flags = set(os.environ.get("XLA_FLAGS", "").split())
    options += sorted(
        flag for flag in flags if not flag.startswith(("--xla_force_host_platform_device_count", "--xla_dump"))
    )
    versions = f"jax {jax.__version__}, jaxlib {jaxlib.version.__version__}, numpy {np.__version__}"
    return f"{versions}; {kind}; {', '.join(options)}"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def is_deterministic(here: str, platform: str) -> bool:
    """Whether a step that is executed again in an environment gives the same bits.

    Args:
      here: its description().
      platform: of its devices, as jax calls it. Assumed: CPUs and TPUs add up in a fixed order by themselves.
    """
    return platform in ("cpu", "tpu") or DETERMINISTIC_SUMS in here


def check_repeats(records: list[dict[str, Any]], step: int, here: str, platform: str) -> None:
    """Refuses to execute steps again elsewhere than where they were executed first, or where sums have no fixed order.

    Formal guarantee: whatever is lost and executed again, no two different sums are ever released with the same noise,
    because a step is repeated only in the environment in which its bits are the same. Tested by
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
                f"step {record['step']} was executed before, with {there}, and must not be repeated with {here}: its"
                " noise would be the same and its rounding not; go on where it was executed, or start another run in a"
                " new `workdir`"
            )
        if not is_deterministic(here, platform):
            raise InputError(
                f"step {record['step']} was executed before and must not be repeated where sums have no fixed order:"
                " its noise would be the same and its rounding not; start another run in a new `workdir`, with"
                f" XLA_FLAGS={DETERMINISTIC_SUMS} set before jax is imported"
            )
