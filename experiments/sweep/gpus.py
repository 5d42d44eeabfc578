"""The NVIDIA GPUs of a machine, divided among the processes of a sweep. jax is not imported: it would take them."""

import importlib.util
import itertools
import os
import pathlib

from accounting.errors import InputError

_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def usable(find_spec=importlib.util.find_spec) -> bool:
    """Whether jax, as it is installed and told, would use GPUs where there are some.

    Args:
      find_spec: what is installed.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "").split(",")
    wanted = platforms == [""] or bool({"cuda", "gpu"} & set(platforms))
    return wanted and any(find_spec(name) for name in _PLUGINS)


def here(find_spec=importlib.util.find_spec) -> list[str]:
    """Names of this machine's GPUs as CUDA_VISIBLE_DEVICES takes them; empty where jax would not use any."""
    if not usable(find_spec):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        # CUDA counts from zero what it is given, whatever the numbers of the devices in a container.
        return [str(i) for i, _ in enumerate(pathlib.Path("/dev").glob("nvidia[0-9]*"))]
    names = [name.strip() for name in named.split(",")]
    return list(
        itertools.takewhile(lambda name: name not in ("", "-1"), names)
    )  # CUDA, too, stops at the first that it does not know


def divided(names: list[str], each: int, slots: int) -> list[dict[str, str]]:
    """The environment of each slot's process, so that it sees its own GPUs alone; where slots share one, none takes all
    of its memory.

    Raises:
      InputError: a run needs more than there are.
    """
    if each > len(names):
        raise InputError(
            f'a run of this sweep has mesh = "data:{each}", but there are {len(names)} GPUs here: lower it'
        )
    shares = len(names) // each
    found = []
    for slot in range(slots):
        first = slot % shares * each
        found.append({"CUDA_VISIBLE_DEVICES": ",".join(names[first : first + each])})
        if slots > shares:
            found[-1]["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return found
