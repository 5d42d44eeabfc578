import functools
import json
import shutil

import numpy as np
import pytest
import sentencepiece
import transformers

from accounting.errors import InputError
from dpgemma.data.text import chat, tokenizer
from dpgemma.data.text import tokenizer_files as files_lib
from tests.gemma import tokenizer_files


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


TURNS = dict(user_defined_symbols=["<start_of_turn>", "<end_of_turn>"], vocab_size=500, byte_fallback=True)
KINDS = {
    "as Gemma's": tokenizer_files.write,
    "tokenizer.json": None,
    "tokenizer.json with added tokens": None,
    "unigram, names of the trainer": tokenizer_files.write_unusual,
    "bpe": functools.partial(tokenizer_files.write_unusual, model_type="bpe"),
    "bpe with bytes and turns": functools.partial(tokenizer_files.write_unusual, model_type="bpe", **TURNS),
    "unigram with bytes and turns": functools.partial(tokenizer_files.write_unusual, **TURNS),
    "unusual specials": functools.partial(
        tokenizer_files.write_unusual, bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]", bos_id=4, eos_id=3,
        unk_id=0, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def exported(request, directories, tmp_path_factory):
    """(a tokenizer as it trains, that of transformers from an export, its folder) for every kind of file."""
    folder = tmp_path_factory.mktemp("tokenizer") / "source"
    if KINDS[request.param] is not None:
        KINDS[request.param](folder)
    elif "added" in request.param:
        theirs = transformers.AutoTokenizer.from_pretrained(directories[1])
        theirs.add_tokens(["<note>", "patient 4"])
        theirs.save_pretrained(folder)
    else:
        folder = directories[1]
    ours, out = tokenizer.load(str(folder)), folder.parent / "export"
    out.mkdir()
    files_lib.write(ours, out, 128)
    return ours, transformers.AutoTokenizer.from_pretrained(out), folder


def test_ids_of_training_are_those_of_transformers(exported):
    ours, theirs, folder = exported
    special = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert (ours.bos, ours.eos, ours.pad) == special and theirs("x")["input_ids"][0] == ours.bos
    texts = tokenizer_files.odd_texts()
    assert len(texts) == 500
    for text in texts:
        ids = ours.encode(text.encode())
        assert ids.dtype == np.int32 and ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ids.size == 0 or ids.max() < len(theirs)
    if (folder / "tokenizer.model").is_file():  # which finds no special tokens in a text
        original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for text in (text for text in texts if not set("<[") & set(text)):
            assert ours.encode(text.encode()).tolist() == original.encode(text), text


CONVERSATIONS = [
    CONVERSATION := [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": " the patient said she was tired\nand cold "},
        {"role": "assistant", "content": "came back on day 7"},
        {"role": "user", "content": "and  then?"},
        {"role": "model", "content": "a cough\n\n"},
    ],
    CONVERSATION[1:],
    CONVERSATION[1:3],
    CONVERSATION[:4],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "what <end_of_turn> <b> is"}],
    [
        {"role": "system", "content": [{"type": "text", "text": " Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": " the "}, {"type": "text", "text": "patient "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "\n3"}]},
    ],
]


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_turns_are_those_of_the_exported_template(exported, number):
    ours, theirs, _ = exported
    if not chat.has_turns(ours):
        assert theirs.chat_template is None
        return
    messages = CONVERSATIONS[number]
    ids, learned = chat.turns(ours, messages)
    assert [ours.bos, *ids] == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    # The answers and the token that ends each, and nothing else.
    answers = [m["content"] for m in messages if m["role"] in ("assistant", "model")]
    answers = [x if isinstance(x, str) else x[0]["text"] for x in answers]
    found = theirs.decode(ids[learned]).replace(" <end_of_turn>", "<end_of_turn>").strip()
    expected = "".join(f"{x.strip()}<end_of_turn>" for x in answers).replace(" <end_of_turn>", "<end_of_turn>")
    assert found.replace("> ", ">") == expected.replace("> ", ">")
    if isinstance(messages[0]["content"], str) and messages[0]["role"] == "user":
        asked = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert [ours.bos, *chat.prompt(ours, messages[0]["content"])] == asked


def test_the_byte_tokenizers_export_has_its_ids_and_is_known_again(tmp_path):
    ours = tokenizer.ByteTokenizer()
    files_lib.write(ours, tmp_path, 128)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in tokenizer_files.odd_texts():
        assert theirs(text)["input_ids"] == [ours.bos, *ours.encode(text.encode())]
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert isinstance(tokenizer.load(str(tmp_path)), tokenizer.ByteTokenizer)


def test_a_sentencepiece_model_that_a_json_cannot_express_is_refused(tmp_path):
    folder = tokenizer_files.write_unusual(tmp_path / "t", user_defined_symbols=["\n"], model_type="bpe")
    with pytest.raises(InputError, match=r"cannot be written as a tokenizer\.json"):
        tokenizer.load(str(folder))
    folder = tokenizer_files.write_unusual(tmp_path / "words", model_type="word", vocab_size=60)
    with pytest.raises(InputError, match="one of the kind unigram or bpe"):
        tokenizer.load(str(folder))


def test_a_model_without_bos_is_exported_with_what_it_trains_with(tmp_path):
    folder = tokenizer_files.write_unusual(tmp_path / "t", bos_id=-1)
    ours = tokenizer.load(str(folder))
    (tmp_path / "out").mkdir()
    files_lib.write(ours, tmp_path / "out", 128)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.bos_token_id == ours.bos and theirs("the patient")["input_ids"] == [
        ours.bos,
        *ours.encode(b"the patient"),
    ]


def test_tokens_that_only_the_settings_name_are_refused(directories, tmp_path):
    shutil.copytree(directories[1], tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = ["<end_of_turn>", "<note>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"lacks \(<note>\)"):
        tokenizer.load(str(tmp_path))


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


def said(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


REFUSED = {
    "empty": ([], "list of objects"),
    "text": ("hello", "list of objects"),
    "no content": ([{"role": "user"}], "needs a content"),
    "a number": (said(("user", 3)), "needs a content"),
    "null": (said(("user", "x"), ("assistant", None)), "needs a content"),
    "a tool": (said(("user", "x"), ("tool", "y")), "roles user and assistant"),
    "capitals": (said(("User", "x"), ("Assistant", "y")), "roles user and assistant"),
    "developer": (said(("developer", "x"), ("user", "y"), ("assistant", "z")), "roles user and assistant"),
    "two systems": (said(("system", "x"), ("system", "y"), ("user", "z")), "roles user and assistant"),
    "no role": ([{"content": "x"}], "roles user and assistant"),
    "a list as role": ([{"role": ["user"], "content": "x"}], "roles user and assistant"),
    "system alone": (said(("system", "x")), "not the system's alone"),
    "the model first": (said(("assistant", "x")), "must take turns"),
    "the model after the system": (said(("system", "x"), ("assistant", "y")), "must take turns"),
    "two users": (said(("user", "x"), ("user", "y"), ("assistant", "z")), "must take turns"),
    "no answer": (said(("user", "x")), "has no answer"),
    "an empty answer": (said(("user", "x"), ("assistant", " \n")), "is empty"),
    "a picture": (said(("user", [{"type": "image", "url": "x"}]), ("assistant", "y")), "parts of type text"),
    "two parts of a system": (
        said(("system", [{"type": "text", "text": "a"}] * 2), ("user", "x"), ("assistant", "y")), "one text",
    ),
    "a tool's call": (
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [{}]}], "calls a tool",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_messages_that_are_none_are_refused(directories, case):
    messages, sentence = REFUSED[case]
    with pytest.raises(InputError, match=sentence):
        chat.turns(tokenizer.load(str(directories[0])), messages)


def test_chat_needs_the_markups_tokens():
    with pytest.raises(InputError, match="start_of_turn"):
        chat.prompt(tokenizer.ByteTokenizer(), "hello")
