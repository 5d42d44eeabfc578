"""Where arrays lie: for every layout, which logical axis of a parameter is spread over which axis of the mesh.

This module imports no jax, so that --help answers at once.
"""

from accounting.errors import InputError
from dpgemma.choices import AUTO

# The axis of the mesh over which units are spread: each unit lies on exactly one device.
DATA_AXIS = "data"

# Logical axes of parameters, as gemma.family and gemma.files.weights use them.
LAYERS, VOCABULARY, MODEL, HEADS, KV_HEADS, HEAD, FEED_FORWARD, RECURRENT, BLOCKS, TAPS, RANK = (
    "layers", "vocabulary", "model", "heads", "kv_heads", "head", "feed_forward", "recurrent", "blocks", "taps", "rank",
)  # fmt: skip
LOGICAL_AXES = (LAYERS, VOCABULARY, MODEL, HEADS, KV_HEADS, HEAD, FEED_FORWARD, RECURRENT, BLOCKS, TAPS, RANK)

REPLICATED = "replicated"

# An axis that a layout's table does not name has no rule there, and a parameter that has it is refused.
RULES: dict[str, dict[str, str | None]] = {
    REPLICATED: dict.fromkeys(LOGICAL_AXES),  # every device holds all of every parameter
}

# Logical axes in the order in which the data axis takes one of them where parameters are at rest. Layer axes are not
# among them: a layer is used at a time.
AT_REST = (VOCABULARY, FEED_FORWARD, RECURRENT, MODEL, HEAD, HEADS, RANK)

SYNTAX = "auto, or data:N with N devices"

_MOST_DEVICES = 10**6  # what jax can be asked for at all


def wanted(mesh: str) -> int | None:
    """N of "data:N"; None for "auto".

    Raises:
      InputError: another form.
    """
    axis, _, count = mesh.partition(":")
    if mesh == AUTO:
        return None
    if axis != DATA_AXIS or not count.isdecimal() or not 0 < int(count) < _MOST_DEVICES:
        raise InputError(f"`mesh` must be {SYNTAX}, got {mesh!r}")
    return int(count)
