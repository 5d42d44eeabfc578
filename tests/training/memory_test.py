"""What follows from shapes: a mesh on which a model cannot fit is refused, and auto takes one on which it may."""

import math

import jax
import numpy as np
import pytest

from accounting.errors import InputError
from dpgemma.data.batch import Batch
from dpgemma.gemma import decoder
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.training import memory
from dpgemma.training import optimizer as optimizer_lib
from dpgemma.training.memory import Arrays, fitting, resolve_mesh
from dpgemma.training.optimizer import Optimization
from dpgemma.training.prepare import objective_of
from dpgemma.training.settings import Settings
from tests.training.runs import call, flags, step_records

MIB = 2**20


def arrays(**settings):
    settings = Settings(**settings)
    optimizer = optimizer_lib.make(Optimization.of(settings, settings.steps))
    return Arrays.of(objective_of(settings), mesh_lib.make(settings.mesh), optimizer), settings, optimizer


@pytest.mark.parametrize("mesh, share", [("data:1", 1), ("data:2", 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_known_bytes_are_those_of_the_arrays(mesh, share, dtype):
    planned, settings, optimizer = arrays(model="tiny", mesh=mesh, dtype=dtype)
    found = planned.known_bytes("example_scan", 2)
    objective = objective_of(settings)
    trainable, _ = objective.init(0, (jax.tree.map(lambda leaf: leaf.sharding, planned.trainable), {}))
    moments = jax.jit(optimizer.init)(trainable)
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(trainable))
    in_use = sum(leaf.nbytes for leaf in jax.tree.leaves(objective.cast(trainable)))
    assert found["trained parameters at rest"] == on_one
    assert found["moments"] == pytest.approx(sum(leaf.nbytes for leaf in jax.tree.leaves(moments)) / share, rel=0.01)
    assert found["gradients of the rows at once"] == 2 * in_use
    assert found["sum of gradients"] == 4 * decoder.count(trainable)
    # On one device, in one type, they are the parameters at rest.
    assert found["weights in use"] == pytest.approx(0 if (share, dtype) == (1, "float32") else in_use, rel=0.05)


def least_bytes(objective):
    """Of tiny on two devices: its arrays, and half of what one row keeps."""
    known = arrays(model="tiny", mesh="data:2")[0].known_bytes("auto", 1).values()
    return sum(known) + memory.activations(objective) // 2


def test_a_mesh_on_which_the_model_cannot_fit_is_refused_with_one_that_would():
    settings = Settings(model="tiny", mesh="data:2")
    objective = objective_of(settings)
    least = least_bytes(objective)
    assert resolve_mesh(settings, objective, 2 * least) == "data:2"
    assert resolve_mesh(settings, objective, 1.1 * least) == "data:2"  # it may fit, and it was asked for
    with pytest.raises(InputError, match=r"needs at least .* GiB a device.*`mesh`=data:1,model:2 would leave room"):
        resolve_mesh(settings, objective, 0.95 * least)
    with pytest.raises(InputError, match="use more devices, or adapters"):
        resolve_mesh(settings, objective, 0.1 * least)


def test_auto_takes_the_smallest_model_axis_that_leaves_room():
    settings = Settings(model="tiny", mesh="auto")
    objective = objective_of(settings)
    least = least_bytes(objective)
    assert resolve_mesh(settings, objective, 2 * least) == "data:2"
    assert resolve_mesh(settings, objective, 1.1 * least) == "data:1,model:2"
    with pytest.raises(InputError, match="`mesh`=data:2 needs at least"):
        resolve_mesh(settings, objective, 0.1 * least)


def test_the_smallest_model_axis_is_searched_within_a_slice():
    asked = []

    def known_bytes(shape):
        asked.append(str(shape))
        if shape.model > 8:
            raise InputError("an axis does not divide")
        return 100 * MIB / shape.model

    assert str(fitting(known_bytes, 64, 2, 30 * MIB)) == "slice:2,data:4,model:8"
    assert asked == ["slice:2,data:32", "slice:2,data:16,model:2", "slice:2,data:8,model:4", "slice:2,data:4,model:8"]
    assert fitting(known_bytes, 64, 1, 10 * MIB) is None and fitting(known_bytes, 12, 1, 20 * MIB) is None


def test_a_step_that_needs_more_than_there_is_is_refused_with_what_needs_less():
    memory.check(MIB, MIB, 8)
    with pytest.raises(InputError, match=r"0\.00 GiB.*give `microbatch_size`=4, `remat`=block or a smaller"):
        memory.check(MIB + 1, MIB, 8)
    with pytest.raises(InputError, match="give `remat`=block or a smaller `sequence_length`"):
        memory.check(MIB + 1, MIB, 1)


def test_a_container_has_the_memory_that_it_is_given(tmp_path):
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "less").write_text("1048576\n")
    whole = memory.of_this_computer([tmp_path / "max", tmp_path / "none"])
    assert whole > 2**30 and memory.of_this_computer([tmp_path / "max", tmp_path / "less"]) == MIB


def test_the_devices_of_a_cpu_share_its_memory():
    one, two = memory.limit(mesh_lib.make("data:1")), memory.limit(mesh_lib.make("data:2"))
    assert one == 2 * two and math.log2(one) > 30


@pytest.mark.parametrize("remat", ["none", pytest.param("block", marks=pytest.mark.slow)])
def test_activations_are_less_than_a_compiled_step_needs(remat):
    """And without recomputation the greater part of it."""
    rows, settings = 64, Settings(model="ladder_20k", remat=remat)
    objective = objective_of(settings)
    trainable, _ = objective.shapes()
    batch = Batch.of_rows(objective.noise_rows(rows), np.ones(rows, bool))

    def losses(trainable, batch):
        return jax.vmap(lambda unit: objective.loss(trainable, {}, unit))(batch.units).sum()

    analysis = jax.jit(jax.grad(losses)).lower(trainable, batch).compile().memory_analysis()
    kept = memory.activations(objective)
    parameters = sum(4 * math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable))
    assert kept < objective.volume[1] * parameters  # which resolve_mesh takes for granted
    share = rows * kept / analysis.temp_size_in_bytes
    assert share < 1.1 and (share > 0.5 or remat == "block")


def test_rows_at_once_that_cannot_fit_are_refused_before_anything_is_made():
    settings = Settings(model="tiny", mesh="data:1", microbatch_size=4096, max_batch_size=4096)
    objective = objective_of(settings)
    with pytest.raises(InputError, match=r"4096 rows at once of 128 tokens need at least .*`microbatch_size`=2048"):
        resolve_mesh(settings, objective, 4 * 2**30)
    assert resolve_mesh(settings.replaced(microbatch_size=256), objective, 4 * 2**30) == "data:1"


@pytest.mark.slow
def test_a_compiled_step_that_does_not_fit_is_refused_before_it_is_taken(text, tmp_path):
    """Of which half would fit."""
    kept = memory.activations(objective_of(Settings(sequence_length=32)))
    rows = int(1.8 * memory.of_this_computer() / kept)
    together = dict(microbatch_size=rows, max_batch_size=rows, clipping="ghost", mesh="data:1")
    done = call(*flags(text, tmp_path / "run", **together))
    assert done.returncode == 2 and "dpgemma: a step needs " in done.stderr, done.stderr
    assert f"in another --workdir, give --microbatch_size={rows // 2}" in done.stderr
    assert not step_records(tmp_path / "run")
