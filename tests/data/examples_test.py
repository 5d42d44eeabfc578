import json

import numpy as np
import pytest

from accounting.errors import InputError
from dpgemma.data.text import units
from dpgemma.data.text.pieces import Reading
from dpgemma.data.text.tokenizer import ByteTokenizer
from dpgemma.data.text.units import Found
from tests.data.in_memory import rows_in_memory

TOKENIZER = ByteTokenizer()
RECORDS = [
    {"prompt": "Question: ", "response": "answer"},
    {"prompt": "", "response": "all of it"},
    {"prompt": "a prompt that is longer than the row", "response": "never seen"},
    {"text": "plain text"},
    {"prompt": b"bytes", "response": b"too"},
]


def to_rows(records, length=20):
    return rows_in_memory(records, TOKENIZER, Reading("example", length, "text"))


def test_a_response_and_its_end_are_scored():
    rows = to_rows(RECORDS)
    assert (
        rows.columns["tokens"].shape == rows.columns["scored"].shape == (5, 20)
        and rows.columns["tokens"].dtype == np.int32
    )
    scored = [
        TOKENIZER.decode(tokens[is_scored])
        for tokens, is_scored in zip(rows.columns["tokens"], rows.columns["scored"], strict=True)
    ]
    assert scored == [b"answer", b"all of it", b"", b"plain text", b"too"]
    whole = [TOKENIZER.decode(tokens) for tokens in rows.columns["tokens"]]
    assert whole == [b"Question: answer", b"all of it", b"a prompt that is lon", b"plain text", b"bytestoo"]
    ends = [
        (tokens[is_scored] == TOKENIZER.eos).sum()
        for tokens, is_scored in zip(rows.columns["tokens"], rows.columns["scored"], strict=True)
    ]
    assert ends == [1, 1, 0, 1, 1]
    assert not (rows.columns["scored"] & (rows.columns["tokens"] == TOKENIZER.pad)).any()


def test_pitfall_19_a_record_is_one_row_and_touches_no_other():
    # pitfall 19: whatever one record becomes, and however long it is, the other rows stay as they are.
    before = to_rows(RECORDS)
    for record in ({"text": ""}, {"prompt": "x" * 1000, "response": "y"}, {"text": "z" * 1000}):
        after = to_rows([*RECORDS[:2], record, *RECORDS[3:]])
        others = [0, 1, 3, 4]
        assert after.num_units == before.num_units
        np.testing.assert_array_equal(after.columns["tokens"][others], before.columns["tokens"][others])
        np.testing.assert_array_equal(after.columns["scored"][others], before.columns["scored"][others])


@pytest.mark.parametrize(
    "record", [{}, {"prompt": "x"}, {"prompt": 3, "response": "x"}, {"other": "x"}, {"messages": []}]
)
def test_a_record_without_its_fields_is_named(record):
    with pytest.raises(InputError, match="record 2 of the data"):
        to_rows([RECORDS[0], record])
    with pytest.raises(InputError, match="empty"):
        to_rows([])


def test_rows_with_nothing_to_learn_are_noticed_and_not_refused():
    """Whether the last record that has something to learn is there must not show in whether training begins."""
    for numbers, which in (((2, 2), "all rows"), ((0, 2), "some rows"), ((0,), None)):
        rows = to_rows([RECORDS[i] for i in numbers])
        found = Found("example", rows, len(numbers), int(rows.columns["scored"].any(axis=1).sum()), len(numbers))
        assert [remark.startswith(f"{which} have nothing to learn") for remark in found.remarks] == [True] * bool(which)


def test_halves_of_surrogate_pairs_are_no_crash():
    rows = to_rows([{"prompt": "a \ud83d b", "response": "\ud83d"}, {"text": "\ud83d"}])
    assert (
        TOKENIZER.decode(rows.columns["tokens"][0]) == b"a ? b?" and TOKENIZER.decode(rows.columns["tokens"][1]) == b"?"
    )


def test_auto_takes_the_unit_from_the_fields(tmp_path):
    def unit(records, privacy_unit="auto", text_field="text", vocab_size=260):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        found = units.read(str(path), TOKENIZER, Reading(privacy_unit, 8, text_field), vocab_size)
        return found.privacy_unit, found.units

    texts = [{"text": "some"}, {"text": "more"}]
    assert unit(RECORDS[:4])[0] == "example" and unit(RECORDS[:4])[1].num_units == 4
    kind, rows = unit(texts)
    assert kind == "sequence" and rows.num_units == 2  # ten tokens in rows of eight
    kind, rows = unit(texts, "example")
    assert kind == "example" and rows.store.columns["scored"].sum(axis=1).tolist() == [5, 5]
    with pytest.raises(InputError, match="tokens beyond the 100 that the model knows"):
        unit(texts, vocab_size=100)
    with pytest.raises(InputError, match="`privacy_unit`=example"):
        unit(RECORDS[:2], "sequence")
