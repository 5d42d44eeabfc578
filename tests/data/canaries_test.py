"""Canaries as a source of units: where they stand, what they hold, and what decides that."""

import collections
import secrets

import numpy as np
import pytest
from scipy import stats

from accounting.errors import InputError
from dpgemma.data import canaries
from dpgemma.data.batch import collate
from dpgemma.data.canaries import Canaries, Planted
from dpgemma.data.source import InMemory
from dpgemma.data.text import canaries as texts
from dpgemma.data.text.rows import SCORED, TOKENS
from dpgemma.data.text.tokenizer import ByteTokenizer

LENGTH, BYTES = 12, ByteTokenizer()


def made(count, repeats=(1,), secret=bytes(32)):
    seed = canaries.seed_of(secret)
    return canaries.of_columns(texts.random_tokens(count, LENGTH, BYTES, seed), repeats, seed)


def own_units(count=10):
    tokens = np.arange(count * LENGTH, dtype=np.int32).reshape(count, LENGTH)
    return InMemory({TOKENS: tokens, SCORED: np.ones(tokens.shape, bool)})


def test_coins_and_contents_follow_from_the_key_alone():
    one, again, other = made(200), made(200), made(200, secret=bytes([1]) * 32)
    assert one.digest() == again.digest() != other.digest()
    np.testing.assert_array_equal(one.included, again.included)
    assert (one.columns[TOKENS] != other.columns[TOKENS]).mean() > 0.9
    # Made again on other data, with others beside them, or repeated, they have the same coins.
    np.testing.assert_array_equal(made(200, (1, 4)).included, one.included)
    np.testing.assert_array_equal(made(500).included[:200], one.included)


def test_coins_are_fair_and_independent_of_contents_and_of_each_other():
    """400 keys of 250 canaries; three tests with a false-alarm rate of 1e-7 each."""
    coins = np.stack([made(250, secret=i.to_bytes(32, "little")).included for i in range(400)])
    level = 1e-7
    assert stats.binomtest(int(coins.sum()), coins.size).pvalue > level
    assert stats.binomtest(int((coins[:, 1:] == coins[:, :-1]).sum()), coins[:, 1:].size).pvalue > level
    of_each = stats.chi2.sf(((coins.sum(axis=0) - 200) ** 2 / 100).sum(), 250)
    assert of_each > level
    first = np.stack([made(250, secret=i.to_bytes(32, "little")).columns[TOKENS][:, 0] for i in range(50)])
    assert stats.binomtest(int((coins[:50] == (first % 2 == 0)).sum()), first.size).pvalue > level


def test_the_source_s_own_units_stay_as_they_are():
    source, planted = own_units(), made(6, (1, 3))
    both = Planted(source, planted)
    assert (planted.units, both.num_units, both.max_rows) == (12, 22, 1)
    rows, owner = both.read(np.arange(10))
    wanted, _ = source.read(np.arange(10))
    np.testing.assert_array_equal(owner, np.arange(10))
    for name in wanted:
        np.testing.assert_array_equal(rows[name], wanted[name])


def test_a_canary_is_as_many_units_as_it_is_repeated_and_a_held_out_one_is_none():
    source, planted = own_units(), made(40, (1, 3))
    both = Planted(source, planted)
    rows, owner = both.read(np.arange(both.num_units))
    found = collections.Counter(row.tobytes() for row in rows[TOKENS][owner >= 10])
    wanted = {planted.columns[TOKENS][i].tobytes(): (1, 3)[i % 2] for i in range(40) if planted.included[i]}
    assert dict(found) == wanted and 0 < len(wanted) < 40
    # In any order of the question, and as a batch.
    asked = np.random.default_rng(0).permutation(both.num_units)[:30]
    rows, owner = both.read(asked)
    for row, unit in zip(rows[TOKENS], asked[owner], strict=True):
        np.testing.assert_array_equal(row, both.read(np.array([unit]))[0][TOKENS][0])
    batch = collate(both, np.arange(both.num_units), slots=100)
    assert int(batch.mask.sum()) == 10 + sum(wanted.values())


def test_a_column_that_only_canaries_have_marks_the_others():
    planted = made(5)
    probed = Canaries(planted.columns | {canaries.LEAF: np.arange(5, dtype=np.int32)}, *_rest(planted))
    rows, owner = Planted(own_units(), probed).read(np.arange(15))
    assert (rows[canaries.LEAF][owner < 10] == canaries.NONE).all()
    np.testing.assert_array_equal(rows[canaries.LEAF][owner >= 10], np.flatnonzero(planted.included))


def _rest(planted):
    return planted.repeats, planted.included, planted.seed


def test_the_digest_binds_everything_and_hides_it():
    planted = made(30, (1, 2))
    changes = {
        "a coin": Canaries(planted.columns, planted.repeats, ~planted.included, planted.seed),
        "a repetition": Canaries(planted.columns, planted.repeats[::-1], planted.included, planted.seed),
        "a content": Canaries(planted.columns | {SCORED: ~planted.columns[SCORED]}, *_rest(planted)),
        "the seed": Canaries(planted.columns, planted.repeats, planted.included, secrets.token_bytes(32)),
    }
    for what, changed in changes.items():
        assert changed.digest() != planted.digest(), what


def test_what_is_bound_can_be_checked_by_whoever_has_the_seed_alone():
    """An unkeyed hash would let anyone test a guess of what an attack showed."""
    planted = made(5)
    other = Canaries(planted.columns, planted.repeats, planted.included, bytes(32))
    assert planted.bound(b"x") == made(5).bound(b"x")
    assert len({planted.bound(b"x"), planted.bound(b"y"), other.bound(b"x")}) == 3


def test_canaries_are_kept_as_they_are():
    planted = made(30, (1, 2))
    again = Canaries.of_bytes(planted.as_bytes(), planted.seed)
    assert again.digest() == planted.digest()
    wrong = [
        Canaries(planted.columns, planted.repeats, np.array(["a"] * 30), planted.seed),
        Canaries(planted.columns, planted.repeats * 0, planted.included, planted.seed),
        Canaries(planted.columns, planted.repeats[:-1], planted.included, planted.seed),
        Canaries({TOKENS: planted.columns[TOKENS][:-1]}, *_rest(planted)),
    ]
    for content in (b"", b"PK\3\4 something", planted.as_bytes()[:-100], *(x.as_bytes() for x in wrong)):
        with pytest.raises(ValueError, match="no canaries"):
            Canaries.of_bytes(content, planted.seed)


def test_random_tokens_are_uniform_over_those_of_text():
    tokens = texts.random_tokens(4000, LENGTH, BYTES, canaries.seed_of(bytes(32)))[TOKENS]
    counts = np.bincount(tokens.ravel(), minlength=260)
    assert (counts[:3] == 0).all() and stats.chisquare(counts[3:]).pvalue > 1e-7


def test_a_new_token_is_none_that_text_has():
    rows = texts.new_tokens(20, LENGTH, BYTES, 260, canaries.seed_of(bytes(32)))
    last = rows[TOKENS][:, -1]
    for token in last:
        with pytest.raises(UnicodeDecodeError):
            bytes([token - 4]).decode()
        with pytest.raises(UnicodeDecodeError):
            b"a".join([bytes([token - 4])] * 2).decode()
    assert (rows[SCORED].sum(axis=1) == 1).all() and rows[SCORED][:, -1].all()


def test_a_vocabulary_without_room_for_a_new_token_is_refused():
    class Full:
        vocab_size, pad, eos, bos = 100, 0, 1, 2

        def token_id(self, token):
            return None

    with pytest.raises(InputError, match="random_tokens or synthetic"):
        texts.new_tokens(2, LENGTH, Full(), 100, bytes(32))
    assert texts.unused_ids(Full(), 103).tolist() == [100, 101, 102]


def test_gradient_canaries_have_places_of_their_own():
    sizes = [7, 1, 500, 30]
    leaves, offsets = canaries.coordinates(sizes, 300, bytes(32))
    places = set(zip(leaves.tolist(), offsets.tolist(), strict=True))
    assert len(places) == 300 and all(0 <= offset < sizes[leaf] for leaf, offset in places)
    assert set(leaves.tolist()) == {0, 1, 2, 3} or len(set(leaves.tolist())) >= 3
    with pytest.raises(ValueError, match="538"):
        canaries.coordinates(sizes, 539, bytes(32))
