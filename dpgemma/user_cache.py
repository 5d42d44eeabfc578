"""Small JSON files that are quicker to read than to work out again. Losing them costs time and nothing else."""

import json
import os
import pathlib
from typing import Any


def folder() -> pathlib.Path:
    """~/.cache/dpgemma, or what XDG_CACHE_HOME asks for."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "dpgemma"


def read(path: pathlib.Path) -> dict[str, Any]:
    """The object that was kept; empty where there is none, or none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Replaces the file in one move, so that no other process reads half of it.

    Raises:
      OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)
