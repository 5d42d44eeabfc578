import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from dpgemma.gemma import decoder, generation
from dpgemma.gemma.generation import Sampling
from tests.gemma.families import FAMILIES, IDS, our_logits
from tests.gemma.hf_models import imported, torch_model

pytestmark = pytest.mark.usefixtures("quick_compiles")

GREEDY = Sampling(temperature=0)
# Prompts of several lengths in one batch, one longer than any window.
PROMPTS = [IDS[0, :3], IDS[1, :11], IDS[0, :19], IDS[1, :1]]

# Attention with and without a window, capped, and recurrent: no other family has an operation that these lack.
QUICK = ("gemma3", "vaultgemma_capped", "recurrent_gemma")


@functools.partial(jax.jit, static_argnums=0)
def next_token(config, params, row, length):
    return decoder.logits(config, params, decoder.hidden_states(config, params, row)[length - 1]).argmax()


def uncached(config, params, prompt, new_tokens):
    """The definition: the whole text again for every token. What stands behind it cannot be seen."""
    row, first = np.zeros(64, np.int32), len(prompt)
    row[:first] = prompt
    for length in range(first, first + new_tokens):
        row[length] = next_token(config, params, row, length)
    return row[first : first + new_tokens].tolist()


@functools.partial(jax.jit, static_argnums=0)
def extended(config, params, cache, tokens, positions):
    hidden, cache = decoder.extend(config, params, cache, tokens, positions, jnp.ones(tokens.shape, bool))
    return decoder.logits(config, params, hidden), cache


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_logits_equal_uncached(name):
    config, params = imported(name)
    tokens = np.random.default_rng(1).integers(3, 90, (2, 30)).astype(np.int32)
    expected = our_logits(config, params, tokens)
    cache, got, first = decoder.init_cache(config, 2, 30), [], 0
    for size in (9, 1, 1, 19):
        positions = np.broadcast_to(np.arange(first, first + size), (2, size))
        logits, cache = extended(config, params, cache, tokens[:, first : first + size], positions)
        got.append(logits)
        first += size
    np.testing.assert_allclose(np.concatenate(got, axis=1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK[:2] else pytest.mark.slow) for name in FAMILIES]
)
def test_greedy_text_equals_uncached_and_transformers(name):
    config, params = imported(name)
    # Prompts are read in several pieces, some of them all padding.
    together = generation.generate(config, params, PROMPTS, 24, GREEDY, stop=(), prefill=4)
    for prompt, got in zip(PROMPTS, together, strict=True):
        assert got.tolist() == uncached(config, params, prompt, 24)
        with torch.no_grad():
            theirs = torch_model(name).generate(
                torch.tensor(prompt[None], dtype=torch.long),
                max_new_tokens=24,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert got.tolist() == theirs[0, len(prompt) :].tolist()


def test_text_ends_at_any_stop_token():
    config, params = imported("gemma2")
    free = generation.generate(config, params, PROMPTS, 24, GREEDY, stop=())
    ends = int(free[0][5]), int(free[2][9])
    stopped = generation.generate(config, params, PROMPTS, 24, GREEDY, stop=ends)
    for whole, cut in zip(free, stopped, strict=True):
        places = [i for i, token in enumerate(whole) if token in ends]
        assert cut.tolist() == whole[: places[0] if places else None].tolist()


def test_text_ends_with_the_context():
    config, params = imported("gemma2")
    prompt = np.resize(IDS[0], config.max_length - 4)
    one, two = generation.generate(config, params, [prompt, PROMPTS[1]], 10, GREEDY, stop=())
    assert len(one) == 4 and len(two) == 10
    for prompts in ([np.resize(IDS[0], config.max_length)], [np.zeros(0, np.int32)], []):
        with pytest.raises(ValueError, match="between 1 and 63"):
            generation.generate(config, params, prompts, 1, GREEDY, stop=())


def test_rows_of_a_batch_do_not_depend_on_each_other():
    config, params = imported("gemma_mha")
    alone = generation.generate(config, params, PROMPTS[:1], 12, Sampling(seed=5), stop=())
    batch = generation.generate(config, params, [PROMPTS[0], PROMPTS[2]], 12, Sampling(seed=5), stop=())
    other = generation.generate(config, params, [PROMPTS[0], PROMPTS[1]], 12, Sampling(seed=5), stop=())
    np.testing.assert_array_equal(batch[0], other[0])
    assert len(alone[0]) == 12


def test_top_k_and_top_p_keep_the_right_tokens():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.05, 0.3, 0.15]]))

    def kept(**options):
        return np.flatnonzero(np.isfinite(generation.filtered(logits, Sampling(**options))[0])).tolist()

    assert kept(top_k=2) == [1, 3] and kept(top_k=1) == [1] and kept(top_k=9) == [0, 1, 2, 3, 4]
    assert (
        kept(top_p=0.69) == [1, 3]
        and kept(top_p=0.71) == [1, 3, 4]
        and kept(top_p=1e-9) == [1]
        and kept(top_p=1.0) == [0, 1, 2, 3, 4]
    )
    np.testing.assert_allclose(generation.filtered(logits, Sampling(temperature=2.0)), logits / 2)


@pytest.mark.slow
def test_sampled_tokens_follow_the_models_distribution():
    config, params = imported("gemma")
    prompts = [PROMPTS[1]] * 4000
    hidden = decoder.hidden_states(config, params, PROMPTS[1])[-1]
    sampling = Sampling(temperature=1.5, top_k=8, seed=3)
    probabilities = np.asarray(
        jax.nn.softmax(generation.filtered(decoder.logits(config, params, hidden), sampling)), np.float64
    )
    drawn = np.bincount(
        [row[0] for row in generation.generate(config, params, prompts, 1, sampling, stop=())], minlength=97
    )
    possible = probabilities > 0
    assert drawn[~possible].sum() == 0 and possible.sum() == 8
    expected = probabilities[possible] / probabilities[possible].sum() * 4000
    assert stats.chisquare(drawn[possible], expected).pvalue > 1e-7


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}]
)
def test_impossible_sampling_is_refused(options):
    with pytest.raises(ValueError):
        Sampling(**options)


def test_a_seed_gives_the_same_text_again():
    config, params = imported("gemma_mha")
    texts = [
        generation.generate(config, params, PROMPTS, 12, dataclasses.replace(Sampling(), seed=s), stop=())
        for s in (1, 1, 2)
    ]
    assert all((a == b).all() for a, b in zip(texts[0], texts[1], strict=True))
    assert any((a != b).any() for a, b in zip(texts[0], texts[2], strict=True))
