"""Canaries: made-up units among the training units, by which an attack on the trained model is measured.

Each canary is included by a fair coin that only the run's secret key knows; one that lost is held out, and is as good
as any other for the question which ones the model has seen. A canary that is included is a unit like any other, and one
that is held out is an empty unit: the two data sets of the zero_out relation. So a guess of a coin is an attack on the
run's own guarantee; under add_or_remove too, because an empty unit gives the sums that an absent one does.

Formal guarantee: contents, repetitions and coins are functions of the run's secret key and of public settings, never of
the training units; the coins are independent of the contents. The source's own units keep their numbers and their rows.
Tested by tests/data/canaries_test.py::test_coins_and_contents_follow_from_the_key_alone and
::test_the_source_s_own_units_stay_as_they_are.
"""

import dataclasses
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpgemma.data.permutation import Permutation
from dpgemma.data.source import Wrapped
from dpgemma.data.spec import Column, RowSpec
from dpgemma.privacy import keystream

# Which number of the gradient a gradient canary moves: leaf of the parameters and place in it; -1 for other units.
LEAF, OFFSET = "canary_leaf", "canary_offset"
NONE = -1


@dataclasses.dataclass(frozen=True)
class Canaries:
    """Units that are planted.

    Attributes:
      columns: arrays [m, ...] by name: the row of each.
      repeats: int64 [m]; as how many units each is planted.
      included: bool [m]; the coins.
      seed: 32 secret bytes, that make `digest` hide what it binds.
    """

    columns: Mapping[str, np.ndarray]
    repeats: np.ndarray
    included: np.ndarray
    seed: bytes = dataclasses.field(repr=False)

    @property
    def count(self) -> int:
        """m."""
        return len(self.included)

    @property
    def units(self) -> int:
        """Units that they take, held-out ones included."""
        return int(self.repeats.sum())

    def digest(self) -> str:
        """SHA-256 by which a ledger binds contents and coins before the first step, without telling them."""
        digest = hashlib.sha256(self.seed)
        for name in sorted(self.columns):
            digest.update(f"{name} {self.columns[name].shape} {self.columns[name].dtype}".encode())
            digest.update(np.ascontiguousarray(self.columns[name]).data)
        digest.update(self.repeats.astype(np.int64).tobytes() + self.included.astype(np.uint8).tobytes())
        return digest.hexdigest()

    def bound(self, content: bytes) -> str:
        """A hash of some content that only whoever has the seed can make or check."""
        return hashlib.blake2b(content, key=self.seed, digest_size=32, person=b"dpgemma attack").hexdigest()

    @property
    def coins_follow_from_seed(self) -> bool:
        """Whether these are the coins that a run with this seed tosses."""
        return bool((self.included == _coins(self.seed, self.count)).all())

    def as_bytes(self) -> bytes:
        """The content of a file, which `of_bytes` reads."""
        file = io.BytesIO()
        rows: dict[str, Any] = {f"row {name}": column for name, column in self.columns.items()}
        np.savez(file, repeats=self.repeats, included=self.included, **rows)
        return file.getvalue()

    @classmethod
    def of_bytes(cls, content: bytes, seed: bytes) -> "Canaries":
        """The inverse of `as_bytes`.

        Raises:
          ValueError: a content that is none.
        """
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as stored:
                found = {name: stored[name] for name in stored.files}
            columns = {name.removeprefix("row "): found[name] for name in found if name.startswith("row ")}
            repeats, included = found["repeats"], found["included"]
            sound = (
                repeats.dtype == np.int64
                and included.dtype == bool
                and repeats.shape == included.shape == (len(included),)
                and (repeats >= 1).all()
                and columns
                and all(len(column) == len(included) and column.dtype.kind in "ib" for column in columns.values())
            )
            if not sound:
                raise ValueError("its arrays do not belong together")
            return cls(columns, repeats, included, seed)
        except Exception as error:  # NumPy, zipfile and zlib have their own ones each
            raise ValueError(f"no canaries: {error}") from None


@dataclasses.dataclass(frozen=True)
class Planted(Wrapped):
    """The units of another source, and behind them those of canaries. Held-out canaries are units without a row.

    Attributes:
      canaries: what is planted.
    """

    canaries: Canaries

    @property
    def spec(self) -> RowSpec:
        own = {name: Column(x.shape[1:], x.dtype.name) for name, x in self.canaries.columns.items()}
        return {**self.source.spec, **own}

    @property
    def num_units(self) -> int:
        return self.source.num_units + self.canaries.units

    def read(self, units: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        first, planted = self.source.num_units, self.canaries
        of_source = np.flatnonzero(units < first)
        rows, owner = self.source.read(units[of_source])
        others = np.flatnonzero(units >= first)
        which = np.repeat(np.arange(planted.count), planted.repeats)[units[others] - first]
        there = planted.included[which]
        owners = np.concatenate([of_source[owner], others[there]])
        order = np.argsort(owners, kind="stable")
        columns = {}
        for name, column in self.spec.items():
            own = rows[name] if name in rows else np.full((len(owner), *column.shape), NONE, column.dtype)
            columns[name] = np.concatenate([own, planted.columns[name][which[there]]])[order]
        return columns, owners[order]

    def fingerprint(self, key: bytes) -> str:
        canaries = hashlib.blake2b(self.canaries.digest().encode(), key=key, digest_size=32).hexdigest()
        return f"{self.source.fingerprint(key)} {canaries}"


def seed_of(secret: bytes) -> bytes:
    """The secret that a run's canaries and coins come from.

    Args:
      secret: of the run's hold-out.
    """
    return keystream.derive(secret, "canaries")


def of_columns(columns: Mapping[str, np.ndarray], repeats: Sequence[int], seed: bytes) -> Canaries:
    """Canaries with these rows [m, ...], planted so often in turn, with coins of the seed."""
    count = len(next(iter(columns.values())))
    return Canaries(columns, np.resize(np.array(repeats, np.int64), count), _coins(seed, count), seed)


def _coins(seed: bytes, count: int) -> np.ndarray:
    coins: np.ndarray = keystream.uniform_uint64(keystream.derive(seed, "coins"), 0, count) >= np.uint64(2**63)
    return coins


def coordinates(sizes: Sequence[int], count: int, seed: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Different places for `count` gradient canaries, spread at random over all numbers of some arrays.

    >>> leaves, offsets = coordinates([3, 5], count=8, seed=bytes(32))
    >>> sorted(zip(leaves.tolist(), offsets.tolist()))[:4]
    [(0, 0), (0, 1), (0, 2), (1, 0)]

    Args:
      sizes: of the arrays.
      seed: secret, of the canaries.

    Returns:
      int32 [m] each: number of the array, and place in it.

    Raises:
      ValueError: more canaries than numbers.
    """
    if count > sum(sizes):
        raise ValueError(f"there are {sum(sizes)} trained parameters, and each canary needs one")
    places = Permutation(keystream.derive(seed, "coordinates"), sum(sizes))(np.arange(count))
    begins = np.concatenate([[0], np.cumsum(sizes)])
    leaves = np.searchsorted(begins, places, "right") - 1
    return leaves.astype(np.int32), (places - begins[leaves]).astype(np.int32)
