"""What binds a ledger to its writer: every line's hash, and how far the file went, under a key.

A hash chain without a key can be written anew by anyone. An HMAC can be made, and checked, by those who have the secret
key. An Ed25519 signature can be made with the secret key alone, and checked by anyone who has the public one.

Formal guarantee: without the secret key nobody can write a ledger that a check under this key, or under its public key,
accepts, other than one that the holder of the key has closed with exactly these lines or cut behind its last closing
(as far as HMAC-SHA256 and Ed25519 are unforgeable). A whole folder that is put back to an earlier state is not found by
its seal; a head that was deposited elsewhere finds it. Tested by tests/training/sealed_test.py.
"""

import dataclasses
import hashlib
import hmac
import json
import pathlib
from typing import Protocol

from accounting.errors import InputError

# How a start event names its seal.
CHAIN = "sha256 chain without a key"
KEYED_CHAIN = "sha256 chain with an HMAC under a private key"
SIGNED_CHAIN = "sha256 chain with an Ed25519 signature of every line"
KEY_BYTES = 32


class Verifier(Protocol):
    """Checks seals. `name` is the start event's; `field` is where a line has its seal."""

    @property
    def name(self) -> str: ...
    @property
    def field(self) -> str: ...
    def holds(self, text: str, seal: str) -> bool:
        """Whether the seal was made for this text."""


class Seal(Verifier, Protocol):
    """Makes seals and checks them."""

    def of(self, text: str) -> str:
        """The seal of a text, in hexadecimal digits."""


@dataclasses.dataclass(frozen=True)
class Hmac:
    """HMAC-SHA256 under a secret key."""

    key: bytes = dataclasses.field(repr=False)
    name: str = KEYED_CHAIN
    field: str = "mac"

    def of(self, text: str) -> str:
        return hmac.new(self.key, text.encode(), hashlib.sha256).hexdigest()

    def holds(self, text: str, seal: str) -> bool:
        return hmac.compare_digest(seal.encode(errors="replace"), self.of(text).encode())


@dataclasses.dataclass(frozen=True)
class PublicKey:
    """The public half of an Ed25519 key, which checks signatures."""

    public: bytes
    name: str = SIGNED_CHAIN
    field: str = "signature"

    def holds(self, text: str, seal: str) -> bool:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            signature = bytes.fromhex(seal)
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, text.encode())
        except (InvalidSignature, ValueError):
            return False
        return signature.hex() == seal  # in no other spelling


@dataclasses.dataclass(frozen=True)
class Signature:
    """Ed25519 signatures under a secret key."""

    key: bytes = dataclasses.field(repr=False)
    name: str = SIGNED_CHAIN
    field: str = "signature"

    def of(self, text: str) -> str:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self.key).sign(text.encode()).hex()

    def holds(self, text: str, seal: str) -> bool:
        return PublicKey(self.public).holds(text, seal)

    @property
    def public(self) -> bytes:
        """The public half."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self.key).public_key().public_bytes_raw()


FIELDS = ("mac", "signature")


def with_secret(name: str, key: bytes) -> Hmac | Signature | None:
    """The seal that a start event names, under its secret key; None for a chain without a key."""
    return Hmac(key) if name == KEYED_CHAIN else Signature(key) if name == SIGNED_CHAIN else None


@dataclasses.dataclass(frozen=True)
class AuditKey:
    """A key that an auditor has from elsewhere.

    Attributes:
      secret: the ledger's secret key, which checks either kind of seal; or None.
      public: the public half of a signing key; it never stands for the secret key of an HMAC.
    """

    secret: bytes | None = dataclasses.field(default=None, repr=False)
    public: bytes | None = None

    def verifier(self, name: str) -> Verifier | None:
        """What checks seals of this name; None where the key cannot."""
        if self.secret is not None:
            return with_secret(name, self.secret)
        return PublicKey(self.public) if self.public is not None and name == SIGNED_CHAIN else None


def read_key(text: str) -> AuditKey:
    """The key that an auditor names.

    Args:
      text: a public key as 64 hexadecimal digits, a file that holds one, or a copy of a run's private/keys.json.

    Raises:
      InputError: neither of them.
    """
    if (public := _hexadecimal(text.lower())) is not None:
        return AuditKey(public=public)
    try:
        content = pathlib.Path(text).read_text()
    except (OSError, ValueError):
        raise InputError(
            f"`require_seal`={text} is neither a public key (64 hexadecimal digits) nor a file with a key"
        ) from None
    if (public := _hexadecimal(content.strip())) is not None:
        return AuditKey(public=public)
    try:
        secret = _hexadecimal(json.loads(content)["ledger"])
    except (ValueError, KeyError, TypeError):
        secret = None
    if secret is None:
        raise InputError(
            f"`require_seal`={text} holds neither a public key (64 hexadecimal digits) nor the keys of a run"
        )
    return AuditKey(secret=secret)


def _hexadecimal(text: object) -> bytes | None:
    """The bytes of a key that is written in hexadecimal digits; None for anything else."""
    if not (isinstance(text, str) and len(text) == 2 * KEY_BYTES and set(text) <= set("0123456789abcdef")):
        return None
    return bytes.fromhex(text)


def closing(seal: Seal, lines: int, head: str) -> str:
    """The content of the closing record: how far a sealed ledger went."""
    record = {"lines": lines, "head": head, seal.field: seal.of(_closed(lines, head))}
    return json.dumps(record, sort_keys=True) + "\n"


def closed_at(verifier: Verifier, content: bytes) -> tuple[int, str] | None:
    """(lines, head) of a closing record; None where it was not written under this key."""
    try:
        record = json.loads(content)
        lines, head, sealed = record["lines"], record["head"], record[verifier.field]
        holds = set(record) == {"lines", "head", verifier.field} and verifier.holds(_closed(lines, head), sealed)
        holds = holds and content == f"{json.dumps(record, sort_keys=True)}\n".encode()  # in no other spelling
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return (lines, head) if holds and isinstance(lines, int) else None


def _closed(lines: int, head: str) -> str:
    return f"dpgemma ledger closed at {lines} {head}"
