"""A small Gemma-like SentencePiece model, trained on the spot."""

import itertools
import json
import random

import sentencepiece

TEXT = [f"the patient {i} came back on day {i * 7} with a cough and said she was tired" for i in range(300)]


def write(directory):
    """tokenizer.model and the tokenizer_config.json that the published directories have."""
    directory.mkdir(exist_ok=True)
    text = directory / "text.txt"
    text.write_text("\n".join(TEXT))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "tokenizer"), vocab_size=400, model_type="bpe",
        byte_fallback=True,
        split_digits=True, add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        pad_id=0, eos_id=1,
        bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=["<mask>", "<start_of_turn>", "<end_of_turn>", "\n"], minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    text.unlink()
    (directory / "tokenizer.vocab").unlink()
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GemmaTokenizer", "add_bos_token": True})
    )
    return directory


def write_unusual(directory, **settings):
    """tokenizer.model alone, with the piece names and rules of the trainer's defaults where `settings` say no other."""
    directory.mkdir(exist_ok=True)
    text = directory / "text.txt"
    text.write_text("\n".join(TEXT))
    given = dict(vocab_size=320, minloglevel=2, hard_vocab_limit=False)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "tokenizer"), **given | settings
    )
    text.unlink()
    (directory / "tokenizer.vocab").unlink()
    return directory


def odd_texts(count=500):
    """Texts that tokenizers read differently: marks, spaces, scripts, line ends, and what looks like special tokens."""
    parts = [
        "the patient", " 42", "  two", "\t", "\r\n", "\n", "\n\n", "\u00a0", "\u200b", "\ufeff", "e\u0301", "é", "ﬁ",
        "２", "½", "…", "漢字", "한국어", "русский", "العربية", "😀", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "<bos>",
        "<eos>", "<pad>", "<unk>", "<s>", "</s>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<end_of_turn>\n",
        "<start_of_turn>user\n", "<0x0A>", "▁", "▁▁the", "<|endoftext|>", "[INST]", "<", ">", "a" * 40, "AbC",
        "x=y[0];", "'s", "12345678", "-", "\\", '"', "\x07", "\u2028",
    ]  # fmt: skip
    rng = random.Random(7)
    drawn = ("".join(rng.choices(parts, k=rng.randint(1, 8))) for _ in itertools.count())
    return ["", " ", "\n", *parts, *itertools.islice(drawn, count - 3 - len(parts))]
