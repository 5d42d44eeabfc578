"""How like a synthetic corpus is to real text, and how near: distances of n-grams, and records that repeat real ones.

All figures depend on the real records and are private like them.
"""

import collections
import dataclasses
import itertools
import math
import random
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from accounting.errors import InputError
from dpgemma.data import readers
from dpgemma.data.text import shapes
from dpgemma.data.text.shapes import Conversation

# A record is a near-copy if it shares so many characters in a row with a real one. In templates of a trade that
# happens without copying, so the same is counted between halves of the real records.
COPIED_CHARACTERS = 50
Score = Callable[[list[str], list[str]], float | None]
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclasses.dataclass(frozen=True)
class Similarity:
    """Records compared with others.

    Attributes:
      records: that are compared.
      words, pairs, characters: Jensen-Shannon divergence in bits, from 0 to 1, of the frequencies of words, of pairs of
        neighbouring words, and of four characters in a row (Lin 1991, IEEE Trans. Inf. Theory 37).
      near_copies: records that share COPIED_CHARACTERS in a row with one of the others.
      mauve: by inference.mauve_score; None where it was not asked for, or there are too few records.
    """

    records: int
    words: float
    pairs: float
    characters: float
    near_copies: int
    mauve: float | None = None

    @classmethod
    def of(cls, some: list[str], others: list[str], score: Score | None = None) -> "Similarity":
        """Texts, compared with others.

        Args:
          score: of MAUVE, or None.
        """

        def distance(grams: Callable[[str], Iterable[Hashable]]) -> float:
            counts = [collections.Counter(gram for text in texts for gram in grams(text)) for texts in (some, others)]
            return divergence(*counts)

        mauve = None if score is None else score(some, others)
        return cls(len(some), distance(words), distance(pairs), distance(characters), near_copies(some, others), mauve)


def compare(
    synthetic: str, real: str, text_field: str = "text", seed: int = 0, score: Score | None = None
) -> tuple[Similarity, Similarity]:
    """(a corpus with real records, one half of the real records with the other: what to expect of a perfect corpus).

    Args:
      synthetic, real: as `data` names them.
      text_field: of the real records' text.
      seed: of the division into halves.
      score: of MAUVE, or None.

    Raises:
      InputError: data that cannot be read.
    """
    made, known = list(texts_of(synthetic, "text")), list(texts_of(real, text_field))
    halves = known[:]
    random.Random(seed).shuffle(halves)
    middle = len(halves) // 2
    return Similarity.of(made, known, score), Similarity.of(halves[:middle], halves[middle:], score)


def texts_of(data: str, text_field: str) -> Iterator[str]:
    """What each record says: its text, its response, or the answers of its conversation.

    Raises:
      InputError: a record that says nothing.
    """
    for number, record in enumerate(readers.records(data, text_field), 1):
        found = shapes.of(record, has_turns=True)
        if isinstance(found, Conversation):
            turns = [m for m in found.messages[found.learned_from :] if isinstance(m, dict) and m.get("role") != "user"]
            said: Any = "\n".join(str(turn.get("content")) for turn in turns if turn.get("role") != "system")
        else:
            said = record.get(text_field) if found is None else found.response
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        if not isinstance(said, str) or not said:
            raise InputError(f"record {number} of {data} has no text in field {text_field!r}: see `text_field`")
        yield said


def words(text: str) -> list[str]:
    """
    >>> words("Seen today: no fever.")
    ['Seen', 'today', ':', 'no', 'fever', '.']
    """
    return _WORD.findall(text)


def pairs(text: str) -> list[tuple[str, str]]:
    """Neighbouring words."""
    found = words(text)
    return list(itertools.pairwise(found))


def characters(text: str) -> list[str]:
    """Four characters in a row."""
    return [text[i : i + 4] for i in range(len(text) - 3)]


def divergence(some: collections.Counter, others: collections.Counter) -> float:
    """Jensen-Shannon divergence in bits of two tables of counts; 1 where one is empty.

    >>> divergence(collections.Counter("ab"), collections.Counter("ab"))
    0.0
    >>> divergence(collections.Counter("aa"), collections.Counter("bb"))
    1.0
    """
    first, second = sum(some.values()), sum(others.values())
    if not first or not second:
        return 1.0
    total = 0.0
    for gram in some.keys() | others.keys():
        p, q = some[gram] / first, others[gram] / second
        middle = (p + q) / 2
        total += (p * math.log2(p / middle) if p else 0.0) / 2 + (q * math.log2(q / middle) if q else 0.0) / 2
    return min(total, 1.0)


def near_copies(made: list[str], known: list[str], length: int = COPIED_CHARACTERS) -> int:
    """How many texts share `length` characters in a row with one of the known texts."""
    hashes = {hash(text[i : i + length]) for text in known for i in range(len(text) - length + 1)}
    return sum(any(hash(text[i : i + length]) in hashes for i in range(len(text) - length + 1)) for text in made)
