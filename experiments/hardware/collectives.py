"""What the chips of a compiled program send to each other, read from its optimised HLO."""

import dataclasses
import math
import re

import numpy as np

from accounting.errors import InputError
from experiments.hardware import hlo

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")
_BETWEEN_SLICES = re.compile(r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="([A-Z_]+)"')
_SIZE = re.compile(r"'([^']+)'=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of transfer within a step.

    Attributes:
      kind: as HLO calls it.
      bytes: of the whole array that is gathered, added up or exchanged, on one chip.
      times: in a step.
      chips: that take part in each.
      crosses_slices: whether some of them lie in different slices.
    """

    kind: str
    bytes: int
    times: int
    chips: int
    crosses_slices: bool = False

    @property
    def sent(self) -> float:
        """Bytes that a chip sends in a step where every chip passes parts on to its neighbour in a ring: an array that
        is added up goes around twice (Patarasuk and Yuan 2009).
        """
        rounds = {"all-reduce": 2.0}.get(self.kind, 1.0)
        share = 1.0 if self.kind == "collective-permute" else (self.chips - 1) / self.chips
        return self.times * rounds * share * self.bytes


def of(text: str, default_trip_count: int = 1, chips_of_slice: int | None = None) -> list[Collective]:
    """The collectives of a program, of one kind, size and group together, the largest first.

    Args:
      text: optimised HLO, `compiled.as_text()`.
      default_trip_count: of loops whose bound is not a constant.
      chips_of_slice: whose chips have neighbouring numbers; None where there is one slice.

    Raises:
      InputError: groups of chips in a form that is not known.
    """
    times: dict[tuple[str, int, int, bool, bool], int] = {}  # by the attributes and whether a loop repeats it
    counts = dict(re.findall(r"(replica_count|num_partitions)=(\d+)", text.split("\n", 1)[0]))
    chips = math.prod(map(int, counts.values()))
    for repeated, opcode, line in hlo.instructions(text, default_trip_count):
        kind = opcode.removesuffix("-start")
        if kind in _KINDS:
            groups = _groups(line, chips)
            crosses = chips_of_slice is not None and any(
                len({chip // chips_of_slice for chip in group}) > 1 for group in groups
            )
            key = kind, _bytes(line, opcode, len(groups[0])), len(groups[0]), crosses, repeated > 1
        elif between := _BETWEEN_SLICES.search(line) if opcode == "send" else None:
            # The host takes an array, and the runtime passes it on to the hosts of other slices.
            slices, kind = len(_numbers(between[1])), between[2].lower().replace("_", "-")
            key = kind, _bytes(line, opcode, slices), slices, True, repeated > 1
        else:
            continue
        times[key] = times.get(key, 0) + repeated
    found = [Collective(kind, size, count, chips, crosses) for (kind, size, chips, crosses, _), count in times.items()]
    return sorted(found, key=lambda collective: -collective.sent)


def _bytes(line: str, opcode: str, chips: int) -> int:
    results = line.split("= ", 1)[1].split(f" {opcode}(")[0]
    arrays = [_BYTES[kind] * math.prod(_numbers(shape)) for kind, shape in _ARRAY.findall(results) if shape]
    if opcode == "send":
        return arrays[0]
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        arrays = arrays[len(arrays) // 2 :]  # the operands come first
    return sum(arrays) * (chips if opcode == "reduce-scatter" else 1)


def _groups(line: str, chips: int) -> list[list[int]]:
    """Numbers of the chips of one group; of a permutation, those of every pair."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [_numbers(pair) for pair in re.findall(r"\{([\d,]+)", pairs[1])]
    if "replica_groups={}" in line:
        return [list(range(chips))]
    if listed := _LISTED.search(line):
        return [_numbers(listed[1])]
    if counted := _COUNTED.search(line):
        shape, sizes = _numbers(counted[1]), _numbers(counted[2])
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        if counted[3]:
            numbers = numbers.transpose(_numbers(counted[3]))
        return [[int(chip) for chip in numbers.reshape(shape)[0]]]
    if named := _NAMED.search(line):
        axes = {name: int(size) for name, size in _SIZE.findall(named[1])}
        together = re.findall(r"'([^']+)'", named[2])
        numbers = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        where = tuple(slice(None) if name in together else 0 for name in axes)
        return [[int(chip) for chip in numbers[where].reshape(-1)]]
    raise InputError(f"the compiler names groups of chips in a form that is not known here: {line.strip()[:200]}")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]
