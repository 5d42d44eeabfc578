import numpy as np
import pytest
import sentencepiece

from accounting.errors import InputError
from dpgemma.gemma import tokenizer


def test_bytes_round_trip():
    t = tokenizer.load("byte")
    text = bytes(range(256)) + "naïve – 漢字".encode()
    ids = t.encode(text)
    assert ids.dtype == np.int32 and ids.min() >= 4 and ids.max() < t.vocab_size == 260
    assert t.decode(np.concatenate([[t.bos], ids, [t.eos, t.pad]])) == text


def test_sentencepiece_round_trip(tmp_path):
    (tmp_path / "text").write_text("\n".join(f"the patient {i} came back on day {i * 7}" for i in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=300, model_type="bpe", byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    t = tokenizer.load(str(tmp_path / "m.model"))
    assert (t.pad, t.eos, t.bos) == (0, 1, 2)
    text = "the patient  42 came é".encode()
    assert t.decode([t.bos, *t.encode(text), t.eos]) == text
    assert len(t.encode(text)) < len(text)


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_a_bad_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "t.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="SentencePiece"):
        tokenizer.load(str(path))
