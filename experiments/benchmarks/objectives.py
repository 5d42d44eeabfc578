"""The objective of text that benchmarks measure, for models without a tokenizer of their own."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from dpgemma.data.batch import Unit
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.start import StartingPoint
from dpgemma.objectives.causal import CausalLM


def causal(config: GemmaConfig, length: int, dtype: Any, remat: str, **options: Any) -> CausalLM:
    """Next-token prediction by a model with random weights."""
    start = StartingPoint("benchmark", config)
    return CausalLM(start, ByteTokenizer(), length, jnp.dtype(dtype).name, remat, **options)


def of_row(objective: CausalLM) -> Callable[[Any, Mapping[str, Any]], Any]:
    """The loss of one row as a function of all parameters, as peers take it."""

    def loss(params: Any, row: Mapping[str, Any]) -> Any:
        return objective.loss(params, {}, Unit({name: x[None] for name, x in row.items()}, jnp.ones(1, bool)))

    return loss
