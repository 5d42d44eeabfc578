"""Documents and users: which rows they have, and that no row holds anything of two of them."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from accounting.errors import InputError
from dpgemma.data.batch import collate
from dpgemma.data.limits import Kept, Limits
from dpgemma.data.source import Items, Subset
from dpgemma.data.text import units as units_lib
from dpgemma.data.text.pieces import Reading
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.data.text.users import within_limit
from tests.data.in_memory import rows_in_memory

TOKENIZER, LENGTH = ByteTokenizer(), 8
SECRET = bytes(range(32))
FIRST, UNIFORM = (Limits(3, kept, SECRET) for kept in ("first", "uniform"))


def by_user(records, limits=FIRST, without="refuse", field="who"):
    return Kept(rows_in_memory(records, TOKENIZER, Reading("user", LENGTH, "text", field, without)), limits)


def by_document(records, limits=FIRST):
    return Kept(rows_in_memory(records, TOKENIZER, Reading("document", LENGTH, "text")), limits)


def rows_of(units, number):
    """(text of the scored tokens, bytes as they stand) of every row of a unit."""
    rows, _ = units.read(np.array([number]))
    return [TOKENIZER.decode(t[s]) for t, s in zip(rows["tokens"], rows["scored"], strict=True)]


def test_a_users_texts_follow_each_other_in_rows_of_his_own():
    records = [
        {"who": "a", "text": "12345"}, {"who": 7, "text": "abc"}, {"who": "a", "text": "678"}, {"who": "7", "text": ""},
        {"who": "b", "prompt": "ask", "response": "yes"}, {"who": "b", "text": "zz"},
    ]  # fmt: skip
    units = by_user(records)
    assert units.num_units == 3 and units.max_rows == 3
    whole = b"".join(rows_of(units, 0))
    assert whole == b"12345678" and len(rows_of(units, 0)) == 2  # with an eos behind each text: ten tokens
    assert rows_of(units, 1) == [b"abc"]
    assert sorted(rows_of(units, 2)) == [b"yes", b"zz"]  # a record with a prompt begins a row


def test_a_document_has_as_many_rows_as_are_kept_of_it():
    text = "".join(chr(ord("a") + i // 8) for i in range(80))
    found = by_document([{"text": "short"}, {"text": text}, {"text": ""}])
    assert found.num_units == 3 and found.left_out() == (1, 8)
    assert rows_of(found, 0) == [b"short"]
    assert rows_of(found, 1) == [b"a" * 8, b"b" * 8, b"c" * 8]
    assert rows_of(found, 2) == [b""]  # a unit without anything to learn


def test_rows_beyond_the_limit_are_chosen_uniformly_by_the_secret_key():
    text = "".join(chr(ord("a") + i) * 8 for i in range(6))
    counts, trials, sets = np.zeros(7), 1400, collections.Counter()
    for secret in range(trials):
        limits = dataclasses.replace(UNIFORM, secret=secret.to_bytes(32, "little"))
        units = by_document([{"text": text}], limits)
        rows, _ = units.read(np.array([0]))
        kept = [int(row[0]) for row in rows["tokens"]]
        assert len(kept) == 3 and kept == sorted(kept[:-1]) + kept[-1:]  # in their order; eos has a row of its own
        sets[tuple(kept)] += 1
        counts += [bytes([ord("a") + i]) in b"".join(rows_of(units, 0)) for i in range(6)] + [0]
    # Each row is kept with probability 3/7: 5.5 standard deviations are exceeded with probability below 1e-6 in all.
    assert np.abs(counts[:6] - trials * 3 / 7).max() < 5.5 * np.sqrt(trials * 3 / 7 * 4 / 7)
    # And every set of three of the seven rows is as likely as any other.
    assert len(sets) == 35 and stats.chisquare(list(sets.values())).pvalue > 1e-7
    again = [rows_of(by_document([{"text": text}], UNIFORM), 0) for _ in range(2)]
    assert again[0] == again[1]


TEXTS = st.text("ab \n\ud83d\u00e9", max_size=60)
RECORD = st.fixed_dictionaries({"who": st.sampled_from(["a", "b", "c", 7])}, optional={"text": TEXTS}).map(
    lambda record: {"text": "", **record}
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(RECORD, min_size=1, max_size=12), st.sampled_from(["a", "b", "c", "7"]), st.lists(TEXTS, max_size=4))
def test_a_unit_s_records_touch_no_other_unit(records, whose, texts):
    """What one user says is replaced by something else: all rows of all others are as they were."""
    users = list(dict.fromkeys(str(record["who"]) for record in records))
    # His number stays what it is: an empty unit in its place.
    changed, replaced = [], iter(texts)
    for record in records:
        if str(record["who"]) != whose:
            changed.append(record)
        else:
            changed.append({**record, "text": next(replaced, "")})
    changed += [{"who": whose, "text": text} for text in replaced if whose in users]
    for limits in (FIRST, UNIFORM):
        one, other = (by_user(each, limits) for each in (records, changed))
        assert one.num_units == other.num_units == len(users)
        for number, user in enumerate(users):
            if user != whose:
                np.testing.assert_array_equal(
                    one.read(np.array([number]))[0]["tokens"], other.read(np.array([number]))[0]["tokens"]
                )
        # And every row is made of one user's text alone.
        for number, user in enumerate(users):
            texts_of_user = [record["text"] for record in records if str(record["who"]) == user]
            own = "".join(texts_of_user).encode("utf-8", "replace")
            assert all(row in own for row in rows_of(one, number))


def test_records_without_a_user_are_refused_or_units_of_their_own():
    records = [{"who": "a", "text": "1"}, {"text": "2"}, {"who": None, "text": "3"}, {"who": "a", "text": "4"}]
    with pytest.raises(InputError, match=r"record 2 of the data has no user in the field 'who'.*records_without_user"):
        by_user(records)
    units = by_user(records, without="own")
    assert [rows_of(units, i) for i in range(units.num_units)] == [[b"14"], [b"2"], [b"3"]]
    for value in (["a", "b"], {"id": 1}, np.array([1, 2]), (3, 4)):
        with pytest.raises(InputError, match="record 1 of the data has no single user"):
            by_user([{"who": value, "text": "1"}], without="own")


def test_fields_within_fields_name_users():
    records = [{"note": {"by": {"id": user}}, "text": "x"} for user in (1, 1.0, "1", 2)]
    assert by_user(records, field="note.by.id").num_units == 2
    dotted = [{"note.by": user, "text": json.dumps(user)} for user in (1, 2)]
    assert by_user(dotted, field="note.by").num_units == 2


def test_items_are_the_rows_of_their_unit():
    """Of any items, drawn in any number: those with a row hold the unit's own row of that place."""
    rng = np.random.default_rng(3)
    records = [{"who": int(who), "text": "abcdefgh" * int(rng.integers(4))} for who in rng.choice(9, 20)]
    units = by_user(records)
    kept = Subset(units, np.arange(1, units.num_units))
    items = Items(kept)
    assert items.num_units == 3 * kept.num_units and items.max_rows == 1
    for _ in range(50):
        asked = np.flatnonzero(rng.random(items.num_units) < rng.choice([0.0, 0.1, 0.5, 1.0]))
        rows, owner = items.read(asked)
        expected = []
        for number, item in enumerate(asked):
            own = kept.read(np.array([item // 3]))[0]["tokens"]
            if item % 3 < len(own):
                expected.append((number, own[item % 3]))
        assert list(owner) == [number for number, _ in expected]
        np.testing.assert_array_equal(rows["tokens"], np.array([row for _, row in expected]).reshape(-1, LENGTH))
        batch = collate(items, asked, items.num_units)  # empty items take no slot
        assert batch.mask.sum() == len(expected) and batch.mask[: len(expected)].all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=4), max_size=30), st.integers(1, 4))
def test_records_of_several_users_are_kept_up_to_the_limit_of_each(owners, limit):
    """At most k of each user, no record left out without need, and nothing but names decides it."""
    names = [tuple(sorted(set(one))) for one in owners]
    kept = within_limit(names, limit)
    counts = collections.Counter(name for number in kept for name in names[number])
    assert max(counts.values(), default=0) <= limit and kept == sorted(set(kept))
    for number in set(range(len(names))) - set(kept):
        before = collections.Counter(name for other in kept if other < number for name in names[other])
        assert any(before[name] == limit for name in names[number])


def test_a_list_names_several_users_only_where_that_is_public(tmp_path):
    records = [{"to": ["a", "b"], "text": "1"}, {"to": "a", "text": "2"}, {"to": ["b", "c", 3], "text": "3"}]
    with pytest.raises(InputError, match=r"record 1 of the data has no single user .*`ownership`=public"):
        by_user(records, field="to")
    path = tmp_path / "mail.jsonl"
    path.write_text("\n".join(map(json.dumps, [*records, {"to": [], "text": "4"}])))
    reading = Reading("user", LENGTH, "text", "to", "own", several_users=True)
    found = units_lib.read(str(path), TOKENIZER, reading, 260, Limits(1, "first", SECRET))
    assert (found.privacy_unit, found.users, found.rows, found.all_rows) == ("user", 5, 2, 4)
    rows, _ = found.units.read(np.arange(found.units.num_units))
    texts = [TOKENIZER.decode(t[s]) for t, s in zip(rows["tokens"], rows["scored"], strict=True)]
    assert texts == [b"1", b"4"] and "2 of 4 records are left out" in found.remarks[1]
    with pytest.raises(InputError, match="has no user in the field 'to'"):
        units_lib.read(str(path), TOKENIZER, dataclasses.replace(reading, records_without_user="refuse"), 260)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(TEXTS, min_size=2, max_size=8), TEXTS)
def test_a_document_touches_no_other_document(texts, other):
    """One record has another text: all rows of all others are as they were."""
    for limits in (FIRST, UNIFORM):
        one, two = (by_document([{"text": text} for text in each], limits) for each in (texts, [other, *texts[1:]]))
        for number in range(1, len(texts)):
            rows = [units.read(np.array([number]))[0]["tokens"] for units in (one, two)]
            np.testing.assert_array_equal(*rows)
