"""What the trainer differentiates: the mean over one row's scored tokens, and nothing else of that row or any other."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dpgemma.data.text.rows import units_of_one_row
from dpgemma.gemma import decoder
from dpgemma.training import evaluation
from tests import objectives as loss_lib
from tests.gemma.decoder_test import CAPPED, random_parameters

pytestmark = pytest.mark.usefixtures("quick_compiles")

BOS = 2
LOSS = jax.jit(loss_lib.row_loss(CAPPED, bos=BOS, dtype=jnp.float32))
PARAMETERS = random_parameters(CAPPED)


def row(seed=0, scored=slice(6, 11), length=14):
    tokens = np.random.default_rng(seed).integers(3, 90, length).astype(np.int32)
    return {"tokens": tokens, "scored": np.isin(np.arange(length), np.arange(length)[scored])}


def test_the_loss_is_the_mean_over_scored_tokens():
    example = row()
    inputs = np.concatenate([[BOS], example["tokens"][:-1]])
    logits = decoder.logits(CAPPED, PARAMETERS, decoder.hidden_states(CAPPED, PARAMETERS, inputs))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, example["tokens"])
    np.testing.assert_allclose(LOSS(PARAMETERS, {}, example), losses[6:11].mean(), rtol=1e-5)


def test_pitfall_18_neither_the_number_nor_the_content_of_unscored_tokens_behind_matters():
    # pitfall 18: what is not scored is no part of the loss, and its number does not rescale it.
    example, longer = row(), row(length=14)
    longer["tokens"][11:] = 77
    np.testing.assert_array_equal(LOSS(PARAMETERS, {}, example), LOSS(PARAMETERS, {}, longer))
    padded = {name: np.pad(column, (0, 6)) for name, column in example.items()}
    np.testing.assert_allclose(LOSS(PARAMETERS, {}, padded), LOSS(PARAMETERS, {}, example), rtol=1e-5)


def test_a_row_with_nothing_scored_has_no_gradient():
    value, gradient = jax.value_and_grad(LOSS)(PARAMETERS, {}, row(scored=slice(0, 0)))
    assert value == 0 and all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_bits_per_byte_count_scored_text_only():
    examples = [row(seed) for seed in (0, 2)]
    units = units_of_one_row(*(np.stack([example[name] for example in examples]) for name in ("tokens", "scored")))
    measured = evaluation.measure(loss_lib.causal(CAPPED), PARAMETERS, {}, units).figures()
    nats = sum(5 * float(LOSS(PARAMETERS, {}, example)) for example in examples)
    size = sum(int((example["tokens"][6:11] >= 4).sum()) for example in examples)
    assert measured.keys() == {"bits_per_byte", "nats_per_token", "token_accuracy"}
    np.testing.assert_allclose(measured["nats_per_token"], nats / units.columns["scored"].sum(), rtol=1e-5)
    np.testing.assert_allclose(measured["bits_per_byte"], nats / np.log(2) / size, rtol=1e-5)
