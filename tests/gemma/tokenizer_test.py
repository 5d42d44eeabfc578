import json

import numpy as np
import pytest
import transformers

from accounting.errors import InputError
from dpgemma.data.text import chat, tokenizer
from tests.gemma import tokenizer_files

TEXTS = [
    "the patient  42 came é",
    "two\nlines and  spaces ",
    "漢字 and <b>",
    "",
    "<start_of_turn>user\nhi<end_of_turn>\n",
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The same tokenizer as a SentencePiece model and as a tokenizer.json."""
    model = tokenizer_files.write(tmp_path_factory.mktemp("sp") / "model")
    fast = tmp_path_factory.mktemp("fast")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(fast)
    assert (fast / "tokenizer.json").is_file() and not (fast / "tokenizer.model").exists()
    return model, fast


def test_bytes_round_trip():
    t = tokenizer.load("byte")
    text = bytes(range(256)) + "naïve – 漢字".encode()
    ids = t.encode(text)
    assert ids.dtype == np.int32 and ids.min() >= 4 and ids.max() < t.vocab_size == 260
    assert t.decode(np.concatenate([[t.bos], ids, [t.eos, t.pad]])) == text


@pytest.mark.parametrize("kind", [0, 1], ids=["model", "json"])
def test_directories_encode_as_transformers_does(directories, kind):
    ours, theirs = tokenizer.load(str(directories[kind])), transformers.AutoTokenizer.from_pretrained(directories[kind])
    assert ours.vocab_size == len(theirs)
    assert (
        (ours.pad, ours.eos, ours.bos) == (0, 1, 2) == (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id)
    )
    for text in TEXTS:
        ids = ours.encode(text.encode())
        assert ids.dtype == np.int32 and ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode([ours.bos, *ids, ours.eos, ours.pad]).decode() == text
    for token in (tokenizer.START_OF_TURN, tokenizer.END_OF_TURN):
        assert ours.token_id(token) == theirs.convert_tokens_to_ids(token) > 3
    assert ours.token_id("<no such token>") is None


def test_a_model_file_by_its_path(directories):
    t = tokenizer.load(str(directories[0] / "tokenizer.model"))
    assert t.encode(b"the patient").tolist() == tokenizer.load(str(directories[0])).encode(b"the patient").tolist()
    assert {path.name for path in t.files()} == {"tokenizer.model", "tokenizer_config.json"}


def test_special_tokens_are_named_by_the_files(directories, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((directories[1] / name).read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<end_of_turn>"}))
    assert tokenizer.load(str(tmp_path)).eos == tokenizer.load(str(directories[1])).token_id("<end_of_turn>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<nowhere>"}))
    with pytest.raises(InputError, match="no eos token"):
        tokenizer.load(str(tmp_path))


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_a_bad_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "t.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="SentencePiece"):
        tokenizer.load(str(path))


def test_added_tokens_beyond_the_embedding_are_no_obstacle(directories, tmp_path):
    # Text-only models share a tokenizer.json that has one token more than they have rows.
    theirs = transformers.AutoTokenizer.from_pretrained(directories[1])
    size = len(theirs)
    theirs.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    theirs.save_pretrained(tmp_path)
    ours = tokenizer.load(str(tmp_path))
    tokenizer.check_vocabulary(ours, size)
    tokenizer.check_ids(ours.encode(b"the patient"), size)
    with pytest.raises(InputError, match=f"beyond the {size} that"):
        tokenizer.check_ids(ours.encode(b"the <image_soft_token>"), size)
    with pytest.raises(InputError, match="choose another"):
        tokenizer.check_vocabulary(ours, size - 1)


@pytest.mark.parametrize("settings", ["[]", '{"bos_token": 3}', '{"bos_token": {"x": 1}}', "{"])
def test_bad_settings_are_one_sentence(directories, tmp_path, settings):
    (tmp_path / "tokenizer.json").write_text((directories[1] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(InputError, match=r"bos token|no JSON object"):
        tokenizer.load(str(tmp_path))


def test_a_bad_directory_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is no tokenizer"):
        tokenizer.load(str(tmp_path))


# The chat template of the published instruction-tuned models, as far as text goes.
TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] | trim + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (first if loop.first else"
    " '') }}"
    "{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<start_of_turn>model\n' }}{% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " the patient said she was tired\nand cold "},
    {"role": "assistant", "content": "came back on day 7"},
    {"role": "user", "content": "and  then?"},
    {"role": "assistant", "content": "a cough"},
]


@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:], CONVERSATION[1:3]])
def test_turns_are_the_published_templates(directories, messages):
    ours, theirs = tokenizer.load(str(directories[0])), transformers.AutoTokenizer.from_pretrained(directories[0])
    ids, scored = chat.turns(ours, messages)
    expected = theirs.apply_chat_template(messages, chat_template=TEMPLATE, return_dict=True)["input_ids"]
    assert [ours.bos, *ids] == expected
    # The answers and the token that ends each, and nothing else.
    answers = [m["content"] + "<end_of_turn>" for m in messages if m["role"] == "assistant"]
    assert "".join(theirs.convert_ids_to_tokens(ids[scored])).replace("▁", " ") == "".join(answers)
    asked = [messages[0]] if messages[0]["role"] == "user" else [CONVERSATION[1]]
    prompt = theirs.apply_chat_template(asked, chat_template=TEMPLATE, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert [ours.bos, *chat.prompt(ours, asked[0]["content"])] == prompt


def test_a_content_of_several_parts_is_their_text(directories):
    ours = tokenizer.load(str(directories[0]))

    def parted(message):
        half = len(message["content"]) // 2
        parts = [message["content"][:half], message["content"][half:]]
        return message | {"content": [{"type": "text", "text": part} for part in parts]}

    for whole, in_parts in zip(
        chat.turns(ours, CONVERSATION), chat.turns(ours, list(map(parted, CONVERSATION))), strict=True
    ):
        np.testing.assert_array_equal(whole, in_parts)
    picture = [{"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "What is it?"}]}]
    with pytest.raises(InputError, match="a list of parts of type text"):
        chat.turns(ours, picture)


@pytest.mark.parametrize("messages", [
    [], "hello", [{"role": "user"}], [{"role": "user", "content": 3}], [{"role": "tool", "content": "x"}],
    [{"role": "system", "content": "x"}],
    [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}],
])  # fmt: skip
def test_messages_that_are_none_are_refused(directories, messages):
    with pytest.raises(InputError, match="message"):
        chat.turns(tokenizer.load(str(directories[0])), messages)


def test_chat_needs_the_markups_tokens():
    with pytest.raises(InputError, match="start_of_turn"):
        chat.prompt(tokenizer.ByteTokenizer(), "hello")
