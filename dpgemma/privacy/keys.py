"""The secret keys of a run: what they are for, where they come from, how they are kept."""

import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

from accounting.errors import InputError

_BYTES = 32
_CHECK = "check"  # in a file of keys


@dataclasses.dataclass(frozen=True)
class Keys:
    """256-bit secrets, one for each purpose.

    Attributes:
      sampling: which units are drawn.
      noise: which noise is added.
      holdout: which units are held out.
      fingerprint: of the keyed hash of the data.
      ledger: of the HMAC of every line of the ledger.
    """

    sampling: bytes = dataclasses.field(repr=False)
    noise: bytes = dataclasses.field(repr=False)
    holdout: bytes = dataclasses.field(repr=False)
    fingerprint: bytes = dataclasses.field(repr=False)
    ledger: bytes = dataclasses.field(repr=False)

    def bound(self, circumstances: Mapping[str, Any]) -> "Keys":
        """The keys with which batches are drawn and noise is added under certain circumstances.

        Formal guarantee: what is released under other circumstances has other, independent noise (as far as keyed
        BLAKE2b is a pseudorandom function), so it cannot be subtracted from this; under equal ones it is equal. Tested
        by tests/privacy/keys_test.py::test_other_circumstances_have_independent_keys.

        >>> keys = Keys.generate()
        >>> keys.bound({"numpy": "2.4.0"}) == keys.bound({"numpy": "2.4.0"})
        True
        >>> keys.bound({"numpy": "2.4.0"}).noise == keys.bound({"numpy": "2.4.1"}).noise
        False

        Args:
          circumstances: everything that decides the bits of a step, as JSON can hold it.
        """
        text = json.dumps(circumstances, sort_keys=True, separators=(",", ":")).encode()

        def of(secret: bytes) -> bytes:
            return hashlib.blake2b(text, key=secret, digest_size=_BYTES, person=b"dpgemma bound").digest()

        return dataclasses.replace(self, sampling=of(self.sampling), noise=of(self.noise))

    @classmethod
    def generate(cls) -> "Keys":
        """Keys of the operating system's randomness."""
        return cls(*(secrets.token_bytes(_BYTES) for _ in dataclasses.fields(cls)))

    def save(self, path: pathlib.Path) -> None:
        """Writes a new file that only its owner may read.

        Raises:
          FileExistsError: keys are never replaced.
        """
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(self.as_hex() | {_CHECK: self._check()}, file)

    def as_hex(self) -> dict[str, str]:
        """The secrets by name, as files and other processes of a run get them."""
        return {field.name: getattr(self, field.name).hex() for field in dataclasses.fields(self)}

    def _check(self) -> str:
        """By which a file of keys knows that none of its bits is wrong: other keys would add other noise."""
        text = json.dumps(self.as_hex(), sort_keys=True).encode()
        return hashlib.blake2b(text, key=self.ledger, digest_size=_BYTES, person=b"dpgemma keys").hexdigest()

    @classmethod
    def of_hex(cls, stored: Mapping[str, str]) -> "Keys":
        """The keys whose as_hex this is.

        Raises:
          KeyError, TypeError, ValueError: it is none.
        """
        return cls(**{field.name: bytes.fromhex(stored[field.name]) for field in dataclasses.fields(cls)})

    @classmethod
    def load(cls, path: pathlib.Path) -> "Keys":
        """The keys of a file.

        Formal guarantee: keys of a file with a check value are those that were written, so a step that is taken again
        has the noise that it had. Assumed: no damage finds a collision of keyed BLAKE2b. Files of earlier versions have
        no check value and are taken as they are. Tested by
        tests/privacy/keys_test.py::test_no_wrong_bit_in_a_file_of_keys_gives_other_keys.

        Raises:
          InputError: the file is damaged, or was not written by this program.
        """
        try:
            stored = json.loads(path.read_text())
            keys = cls.of_hex(stored)
            if stored.get(_CHECK, keys._check()) != keys._check():  # older files have none
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{path} is damaged: restore it; without its keys this run can neither go on nor be attacked"
            ) from None
        if any(len(getattr(keys, field.name)) != _BYTES for field in dataclasses.fields(cls)):
            raise InputError(f"{path} holds keys of another length: it was not written by this program")
        return keys
