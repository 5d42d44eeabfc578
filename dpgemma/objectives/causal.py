"""The next-token loss of a unit of text, as the trainer differentiates it, and bits per byte of held-out text."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpgemma.data.batch import Unit
from dpgemma.data.spec import RowSpec
from dpgemma.data.text import rows as text_rows
from dpgemma.data.text import tokenizer as tokenizer_lib
from dpgemma.data.text.rows import SCORED, TOKENS
from dpgemma.data.text.tokenizer import Tokenizer
from dpgemma.gemma import decoder, lora
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.files import weights
from dpgemma.gemma.start import StartingPoint
from dpgemma.objectives.cross_entropy import cross_entropy, losses_and_hits
from dpgemma.objectives.protocol import Params

BITS_PER_BYTE, NATS_PER_TOKEN, TOKEN_ACCURACY = "bits_per_byte", "nats_per_token", "token_accuracy"


def token_losses(
    config: GemmaConfig,
    parameters: Params,
    row: Mapping[str, Any],
    *,
    vocabulary_is_spread: bool = False,
    **options: Any,
) -> Any:
    """Negative log-likelihoods [..., S] of a row's tokens, each given bos and the tokens before it.

    Where a token is not scored, its loss is zero.

    Args:
      row: tokens and scored, each [..., S], as in data.text.rows.
      vocabulary_is_spread: over devices, as cross_entropy takes it.
      options: of token_states.
    """
    hidden, words = token_states(config, parameters, row[TOKENS], **options), parameters["embedder"]["embedding"]
    losses = cross_entropy(hidden, words, row[TOKENS], final_cap=config.final_cap, is_spread=vocabulary_is_spread)
    return jnp.where(row[SCORED], losses, 0.0)


def token_scores(
    config: GemmaConfig,
    parameters: Params,
    row: Mapping[str, Any],
    *,
    vocabulary_is_spread: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """For evaluation: the losses of token_losses, and whether each scored token is the likeliest, both [..., S]."""
    hidden, words = token_states(config, parameters, row[TOKENS], **options), parameters["embedder"]["embedding"]
    losses, hits = losses_and_hits(
        hidden, words, row[TOKENS], final_cap=config.final_cap, is_spread=vocabulary_is_spread
    )
    return jnp.where(row[SCORED], losses, 0.0), hits & row[SCORED]


def token_states(
    config: GemmaConfig, parameters: Params, tokens: jax.Array, *, bos: int, closing: int | None = None, **options: Any
) -> Any:
    """Hidden states [..., S, D] from which every token [..., S] is predicted: those of bos and the tokens before it.

    With `closing` a text begins behind every such token, and sees nothing of what stands before it: its tokens are
    given bos and the tokens of their own text.

    Args:
      bos: number of the token that rows begin after.
      closing: number of the token that ends a text.
      options: of decoder.hidden_states.
    """
    bos_column = jnp.full((*tokens.shape[:-1], 1), bos, tokens.dtype)
    inputs = jnp.concatenate([bos_column, tokens[..., :-1]], axis=-1)
    if closing is not None:
        is_first = (inputs == closing).at[..., 0].set(True)
        places = jnp.where(is_first, jnp.arange(tokens.shape[-1], dtype=jnp.int32), 0)
        options["begins"] = jax.lax.cummax(places, axis=places.ndim - 1)
        inputs = jnp.where(is_first, bos, inputs)
    return decoder.hidden_states(config, parameters, inputs, **options)


@dataclasses.dataclass(frozen=True)
class CausalLM:
    """Next-token prediction by a decoder, whole or by its adapters.

    Attributes:
      start: the model and where its parameters start.
      tokenizer: of the rows; knows bos, and how many bytes a token stands for.
      length: S, tokens of a row.
      dtype, remat, attention: as decoder.hidden_states takes them; dtype by its name.
      vocabulary_is_spread: whether devices along a model axis share the words among them.
      across_documents: whether a token sees the texts before its own in a row. If not, attention, positions and
        recurrent states begin anew behind every eos.
    """

    start: StartingPoint
    tokenizer: Tokenizer
    length: int
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    vocabulary_is_spread: bool = False
    across_documents: bool = True

    name = "causal"

    @property
    def model(self) -> GemmaConfig:
        return self.start.model

    @property
    def spec(self) -> RowSpec:
        return text_rows.spec(self.length)

    @property
    def volume(self) -> tuple[str, int]:
        return TOKENS, self.length

    @property
    def operations_per_row(self) -> float:
        """6 operations for each parameter and token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""
        return 6.0 * decoder.num_parameters(self.model) * self.length

    @property
    def identity(self) -> dict[str, Any]:
        settings = [self.length, self.dtype, self.remat, self.attention, self.vocabulary_is_spread]
        settings += [] if self.across_documents else ["documents apart"]
        return {"model": dataclasses.asdict(self.model), "settings": settings}

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "model": self.start.name,
            "architecture": dataclasses.asdict(self.model),
            "init_sha256": self.start.sha256,
            "sequence_length": self.length,
            "tokenizer_sha256": tokenizer_lib.digest(self.tokenizer),
        }

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "bos": self.tokenizer.bos,
            "closing": None if self.across_documents else self.tokenizer.eos,
            "dtype": jnp.dtype(self.dtype),
            "remat": self.remat,
            "attention": self.attention,
            "vocabulary_is_spread": self.vocabulary_is_spread,
        }

    def init(self, seed: int, shardings: tuple[Any, Any] | None = None) -> tuple[Params, Params]:
        return self.start.parameters(seed, shardings)

    def shapes(self) -> tuple[Params, Params]:
        return lora.split(self.model, decoder.parameter_shapes(self.model))

    def axes(self) -> tuple[Params, Params]:
        return lora.split(self.model, weights.axes(self.model))

    def join(self, trainable: Params, frozen: Params) -> Params:
        return lora.join(trainable, frozen)

    def cast(self, trainable: Params) -> Params:
        is_matrix, _ = lora.split(self.model, weights.matrices(self.model))
        return jax.tree.map(lambda x, cast: x.astype(self.dtype) if cast else x, trainable, is_matrix)

    def loss(self, trainable: Params, frozen: Params, unit: Unit) -> jax.Array:
        """The mean over the unit's rows of the mean loss of a row's scored tokens; zero for a row without any.

        Formal guarantee: it is a function of one unit and the parameters; no other unit, no place that holds no row,
        and no token behind the last scored one of a row has a part in it. Tested by tests/training/loss_test.py::
        test_pitfall_18_neither_the_number_nor_the_content_of_unscored_tokens_behind_matters and
        tests/training/units_test.py::test_places_without_a_row_have_no_part_in_a_unit.
        """
        rows, real = unit.rows, unit.real
        if real.shape[0] == 1:  # with one place per slot, every unit has exactly one row
            rows = jax.tree.map(lambda x: x[0], rows)
        losses = token_losses(self.model, self.join(trainable, frozen), rows, **self._options)
        if real.shape[0] == 1:
            return losses.sum() / jnp.maximum(rows[SCORED].sum(), 1)
        of_row = losses.sum(axis=-1) / jnp.maximum(rows[SCORED].sum(axis=-1), 1)
        return jnp.where(real, of_row, 0.0).sum() / jnp.maximum(real.sum(), 1)

    def measures(
        self, trainable: Params, frozen: Params, rows: Mapping[str, np.ndarray]
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Bits needed to code a row's scored text, by its bytes; nats, and tokens that are the likeliest, by tokens."""
        losses, hits = map(np.asarray, self._compiled_scores(self.join(trainable, frozen), dict(rows)))
        texts = zip(rows[TOKENS], rows[SCORED], strict=True)
        sizes = np.array([len(self.tokenizer.decode(tokens[scored])) for tokens, scored in texts], np.float64)
        nats, counts = losses.sum(axis=-1, dtype=np.float64), rows[SCORED].sum(axis=-1, dtype=np.float64)
        return {
            BITS_PER_BYTE: (nats / math.log(2), sizes),
            NATS_PER_TOKEN: (nats, counts),
            TOKEN_ACCURACY: (hits.sum(axis=-1, dtype=np.float64), counts),
        }

    @functools.cached_property
    def _compiled_scores(self) -> Any:
        return jax.jit(functools.partial(token_scores, self.model, **self._options))

    def noise_rows(self, count: int) -> dict[str, np.ndarray]:
        tokens = np.random.default_rng(0).integers(0, self.model.vocab_size, (count, self.length)).astype(np.int32)
        return {TOKENS: tokens, SCORED: np.ones(tokens.shape, bool)}
