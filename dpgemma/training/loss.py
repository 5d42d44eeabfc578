"""The loss of one row, as the trainer differentiates it, and bits per byte of held-out rows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.gemma import decoder
from dpgemma.gemma import loss as gemma_loss
from dpgemma.gemma.config import GemmaConfig

_EVALUATION_BATCH = 32


def token_losses(config: GemmaConfig, parameters, row, *, bos: int, pad: int, dtype, remat: str = "none"):
    """Negative log-likelihoods [..., S] of a row's tokens, each from bos and the tokens before it; zero at padding."""
    bos_column = jnp.full((*row.shape[:-1], 1), bos, row.dtype)
    inputs = jnp.concatenate([bos_column, row[..., :-1]], axis=-1)
    hidden = decoder.hidden_states(config, parameters, inputs, dtype=dtype, remat=remat)
    losses = gemma_loss.cross_entropy(hidden, parameters["embedder"]["embedding"], row, final_cap=config.final_cap)
    return jnp.where(row == pad, 0.0, losses)


def row_loss(config: GemmaConfig, **options):
    """loss(parameters, row): sum over the row's tokens, divided by the row length, a public constant."""
    return lambda parameters, row: token_losses(config, parameters, row, **options).sum() / row.shape[-1]


def bits_per_byte(config: GemmaConfig, parameters, rows: np.ndarray, tokenizer, dtype) -> float:
    """Bits needed per byte of text to code the rows; NaN for no text."""
    losses = jax.jit(functools.partial(token_losses, config, bos=tokenizer.bos, pad=tokenizer.pad, dtype=dtype))
    nats, size = 0.0, 0
    for first in range(0, len(rows), _EVALUATION_BATCH):
        chunk = rows[first : first + _EVALUATION_BATCH]
        padding = ((0, _EVALUATION_BATCH - len(chunk)), (0, 0))
        nats += float(losses(parameters, np.pad(chunk, padding, constant_values=tokenizer.pad)).sum())
        size += sum(len(tokenizer.decode(row)) for row in chunk)
    return nats / math.log(2) / size if size else math.nan
