"""The objective of text for tests: a decoder, whole or by its adapters, on bytes."""

import jax.numpy as jnp

from dpgemma.data.batch import Unit
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.gemma.start import StartingPoint
from dpgemma.objectives.causal import CausalLM


def causal(config, *, length=16, bos=ByteTokenizer.bos, dtype=jnp.float32, **options):
    assert bos == ByteTokenizer.bos
    return CausalLM(StartingPoint("tested", config), ByteTokenizer(), length, jnp.dtype(dtype).name, **options)


def row_loss(config, **options):
    """loss(trainable, frozen, row) of a unit with this row, or with these rows where it has a leading axis."""
    objective = causal(config, **options)

    def loss(trainable, frozen, row):
        rows = row if row["tokens"].ndim == 2 else {name: column[None] for name, column in row.items()}
        return objective.loss(trainable, frozen, Unit(rows, jnp.ones(len(rows["tokens"]), bool)))

    return loss
