"""What the processes of one run tell each other, beside the sums that their devices add up.

One process is alone unless jax.distributed was initialised. Several ones execute the same program, each with its own
devices; the first one decides, and the others are told. What is told goes through the coordinator's key-value store,
and is deleted there when everybody has it.

Assumed: the network between the processes is as trusted as their machines. Sums without noise go over it, and so do
the keys of a run.
"""

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

from accounting.errors import InputError

T = TypeVar("T")

_numbers = itertools.count()  # every process asks and tells in the same order, so equal numbers meet
# Whether somebody has died is found out elsewhere (commands.peers): data may be read and programs compiled for hours.
_PATIENCE_MS = 7 * 24 * 3600 * 1000
_GATHERED_BYTES = 2**28


def count() -> int:
    """The number of processes of this run."""
    import jax

    state = _distributed()
    return int(jax.process_count() if state.client is None else state.num_processes)


def number() -> int:
    """The number of this process, from 0."""
    import jax

    state = _distributed()
    return int(jax.process_index() if state.client is None else state.process_id)


def are_joined() -> bool:
    """Whether jax.distributed was initialised."""
    return _distributed().client is not None


def is_first() -> bool:
    """Whether this process keeps the run's record."""
    return number() == 0


def from_first(compute: Callable[[], T]) -> T:
    """What the first process computes, in every process; the others do not compute it.

    Args:
      compute: gives something that JSON can hold.

    Raises:
      InputError: in every process if `compute` raised one; for another exception in the others only, and the first
        process raises its own.
    """
    if count() == 1:
        return compute()
    name = _next_name()
    if is_first():
        _tell(name, compute)
    told = _hear(name)
    _meet(name)
    if is_first():
        _client().key_value_delete(name)
    return cast(T, told)


def from_all(compute: Callable[[], T]) -> list[T]:
    """What every process computes, in the order of their numbers.

    Args:
      compute: gives something that JSON can hold.

    Raises:
      InputError: in every process if `compute` raised one in any; for another exception in the others only, and the
        process that failed raises its own.
    """
    if count() == 1:
        return [compute()]
    name = _next_name()
    _tell(f"{name}/{number()}", compute)
    told = [cast(T, _hear(f"{name}/{i}", i)) for i in range(count())]
    _meet(name)
    _client().key_value_delete(f"{name}/{number()}")
    return told


def any_of(flag: bool) -> bool:
    """Whether `flag` is true in any process. Devices exchange it, because it is asked after every step."""
    if count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def on_host(array: Any) -> Any:
    """A whole array in this process's memory, as NumPy's, wherever its parts lie; every process has to ask for it.

    It is gathered a part at a time, because devices may not have room for all of it.
    """
    import jax
    import numpy as np

    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    whole = np.empty(array.shape, array.dtype)
    at_once = max(1, _GATHERED_BYTES // max(1, array.nbytes // array.shape[0]))
    for first in range(0, array.shape[0], at_once):
        part = slice(first, first + at_once)
        whole[part] = multihost_utils.process_allgather(array[part], tiled=True)
    return whole


def meet(name: str) -> None:
    """Waits until every process is here, under a name that is used once."""
    if count() > 1:
        _meet(f"dpgemma/{name}")


def coordinator() -> str:
    """Address of the process that others ask for what is told, as HOST:PORT."""
    return str(_distributed().coordinator_address)


def _next_name() -> str:
    return f"dpgemma/{next(_numbers)}"


def _tell(name: str, compute: Callable[[], Any]) -> None:
    """Puts into the store what is computed, or why it cannot be."""
    try:
        outcome = {"value": compute()}
    except BaseException as error:
        _client().key_value_set(name, json.dumps({"refused": _sentence(error)}))
        raise
    _client().key_value_set(name, json.dumps(outcome))


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, InputError) else f"process {number()} failed: {type(error).__name__}"


def _hear(name: str, teller: int = 0) -> Any:
    told = json.loads(_client().blocking_key_value_get(name, _PATIENCE_MS))
    if "refused" in told:
        raise InputError(f"{told['refused']} (said by process {teller})")
    return told["value"]


def _meet(name: str) -> None:
    _client().wait_at_barrier(name, _PATIENCE_MS)


def _client() -> Any:
    client = _distributed().client
    if client is None:
        raise InputError("several processes share these devices: start each of them with `coordinator`=auto")
    return client


def _distributed() -> Any:
    """What jax.distributed.initialize has made. jax has no public name for it; Orbax takes it from here too."""
    from jax._src import distributed

    return distributed.global_state
