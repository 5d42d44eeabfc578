import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant

from accounting.mechanism import Clip, dp_sgd
from accounting.mechanism.clip import COUNT_SENSITIVITY
from dpgemma.gemma import decoder
from dpgemma.gemma.presets import PRESETS
from dpgemma.privacy import clip_norm as clip_norm_lib
from dpgemma.privacy import clipping, noise
from tests import objectives as loss_lib
from tests.privacy import sums as sums_lib


def adapting(quantile, noise_multiplier, batch):
    return dp_sgd(10 * batch, batch, None, noise_multiplier, 1.0, 10, clip_quantile=quantile)


pytestmark = pytest.mark.usefixtures("quick_compiles")


def test_both_releases_together_are_the_mechanism_that_is_charged():
    """Composed by dp-accounting as two Gaussians, the releases cost what one of the whole noise multiplier does."""
    rule = adapting(0.5, 1.1, 200)
    both = PLDAccountant()
    both.compose(dp_event.GaussianDpEvent(rule.gradient_noise_multiplier), 10)
    both.compose(dp_event.GaussianDpEvent(rule.count_noise / COUNT_SENSITIVITY), 10)
    one = PLDAccountant()
    one.compose(dp_event.GaussianDpEvent(1.1), 10)
    assert both.get_epsilon(1e-6) == pytest.approx(one.get_epsilon(1e-6), rel=1e-3)
    both_in_one = np.hypot(1 / rule.gradient_noise_multiplier, COUNT_SENSITIVITY / rule.count_noise)
    assert 1 / both_in_one == pytest.approx(1.1, rel=1e-12)
    assert rule.gradient_noise_multiplier > 1.1


def test_gradients_and_count_are_noised_by_the_amounts_that_are_charged():
    """100,000 coordinates and 4,000 counts: a standard deviation that is off by 3 % (11 %) is ten standard
    errors away."""
    rule = adapting(0.5, 1.1, 40)
    sums = clipping.ClippedSum(
        jnp.zeros(100_000), clipping.PrivateStats(jnp.zeros(1), jnp.zeros(1)), 1.0, count=jnp.float32(0)
    )
    noised = noise.add_gaussian_noise(
        sums, rule.gradient_noise_multiplier, noise.noise_keys(b"k" * 16, 0), rule.count_noise
    )
    assert float(jnp.std(noised.total)) == pytest.approx(rule.gradient_noise_multiplier, rel=0.03)
    draw = jax.jit(
        lambda keys: (
            noise.add_gaussian_noise(
                clipping.ClippedSum({}, sums.stats, 1.0, count=jnp.float32(0)),
                rule.gradient_noise_multiplier,
                keys,
                rule.count_noise,
            ).count
        )
    )
    counts = [float(draw(noise.noise_keys(b"k" * 16, t))) for t in range(4000)]
    assert np.std(counts) == pytest.approx(rule.count_noise, rel=0.11)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
def test_the_clip_norm_finds_the_quantile(quantile):
    norms = np.random.default_rng(0).lognormal(1.0, 0.7, 1000)
    clip_norm = jnp.float32(0.01)
    for _ in range(400):
        count = np.where(norms <= clip_norm, 0.5, -0.5).sum()
        clip_norm = clip_norm_lib.following(Clip(1.0, quantile=quantile), clip_norm, count, 1000)
    assert float(clip_norm) == pytest.approx(np.quantile(norms, quantile), rel=0.02)


def test_the_clip_norm_stays_where_norms_can_be_measured():
    clip, clip_norm = Clip(1.0, quantile=0.2), jnp.float32(1.0)
    for _ in range(500):  # units without a gradient are all below any clip norm
        clip_norm = clip_norm_lib.following(clip, clip_norm, 50.0, 100)
    assert float(clip_norm) == pytest.approx(clipping.SMALLEST_CLIP_NORM)
    for _ in range(2000):
        clip_norm = clip_norm_lib.following(clip, clip_norm, -50.0, 100)
    assert float(clip_norm) == clip_norm_lib.LARGEST_CLIP_NORM


def test_a_unit_moves_the_count_by_a_half_and_a_bad_one_by_nothing():
    def loss(w, x):
        return jnp.vdot(w, x)

    examples = jnp.array([[0.5], [2.0], [np.nan], [np.inf], [0.1]])

    def count(mask):
        return float(
            sums_lib.clipped_sum(
                loss, jnp.zeros(1), examples, jnp.array(mask), 1.0, scaling="normalise", counted=True
            ).count
        )

    assert count([1, 0, 0, 0, 0]) == 0.5 and count([0, 1, 0, 0, 0]) == -0.5
    assert count([0, 0, 1, 0, 0]) == count([0, 0, 0, 1, 0]) == count([0] * 5) == 0.0
    assert count([1] * 5) == 0.5


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "strategy", ["example_scan", "ghost", pytest.param("per_layer", marks=SLOW), pytest.param("vmap", marks=SLOW)]
)
def test_an_empty_unit_in_place_of_one_moves_the_count_by_a_half(strategy):
    """Both relations: a unit of nothing scored counts as one that is absent, not as one whose gradient is small."""
    config = PRESETS["ladder_20k"]
    params = decoder.init_parameters(config, jax.random.key(0))
    row_loss = loss_lib.row_loss(config, bos=2)

    def loss(params, row):
        return row_loss(params, {}, row)

    tokens = jax.random.randint(jax.random.key(1), (2, 8), 4, config.vocab_size)
    rows = {"tokens": tokens, "scored": jnp.array([[True] * 8, [False] * 8])}

    both = rows | {"scored": jnp.ones((2, 8), bool)}
    for clip_norm, half in ((1e6, 0.5), (1e-6, -0.5)):
        sums = functools.partial(
            sums_lib.clipped_sum, loss, params, clip_norm=clip_norm, strategy=strategy, counted=True
        )
        compiled = jax.jit(lambda rows, mask, sums=sums: sums(rows, mask).count)

        def count(rows, mask, compiled=compiled):
            return float(compiled(rows, jnp.array(mask, bool)))

        assert count(both, [1, 1]) == 2 * half
        assert count(rows, [1, 1]) == count(both, [1, 0]) == half


def test_a_traced_clip_norm_has_no_sensitivity_unless_it_is_divided_out():
    def run(scaling):
        return jax.jit(
            lambda c: (
                sums_lib.clipped_sum(
                    lambda w, x: jnp.vdot(w, x), jnp.zeros(1), jnp.ones((2, 1)), jnp.ones(2, bool), c, scaling=scaling
                ).total
            )
        )(jnp.float32(0.5))

    assert run("normalise")[0] == pytest.approx(2.0, rel=1e-5)
    with pytest.raises(ValueError, match="no known sensitivity"):
        run("clip")


def test_a_count_is_never_released_without_noise_of_its_own():
    sums = clipping.ClippedSum(
        jnp.zeros(3), clipping.PrivateStats(jnp.zeros(1), jnp.zeros(1)), 1.0, count=jnp.float32(7)
    )
    with pytest.raises(ValueError, match="count_noise"):
        noise.add_gaussian_noise(sums, 1.0, noise.noise_keys(b"k" * 16, 0))
    with pytest.raises(ValueError, match="count_noise"):
        noise.add_gaussian_noise(sums, 1.0, noise.noise_keys(b"k" * 16, 0), 0.0)


def test_noise_that_leaves_nothing_for_the_gradients_is_refused():
    with pytest.raises(ValueError, match="leaves nothing"):
        _ = adapting(0.5, 3.0, 20).gradient_noise_multiplier
    with pytest.raises(ValueError, match="quantile"):
        adapting(1.0, 1.0, 2000)
