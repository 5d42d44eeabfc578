"""Everything that distinguishes one family of Gemma models from another, as one record.

The records themselves are in dpgemma.gemma.families.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from accounting.errors import InputError
from dpgemma.gemma.config import GemmaConfig, Rope
from dpgemma.sharding.rules import (
    BLOCKS,
    FEED_FORWARD,
    HEAD,
    HEADS,
    KV_HEADS,
    LAYERS,
    MODEL,
    RECURRENT,
    TAPS,
    VOCABULARY,
)

# How a parameter is stored in a file of safetensors.
AS_IS = "as is"
LINEAR = "linear"  # a matrix [fan-in, fan-out] with its axes split, stored as [fan-out, fan-in]
CHANNELS = "channels"  # [C, K] stored as [C, 1, K]

EMBEDDING = "model.embed_tokens.weight"

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Content = Mapping[str, Any]  # of a config.json
Fields = dict[str, Any]  # of a GemmaConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter: where it is in the parameter tree, and how a safetensors file names and stores it.

    Attributes:
      path: in the tree of parameters.
      name: of the tensor, with {} for the number of the layer.
      axes: logical names of its axes, those of layers included.
      layout: in the file.
      inputs: how many axes a linear layer contracts, those of layers not counted.
    """

    path: tuple[str, ...]
    name: str
    axes: tuple[str, ...]
    layout: str = AS_IS
    inputs: int = 1


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: how its files map to GemmaConfig and to the parameter tree.

    Attributes:
      model_type: its name in config.json and in GemmaConfig.
      hf_class: its class in transformers.
      fixed: fields of GemmaConfig that the architecture's name alone decides.
      keys: names in config.json of other fields, beside those that all families have.
      activations: names of the activation function in its files.
      read: function from config.json and the fields found by `keys` to more fields, which override those.
      write: the keys of config.json beyond those that all families have.
      norms: names of a layer's norms, here and in files.
      final_norm: name of the last norm in files.
      mixer, mlp: names of a layer's two parts in files.
      lora_targets: linear layers that may get an adapter, by their names in files.
      wrapped_as: model_type of a multimodal model whose text part this is, or None.
    """

    model_type: str
    hf_class: str
    fixed: Mapping[str, Any]
    keys: Mapping[str, str]
    read: Callable[[Content, Fields], Fields]
    write: Callable[[GemmaConfig], dict[str, Any]]
    norms: Mapping[str, str]
    activations: tuple[str, ...] = ("gelu_pytorch_tanh",)
    final_norm: str = "model.norm.weight"
    mixer: str = "self_attn"
    mlp: str = "mlp"
    lora_targets: tuple[str, ...] = ATTENTION_TARGETS
    wrapped_as: str | None = None

    def __post_init__(self) -> None:
        assert set(self.fixed) == {"qk_norm", "post_norms", "biases", "bfloat16_scale"}


def linear(
    stack: str, here: str, there: str, inputs: tuple[str, ...], outputs: tuple[str, ...], *, bias: bool = False
) -> list[Weight]:
    """A linear layer of every layer of a stack, with its bias if it has one.

    Args:
      here: path below the stack, joined by dots.
      there: name below the layer in files.
    """
    path, name = (stack, *here.split(".")), f"model.layers.{{}}.{there}"
    found = [Weight((*path, "w"), f"{name}.weight", (LAYERS, *inputs, *outputs), LINEAR, len(inputs))]
    return found + ([Weight((*path, "bias"), f"{name}.bias", (LAYERS, *outputs))] if bias else [])


def outside_of_layers(family: Family) -> list[Weight]:
    """Embedding and final norm."""
    return [
        Weight(("embedder", "embedding"), EMBEDDING, (VOCABULARY, MODEL)),
        Weight(("final_norm", "scale"), family.final_norm, (MODEL,)),
    ]


def norms_and_mlp(family: Family, config: GemmaConfig, stack: str) -> list[Weight]:
    """What every block has beside its mixer."""
    weights = [
        Weight((stack, here, "scale"), f"model.layers.{{}}.{there}.weight", (LAYERS, MODEL))
        for here, there in family.norms.items()
    ]
    for name, inputs, outputs in (
        ("gate", MODEL, FEED_FORWARD),
        ("up", MODEL, FEED_FORWARD),
        ("down", FEED_FORWARD, MODEL),
    ):
        there = f"{family.mlp}.{name}_proj"
        weights += linear(stack, f"mlp.{name}", there, (inputs,), (outputs,), bias=config.biases)
    return weights


def attention(family: Family, config: GemmaConfig, stack: str) -> list[Weight]:
    """The mixer of an attention block."""
    weights: list[Weight] = []
    for here, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        weights += linear(stack, f"mixer.{here}", f"{family.mixer}.{here}_proj", (MODEL,), (heads, HEAD))
    there = f"{family.mixer}.o_proj"
    weights += linear(stack, "mixer.out", there, (HEADS, HEAD), (MODEL,), bias=config.biases)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        there = f"model.layers.{{}}.{family.mixer}.{name}.weight"
        weights.append(Weight((stack, "mixer", name, "scale"), there, (LAYERS, HEAD)))
    return weights


def recurrent_unit(family: Family, stack: str) -> list[Weight]:
    """The mixer of a recurrent block."""
    weights: list[Weight] = []
    for name, inputs, outputs in (
        ("linear_x", MODEL, RECURRENT),
        ("linear_y", MODEL, RECURRENT),
        ("linear_out", RECURRENT, MODEL),
    ):
        weights += linear(stack, f"mixer.{name}", f"{family.mixer}.{name}", (inputs,), (outputs,), bias=True)
    layer = f"model.layers.{{}}.{family.mixer}"
    convolution = (stack, "mixer", "conv")
    weights += [
        Weight((*convolution, "w"), f"{layer}.conv_1d.weight", (LAYERS, RECURRENT, TAPS), CHANNELS),
        Weight((*convolution, "bias"), f"{layer}.conv_1d.bias", (LAYERS, RECURRENT)),
    ]
    unit = (stack, "mixer", "rg_lru")
    for gate in ("input_gate", "recurrent_gate"):
        # A block's matrix is square; its own two axes are small and stay together.
        weights += [
            Weight((*unit, gate, "w"), f"{layer}.rg_lru.{gate}_weight", (LAYERS, BLOCKS, HEAD, HEAD)),
            Weight((*unit, gate, "bias"), f"{layer}.rg_lru.{gate}_bias", (LAYERS, BLOCKS, HEAD)),
        ]
    weights.append(Weight((*unit, "recurrent_param"), f"{layer}.rg_lru.recurrent_param", (LAYERS, RECURRENT)))
    return weights


def rope(stated: Content, share: float = 1.0) -> Rope | None:
    """A rotary embedding as config.json states one; None where it names no base frequency.

    Raises:
      InputError: a type that the Gemma models do not use.
    """
    kind = stated.get("rope_type", stated.get("type", "default"))
    if kind not in ("default", "linear"):
        raise InputError(f"rotary embedding of type {kind!r} is not supported: use default or linear")
    if stated.get("rope_theta") is None:
        return None
    return Rope(float(stated["rope_theta"]), float(stated["factor"]) if kind == "linear" else 1.0, float(share))


def one_rope(content: Content, share: float = 1.0) -> Fields:
    """The fields of a family whose layers all rotate alike."""
    stated = {**(content.get("rope_scaling") or {}), **(content.get("rope_parameters") or {})}
    stated.setdefault("rope_theta", content.get("rope_theta"))
    found = rope(stated, share)
    return {} if found is None else {"rope_full": found, "rope_sliding": found}


def layer_types(content: Content, period: tuple[str, ...] | None) -> Fields:
    """The kinds of all layers: as the file names them, or repeated; nothing where neither is known.

    Raises:
      InputError: the file names another number of layers than it has.
    """
    layers = content["num_hidden_layers"]
    named = content.get("layer_types")
    if named:
        if len(named) != layers:
            raise InputError(f"layer_types names {len(named)} layers, num_hidden_layers {layers}")
        return {"layer_types": tuple(named)}
    return {} if period is None else {"layer_types": (period * layers)[:layers]}


def plain_rope(config: GemmaConfig) -> dict[str, Any]:
    """The keys of a family whose layers all rotate alike, in the spelling of transformers 4 and of 5."""
    theta = config.rope_full.theta
    return {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}


def as_float(cap: float | None) -> float | None:
    """A soft-cap as files have it."""
    return None if cap is None else float(cap)
