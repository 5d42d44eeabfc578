"""Tokenizers of Hugging Face's `tokenizers` library that give the ids of this package's other kinds of tokenizers.

What is trained with is what an export writes as tokenizer.json, so a model meets the same ids wherever it is used.
"""

import pathlib
import re
from typing import Any

from accounting.errors import InputError

# Names of the byte tokenizer's special tokens. U+FDD0 stands for no character, so no text spells one of them.
BYTE_SPECIALS = tuple(f"\ufdd0<{name}>" for name in ("pad", "eos", "bos", "unk"))

# Kinds of pieces in a SentencePiece model (sentencepiece_model.proto).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_UNIGRAM, _BPE = 1, 2
_SPACE = "▁"
_NEVER = -1e6  # score of a piece that no text has
# Ids of these have to be those of SentencePiece itself.
_PROBES = (
    "the patient came back",
    " one  two   three ",
    "tab\there\nnew line\r\n",
    "É e\u0301 ﬁ ２ ½ …",
    "漢字 かな 한국어 русский العربية",
    "😀👩‍👩‍👧 \u200b\ufeff\u00a0x",
    "Za1b2C3 3.14159 x=y[0]; /* ok */",
    "aaaaaaaaaaaaaaaa bbbbbbbb",
)


def of_bytes() -> Any:
    """One token for each byte: pad 0, eos 1, bos 2, unk 3, byte + 4."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The library spells a byte that is no printable character of Latin-1 by one from U+0100 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    spelled = [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]
    vocabulary = {token: number for number, token in enumerate([*BYTE_SPECIALS, *spelled])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in BYTE_SPECIALS])
    return made


def of_sentencepiece(path: pathlib.Path, markup: tuple[str, ...]) -> tuple[Any, dict[str, str]]:
    """A SentencePiece model as (tokenizer, its pieces for pad, eos, bos and unk).

    Control pieces, the unknown piece and user-defined ones are found in a text before all others, as transformers does.

    Args:
      markup: user-defined pieces that are no text: decoding leaves them out.

    Raises:
      InputError: a file that is none, or a model that the library cannot express.
    """
    import sentencepiece
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
        original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, DecodeError):
        raise InputError(f"{path} is not a SentencePiece model: give a .model file, or `tokenizer`=byte") from None
    kind, spaces_last = model.trainer_spec.model_type, model.trainer_spec.treat_whitespace_as_suffix
    if kind not in (_UNIGRAM, _BPE) or spaces_last:
        raise InputError(f"{path} is a SentencePiece model of words, of characters or with spaces behind words: train"
                         " one of the kind unigram or bpe")  # fmt: skip
    made = _converted(model, markup)
    names = {
        name: original.id_to_piece(number)
        for name in ("pad", "eos", "bos", "unk")
        if (number := getattr(original, f"{name}_id")()) >= 0
    }
    for probe in _PROBES:
        if made.encode(probe, add_special_tokens=False).ids != original.encode(probe):
            raise InputError(
                f"{path} cannot be written as a tokenizer.json with the same ids: give a directory that has one"
            )
    return made, names


def _converted(model: Any, markup: tuple[str, ...]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces, spec, trained = model.pieces, model.normalizer_spec, model.trainer_spec
    unknown = next(number for number, piece in enumerate(pieces) if piece.type == _UNKNOWN)
    defined = [piece.piece for piece in pieces if piece.type == _USER_DEFINED]
    turns = [piece for piece in defined if piece in markup]
    others = [piece for piece in defined if piece not in markup]
    # Where spaces are added or removed, that has to happen before a text is divided at user-defined pieces.
    divides_later = bool(others) and (spec.add_dummy_prefix or spec.remove_extra_whitespaces)
    kind = trained.model_type
    if kind == _BPE:
        made = Tokenizer(
            models.BPE(
                vocab={piece.piece: number for number, piece in enumerate(pieces)},
                merges=_merges(pieces),
                unk_token=pieces[unknown].piece,
                fuse_unk=True,
                byte_fallback=trained.byte_fallback,
                ignore_merges=divides_later,
            )
        )
    else:
        scores = [(piece.piece, piece.score if piece.type != _UNUSED else _NEVER) for piece in pieces]
        made = Tokenizer(models.Unigram(scores, unknown, trained.byte_fallback))

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        # A single space in front stands for the one that add_dummy_prefix would put there.
        ends = r"\A \z|(?<=[\s\S]) \z" if spec.add_dummy_prefix else r"\A | \z"
        steps.append(normalizers.Replace(Regex(ends), ""))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if steps:
        made.normalizer = normalizers.Sequence(steps)
    divisions: list[Any] = []
    if spec.add_dummy_prefix:
        divisions.append(pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="first", split=False))
    if divides_later:
        longest_first = sorted(others, key=len, reverse=True)
        divisions.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated"))
    if divisions:
        made.pre_tokenizer = pre_tokenizers.Sequence(divisions)
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    special = [piece.piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL)] + turns
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    if not divides_later:
        made.add_tokens([AddedToken(piece, normalized=False) for piece in others])
    return made


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Pairs of pieces that make another one, the one with the highest score first."""
    ranks = {piece.piece: (-piece.score, number) for number, piece in enumerate(pieces) if piece.type == _NORMAL}
    found = [
        (*rank, piece[:at], piece[at:])
        for piece, rank in ranks.items()
        for at in range(1, len(piece))
        if piece[:at] in ranks and piece[at:] in ranks
    ]
    return [(left, right) for _, _, left, right in sorted(found)]
