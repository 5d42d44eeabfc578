"""Records in the shapes of other tools are read as those tools mean them, or refused with what to do."""

import json

import numpy as np
import pytest
import transformers

from accounting.errors import InputError
from dpgemma.data.text import examples, shapes, tokenizer
from tests.gemma import tokenizer_files

ASKED, ANSWER = "why was she tired?", "a cough"
TURNS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWER}]
SYSTEM = {"role": "system", "content": "the patient came"}
# Records, and the messages that they stand for.
SHAPES = {
    "messages": ({"messages": TURNS}, TURNS),
    "messages as a text": ({"messages": json.dumps(TURNS)}, TURNS),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}]}, TURNS,
    ),
    "ShareGPT with a system": (
        {
            "conversations": [
                {"from": "system", "value": SYSTEM["content"]},
                {"from": "human", "value": ASKED},
                {"from": "gpt", "value": ANSWER},
            ]
        },
        [SYSTEM, *TURNS],
    ),
    "conversations of messages": ({"conversations": TURNS}, TURNS),
    "Alpaca": ({"instruction": ASKED, "input": "", "output": ANSWER}, TURNS),
    "Alpaca with input and system": (
        {"instruction": ASKED, "input": "day 7", "output": ANSWER, "system": SYSTEM["content"]},
        [SYSTEM, {"role": "user", "content": f"{ASKED}\nday 7"}, TURNS[1]],
    ),
    "Dolly": (
        {"instruction": ASKED, "context": "day 7", "response": ANSWER, "category": "qa"},
        [{"role": "user", "content": f"{ASKED}\nday 7"}, TURNS[1]],
    ),
    "TRL": ({"prompt": [SYSTEM, TURNS[0]], "completion": TURNS[1:]}, [SYSTEM, *TURNS]),
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tokenizer_files.write(tmp_path_factory.mktemp("shapes") / "tokenizer")


@pytest.mark.parametrize("name", SHAPES)
def test_conversations_of_other_tools_are_their_messages(name, directory, tmp_path):
    record, messages = SHAPES[name]
    assert shapes.is_example(record)
    ours = tokenizer.load(str(directory))
    ids, learned = examples.encoded(record, ours, "text")
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    from dpgemma.data.text.chat import TEMPLATE

    assert [ours.bos, *ids] == theirs.apply_chat_template(messages, chat_template=TEMPLATE, return_dict=True)[
        "input_ids"
    ]
    assert ours.decode(ids[learned]) == ANSWER.encode()


def test_answers_within_a_prompt_are_not_learned(directory):
    ours = tokenizer.load(str(directory))
    record = {"prompt": [*TURNS, TURNS[0]], "completion": [{"role": "assistant", "content": "said 4"}]}
    ids, learned = examples.encoded(record, ours, "text")
    assert ours.decode(ids[learned]) == b"said 4" and ANSWER in ours.decode(ids).decode()


@pytest.mark.parametrize("record", [
    {"prompt": "a ", "response": "b"}, {"prompt": "a ", "completion": "b"}, {"prompt": b"a ", "completion": b"b"},
])  # fmt: skip
def test_pairs_are_scored_on_the_second_text(record):
    ours = tokenizer.ByteTokenizer()
    ids, learned = examples.encoded(record, ours, "text")
    assert ours.decode(ids) == b"a b" and ours.decode(ids[learned]) == b"b" and ids[-1] == ours.eos


def test_without_turn_markup_alpaca_is_a_pair():
    ours = tokenizer.ByteTokenizer()
    ids, learned = examples.encoded({"instruction": "do", "input": "this", "output": "done"}, ours, "text")
    assert ours.decode(ids[~learned]) == b"do\nthis\n" and ours.decode(ids[learned]) == b"done"


REFUSED = {
    "a preference": ({"prompt": "x", "chosen": "y", "rejected": "z"}, "no text in its field 'response'"),
    "an empty response": ({"prompt": "x", "response": " "}, "response is empty"),
    "a null completion": ({"prompt": "x", "completion": None}, "no text in its field 'completion'"),
    "a list and a text": ({"prompt": TURNS[:1], "completion": "x"}, "'completion' is no list of messages"),
    "messages that are no list": ({"messages": {"role": "user"}}, "'messages' is no list of messages"),
    "messages as another text": ({"messages": "hello"}, "'messages' is no list of messages"),
    "a function's turn": (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "y"}]}, "a speaker in",
    ),
    "a turn without value": ({"conversations": [{"from": "human"}]}, "turns need a value"),
    "an empty output": ({"instruction": "x", "output": ""}, "message of the assistant is empty"),
    "a history": ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "earlier turns"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_teaches_nothing_or_something_else_is_refused(case, directory):
    record, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence):
        examples.encoded(record, tokenizer.load(str(directory)), "text")


def test_records_of_text_stay_records_of_text():
    for record in ({"text": "x"}, {"instruction": "x", "text": "y"}, {"input": "x", "output": "y"}):
        assert not shapes.is_example(record) and shapes.of(record, has_turns=True) is None
    ids, learned = examples.encoded({"text": "x"}, tokenizer.ByteTokenizer(), "text")
    assert learned.all() and np.array_equal(ids, [ord("x") + 4, 1])
