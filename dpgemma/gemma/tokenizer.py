"""Text to token ids and back. Special ids are Gemma's: pad 0, eos 1, bos 2, unk 3."""

import dataclasses
import pathlib

import numpy as np

from accounting.errors import InputError

BYTE = "byte"
_SPECIALS = 4


class ByteTokenizer:
    """One token per byte: id = byte + 4. Any text fits; nothing is learned from data."""

    vocab_size = 256 + _SPECIALS
    pad, eos, bos = 0, 1, 2

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32) + _SPECIALS

    def decode(self, ids) -> bytes:
        ids = np.asarray(ids)
        return (ids[ids >= _SPECIALS] - _SPECIALS).astype(np.uint8).tobytes()


@dataclasses.dataclass
class SentencePieceTokenizer:
    """A SentencePiece `.model` file. If it was trained on private data, that training is outside the guarantee."""

    path: str

    def __post_init__(self):
        import sentencepiece

        if not pathlib.Path(self.path).is_file():
            raise InputError(f"no tokenizer file at {self.path}: give a SentencePiece .model file, or --tokenizer={BYTE}")
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=self.path)
        except (RuntimeError, OSError):
            raise InputError(f"{self.path} is not a SentencePiece model: give a .model file, or --tokenizer={BYTE}") from None
        self.vocab_size = self._pieces.vocab_size()
        self.pad, self.eos, self.bos = (max(0, i) for i in (self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.bos_id()))

    def encode(self, text: bytes) -> np.ndarray:
        return np.asarray(self._pieces.encode(text.decode("utf-8", errors="replace")), np.int32)

    def decode(self, ids) -> bytes:
        specials = {self.pad, self.eos, self.bos}
        return self._pieces.decode([int(i) for i in ids if int(i) not in specials]).encode()


def load(spec: str):
    """The tokenizer that --tokenizer names: "byte" or the path of a SentencePiece model."""
    return ByteTokenizer() if spec == BYTE else SentencePieceTokenizer(spec)
