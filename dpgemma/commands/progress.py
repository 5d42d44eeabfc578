"""A bar, or a line, for whatever takes more than two seconds, on standard error."""

import contextlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

_PATIENCE_SECONDS = 2.0
_COLUMNS = 80  # of a terminal that does not say


def columns() -> int:
    """Columns of the terminal."""
    return shutil.get_terminal_size((_COLUMNS, 24)).columns


@contextlib.contextmanager
def phase(name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Says after two seconds that something goes on; yields what is told how much more of it is done.

    On a terminal only: how much there is and how long it takes may be a fact about private data.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    if total is not None:
        import tqdm

        bar: Any = tqdm.tqdm(
            total=total, desc=name, file=sys.stderr, delay=_PATIENCE_SECONDS, leave=False, ncols=columns(),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
        )  # fmt: skip
        with bar:
            yield bar.update
        return
    told = threading.Timer(_PATIENCE_SECONDS, print, [f"{name} ..."], {"file": sys.stderr, "flush": True})
    told.daemon = True
    told.start()
    try:
        yield lambda done: None
    finally:
        told.cancel()
