"""Where arrays lie: for every layout, which logical axis of a parameter is spread over which axis of the mesh.

This module imports no jax, so that --help answers at once.
"""

import dataclasses

from accounting.errors import InputError
from dpgemma.choices import AUTO

# The axes of a mesh. Units are spread over the first: each unit lies on exactly one of its devices, or on exactly one
# row of devices where there is a second axis, over which every layer is spread.
DATA_AXIS, MODEL_AXIS = "data", "model"

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

SYNTAX = "auto, data:N or data:A,model:B, with N or A times B devices"

_MOST_DEVICES = 10**6  # what jax can be asked for at all


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices there are along each axis.

    >>> str(MeshShape(4, 2)), str(MeshShape(8))
    ('data:4,model:2', 'data:8')
    """

    data: int
    model: int = 1

    def __str__(self) -> str:
        across = f",{MODEL_AXIS}:{self.model}" if self.model > 1 else ""
        return f"{DATA_AXIS}:{self.data}{across}"

    @property
    def devices(self) -> int:
        return self.data * self.model


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
    for axis, part in zip((DATA_AXIS, MODEL_AXIS), mesh.split(","), strict=False):
        name, _, count = part.partition(":")
        if name == axis and count.isascii() and count.isdecimal() and 0 < int(count) < _MOST_DEVICES:
            counts[axis] = int(count)
    if len(counts) != mesh.count(",") + 1:
        raise InputError(f"`mesh` must be {SYNTAX}, got {mesh!r}")
    return MeshShape(**counts)
