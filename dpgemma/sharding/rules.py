"""Where arrays lie: for every layout, which logical axis of a parameter is spread over which axis of the mesh.

This module imports no jax, so that --help answers at once.
"""

import dataclasses

from accounting.errors import InputError
from dpgemma.choices import AUTO

# The axes of a mesh. Units are spread over the first two: each unit lies on exactly one of their devices, or on exactly
# one row of devices where there is a model axis, over which every layer is spread. Slices are machines whose devices
# have fast links to each other and slow ones to the rest: parameters are spread within a slice and never across.
SLICE_AXIS, DATA_AXIS, MODEL_AXIS = "slice", "data", "model"
AXES = (SLICE_AXIS, DATA_AXIS, MODEL_AXIS)

# Logical axes of parameters, as gemma.family and gemma.files.weights use them.
LAYERS, VOCABULARY, MODEL, HEADS, KV_HEADS, HEAD, FEED_FORWARD, RECURRENT, BLOCKS, TAPS, RANK = (
    "layers", "vocabulary", "model", "heads", "kv_heads", "head", "feed_forward", "recurrent", "blocks", "taps", "rank",
)  # fmt: skip
LOGICAL_AXES = (LAYERS, VOCABULARY, MODEL, HEADS, KV_HEADS, HEAD, FEED_FORWARD, RECURRENT, BLOCKS, TAPS, RANK)

REPLICATED, TENSOR = "replicated", "tensor"

# An axis that a layout's table does not name has no rule there, and a parameter that has it is refused.
RULES: dict[str, dict[str, str | None]] = {
    REPLICATED: dict.fromkeys(LOGICAL_AXES),  # every device uses all of every parameter
    # Products with these weights need no other device's weights, and one sum of activations a layer's half.
    TENSOR: dict.fromkeys(LOGICAL_AXES)
    | dict.fromkeys((VOCABULARY, HEADS, KV_HEADS, FEED_FORWARD, RECURRENT, BLOCKS), MODEL_AXIS),
}

# Held whole where they do not divide: every device then computes all of the few heads of keys and values.
MAY_STAY_WHOLE = (KV_HEADS,)

# Logical axes in the order in which the data axis takes one of them where parameters are at rest. Layer axes are not
# among them: a layer is used at a time.
AT_REST = (VOCABULARY, FEED_FORWARD, RECURRENT, MODEL, HEAD, HEADS, RANK)

SYNTAX = "auto, data:N, data:A,model:B or slice:S,data:A,model:B, whose numbers multiply to the devices"

_MOST_DEVICES = 10**6  # what jax can be asked for at all


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices there are along each axis.

    >>> str(MeshShape(4, 2)), str(MeshShape(8)), str(MeshShape(4, slices=2))
    ('data:4,model:2', 'data:8', 'slice:2,data:4')
    """

    data: int
    model: int = 1
    slices: int = 1

    def __str__(self) -> str:
        return ",".join(f"{axis}:{size}" for axis, size in self.sizes.items())

    @property
    def sizes(self) -> dict[str, int]:
        """By axis: that of the data, and those of the others along which there is more than one device."""
        sizes = dict(zip(AXES, (self.slices, self.data, self.model), strict=True))
        return {axis: size for axis, size in sizes.items() if size > 1 or axis == DATA_AXIS}

    @property
    def rows(self) -> int:
        """Rows of devices along the model axis, each of which has units of its own."""
        return self.slices * self.data

    @property
    def devices(self) -> int:
        return self.rows * self.model


def wanted(mesh: str) -> MeshShape | None:
    """The shape that a setting names; None for "auto".

    >>> wanted("data:4,model:2").devices
    8

    Raises:
      InputError: another form.
    """
    if mesh == AUTO:
        return None
    counts: dict[str, int] = {}
    for part in mesh.split(","):
        name, _, count = part.partition(":")
        if name in AXES and count.isascii() and count.isdecimal() and 0 < int(count) < _MOST_DEVICES:
            counts[name] = int(count)
    in_order = [axis for axis in AXES if axis in counts] == list(counts)
    if not in_order or DATA_AXIS not in counts or len(counts) != mesh.count(",") + 1:
        raise InputError(f"`mesh` must be {SYNTAX}, got {mesh!r}")
    return MeshShape(counts[DATA_AXIS], counts.get(MODEL_AXIS, 1), counts.get(SLICE_AXIS, 1))
