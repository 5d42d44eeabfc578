"""Weight names and layouts of Hugging Face checkpoints, as one table for both directions."""

import dataclasses

import numpy as np

from accounting.errors import InputError
from dpgemma.gemma import decoder
from dpgemma.gemma.config import GemmaConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter: its path here, its Hugging Face name ({} is the layer) and the change of layout.

    Attributes:
      layout: "as is"; "heads in" for (N, D, H) stored as (N * H, D); "heads out" for (N, H, D) stored as (D, N * H); "transposed".
    """

    path: tuple[str, ...]
    name: str
    layout: str = "as is"

    @property
    def stacked(self) -> bool:
        return self.path[0] == "blocks"


_LAYER = "model.layers.{}."
TABLE = (
    Weight(("embedder", "embedding"), "model.embed_tokens.weight"),
    Weight(("final_norm", "scale"), "model.norm.weight"),
    Weight(("blocks", "pre_attention_norm", "scale"), _LAYER + "input_layernorm.weight"),
    Weight(("blocks", "pre_ffw_norm", "scale"), _LAYER + "pre_feedforward_layernorm.weight"),
    Weight(("blocks", "attention", "q", "w"), _LAYER + "self_attn.q_proj.weight", "heads in"),
    Weight(("blocks", "attention", "k", "w"), _LAYER + "self_attn.k_proj.weight", "heads in"),
    Weight(("blocks", "attention", "v", "w"), _LAYER + "self_attn.v_proj.weight", "heads in"),
    Weight(("blocks", "attention", "out", "w"), _LAYER + "self_attn.o_proj.weight", "heads out"),
    Weight(("blocks", "mlp", "gate", "w"), _LAYER + "mlp.gate_proj.weight", "transposed"),
    Weight(("blocks", "mlp", "up", "w"), _LAYER + "mlp.up_proj.weight", "transposed"),
    Weight(("blocks", "mlp", "down", "w"), _LAYER + "mlp.down_proj.weight", "transposed"),
)


def _to_file(array: np.ndarray, layout: str) -> np.ndarray:
    if layout == "heads in":
        return array.transpose(0, 2, 1).reshape(-1, array.shape[1])
    if layout == "heads out":
        return array.reshape(-1, array.shape[2]).T
    return array.T if layout == "transposed" else array


def _from_file(array: np.ndarray, layout: str, shape: tuple[int, ...]) -> np.ndarray:
    if layout == "heads in":
        heads, width, head_dim = shape
        return array.reshape(heads, head_dim, width).transpose(0, 2, 1)
    if layout == "heads out":
        return array.T.reshape(shape)
    return array.T if layout == "transposed" else array


def _leaves(tree: dict, prefix: tuple[str, ...] = ()) -> dict:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: leaf for name, branch in tree.items() for path, leaf in _leaves(branch, (*prefix, name)).items()}


def to_hf(config: GemmaConfig, parameters: dict) -> dict[str, np.ndarray]:
    """float32 arrays by Hugging Face name. Raises InputError where a parameter has no name in the table."""
    leaves = _leaves(parameters)
    unknown = set(leaves) - {weight.path for weight in TABLE}
    if unknown:
        raise InputError(f"no Hugging Face name is known for {', '.join('/'.join(path) for path in sorted(unknown))}")
    result = {}
    for weight in TABLE:
        array = np.asarray(leaves[weight.path], np.float32)
        layers = [(weight.name.format(i), layer) for i, layer in enumerate(array)] if weight.stacked else [(weight.name, array)]
        result.update({name: np.ascontiguousarray(_to_file(layer, weight.layout)) for name, layer in layers})
    return result


def from_hf(config: GemmaConfig, tensors: dict[str, np.ndarray]) -> dict:
    """The parameter tree of arrays by Hugging Face name.

    Raises:
      InputError: names the missing, superfluous or misshapen tensors.
    """
    shapes = {path: leaf.shape for path, leaf in _leaves(decoder.parameter_shapes(config)).items()}
    expected = {w.name.format(i) for w in TABLE for i in range(config.num_layers if w.stacked else 1)}
    missing, extra = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or extra:
        raise InputError(f"the checkpoint lacks {missing or 'nothing'} and has {extra or 'nothing'} beyond this architecture")
    parameters: dict = {}
    for weight in TABLE:
        shape = shapes[weight.path]
        names = [weight.name.format(i) for i in range(shape[0])] if weight.stacked else [weight.name]
        inner = shape[1:] if weight.stacked else shape
        for name in names:
            if tensors[name].size != np.prod(inner):
                raise InputError(f"tensor {name} has shape {tensors[name].shape}, which does not fit {inner}")
        arrays = [np.asarray(_from_file(tensors[name], weight.layout, inner), np.float32) for name in names]
        node = parameters
        for part in weight.path[:-1]:
            node = node.setdefault(part, {})
        node[weight.path[-1]] = np.stack(arrays) if weight.stacked else arrays[0]
    return parameters
