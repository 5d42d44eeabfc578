"""Where arrays lie: for every layout, which logical axis of a parameter is spread over which axis of the mesh.

This module imports no jax, so that --help answers at once.
"""

import dataclasses

from accounting.errors import InputError
from dpgemma.choices import AUTO

# The axes of a mesh. Units are spread over all but the last: each unit lies on exactly one of their devices, or on
# exactly one row of devices where there is a model axis, over which every layer is spread. Slices are machines whose
# devices have fast links to each other and slow ones to the rest: parameters are spread within a slice, never across.
# A mesh has a data axis, or an fsdp axis ("fully sharded data parallel") over which parameters are spread in use too.
SLICE_AXIS, DATA_AXIS, FSDP_AXIS, MODEL_AXIS = "slice", "data", "fsdp", "model"
AXES_OF_ROWS = (SLICE_AXIS, DATA_AXIS, FSDP_AXIS)
AXES = (*AXES_OF_ROWS, MODEL_AXIS)

# Logical axes of parameters, as gemma.family and gemma.files.weights use them.
LAYERS, VOCABULARY, MODEL, HEADS, KV_HEADS, HEAD, FEED_FORWARD, RECURRENT, BLOCKS, TAPS, RANK = (
    "layers", "vocabulary", "model", "heads", "kv_heads", "head", "feed_forward", "recurrent", "blocks", "taps", "rank",
)  # fmt: skip
LOGICAL_AXES = (LAYERS, VOCABULARY, MODEL, HEADS, KV_HEADS, HEAD, FEED_FORWARD, RECURRENT, BLOCKS, TAPS, RANK)

REPLICATED, TENSOR, FULLY_SHARDED = "replicated", "tensor", "fully sharded"

# An axis that a layout's table does not name has no rule there, and a parameter that has it is refused.
RULES: dict[str, dict[str, str | None]] = {
    REPLICATED: dict.fromkeys(LOGICAL_AXES),  # every device uses all of every parameter
    # Products with these weights need no other device's weights, and one sum of activations a layer's half.
    TENSOR: dict.fromkeys(LOGICAL_AXES)
    | dict.fromkeys((VOCABULARY, HEADS, KV_HEADS, FEED_FORWARD, RECURRENT, BLOCKS), MODEL_AXIS),
    # In use as at rest: an operation gathers the parameter of its layer, and scatters the sum of its gradients.
    FULLY_SHARDED: dict.fromkeys(LOGICAL_AXES),
}

# Held whole where they do not divide: every device then computes all of the few heads of keys and values.
MAY_STAY_WHOLE = (KV_HEADS,)

# Logical axes in the order in which the data or fsdp axis takes one of them where parameters are at rest. Layer axes
# are not among them: a layer is used at a time.
AT_REST = (VOCABULARY, FEED_FORWARD, RECURRENT, MODEL, HEAD, HEADS, RANK)

SYNTAX = "auto, data:N, data:A,model:B, fsdp:N, or one of them behind slice:S, and multiply to the number of devices"

_MOST_DEVICES = 10**6  # what jax can be asked for at all


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices there are along each axis.

    >>> str(MeshShape(4, 2)), str(MeshShape(8)), str(MeshShape(4, slices=2)), str(MeshShape(8, fully_sharded=True))
    ('data:4,model:2', 'data:8', 'slice:2,data:4', 'fsdp:8')

    Attributes:
      data: along the data axis, or along the fsdp axis of a mesh that is fully sharded.
      model: along the model axis.
      slices: along the slice axis.
      fully_sharded: whether parameters are spread in use too.
    """

    data: int
    model: int = 1
    slices: int = 1
    fully_sharded: bool = False

    def __str__(self) -> str:
        return ",".join(f"{axis}:{size}" for axis, size in self.sizes.items())

    @property
    def sizes(self) -> dict[str, int]:
        """By axis: that of the data or fsdp axis, and those of the others along which there is more than one device."""
        spread = FSDP_AXIS if self.fully_sharded else DATA_AXIS
        sizes = {SLICE_AXIS: self.slices, spread: self.data, MODEL_AXIS: self.model}
        return {axis: size for axis, size in sizes.items() if size > 1 or axis == spread}

    @property
    def rows(self) -> int:
        """Rows of devices along the model axis, each of which has units of its own."""
        return self.slices * self.data

    @property
    def devices(self) -> int:
        return self.rows * self.model


def wanted(mesh: str) -> MeshShape | None:
    """The shape that a setting names; None for "auto".

    >>> wanted("data:4,model:2").devices, wanted("fsdp:4").fully_sharded
    (8, True)

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
    in_order = [axis for axis in AXES if axis in counts] == list(counts) and len(counts) == mesh.count(",") + 1
    fully_sharded = FSDP_AXIS in counts
    if not in_order or fully_sharded + (DATA_AXIS in counts) != 1 or (fully_sharded and MODEL_AXIS in counts):
        raise InputError(f"`mesh` must be {SYNTAX}, got {mesh!r}")
    size = counts[FSDP_AXIS if fully_sharded else DATA_AXIS]
    return MeshShape(size, counts.get(MODEL_AXIS, 1), counts.get(SLICE_AXIS, 1), fully_sharded)
