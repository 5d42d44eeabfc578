"""Fuzzes one reader in a process of its own, so that a hang or a crash of a library ends this process alone."""

import contextlib
import io
import json
import pathlib
import resource
import shutil
import sys
import time
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from accounting.errors import InputError
from tests.fuzzing.targets import TARGETS

LARGEST_INPUT = 1 << 16
MEMORY = 1 << 30
EXAMPLES_AT_ONCE = 200

_NUMBERS = [b"0", b"-1", b"1e999", b"18446744073709551615", b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f"]
_TEXTS = [
    b'"',
    b"\\",
    b"{",
    b"[" * 2000,
    b"\r",
    b"\n\n",
    b"\xef\xbb\xbf",
    b"../../../x",
    b"/etc/passwd",
    b"\x1f\x8b",
    b"NaN",
]
_VALUES = [None, True, -1, 2**63, 1e308, "", "inf", "../../x", [], {}, [[]], {"a": 1}, "x" * 5000, 10**30]

_EDITS = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, LARGEST_INPUT), st.integers(1, 64)),
    st.tuples(st.just("set"), st.integers(0, LARGEST_INPUT), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), st.integers(0, LARGEST_INPUT), st.binary(max_size=8)),
    st.tuples(st.just("insert"), st.integers(0, LARGEST_INPUT), st.sampled_from(_NUMBERS + _TEXTS)),
    st.tuples(st.just("repeat"), st.integers(0, LARGEST_INPUT), st.integers(1, 64)),
    st.tuples(st.just("end"), st.integers(0, LARGEST_INPUT), st.just(0)),
    st.tuples(st.just("value"), st.integers(0, 200), st.sampled_from(_VALUES)),
)  # fmt: skip


def edited(content: bytes, edits: list[tuple[str, int, Any]]) -> bytes:
    """A valid input after some changes."""
    for kind, place, what in edits:
        at = place % (len(content) + 1)
        if kind == "cut":
            content = content[:at] + content[at + what :]
        elif kind == "set":
            content = content[:at] + what + content[at + len(what) :]
        elif kind == "insert":
            content = content[:at] + what + content[at:]
        elif kind == "repeat":
            content = content[:at] + content[at : at + what] * 20 + content[at + what :]
        elif kind == "end":
            content = content[:at]
        else:
            content = with_value(content, place, what)
    return content[:LARGEST_INPUT]


def with_value(content: bytes, place: int, value: Any) -> bytes:
    """JSON, or JSON lines, with another value in one of its places; anything else as it is."""
    lines = content.split(b"\n")
    number = place % len(lines)
    with contextlib.suppress(ValueError, RecursionError, OverflowError):
        whole = json.loads(lines[number])
        places = list(_places(whole))
        if places:
            holder, key = places[place % len(places)]
            holder[key] = value
            lines[number] = json.dumps(whole).encode()
    return b"\n".join(lines)


def _places(value: Any) -> Any:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def tried(name: str, content: bytes, place: pathlib.Path) -> None:
    """Gives an input to a reader. It lies in `place` meanwhile, beside the reader's name."""
    folder = place / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (place / "reader").write_text(name)
    (place / "input").write_bytes(content)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(InputError, OSError):
            TARGETS[name][1](folder, content)


def fuzzed(name: str, valid: bytes, seconds: float, seed: int, place: pathlib.Path) -> int:
    """Tries changed inputs for some seconds; how many."""
    deadline, count = time.monotonic() + seconds, 0

    def one(edits: Any) -> None:
        nonlocal count
        if time.monotonic() < deadline:
            count += 1
            tried(name, edited(valid, edits), place)

    options = hypothesis.settings(
        max_examples=EXAMPLES_AT_ONCE, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False,
    )  # fmt: skip
    while time.monotonic() < deadline:
        hypothesis.seed(seed)(options(hypothesis.given(st.lists(_EDITS, min_size=1, max_size=5))(one)))()
        seed += 1
    return count


def main() -> None:
    """Arguments: seconds for each reader, a number to begin with, a folder that stays if this process dies, readers."""
    seconds, seed, place, names = float(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4:]
    valid = {name: TARGETS[name][0]() for name in names}
    for name in names:  # loads what it needs
        tried(name, valid[name], place)
    with open("/proc/self/statm") as file:
        here = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + MEMORY, here + MEMORY))
    (place / "started").touch()
    for name in names:
        print(f"{name}: {fuzzed(name, valid[name], seconds, seed, place)} inputs", flush=True)


if __name__ == "__main__":
    main()
