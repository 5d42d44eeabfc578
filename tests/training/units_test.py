"""Units of several rows, from their source through clipped_sum and the step, against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from accounting.mechanism import Clip, dp_sgd
from dpgemma.data import holdout
from dpgemma.data.batch import Batch, Unit, collate
from dpgemma.data.source import InMemory, Subset
from dpgemma.gemma import decoder
from dpgemma.privacy import clipping, noise
from dpgemma.privacy.clipping import Strategy
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.training.step import TrainState, make_train_step
from tests.objectives import causal, row_loss
from tests.training.step_test import MODEL, flat

pytestmark = pytest.mark.usefixtures("quick_compiles")

# Five units, of 3, 1, 2, 3 and 1 rows. Rows have different numbers of scored tokens, one of them none.
COUNTS = (3, 1, 2, 3, 1)
KEYS = noise.noise_keys(bytes(32), 3)
OBJECTIVE = causal(MODEL, length=10)
GRADIENT = jax.jit(jax.grad(lambda params, row: row_loss(MODEL)(params, {}, row)))
WAYS = [Strategy("example_scan"), Strategy("ghost", 2), Strategy("vmap", 2)]


def source():
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 40, (sum(COUNTS), 10)).astype(np.int32)
    scored = np.arange(10) < rng.integers(1, 11, (sum(COUNTS), 1))
    scored[4] = False
    return InMemory({"tokens": tokens, "scored": scored}, np.concatenate([[0], np.cumsum(COUNTS)]), max_rows=3)


def parameters():
    return decoder.init_parameters(MODEL, jax.random.key(0))


def expected_sum(units, clip_norm):
    """The definition: the mean of a unit's row gradients, in float64, scaled to the clip norm as a whole; summed."""
    columns, first = source().columns, source().first
    total = 0
    for u in units:
        rows = range(first[u], first[u + 1])
        mean = np.mean([flat(GRADIENT(parameters(), {n: c[r] for n, c in columns.items()})) for r in rows], axis=0)
        total = total + mean * min(1, clip_norm / np.linalg.norm(mean))
    return total


def of_unit(params, unit):
    return OBJECTIVE.loss(params, {}, unit)


@pytest.mark.parametrize("how", WAYS, ids=lambda how: how.name)
@pytest.mark.parametrize("clip_norm", [0.3, 1e6])
def test_a_unit_of_several_rows_contributes_its_clipped_mean_gradient(how, clip_norm):
    units = np.array([0, 2, 3, 4])
    batch = collate(source(), units, 6)
    assert batch.rows["tokens"].shape == (6, 3, 10)
    got = jax.jit(lambda p, b: clipping.clipped_sum(of_unit, p, b, Clip(clip_norm), how))(parameters(), batch)
    expected = expected_sum(units, clip_norm)
    # Where a unit is clipped, ghost takes off what its bounds of all roundings ask for.
    tolerance = 3e-5 if how.name == "ghost" and clip_norm < 1 else 1e-5
    assert np.linalg.norm(flat(got.total) - expected) < tolerance * np.linalg.norm(expected)
    assert (np.asarray(got.stats.norms) > 0).tolist() == [True] * 4 + [False] * 2


def test_devices_that_go_through_their_rows_together_add_what_each_adds_alone():
    """One has six rows and the other one, so the other goes on over places that hold none."""
    batches = [collate(source(), np.array(units), 3) for units in ([0, 3], [1])]
    both = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)

    def total(batch, **together):
        return clipping.clipped_sum(of_unit, parameters(), batch, Clip(0.3), Strategy("example_scan"), **together).total

    joint = jax.jit(jax.vmap(lambda batch: total(batch, together=("rows",)), axis_name="rows"))(both)
    for i, units in enumerate(([0, 3], [1])):
        got, expected = flat(jax.tree.map(lambda leaf, i=i: leaf[i], joint)), expected_sum(units, 0.3)
        assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_step_takes_such_units(devices):
    """Clip, sum, noise, divide by the public 4: written out for units of several rows, dealt out to devices."""
    mechanism = dp_sgd(5, 4, 6, 0.8, 0.3, 10)
    step = make_train_step(OBJECTIVE.loss, optax.sgd(1.0), mechanism, mesh_lib.make(f"data:{devices}"))
    params = parameters()
    before, shapes = flat(params), [leaf.shape for leaf in jax.tree.leaves(params)]
    draws = jax.jit(lambda keys: [noise.standard_normal(keys, i, shape) for i, shape in enumerate(shapes)])(KEYS)
    batch = collate(source(), np.array([1, 2, 3]), 6).dealt(devices)
    state, _ = step(TrainState(params, optax.sgd(1.0).init(params)), {}, batch, KEYS)
    expected = (expected_sum([1, 2, 3], 0.3) + 0.8 * 0.3 * flat(draws)) / 4
    np.testing.assert_allclose(before - flat(state.parameters), expected, atol=2e-6)


def test_a_unit_never_contributes_more_than_the_clip_norm_however_many_rows_it_has():
    """Sensitivity is per unit: three rows of one unit are not three contributions."""
    clip, params = Clip(0.01), parameters()
    total = jax.jit(lambda b: clipping.clipped_sum(of_unit, params, b, clip, Strategy()).total)
    both, one = (flat(total(collate(source(), np.array(units), 2))) for units in ([0, 3], [3]))
    assert 0.0099 < np.linalg.norm(both - one) <= 0.01


def test_places_without_a_row_have_no_part_in_a_unit():
    """Whatever stands in a place that holds no row, even tokens that are marked as scored."""
    batch = collate(source(), np.array([2]), 1)
    unit = Unit({name: column[0] for name, column in batch.rows.items()}, batch.real[0])
    assert unit.real.tolist() == [True, True, False]
    rows = {name: column.copy() for name, column in unit.rows.items()}
    rows["tokens"][2], rows["scored"][2] = 7, True
    loss = jax.jit(jax.value_and_grad(of_unit))
    params = parameters()
    (a, gradient), (b, other) = (loss(params, u) for u in (unit, Unit(rows, unit.real)))
    assert a == b and (flat(gradient) == flat(other)).all()


def test_collated_units_hold_their_own_rows_and_zeros():
    made = source()
    for units in ([], [0], [1, 4], [0, 1, 2, 3, 4], [3, 9]):
        batch = collate(made, np.array(units, int), 5)
        assert batch.real.sum() == sum(COUNTS[u] for u in units if u < 5)
        for slot, u in enumerate(u for u in units if u < 5):
            rows = batch.rows["tokens"][slot][batch.real[slot]]
            np.testing.assert_array_equal(rows, made.columns["tokens"][made.first[u] : made.first[u + 1]])
        assert (batch.rows["tokens"][~batch.real] == 0).all()
    dealt = collate(made, np.arange(5), 6).dealt(2)
    assert dealt.mask.reshape(2, 3).sum(axis=1).tolist() == [3, 2]


def test_sources_wrap_one_another():
    """A hold-out of a subset reads the rows of the units that it means, in their order, and has its own fingerprint."""
    made = source()
    subset = Subset(made, np.array([4, 0, 2]))
    training, held_out = holdout.split(subset, b"k" * 32, 0.5)
    assert training.num_units + held_out.num_units == 3 and training.max_rows == 3
    for wrapped in (training, held_out):
        for u in range(wrapped.num_units):
            rows, owner = wrapped.read(np.array([u]))
            original = subset.numbers[wrapped.numbers[u]]
            np.testing.assert_array_equal(rows["tokens"], made.read(np.array([original]))[0]["tokens"])
            assert owner.tolist() == [0] * COUNTS[original]
    keys = (b"a" * 32, b"b" * 32)
    prints = {
        made.fingerprint(keys[0]),
        made.fingerprint(keys[1]),
        subset.fingerprint(keys[0]),
        training.fingerprint(keys[0]),
    }
    assert len(prints) == 4
    moved = InMemory(made.columns, np.array([0, 2, 4, 6, 9, 10]), max_rows=3)  # the same rows, divided otherwise
    assert moved.fingerprint(keys[0]) != made.fingerprint(keys[0])


def test_the_fingerprint_of_data_depends_on_every_column_and_on_what_a_unit_is():
    columns = {"tokens": np.arange(12, dtype=np.int32).reshape(4, 3), "scored": np.ones((4, 3), bool)}
    source = InMemory(columns, np.array([0, 1, 4]), max_rows=3)
    found = {source.fingerprint(bytes(32)), source.fingerprint(bytes(31) + b"1")}
    assert len(found) == 2 and source.fingerprint(bytes(32)) in found
    for name in columns:
        changed = {**columns, name: columns[name].copy()}
        changed[name][2, 1] = 0
        found.add(InMemory(changed, source.first, 3).fingerprint(bytes(32)))
    found.add(InMemory(columns, np.array([0, 2, 4]), 3).fingerprint(bytes(32)))
    found.add(InMemory({**columns, "tokens": columns["tokens"][:, :2]}, source.first, 3).fingerprint(bytes(32)))
    assert len(found) == 6


def test_padding_is_a_batch_of_one_row_too():
    rows = {"x": jnp.ones((4, 2))}
    batch = Batch.of_rows(rows, jnp.array([True, False, True, False]))
    assert batch.slots == 4 and batch.mask.tolist() == [True, False, True, False]


@pytest.mark.parametrize("first", [[0, 3, 4, 6, 9], [1, 3, 4, 6, 9, 10], [0, 3, 3, 6, 9, 10], [0, 4, 5, 6, 9, 10]])
def test_units_that_the_declared_bound_does_not_hold_are_refused(first):
    """Shapes are public, so the bound on a unit's rows is declared and not the largest number that the data have."""
    with pytest.raises(ValueError, match="at most max_rows=3"):
        InMemory(source().columns, np.array(first), max_rows=3)
    assert InMemory(source().columns, source().first, max_rows=7).max_rows == 7


@pytest.mark.parametrize("owner", [[0, 1, 0], [0, 0, 0]])
def test_rows_of_a_faulty_source_do_not_take_the_places_of_others(owner):
    class Faulty(InMemory):
        def read(self, units):
            return {"x": np.ones((3, 2), np.float32)}, np.array(owner)

    faulty = Faulty({"x": np.ones((3, 2), np.float32)}, np.array([0, 2, 3]), max_rows=2)
    with pytest.raises(ValueError, match="out of order"):
        collate(faulty, np.array([0, 1]), 4)
