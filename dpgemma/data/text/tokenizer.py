"""Text to token ids and back. Special ids come from the tokenizer's own files; ours are Gemma's: pad 0, eos 1, bos 2,
unk 3.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any, Protocol

import numpy as np

from accounting.errors import InputError

BYTE = "byte"
MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
# What a directory may hold beside these; an export copies whatever is there.
FILES = (
    MODEL_FILE,
    JSON_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
_SPECIALS = 4


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
      vocab_size: ids of ordinary text are below it; added tokens, which no text model uses, may lie above.
      pad, eos, bos: special ids.
    """

    vocab_size: int
    pad: int
    eos: int
    bos: int

    def encode(self, text: bytes) -> np.ndarray:
        """Ids int32 [n], without bos and eos."""

    def decode(self, ids: Any) -> bytes:
        """Text of ids; special ones are left out."""

    def token_id(self, token: str) -> int | None:
        """The id of a token, or None."""

    def files(self) -> list[pathlib.Path]:
        """Returns the paths of the tokenizer's files, which an export copies."""


class ByteTokenizer:
    """One token per byte: id = byte + 4. Any text fits; nothing is learned from data."""

    vocab_size = 256 + _SPECIALS
    pad, eos, bos = 0, 1, 2

    def encode(self, text: bytes) -> np.ndarray:
        return np.frombuffer(text, np.uint8).astype(np.int32) + _SPECIALS

    def decode(self, ids: Any) -> bytes:
        ids = np.asarray(ids)
        return (ids[(ids >= _SPECIALS) & (ids < self.vocab_size)] - _SPECIALS).astype(np.uint8).tobytes()

    def token_id(self, token: str) -> int | None:
        return None

    def files(self) -> list[pathlib.Path]:
        return []


@dataclasses.dataclass
class SentencePieceTokenizer:
    """A SentencePiece `.model` file. If it was trained on private data, that training is outside the guarantee."""

    path: str

    def __post_init__(self) -> None:
        import sentencepiece

        if not pathlib.Path(self.path).is_file():
            raise InputError(
                f"no tokenizer file at {self.path}: give a SentencePiece .model file, a Hugging Face directory, or"
                f" `tokenizer`={BYTE}"
            )
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=self.path)
        except (RuntimeError, OSError):
            raise InputError(
                f"{self.path} is not a SentencePiece model: give a .model file, or `tokenizer`={BYTE}"
            ) from None
        self.vocab_size = self._pieces.vocab_size()
        self.pad, self.eos, self.bos = (
            max(0, i) for i in (self._pieces.pad_id(), self._pieces.eos_id(), self._pieces.bos_id())
        )

    def encode(self, text: bytes) -> np.ndarray:
        return np.asarray(self._pieces.encode(text.decode("utf-8", errors="replace")), np.int32)

    def decode(self, ids: Any) -> bytes:
        specials = {self.pad, self.eos, self.bos}
        return self._pieces.decode(
            [int(i) for i in ids if int(i) not in specials and int(i) < self.vocab_size]
        ).encode()

    def token_id(self, token: str) -> int | None:
        found = self._pieces.piece_to_id(token)
        return found if self._pieces.id_to_piece(found) == token else None

    def files(self) -> list[pathlib.Path]:
        """The model file, or all tokenizer files of the Hugging Face directory that it lies in."""
        return _siblings(pathlib.Path(self.path))


class JsonTokenizer:
    """A Hugging Face directory's tokenizer.json; its special tokens are named in tokenizer_config.json."""

    def __init__(self, directory: pathlib.Path) -> None:
        import tokenizers

        self._path = directory / JSON_FILE
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self._path))
        except Exception as error:  # the library raises its own errors as plain Exceptions
            raise InputError(
                f"{self._path} is no tokenizer ({str(error).splitlines()[0]}): download it again"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=False)
        settings = _json(directory / "tokenizer_config.json")
        self.pad, self.eos, self.bos = (self._special(settings, name) for name in ("pad", "eos", "bos"))

    def _special(self, settings: dict[str, Any], name: str) -> int:
        token = settings.get(f"{name}_token") or f"<{name}>"
        token = token.get("content") if isinstance(token, dict) else token
        found = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        if found is None:
            raise InputError(f"{self._path} has no {name} token ({token}): name it in tokenizer_config.json")
        return found

    def encode(self, text: bytes) -> np.ndarray:
        return np.asarray(
            self._tokenizer.encode(text.decode("utf-8", errors="replace"), add_special_tokens=False).ids, np.int32
        )

    def decode(self, ids: Any) -> bytes:
        specials = {self.pad, self.eos, self.bos}
        return self._tokenizer.decode(
            [int(i) for i in ids if int(i) not in specials], skip_special_tokens=True
        ).encode()

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def files(self) -> list[pathlib.Path]:
        return _siblings(self._path)


def _json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object: download it again")
    return content


def _siblings(path: pathlib.Path) -> list[pathlib.Path]:
    if path.name not in FILES:
        return [path]
    return [path.parent / name for name in FILES if (path.parent / name).is_file()]


def digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what decides the ids of a text: the tokenizer's kind, special ids and files."""
    hashed = hashlib.sha256(repr((type(tokenizer).__name__, tokenizer.pad, tokenizer.eos, tokenizer.bos)).encode())
    for path in tokenizer.files():
        if path.name in (MODEL_FILE, JSON_FILE) or path.suffix == ".model":
            hashed.update(hashlib.sha256(path.read_bytes()).digest())
    return hashed.hexdigest()


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> None:
    """Raises InputError where a tokenizer has more tokens than an embedding has rows."""
    if tokenizer.vocab_size > rows:
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's {rows}: choose another of the two"
        )


def check_ids(ids: np.ndarray, rows: int) -> None:
    """Raises InputError for ids beyond an embedding: text that holds a token which the tokenizer knows and the model
    does not.
    """
    if ids.size and ids.max() >= rows:
        raise InputError(
            f"the text holds tokens beyond the {rows} that the model knows: remove them, or choose another tokenizer"
        )


def utf8(text: str) -> bytes:
    """Bytes of a text; what is no character (half of a surrogate pair) becomes a question mark."""
    return text.encode("utf-8", errors="replace")


def load(spec: str) -> Tokenizer:
    """The tokenizer that `tokenizer` names: "byte", a SentencePiece model, or a Hugging Face directory with either of
    its files.

    Raises:
      InputError: nothing of the kind there.
    """
    if spec == BYTE:
        return ByteTokenizer()
    path = pathlib.Path(spec)
    if not path.is_dir():
        return SentencePieceTokenizer(spec)
    if (path / JSON_FILE).is_file():
        return JsonTokenizer(path)
    if (path / MODEL_FILE).is_file():
        return SentencePieceTokenizer(str(path / MODEL_FILE))
    raise InputError(
        f"{spec} has neither {JSON_FILE} nor {MODEL_FILE}: give another `tokenizer`, or `tokenizer`={BYTE}"
    )
