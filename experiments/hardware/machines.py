"""Chips and the machines that are made of them. This module imports no jax, so that --help answers at once."""

import dataclasses
import math
import re

from accounting.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """What its maker says of one chip.

    Attributes:
      memory: bytes.
      flops: multiplications and additions of bfloat16 in a second, at most.
      link: bytes a second that a chip sends to the others of its slice or machine, in one direction.
      network: bytes a second that a chip sends out of its slice; None where it is not known.
      dimensions: of a slice's shape; 0 where a machine is a number of chips.
      clock: cycles a second of the matrix units: flops / (2 x multipliers); None where no compiler counts cycles here.
    """

    memory: float
    flops: float
    link: float
    network: float | None
    dimensions: int = 0
    clock: float | None = None


# TPUs: cloud.google.com/tpu/docs/v5e, v5p and v6e; the multipliers of a chip are 4 x 128 x 128 (v5e), 2 x 4 x 128 x 128
# (v5p) and 2 x 256 x 256 (v6e: twice that, which its peak at the clock of v5p implies). GPUs: data sheets of the SXM
# versions.
CHIPS = {
    "v5e": Chip(16 * 2**30, 197e12, 200e9, 3.1e9, dimensions=2, clock=197e12 / (2 * 4 * 128**2)),
    "v5p": Chip(95 * 2**30, 459e12, 600e9, 6.25e9, dimensions=3, clock=459e12 / (2 * 8 * 128**2)),
    "v6e": Chip(32 * 2**30, 918e12, 400e9, 12.5e9, dimensions=2, clock=918e12 / (2 * 4 * 256**2)),
    "a100": Chip(80e9, 312e12, 300e9, None),
    "h100": Chip(80e9, 989e12, 450e9, None),
    "h200": Chip(141e9, 989e12, 450e9, None),
}
_MOST_CHIPS, _MOST_GPUS = 2**17, 1024  # for a GPU a device of the CPU stands in
# The processor of this computer, divided into devices, is the one machine on which a plan is measured.
CPU, _MOST_CPU_DEVICES = "cpu", 64
SYNTAX = "v6e:16x16, v5e:8x8, v5p:4x4x4, h100:8, h200:8, a100:8, or cpu:2 for this computer"


def of_device(kind: str) -> Chip | None:
    """What is known of a device by the name that jax gives it; None of others.

    >>> of_device("NVIDIA H100 80GB HBM3") is CHIPS["h100"], of_device("cpu")
    (True, None)
    """
    return next((chip for name, chip in CHIPS.items() if name in kind.lower()), None)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: slices of chips of one kind.

    Attributes:
      kind: a name of CHIPS.
      shape: of one slice.
      slices: that work together.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return _part_of_this_computer(self.chips) if self.is_at_hand else CHIPS[self.kind]

    @property
    def is_at_hand(self) -> bool:
        """Whether it is this computer, on which steps can be measured."""
        return self.kind == CPU

    @property
    def is_compiled_for(self) -> bool:
        """Whether a program can be compiled for it on a host without one."""
        return self.chip.dimensions > 0

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"


def accelerators(text: str) -> Topology:
    """Chips that a flag `chips` names, of one slice.

    Raises:
      InputError: as `parse`, or this computer.
    """
    try:
        topology = parse(text)
    except InputError as error:
        raise InputError(str(error).replace("`topology`", "`chips`")) from None
    if topology.is_at_hand:
        raise InputError("`chips` names accelerators, such as h100:8, and not this computer")
    return topology


def parse(text: str, slices: int = 1) -> Topology:
    """The machine that a flag names.

    >>> parse("v6e:16x16", slices=8).chips
    2048

    >>> parse("cpu:2").is_at_hand
    True

    Raises:
      InputError: another form, an unknown chip, or a shape of the wrong number of dimensions.
    """
    match = re.fullmatch(r"([a-z0-9]+):([1-9]\d{0,3}(?:x[1-9]\d{0,3})*)", text)
    if not match:
        raise InputError(f"`topology` must have a form like {SYNTAX}, got {text!r}")
    kind, shape = match[1], tuple(map(int, match[2].split("x")))
    if kind not in (*CHIPS, CPU):
        raise InputError(f"`topology`={text} names an unknown chip: use one of {', '.join(CHIPS)}, as in {SYNTAX}")
    if slices < 1:
        raise InputError(f"`num_slices` must be at least 1, got {slices}")
    dimensions = 0 if kind == CPU else CHIPS[kind].dimensions
    if slices > 1 and not dimensions:
        raise InputError(f"`num_slices` is for TPUs: name all chips of {kind} in `topology`")
    wanted = max(1, dimensions)
    if len(shape) != wanted:
        raise InputError(f"`topology`={text} needs {wanted} numbers after {kind}: use a form like {SYNTAX}")
    topology = Topology(kind, shape, slices)
    most = _MOST_CPU_DEVICES if kind == CPU else _MOST_CHIPS if topology.is_compiled_for else _MOST_GPUS
    if topology.chips > most:
        raise InputError(f"`topology`={text} has {topology.chips} chips in all, and {most} are the most to plan for")
    return topology


def _part_of_this_computer(devices: int) -> Chip:
    """One of the devices that share this computer's memory; nobody says how fast it is."""
    from dpgemma.training import memory

    return Chip((memory.of_this_computer() or math.inf) / devices, flops=math.nan, link=math.nan, network=None)
