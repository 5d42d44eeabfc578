"""Libraries that benchmarks compare with, which only the dev extra installs."""

import importlib
import sys
from typing import Any


def imported(module: str) -> Any:
    """The top package of a module that is imported; ends the program with a sentence where it is not installed."""
    name = module.partition(".")[0]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        print(f"this benchmark compares with {name}, which is not installed: pip install -e '.[dev]'", file=sys.stderr)
        sys.exit(2)
    return sys.modules[name]
