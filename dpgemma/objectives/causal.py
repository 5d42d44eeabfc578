"""The loss of one row, as the trainer differentiates it, and bits per byte of held-out rows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.data.text.rows import Rows
from dpgemma.gemma import decoder, lora
from dpgemma.gemma.config import GemmaConfig
from dpgemma.objectives import cross_entropy as gemma_loss

_EVALUATION_BATCH = 32


def token_losses(config: GemmaConfig, parameters, row: dict, *, bos: int, **options):
    """Negative log-likelihoods [..., S] of a row's tokens, each from bos and the tokens before it; zero where they are
    not scored.

    Args:
      row: tokens and scored, each [..., S], as in data.rows.
      options: of decoder.hidden_states.
    """
    tokens = row["tokens"]
    bos_column = jnp.full((*tokens.shape[:-1], 1), bos, tokens.dtype)
    inputs = jnp.concatenate([bos_column, tokens[..., :-1]], axis=-1)
    hidden = decoder.hidden_states(config, parameters, inputs, **options)
    losses = gemma_loss.cross_entropy(hidden, parameters["embedder"]["embedding"], tokens, final_cap=config.final_cap)
    return jnp.where(row["scored"], losses, 0.0)


def row_loss(config: GemmaConfig, **options):
    """loss(trainable, frozen, row): mean over the scored tokens of this row; zero where there are none.

    Formal guarantee: it is a function of one row and the parameters; no other row, and no token behind the last scored
    one, has a part in it. Tested by tests/training/loss_test.py::
    test_pitfall_18_neither_the_number_nor_the_content_of_unscored_tokens_behind_matters.
    """

    def loss(trainable, frozen, row):
        losses = token_losses(config, lora.join(trainable, frozen), row, **options)
        return losses.sum() / jnp.maximum(row["scored"].sum(), 1)

    return loss


def bits_per_byte(config: GemmaConfig, parameters, rows: Rows, numbers: np.ndarray, tokenizer, **options) -> float:
    """Bits needed per byte to code the scored text of the numbered rows; NaN for no text."""
    losses = jax.jit(functools.partial(token_losses, config, **options))
    nats, size = 0.0, 0
    for first in range(0, len(numbers), _EVALUATION_BATCH):
        chunk = rows.take(numbers[first : first + _EVALUATION_BATCH], _EVALUATION_BATCH)
        nats += float(losses(parameters, chunk).sum())
        size += sum(
            len(tokenizer.decode(tokens[scored]))
            for tokens, scored in zip(chunk["tokens"], chunk["scored"], strict=True)
        )
    return nats / math.log(2) / size if size else math.nan
