"""Parameters at rest are spread over the devices: with the same bits, and moved once in a step each way."""

import itertools

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dpgemma.gemma import decoder
from dpgemma.gemma.files import weights
from dpgemma.gemma.presets import PRESETS
from dpgemma.sharding.place import Layout
from tests.sharding import eight
from tests.training import step_test


@pytest.mark.slow
def test_the_bits_of_a_step_do_not_depend_on_where_its_state_lies():
    whole = "Step('data:1', spread=False).run(3).digest()"
    spread = "Step(mesh).run(3).digest() for mesh in ('data:8', 'slice:2,data:4')"
    digests = eight.result_of(f"[{whole}, *({spread})]")
    assert len(set(digests)) == 1


@pytest.mark.slow
def test_weights_are_gathered_once_and_sums_scattered_once():
    text, share = eight.result_of("(lambda step: [step.text(), step.run(1).largest_share()])(Step('data:8'))")
    assert share == 1 / 8
    leaves = jax.tree.leaves(decoder.parameter_shapes(step_test.MODEL))
    found = eight.collectives(text)
    assert not [each for each in found if each[1]], "nothing moves inside the loop over microbatches"
    large = [(name, size) for name, _, size in found if size > 64]  # others carry norms and losses of units
    weights_gathered = sorted(size for name, size in large if name == "all-gather")
    assert weights_gathered == sorted(leaf.size for leaf in leaves if leaf.size > 64)
    sums = sorted(8 * size for name, _, size in found if name == "reduce-scatter")
    assert sums == sorted(leaf.size for leaf in leaves)
    assert {name for name, _ in large} <= {"all-gather", "reduce-scatter"}


LARGE = ["vaultgemma_1b", "gemma3_1b", "gemma3_27b", "recurrentgemma_2b"]


@pytest.mark.parametrize("name, devices", [("tiny", 2), ("tiny", 8), *itertools.product(LARGE, [2, 8, 256])])
def test_what_is_held_whole_at_rest_is_little(name, devices):
    config, mesh = PRESETS[name], AbstractMesh((devices,), ("data",))
    shapes = decoder.parameter_shapes(config)
    specs = jax.tree.map(
        lambda axes, leaf: Layout(mesh).at_rest(axes, leaf.shape),
        weights.axes(config),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    pairs = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(specs), strict=True))
    whole = sum(leaf.size for leaf, spec in pairs if "data" not in spec)
    assert all(leaf.shape[spec.index("data")] % devices == 0 for leaf, spec in pairs if "data" in spec)
    if config.d_model % devices == 0 or config.d_ff % devices == 0:
        assert whole < 0.08 * decoder.count(shapes), [leaf.shape for leaf, spec in pairs if "data" not in spec]


def test_an_axis_without_a_rule_is_refused_by_the_parameters_name():
    layout = Layout(AbstractMesh((2,), ("data",)))
    with pytest.raises(ValueError, match=r"parameter a/b: layout replicated has no rule for the axis pages"):
        layout.places(({"a": {"b": ("pages",)}}, {}), ({"a": {"b": jax.numpy.ones(2)}}, {}))
    assert layout.at_rest(("model",), (3,)) == PartitionSpec(None)
