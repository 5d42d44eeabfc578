"""Layers that are spread over devices: the same sums and norms, nothing of a unit's gradient travels, none leaves C."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from accounting.errors import InputError
from dpgemma.gemma import decoder
from dpgemma.sharding.place import Layout
from dpgemma.sharding.rules import MeshShape, wanted
from tests.sharding import eight

MESHES = [
    "data:1", "data:8", "data:2,model:4", "data:4,model:2", "data:1,model:8", "slice:2,data:4",
    "slice:2,data:2,model:2",
]  # fmt: skip
FEW_MESHES = [MESHES[0], *MESHES[-2:]]
FULLY_SHARDED = ["data:1", "fsdp:8", "slice:2,fsdp:4"]
FAMILIES = ["vaultgemma_1b", "gemma2_2b", "gemma3_1b", "recurrentgemma_2b"]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "family, meshes", [("vaultgemma_1b", FEW_MESHES), *(pytest.param(name, MESHES, marks=slow) for name in FAMILIES)]
)
def test_a_sum_does_not_depend_on_the_mesh(family, meshes):
    norm, away, norms_away, alone = eight.result_of(f"sums({meshes!r}, {family!r})")
    assert 0.05 < norm < 13 * 0.05 and max(away) < 1e-5 * norm and max(norms_away) < 1e-5
    assert 0.99 < alone <= 1


@slow
@pytest.mark.parametrize("family", ["vaultgemma_1b", "recurrentgemma_2b"])
def test_units_of_several_rows_have_the_same_sums_on_every_mesh(family):
    """Devices have different numbers of rows, and where layers are spread go through them together."""
    norm, away, norms_away, alone = eight.result_of(f"sums({MESHES!r}, {family!r}, rows_per_unit=3)")
    assert 0.05 < norm < 13 * 0.05 and max(away) < 1e-5 * norm and max(norms_away) < 1e-5
    assert 0.99 < alone <= 1


@slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, far", [("float32", 1e-5), pytest.param("bfloat16", 0.1, marks=slow)])
def test_fully_sharded_parameters_give_the_sums_of_whole_ones(family, dtype, far):
    norm, away, norms_away, alone = eight.result_of(f"sums({FULLY_SHARDED!r}, {family!r}, {dtype!r}, 'ghost')")
    assert 0.05 < norm < 13 * 0.05 and max(away) < far * norm and max(norms_away) < far
    assert 0.9 < alone <= 1


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_no_unit_contributes_more_than_the_clip_norm_in_bfloat16(family):
    norm, away, _, alone = eight.result_of(f"sums({MESHES!r}, {family!r}, 'bfloat16')")
    assert max(away) < 0.1 * norm and 0.9 < alone <= 1


@pytest.mark.parametrize(
    "strategy, meshes",
    [
        pytest.param("ghost", FULLY_SHARDED, marks=slow),
        pytest.param("example_scan", MESHES, marks=slow),
    ],
)
def test_adapters_of_spread_weights_have_the_sums_of_adapters_of_whole_ones(strategy, meshes):
    norm, away, norms_away, alone = eight.result_of(f"sums({meshes!r}, 'gemma3_1b', 'float32', {strategy!r}, 4)")
    assert 0.05 < norm < 13 * 0.05 and max(away) < 1e-5 * norm and max(norms_away) < 1e-5
    assert 0.9 < alone <= 1


@pytest.mark.parametrize(
    "family, meshes",
    [
        pytest.param("gemma3_1b", ["data:1", "data:2,model:4", "fsdp:8"], marks=slow),
        *(pytest.param(name, MESHES + FULLY_SHARDED, marks=slow) for name in FAMILIES),
    ],
)
def test_noise_does_not_depend_on_the_mesh(family, meshes):
    assert len(set(eight.result_of(f"noises({meshes!r}, {family!r})"))) == 1


@slow
@pytest.mark.parametrize("mesh", ["data:2,model:4", "data:1,model:8"])
def test_no_gradient_travels_inside_the_loop(mesh):
    """What does are activations of one unit and parts of norms: vectors of the numbers of one row or one column."""
    text = eight.result_of(f"Step({mesh!r}, model=small('vaultgemma_1b')).text()")
    found, model = eight.collectives(text), eight.small("vaultgemma_1b")
    shape = wanted(mesh)
    tokens, widest = 10, max(model.d_model, model.head_dim * model.num_kv_heads)
    inside = [size for _, in_loop, size in found if in_loop]
    assert inside and max(inside) <= tokens * widest
    leaves = [leaf for leaf in jax.tree.leaves(decoder.parameter_shapes(model)) if leaf.ndim > 2]
    assert min(leaf.size for leaf in leaves) > max(inside), "no array of weights could be meant"
    # Outside of it the weights are gathered along the data axis alone, each device its own part of the layers.
    outside = [size for name, in_loop, size in found if not in_loop and name == "all-gather"]
    assert max(outside) <= max(leaf.size for leaf in jax.tree.leaves(decoder.parameter_shapes(model))) / shape.model


@slow
def test_no_device_holds_the_gradients_or_weights_of_all_layers():
    """On a fully sharded mesh: a layer at a time, and the words that the first and the last operation use."""
    model = eight.small("vaultgemma_1b")
    model = dataclasses.replace(model, layer_types=model.layer_types * 16)
    text = eight.result_of(
        "Step('fsdp:8', remat='block', dtype='bfloat16', model=dataclasses.replace("
        "(one := small('vaultgemma_1b')), layer_types=one.layer_types * 16)).text()"
    )
    shapes = decoder.parameter_shapes(model)
    stacked = max(leaf.size for leaf in jax.tree.leaves(shapes["blocks"]))
    words = shapes["embedder"]["embedding"].size
    assert words < stacked / 2
    assert max(eight.largest_arrays(text).values()) < stacked
    in_loop = [size for _, is_inside, size in eight.collectives(text) if is_inside]
    assert in_loop and max(in_loop) <= max(stacked / 16, words)


def test_what_does_not_divide_is_refused_with_what_would():
    layout = Layout(AbstractMesh((1, 4), ("data", "model")))
    assert layout.in_use(("model", "heads", "head"), (64, 8, 16)) == PartitionSpec(None, "model", None)
    assert layout.in_use(("model", "kv_heads", "head"), (64, 2, 16)) == PartitionSpec(None, None, None)
    assert layout.at_rest(("layers", "model", "feed_forward"), (2, 64, 256)) == PartitionSpec(None, "data", "model")
    with pytest.raises(InputError, match=r"`mesh` spreads heads over 4 devices, and 10 .* use a model axis of 2"):
        layout.in_use(("model", "heads", "head"), (64, 10, 16))


def test_meshes_have_one_form():
    assert wanted("auto") is None and wanted("data:3") == MeshShape(3) and wanted("data:2,model:4") == MeshShape(2, 4)
    assert wanted("slice:2,data:3,model:4") == MeshShape(3, 4, 2) and wanted("slice:1,data:2") == MeshShape(2)
    wrong = ["model:2", "data:2,model:0", "data:2,model", "data:2,data:2", "data:2,model:2,model:2", "data:²", ""]
    wrong += ["data:2,fsdp:2", "fsdp:2,model:2", "fsdp:2,slice:2"]
    for mesh in [*wrong, "model:2,data:2", "data:2,slice:2", "slice:2", "slice:2,model:2", "data:2,"]:
        with pytest.raises(InputError, match="`mesh` must be auto, data:N, data:A,model:B, fsdp:N, or one of them"):
            wanted(mesh)
    assert MeshShape(3, 4, 2).rows == 6 and MeshShape(3, 4, 2).devices == 24
    assert str(MeshShape(3, 4, 2)) == "slice:2,data:3,model:4"
    assert wanted("slice:2,fsdp:3") == MeshShape(3, 1, 2, fully_sharded=True) and wanted("fsdp:3").rows == 3
