"""What a compiled program runs, and how often: its optimised HLO, loops followed into their bodies."""

import collections
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_OPCODE = re.compile(r"= .*?(?:\]|\}|\)) ([a-z][\w\-]*)\(")
_WHILE = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIP = re.compile(r"[su]32\[\]\S* constant\((\d+)\)")
_ENTERED = ("call", "conditional", "async-start")


def instructions(text: str, default_trip_count: int = 1) -> Iterator[tuple[int, str, str]]:
    """Yields (times run, opcode, HLO line) of every instruction outside of fusions. Of a conditional all
    branches are yielded, though one of them runs.

    Args:
      text: optimised HLO, `compiled.as_text()`.
      default_trip_count: of loops whose bound is not a constant.
    """
    bodies, entry = _computations(text)
    pending = collections.deque([(entry, 1)])
    while pending:
        name, times = pending.popleft()
        for line in bodies[name]:
            loop = _WHILE.search(line)
            if loop:
                pending.append((loop.group(2), times * _trip_count(bodies[loop.group(1)], bodies, default_trip_count)))
                continue
            found = _OPCODE.search(line)
            if not found:
                continue
            opcode = found.group(1)
            if opcode in _ENTERED:
                called = _CALLED.findall(line)
                for names in _BRANCHES.findall(line):
                    called += [name.strip().lstrip("%") for name in names.split(",")]
                pending.extend((name, times) for name in called)
            yield times, opcode, line


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    name, entry = None, ""
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            bodies[name := match.group(1)] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name is not None:
            bodies[name].append(line)
    return bodies, entry


def _trip_count(condition: list[str], bodies: dict[str, list[str]], default: int) -> int:
    """The bound that a loop's counter is compared with; `default` where it is not a constant."""
    lines = condition + [line for own in condition for called in _CALLED.findall(own) for line in bodies[called]]
    bounds = [int(bound) for line in lines for bound in _TRIP.findall(line)]
    return max(bounds, default=0) or default
