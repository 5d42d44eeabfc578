"""Cycles of a program compiled for TPU, as its compiler estimates them: every instruction's own estimate, times how
often it runs.

cost_analysis() of such a program is of no use here: its optimal_seconds are negative and its FLOPs count the body of a
loop once. The optimised HLO holds an estimate for each instruction and, in the condition of each loop, how often it is
repeated. This is a static estimate: transfers do not overlap with compute, and what collectives wait for is not in it.
Filling a buffer with a constant is estimated about nine times too slow (89 bytes a cycle where the addition beside it
gets 780), so cycles of such fills are kept apart.
"""

import collections
import dataclasses
import re

FILL_OVERESTIMATE = 9.0

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OPCODE = re.compile(r"= .*?(?:\]|\}|\)) ([a-z][\w\-]*)\(")
_WHILE = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_TRIP = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Estimated cycles of one run of a program: all of them, and those among them that fill buffers with a constant."""

    raw: float
    fills: float

    @property
    def corrected(self) -> float:
        return self.raw - self.fills * (1 - 1 / FILL_OVERESTIMATE)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies, name, entry = {}, None, None
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            name = match.group(1)
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name is not None:
            bodies[name].append(line)
    return bodies, entry


def _trip_count(condition: list[str], bodies: dict[str, list[str]], default: int) -> int:
    """The bound that a loop's counter is compared with; `default` where it is not a constant."""
    lines = condition + [line for own in condition for called in _CALLED.findall(own) for line in bodies[called]]
    bounds = [int(bound) for line in lines for bound in _TRIP.findall(line)]
    return max(bounds, default=default)


def instructions(text: str, default_trip_count: int = 1):
    """Yields (times run, estimated cycles, opcode, HLO line) of every instruction with an estimate.

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
            opcode = _OPCODE.search(line)
            if opcode and opcode.group(1) in ("call", "conditional", "async-start"):
                pending.extend((called, times) for called in _CALLED.findall(line))
            estimate = _CYCLES.search(line)
            if estimate:
                yield times, int(estimate.group(1)), opcode.group(1) if opcode else "?", line


def of(text: str, default_trip_count: int = 1) -> Cycles:
    """Cycles of a compiled program."""
    raw = fills = 0.0
    for times, cycles, opcode, _ in instructions(text, default_trip_count):
        raw += times * cycles
        fills += times * cycles * (opcode == "broadcast")
    return Cycles(raw, fills)


def heaviest(text: str, count: int = 20, default_trip_count: int = 1) -> list[tuple[float, int, str, str]]:
    """(cycles in all, times run, opcode, name of the JAX operation) of the instructions that cost most."""
    rows = []
    for times, cycles, opcode, line in instructions(text, default_trip_count):
        name = _OP_NAME.search(line)
        rows.append((times * cycles, times, line.split("=")[0].strip() + " " + opcode, name.group(1) if name else ""))
    return sorted(rows, reverse=True)[:count]
