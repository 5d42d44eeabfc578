"""The TPU chips of a machine, divided among the processes of a sweep: one process that starts jax takes all chips that
it sees. jax is not imported here.

Not tried on a TPU: what each process is told are the variables that libtpu reads (jax-ml/jax issue 8809, pytorch/xla
issue 7714), for chips that jax shows as one device each, as from v4 to v6e.
"""

import importlib.util
import os
import pathlib

from accounting.errors import InputError

VISIBLE = "TPU_VISIBLE_CHIPS"
# How chips of one process lie in the machine's torus.
_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


def usable(find_spec=importlib.util.find_spec) -> bool:
    """Whether jax, as it is installed and told, would use TPUs where there are some.

    Args:
      find_spec: what is installed.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "").split(",")
    return (platforms == [""] or "tpu" in platforms) and find_spec("libtpu") is not None


def here(find_spec=importlib.util.find_spec, devices: pathlib.Path = pathlib.Path("/dev")) -> list[str]:
    """Numbers of this machine's chips; empty where jax would not use any.

    Args:
      devices: where the system shows them, as accelN or, from v5 on, vfio/N.
    """
    if not usable(find_spec):
        return []
    named = os.environ.get(VISIBLE)
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    shown = [*devices.glob("accel[0-9]*")] or [*devices.glob("vfio/[0-9]*")]
    return [str(number) for number in range(len(shown))]


def divided(names: list[str], each: int, slots: int) -> list[dict[str, str]]:
    """The environment of each slot's process, so that it sees chips of its own alone.

    Raises:
      InputError: there are too few, or so many of one process do not lie in a block.
    """
    if each not in _BOUNDS or each > len(names):
        blocks = ", ".join(str(count) for count in _BOUNDS if count <= len(names))
        raise InputError(
            f'a run of this sweep has mesh = "data:{each}", and of the {len(names)} TPU chips here one process takes'
            f" {blocks}: give one of these"
        )
    if slots * each > len(names):
        raise InputError(
            f"`slots`={slots} processes of {each} chips are more than the {len(names)} TPU chips here, and a chip is"
            f" one process's: {len(names) // each} at most"
        )
    return [
        {
            VISIBLE: ",".join(names[slot * each : (slot + 1) * each]),
            "TPU_CHIPS_PER_PROCESS_BOUNDS": _BOUNDS[each],
            "TPU_PROCESS_BOUNDS": "1,1,1",
        }
        for slot in range(slots)
    ]
