"""Checkpoints: parameters, optimizer state and the place in the ledger in one atomic Orbax step.

A checkpoint names the ledger's length and head hash at its own event, which is on disk before it and names the SHA-256
of its parameters and of its whole state; so each fixes the other. A second event names the SHA-256 of its files.

Formal guarantee: parameters that are not those with which a run's ledger was written are neither trained further, nor
sampled from, nor exported under its report; no step is saved with two states; and a run goes on only from a state that
the lineage of its keys leads to. Tested by
tests/training/audit_test.py::test_parameters_of_another_run_are_not_taken_for_this_ones and
tests/training/checkpoint_test.py::test_a_step_is_not_saved_with_another_state and
::test_a_run_does_not_go_on_from_a_state_that_it_has_left.
"""

import functools
import hashlib
import itertools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from accounting import run_files
from accounting.errors import InputError, is_out_of_memory
from accounting.ledger import events
from accounting.ledger.chain import Ledger
from accounting.ledger.history import History
from dpgemma.sharding import processes
from dpgemma.storage.mirror import Mirror
from dpgemma.training import optimizer
from dpgemma.training.checkpoint_files import CheckpointFiles
from dpgemma.training.step import TrainState

# What read_only implies is said as well, because Orbax warns about each that it has to change.
_READ_ONLY = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
_PARAMETERS = "parameters"
_READ_AT_ONCE = 2**28  # bytes of a checkpoint that an audit holds in memory, where arrays are smaller


class Checkpoints:
    """The checkpoints of one run; use as a context manager, so that a pending write is finished."""

    def __init__(self, files: CheckpointFiles, keep: int, mirror: Mirror | None = None) -> None:
        """Opens or creates the folder.

        Args:
          keep: number of checkpoints that are kept.
          mirror: is told which checkpoints are complete, where the folder is the copy of one in an object storage.
        """
        self._files, self._mirror = files, mirror
        # Step of the checkpoint whose files are not in the ledger yet, and of the one whose metadata still hold times
        # of writing; None if there is none.
        self._writing: int | None = None
        self._dated: int | None = None
        if processes.is_first():
            files.delete_removed()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, todelete_subdir=files.removed
        )
        self._manager: ocp.CheckpointManager = self._looked_at(
            lambda: ocp.CheckpointManager(files.directory, options=options, item_names=("state", "meta"))
        )

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and processes.count() > 1:
            return  # other processes cannot be waited for: they are told why this one ends
        try:
            self._manager.close()
        except Exception:  # of a write that nobody waited for: what ended the run is told instead
            if kind is None:
                raise

    def save(self, step: int, state: TrainState, ledger: Ledger | None, **facts: Any) -> None:
        """Begins to save the state after `step` updates, bound to the ledger's head at a new checkpoint event.

        Once it returns, the state's memory may be used again: files are written while training goes on.

        Formal guarantee: files enter the ledger before the next checkpoint begins, or at `settle`, so where their event
        stands among the steps does not depend on how long a step took, which tells how many units it had. Tested by
        tests/training/checkpoint_test.py::test_files_enter_the_ledger_at_a_step_that_no_clock_decides.

        Args:
          ledger: None in the processes that are not the first.
          facts: what the event records besides the step and its digests.

        Raises:
          InputError: the ledger knows another state of this step, or the disk is full.
        """
        self.settle(ledger)
        if self._mirror is not None:
            self._mirror.wait()  # what it takes away might be removed with the new one
        if step in self._all_steps():
            return
        state_dict = state.as_dict()
        sha256 = digests(state_dict)
        count = optimizer.update_count(state.optimizer_state)

        def recorded() -> dict[str, Any]:
            assert ledger is not None
            if ledger.history.state_at(step) not in (None, sha256["state_sha256"]):
                raise InputError(
                    f"step {step} has been saved before with another state, so this computer does not repeat its own"
                    " results; the checkpoints before it are kept, and this run must not go on here: it would release a"
                    " second time what is charged once"
                )
            ledger.append(events.CHECKPOINT, step=step, **sha256, **facts)
            ledger.sync()
            return {"step": step, "optimizer_count": count, "ledger_lines": ledger.length, "ledger_head": ledger.head}

        meta = processes.from_first(recorded)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state_dict), meta=ocp.args.JsonSave(meta))
        self._writing = self._dated = step
        processes.from_all(lambda: self._write(step, lambda: self._manager.save(step, args=items)))

    def tidy(self) -> None:
        """Removes the times of writing from the metadata of a checkpoint that has been written meanwhile, so that a
        crash before `settle` leaves none there.
        """
        if self._dated is None or not processes.is_first() or self._manager.is_saving_in_progress():
            return
        is_whole = self._files.strip_times(self._dated)  # else it could not be written, which `settle` reports
        if is_whole and self._mirror is not None:
            self._mirror.stored(self._dated)
        self._dated = None

    def settle(self, ledger: Ledger | None) -> None:
        """Waits until what was begun is written, and enters its files into the ledger.

        Raises:
          InputError: the disk is full.
        """
        if self._writing is None:
            return
        step, is_new, self._writing, self._dated = self._writing, self._dated is not None, None, None
        processes.from_all(lambda: self._write(step, self._manager.wait_until_finished))
        processes.from_first(lambda: self._record_files(step, ledger, is_new=is_new))

    def _all_steps(self) -> list[int]:
        """Steps of whole checkpoints: the first process looks, because others may see a shared folder later."""
        return processes.from_first(lambda: self._looked_at(lambda: sorted(map(int, self._manager.all_steps()))))

    def _looked_at(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # each disk and storage has exceptions of its own
            raise InputError(
                f"checkpoints cannot be looked for in {self._files.directory} ({_reason(error)}): run the same command"
                " again when they can be read and written"
            ) from None

    def _write(self, step: int, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # a full disk comes back as one of many types
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"checkpoint {step} cannot be written to {self._files.directory} ({_reason(error)}): make room and run"
                " the same command again; the checkpoints before it are kept"
            ) from None

    def _record_files(self, step: int, ledger: Ledger | None, *, is_new: bool) -> None:
        """Enters the files of a whole checkpoint into the ledger, without the times at which they were written.

        Args:
          is_new: whether the mirror does not have it.
        """
        assert ledger is not None
        self._files.strip_times(step)
        self._files.delete_removed()
        ledger.append(events.STORED, step=step, files_sha256=self._files.digest(step))
        ledger.sync()
        if is_new and self._mirror is not None:
            self._mirror.stored(step)

    def restore(
        self, like: TrainState, ledger: Ledger | None, warn: Callable[[str], None]
    ) -> tuple[int, TrainState] | None:
        """The latest checkpoint that can be read, as (step, state); None if there is none.

        A damaged checkpoint is renamed, with a warning, and the one before it is taken.

        Args:
          like: a state of the right structure, shapes and shardings.
          ledger: None in the processes that are not the first.

        Raises:
          InputError: a checkpoint that this ledger does not know.
        """
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like.as_dict())
        for step in reversed(self._all_steps()):
            state, fault = self._sound_state(step, template, ledger)
            if state is not None:
                return step, state
            warn(f"checkpoint {step} {fault}; it is set aside and the one before it is used")
            processes.from_first(functools.partial(self._files.set_aside, step))
            self._looked_at(self._manager.reload)
        return None

    def _sound_state(self, step: int, template: Any, ledger: Ledger | None) -> tuple[TrainState | None, str | None]:
        """The state of a checkpoint; None, and why, if a run must not go on from it."""
        if processes.count() > 1:  # which read together: none may fail alone
            fault = processes.from_first(lambda: self._fault_of_files(step, ledger))
            if fault is not None:
                return None, fault
        state, meta, reason = self._read(step, template)
        if state is None and processes.count() > 1:
            raise InputError(
                f"process {processes.number()} cannot read checkpoint {step} in {self._files.directory} ({reason}):"
                " restore it, or remove its folder, and the run goes on from the one before it"
            )
        if state is None:
            return None, f"cannot be read ({reason})"
        sha256 = digests(state.as_dict())["state_sha256"]
        fault = processes.from_first(lambda: self._fault(step, meta, sha256, ledger))
        return (state, None) if fault is None else (None, fault)

    def _read(self, step: int, template: Any) -> tuple[TrainState | None, dict[str, Any], str | None]:
        """The state and what is known of it; or why it cannot be read."""
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore())
            )
            meta, state = restored.meta, TrainState(**restored.state)
            meta["ledger_lines"], meta["ledger_head"]  # a checkpoint without them is damaged
            sound = meta["step"] == meta["optimizer_count"] == optimizer.update_count(state.optimizer_state) == step
            if not sound:
                raise ValueError(f"its counters disagree with its number {step}")
        except Exception as error:  # whatever the storage layers raise on damaged files
            if is_out_of_memory(error):  # which says nothing of the files
                raise
            return None, {}, _reason(error)
        return state, meta, None

    def _fault_of_files(self, step: int, ledger: Ledger | None) -> str | None:
        """Whether files are not those that the ledger recorded, where it did: a sentence, or None."""
        assert ledger is not None
        recorded = [each for each in ledger.records if each["kind"] == events.STORED and each["step"] == step]
        if not recorded or self._files.digest(step) == recorded[-1]["files_sha256"]:
            return None
        return "has other files than the ledger recorded"

    def _fault(self, step: int, meta: dict[str, Any], state_sha256: str, ledger: Ledger | None) -> str | None:
        """Why a run must not go on from a checkpoint; None if it may."""
        assert ledger is not None
        if not ledger.begins_with(meta["ledger_lines"], meta["ledger_head"]):
            raise InputError(
                f"checkpoint {step} in {self._files.directory} belongs to another ledger: it was exchanged or the"
                " ledger edited"
            )
        if not is_recorded(meta, ledger.records, state_sha256=state_sha256):
            return "holds another state than the ledger recorded"
        then = History.of(ledger.records[: meta["ledger_lines"]])
        if then.way_to(step) != ledger.history.way_to(step):
            return "was made before the run went on without it, elsewhere"
        written = ledger.records[meta["ledger_lines"] :]
        if not any(record["kind"] == events.STORED and record["step"] == step for record in written):
            self._record_files(step, ledger, is_new=False)  # a crash came before
        return None


def digests(state: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the parameters and of a whole state, as a checkpoint event names them: that of a state is of its
    arrays' own digests, in the order of their names, in whatever containers.

    One array is in host memory at a time. Of several processes, each has to ask.
    """
    parameters, of_arrays = hashlib.sha256(), {}
    for path, leaf in jax.tree.flatten_with_path(state)[0]:
        array = processes.on_host(leaf)
        of_arrays[_name(path)] = _digest_of(array)
        if path[0].key == _PARAMETERS:
            _add(parameters, path[1:], array)
    return {"parameters_sha256": parameters.hexdigest(), "state_sha256": _combined(of_arrays)}


def digest(parameters: dict[str, Any]) -> str:
    """SHA-256 of names, types, shapes and contents of a tree of arrays."""
    return digests({_PARAMETERS: parameters})["parameters_sha256"]


def _combined(digests: dict[str, str]) -> str:
    return run_files.digest("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode())


def _name(path: tuple[Any, ...]) -> str:
    return str(jax.tree_util.keystr(path, simple=True, separator="/"))


def _digest_of(array: np.ndarray) -> str:
    total = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
    total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _add(total: Any, path: tuple[Any, ...], array: np.ndarray) -> None:
    total.update(f"{_name(path)} {array.dtype} {array.shape}\n".encode())
    total.update(np.ascontiguousarray(array).tobytes())


def is_recorded(meta: dict[str, Any], records: Sequence[dict[str, Any]], **digests: str) -> bool:
    """Whether the ledger's event of a checkpoint has these digests."""
    place = meta["ledger_lines"] - 1
    event = records[place] if 0 <= place < len(records) else {}
    return event.get("kind") == events.CHECKPOINT and all(event.get(name) == digests[name] for name in digests)


def summaries(directory: pathlib.Path, read_at_once: int = _READ_AT_ONCE) -> list[dict[str, Any]]:
    """Every checkpoint as plain facts, for an audit.

    Each has `step` (its folder's), `meta`, `optimizer_count`, `parameters_sha256` and `state_sha256`, or `step` and
    `error`.

    Every array is read, a few at a time, so that a damaged one is found in little memory.
    """
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(directory.absolute(), item_handlers=handlers, options=_READ_ONLY) as manager:
        return [_summary(manager, step, read_at_once) for step in sorted(manager.all_steps())]


def _summary(manager: ocp.CheckpointManager, step: int, read_at_once: int) -> dict[str, Any]:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    try:
        paths, structure = jax.tree.flatten_with_path(manager.item_metadata(step)["state"].tree)
        leaves, parameters, digests = [leaf for _, leaf in paths], hashlib.sha256(), {}
        for chosen in _together(leaves, read_at_once):
            wanted = [ocp.PLACEHOLDER] * len(leaves)
            for i in chosen:
                wanted[i] = jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype, sharding=device)
            arrays = jax.tree.leaves(_restore_tree(manager, step, jax.tree.unflatten(structure, wanted)).state)
            for i in chosen:
                path, _ = paths[i]
                digests[_name(path)] = _digest_of(np.asarray(arrays[i]))
                if path[0].key == _PARAMETERS:
                    _add(parameters, path[1:], np.asarray(arrays[i]))
                # Only the counters are kept.
                leaves[i] = arrays[i] if arrays[i].shape == () else None
        count = optimizer.update_count(jax.tree.unflatten(structure, leaves)["optimizer_state"])
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    except Exception as error:  # whatever the storage layers raise on damaged files
        return {"step": step, "error": f"it cannot be read ({_reason(error)})"}
    return {
        "step": step,
        "meta": meta,
        "optimizer_count": count,
        "parameters_sha256": parameters.hexdigest(),
        "state_sha256": _combined(digests),
    }


def _together(leaves: Sequence[Any], read_at_once: int) -> list[range]:
    """Numbers of neighbouring arrays that are read together: those of at most so many bytes in all, or one larger
    one.
    """
    ends, size = [0], 0
    for i, leaf in enumerate(leaves):
        bytes_ = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        if i > ends[-1] and size + bytes_ > read_at_once:
            ends.append(i)
            size = 0
        size += bytes_
    return [range(*pair) for pair in itertools.pairwise([*ends, len(leaves)])]


def _restore_tree(manager: ocp.CheckpointManager, step: int, template: Any) -> Any:
    arguments = ocp.checkpoint_utils.construct_restore_args(template)
    return manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(item=template, restore_args=arguments))
    )


def latest_parameters(directory: pathlib.Path) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(step, parameter tree, meta) of the latest checkpoint on one device, wherever it was saved; for sampling and
    export.

    Raises:
      InputError: there is none, or it cannot be read.
    """
    absent = InputError(f"{directory.parent} has no checkpoint yet: train it first")
    if not directory.is_dir():
        raise absent
    handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(directory.absolute(), item_handlers=handlers, options=_READ_ONLY) as manager:
        step = manager.latest_step()
        if step is None:
            raise absent
        try:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            stored = manager.item_metadata(step)["state"].tree
            template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), stored)
            items = ocp.args.Composite(state=ocp.args.StandardRestore(template), meta=ocp.args.JsonRestore())
            restored = manager.restore(step, args=items)
        except Exception as error:  # whatever the storage layers raise on damaged files
            raise InputError(
                f"checkpoint {step} in {directory} cannot be read ({_reason(error)}): resume training, which falls back"
            ) from None
    return step, restored.state["parameters"], restored.meta


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
