"""Cycles of a program compiled for TPU, as its compiler estimates them: every instruction's own estimate, times how
often it runs.

cost_analysis() of such a program is of no use here: its optimal_seconds are negative and its FLOPs count the body of a
loop once. The optimised HLO holds an estimate for each instruction and, in the condition of each loop, how often it is
repeated. This is a static estimate: transfers do not overlap with compute, and what collectives wait for is not in it.
Filling a buffer with a constant is estimated about nine times too slow (89 bytes a cycle where the addition beside it
gets 780), so cycles of such fills are kept apart.
"""

import dataclasses
import re
from collections.abc import Iterator

from experiments.hardware import hlo

FILL_OVERESTIMATE = 9.0

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Estimated cycles of one run of a program: all of them, and those among them that fill buffers with a constant."""

    raw: float
    fills: float

    @property
    def corrected(self) -> float:
        return self.raw - self.fills * (1 - 1 / FILL_OVERESTIMATE)


def _estimated(text: str, default_trip_count: int) -> Iterator[tuple[int, int, str, str]]:
    """Yields (times run, estimated cycles, opcode, HLO line) of every instruction with an estimate."""
    for times, opcode, line in hlo.instructions(text, default_trip_count):
        estimate = _CYCLES.search(line)
        if estimate:
            yield times, int(estimate.group(1)), opcode, line


def of(text: str, default_trip_count: int = 1) -> Cycles:
    """Cycles of a compiled program."""
    raw = fills = 0.0
    for times, cycles, opcode, _ in _estimated(text, default_trip_count):
        raw += times * cycles
        fills += times * cycles * (opcode == "broadcast")
    return Cycles(raw, fills)


def heaviest(text: str, count: int = 20, default_trip_count: int = 1) -> list[tuple[float, int, str, str]]:
    """(cycles in all, times run, opcode, name of the JAX operation) of the instructions that cost most."""
    rows: list[tuple[float, int, str, str]] = []
    for times, cycles, opcode, line in _estimated(text, default_trip_count):
        name = _OP_NAME.search(line)
        rows.append((times * cycles, times, line.split("=")[0].strip() + " " + opcode, name.group(1) if name else ""))
    return sorted(rows, reverse=True)[:count]
