"""Text to token ids and back. Special ids come from the tokenizer's own files; ours are Gemma's: pad 0, eos 1, bos 2,
unk 3.
"""

import hashlib
import json
import pathlib
from typing import Any, Protocol

import numpy as np

from accounting.errors import InputError
from dpgemma.data.text import fast_tokenizers

BYTE = "byte"
MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
# What a directory may hold of its tokenizer.
FILES = (
    MODEL_FILE,
    JSON_FILE,
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    TEMPLATE_FILE,
)
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
_NAMES = ("pad", "eos", "bos", "unk")
_SPECIALS = len(_NAMES)


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
        """Returns the paths of the tokenizer's files."""

    def as_fast(self) -> tuple[Any, dict[str, str]]:
        """A tokenizer of Hugging Face's library with the same ids, and its tokens for pad, eos, bos and unk."""


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

    def as_fast(self) -> tuple[Any, dict[str, str]]:
        return fast_tokenizers.of_bytes(), dict(zip(_NAMES, fast_tokenizers.BYTE_SPECIALS, strict=True))


class FastTokenizer:
    """A tokenizer of Hugging Face's `tokenizers` library, read from a file of either kind.

    If it was trained on private data, that training is outside the guarantee.
    """

    def __init__(self, path: pathlib.Path, made: Any, names: dict[str, str]) -> None:
        """Takes the tokenizer as it is made.

        Args:
          path: the file that it was made of.
          names: the tokens that are "pad", "eos", "bos" and perhaps "unk".
        """
        self.path, self.names = path, names
        self._tokenizer = made
        self.vocab_size: int = made.get_vocab_size(with_added_tokens=False)
        self.pad, self.eos, self.bos = (self._special(name) for name in _NAMES[:3])

    def _special(self, name: str) -> int:
        token = self.names.get(name)
        return max(0, -1 if token is None else self._tokenizer.token_to_id(token))

    def encode(self, text: bytes) -> np.ndarray:
        decoded = text.decode("utf-8", errors="replace")
        return np.asarray(self._tokenizer.encode(decoded, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Any) -> bytes:
        specials = {self.pad, self.eos, self.bos}
        return self._tokenizer.decode(
            [int(i) for i in ids if int(i) not in specials], skip_special_tokens=True
        ).encode()

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def files(self) -> list[pathlib.Path]:
        """The file, or all tokenizer files of the Hugging Face directory that it lies in."""
        return _siblings(self.path)

    def as_fast(self) -> tuple[Any, dict[str, str]]:
        return self._tokenizer, self.names


class SentencePieceTokenizer(FastTokenizer):
    """A SentencePiece `.model` file."""

    def __init__(self, path: str) -> None:
        if not pathlib.Path(path).is_file():
            raise InputError(
                f"no tokenizer file at {path}: give a SentencePiece .model file, a Hugging Face directory, or"
                f" `tokenizer`={BYTE}"
            )
        markup = (START_OF_TURN, END_OF_TURN)
        super().__init__(pathlib.Path(path), *fast_tokenizers.of_sentencepiece(pathlib.Path(path), markup))


class JsonTokenizer(FastTokenizer):
    """A Hugging Face directory's tokenizer.json; its special tokens are named in tokenizer_config.json."""

    def __init__(self, directory: pathlib.Path) -> None:
        import tokenizers

        path = directory / JSON_FILE
        try:
            made = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises its own errors as plain Exceptions
            raise InputError(f"{path} is no tokenizer ({str(error).splitlines()[0]}): download it again") from None
        made.no_padding()
        made.no_truncation()
        settings = _json(directory / CONFIG_FILE)
        names = {}
        for name in _NAMES:
            token = settings.get(f"{name}_token") or f"<{name}>"
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and made.token_to_id(token) is not None:
                names[name] = token
            elif name != "unk":
                raise InputError(f"{path} has no {name} token ({token}): name it in tokenizer_config.json")
        lacking = sorted(token for token in _named(settings) if made.token_to_id(token) is None)
        if lacking:
            raise InputError(
                f"{directory / CONFIG_FILE} names tokens that {JSON_FILE} lacks ({', '.join(lacking[:3])}): save the"
                " tokenizer again with transformers, whose save_pretrained writes them into it"
            )
        super().__init__(path, made, names)


def _named(settings: dict[str, Any]) -> set[str]:
    """The tokens that a tokenizer_config.json adds to those of its tokenizer.json."""
    added = settings.get("added_tokens_decoder")
    found = list(added.values()) if isinstance(added, dict) else []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(name)
        found += list(more.values()) if isinstance(more, dict) else more if isinstance(more, list) else []
    tokens = (token.get("content") if isinstance(token, dict) else token for token in found)
    return {token for token in tokens if isinstance(token, str)}


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


def _is_bytes(path: pathlib.Path) -> bool:
    """Whether a tokenizer.json is the byte tokenizer's, as exports have it."""
    specials = _json(path).get("added_tokens")
    if not isinstance(specials, list):
        return False
    return [token.get("content") for token in specials if isinstance(token, dict)] == list(
        fast_tokenizers.BYTE_SPECIALS
    )


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
        return ByteTokenizer() if _is_bytes(path / JSON_FILE) else JsonTokenizer(path)
    if (path / MODEL_FILE).is_file():
        return SentencePieceTokenizer(str(path / MODEL_FILE))
    raise InputError(
        f"{spec} has neither {JSON_FILE} nor {MODEL_FILE}: give another `tokenizer`, or `tokenizer`={BYTE}"
    )
