"""Checkpoints: what they are bound to, and what they must not say."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import optax
import pytest

from accounting.errors import InputError
from accounting.ledger.chain import Ledger
from dpgemma.training import checkpoint
from dpgemma.training.checkpoint import Checkpoints
from dpgemma.training.checkpoint_files import OnDisk
from dpgemma.training.step import TrainState

GROUP = {"sampling_probability": 0.1, "noise_multiplier": 1.0, "max_batch_size": 60}


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger.open(tmp_path / "ledger.jsonl")
    ledger.append("start", format=4, environment="laptop")
    for step in range(2):
        ledger.append_step(step, GROUP)
    return ledger


def state_of(value, moment=0.0):
    parameters = {"w": jnp.full(3, value)}
    adam = optax.adamw(0.1).init(parameters)
    first = adam[0]._replace(count=jnp.asarray(2, jnp.int32), mu={"w": jnp.full(3, moment)})
    return TrainState(parameters, (first, *adam[1:]))


def save(folder, ledger, state):
    with Checkpoints(OnDisk(folder, folder / "damaged"), 3) as checkpoints:
        checkpoints.save(2, state, ledger, metrics_sha256="")
        checkpoints.settle(ledger)


@pytest.mark.parametrize("other", [state_of(2.0), state_of(1.0, moment=1e-7)], ids=["parameters", "optimizer"])
def test_a_step_is_not_saved_with_another_state(other, ledger, tmp_path):
    """Not even in another folder, with its own checkpoints, under the ledger that knows the first ones."""
    save(tmp_path / "a", ledger, state_of(1.0))
    length = ledger.length
    with pytest.raises(InputError, match="saved before with another state"):
        save(tmp_path / "b", ledger, other)
    assert ledger.length == length
    save(tmp_path / "again", ledger, state_of(1.0))
    # Elsewhere the step has noise of its own, and so another state.
    ledger.append("resume", step=1, environment="server")
    ledger.append_step(1, GROUP)
    save(tmp_path / "c", ledger, other)


def test_a_run_does_not_go_on_from_a_state_that_it_has_left(ledger, tmp_path):
    """The first place saved step 2; a second began before it again, so its noise at step 2 is for another state."""
    save(tmp_path / "a", ledger, state_of(1.0))
    ledger.append("resume", step=0, environment="server")
    warnings = []
    with Checkpoints(OnDisk(tmp_path / "a", tmp_path / "damaged"), 3) as checkpoints:
        assert checkpoints.restore(state_of(0.0), ledger, warnings.append) is None
    assert "went on without it" in warnings[0] and (tmp_path / "damaged" / "2").is_dir()
    for step in range(2):
        ledger.append_step(step, GROUP)
    save(tmp_path / "a", ledger, state_of(2.0))
    with Checkpoints(OnDisk(tmp_path / "a", tmp_path / "damaged"), 3) as checkpoints:
        step, state = checkpoints.restore(state_of(0.0), ledger, pytest.fail)
    assert step == 2 and float(state.parameters["w"][0]) == 2.0


def test_files_enter_the_ledger_at_a_step_that_no_clock_decides(ledger, tmp_path):
    """However soon they are written: before the next checkpoint begins, or when the run waits for them."""
    with Checkpoints(OnDisk(tmp_path / "a", tmp_path / "damaged"), 3) as checkpoints:
        checkpoints.save(2, state_of(1.0), ledger, metrics_sha256="")
        metadata = tmp_path / "a/2/_CHECKPOINT_METADATA"
        deadline = time.monotonic() + 30
        while not metadata.is_file() or "null" not in metadata.read_text():  # nor does it say when it was written
            assert time.monotonic() < deadline
            checkpoints.tidy()
        assert ledger.records[-1]["kind"] == "checkpoint"
        ledger.append_step(2, GROUP)
        later = state_of(2.0)
        adam = later.optimizer_state[0]._replace(count=jnp.asarray(3, jnp.int32))
        later = dataclasses.replace(later, optimizer_state=(adam, *later.optimizer_state[1:]))
        checkpoints.save(3, later, ledger, metrics_sha256="")
        kinds = [record["kind"] for record in ledger.records[-4:]]
        assert kinds == ["checkpoint", "step", "stored", "checkpoint"]
        checkpoints.settle(ledger)
        checkpoints.settle(ledger)
        assert [record["step"] for record in ledger.records if record["kind"] == "stored"] == [2, 3]


def test_what_is_saved_is_the_state_before_its_memory_is_used_again(ledger, tmp_path):
    following = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = state_of(1.0)
    state = dataclasses.replace(state, parameters={"w": jnp.full(10**6, 1.0)})
    with Checkpoints(OnDisk(tmp_path / "a", tmp_path / "damaged"), 3) as checkpoints:
        checkpoints.save(2, state, ledger, metrics_sha256="")
        for _ in range(20):
            state = following(state)
        checkpoints.settle(ledger)
    assert checkpoint.summaries(tmp_path / "a")[0]["state_sha256"] == ledger.records[-2]["state_sha256"]
    _, parameters, _ = checkpoint.latest_parameters(tmp_path / "a")
    assert (parameters["w"] == 1).all()


def test_a_checkpoint_does_not_say_when_it_was_written(ledger, tmp_path):
    save(tmp_path / "a", ledger, state_of(1.0))
    (folder,) = (path for path in (tmp_path / "a").iterdir() if path.name == "2")
    metadata = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    assert [metadata[name] for name in metadata if "timestamp" in name] == [None, None]
    assert checkpoint.summaries(tmp_path / "a")[0]["optimizer_count"] == 2
    with Checkpoints(OnDisk(tmp_path / "a", tmp_path / "damaged"), 3) as checkpoints:
        step, state = checkpoints.restore(state_of(0.0), ledger, pytest.fail)
    assert step == 2 and float(state.parameters["w"][0]) == 1.0


def test_the_digest_of_a_state_depends_on_every_leaf_and_not_on_its_containers():
    state = state_of(1.0, moment=0.5).as_dict()
    same = {
        "optimizer_state": [
            {"count": jnp.asarray(2, jnp.int32), "mu": {"w": jnp.full(3, 0.5)}, "nu": {"w": jnp.zeros(3)}}
        ],
        "parameters": {"w": jnp.full(3, 1.0)},
    }
    assert checkpoint.digests(state)["state_sha256"] == checkpoint.digests(same)["state_sha256"]
    for changed in (state_of(1.0).as_dict(), state_of(1.5, moment=0.5).as_dict(), {**state, "clip_norm": jnp.ones(())}):
        assert checkpoint.digests(changed)["state_sha256"] != checkpoint.digests(state)["state_sha256"]


def test_a_checkpoint_that_is_deleted_is_never_there_in_part(ledger, tmp_path):
    """It goes to private/ in one move; what a killed process left there is deleted by the next one."""
    moved, removed = [], tmp_path / "private" / "removed"

    class Watched(OnDisk):
        def delete_removed(self):
            moved.extend(sorted(path.name for path in removed.iterdir()) if removed.exists() else [])
            super().delete_removed()
            assert not removed.exists()

    (removed / "1").mkdir(parents=True)
    # Checkpoints may lie elsewhere, behind a link.
    elsewhere = tmp_path / "elsewhere" / "checkpoints"
    elsewhere.mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(elsewhere)
    with Checkpoints(Watched(tmp_path / "checkpoints", tmp_path / "damaged"), 1) as checkpoints:
        for step in (2, 3):
            state = state_of(float(step))
            adam = (state.optimizer_state[0]._replace(count=jnp.asarray(step, jnp.int32)), *state.optimizer_state[1:])
            checkpoints.save(step, dataclasses.replace(state, optimizer_state=adam), ledger, metrics_sha256="")
            checkpoints.settle(ledger)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["checkpoints"]
    assert moved == ["1", "2"] and [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
