"""A small Gemma-like SentencePiece model, trained on the spot."""

import json

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
