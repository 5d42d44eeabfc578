"""Rows in which texts do not see each other: as if each had a row of its own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from accounting.errors import InputError
from accounting.mechanism import Clip
from dpgemma.data.batch import Batch
from dpgemma.gemma.blocks import attention, masks
from dpgemma.gemma.config import FULL, SLIDING
from dpgemma.objectives.causal import token_losses
from dpgemma.privacy import clipping
from dpgemma.privacy.clipping import Strategy
from dpgemma.training.settings import Settings
from tests import objectives
from tests.gemma.attention_test import problem
from tests.gemma.decoder_test import PLAIN
from tests.gemma.families import FAMILIES
from tests.gemma.hf_models import imported

pytestmark = pytest.mark.usefixtures("quick_compiles")

BOS, EOS = 2, 1
# Texts of 5, 1, 7, 3 and, without an end, 3 tokens.
ENDS = (4, 5, 12, 15)
TOKENS = np.random.default_rng(4).integers(3, 90, 19).astype(np.int32)
TOKENS[list(ENDS)] = EOS
ROW = {"tokens": TOKENS, "scored": np.ones(19, bool)}
TEXTS = [slice(a, b) for a, b in zip((0, *(e + 1 for e in ENDS)), (*(e + 1 for e in ENDS), 19), strict=True)]


def quick(cases, *chosen):
    return [case if case in chosen else pytest.param(*case, marks=pytest.mark.slow) for case in cases]


CASES = [(family, way) for family in FAMILIES for way in ("dense", "blockwise")]


@pytest.mark.parametrize("family, way", quick(CASES, ("gemma3", "blockwise")))
def test_a_text_is_computed_as_in_a_row_of_its_own(family, way):
    config, params = imported(family)
    losses = jax.jit(functools.partial(token_losses, config, params, bos=BOS, attention=way), static_argnames="closing")
    together = losses(ROW, closing=EOS)
    alone = [losses({name: column[text] for name, column in ROW.items()}) for text in TEXTS]
    np.testing.assert_allclose(together, jnp.concatenate(alone), atol=2e-5, rtol=2e-5)
    assert np.abs(together[5:] - losses(ROW)[5:]).min() > 1e-4  # otherwise each sees those before it


@pytest.mark.parametrize("is_sliding", [False, True])
@pytest.mark.parametrize("length, window", [(300, 100), pytest.param(700, 257, marks=pytest.mark.slow)])
def test_tiles_equal_dense_scores_over_texts_of_any_lengths(length, window, is_sliding):
    config = dataclasses.replace(PLAIN, layer_types=(FULL, SLIDING), window=window, max_length=1024)
    rng = np.random.default_rng(length)
    starts = rng.random((2, length)) < 0.01
    begins = jnp.asarray(np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=-1), jnp.int32)
    *inputs, cotangent = problem(length)

    @functools.partial(jax.jit, static_argnums=0)
    def run(way):
        def mixed(q, k, v):
            mask = masks.causal(length, window, is_sliding, begins)
            return attention.attend(q, k, v, mask, config, jnp.bool_(is_sliding), way)

        out, pull = jax.vjp(mixed, *inputs)
        return out, *pull(cotangent)

    for a, b in zip(run("blockwise"), run("dense"), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6 * max(1, float(jnp.abs(b).max())))
    with pytest.raises(ValueError, match="over whole rows"):
        run("fused")


@pytest.mark.parametrize("family", ["gemma3", pytest.param("recurrent_gemma", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["ghost", pytest.param("example_scan", marks=pytest.mark.slow)])
def test_clipped_sums_are_those_of_the_definition(family, name):
    config, params = imported(family)
    rows = {"tokens": np.stack([TOKENS, np.roll(TOKENS, 3)]), "scored": np.ones((2, 19), bool)}
    objective = dataclasses.replace(objectives.causal(config, length=19), across_documents=False)
    batch = Batch.of_rows(rows, np.ones(2, bool))

    @functools.partial(jax.jit, static_argnums=0)
    def total(how):
        summed = clipping.clipped_sum(lambda p, unit: objective.loss(p, {}, unit), params, batch, Clip(0.05), how)
        return summed.total, summed.stats.norms

    for a, b in zip(jax.tree.leaves(total(Strategy(name))), jax.tree.leaves(total(Strategy("vmap"))), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(InputError, match="`attention`=fused is attention over whole rows"):
        Settings(attention="fused", attend_across_documents=False)
