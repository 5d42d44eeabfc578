"""The architecture of a Gemma decoder as one frozen dataclass.

Every switch that distinguishes the published text decoders is a field here (Gemma 1, 2, 3, VaultGemma, RecurrentGemma);
everything else is constant across the family. The parameterisation is the published one (norms multiply by 1 + w, the
embedding is stored unscaled): under DP-SGD clip norm and noise act in parameter space, so another parameterisation
would be another mechanism.
"""

import dataclasses
from typing import Any

FULL = "full_attention"
SLIDING = "sliding_attention"
RECURRENT = "recurrent"

MODEL_TYPES = ("vaultgemma", "gemma", "gemma2", "gemma3_text", "recurrent_gemma")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: base frequency, the factor by which positions are divided, and the share of each head that is
    rotated.
    """

    theta: float = 10_000.0
    linear_factor: float = 1.0
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): y = x W + (alpha / rank) (x A) B, with A random and B zero
    at first.

    Attributes:
      rank: columns of A.
      alpha: scale of the adapter, divided by the rank.
      targets: names of the linear layers that get one, of those that the model's family offers.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Shape and switches of one decoder.

    Attributes:
      vocab_size: rows of the tied embedding.
      d_model: width of the residual stream.
      num_heads, num_kv_heads, head_dim: attention heads; heads * head_dim need not equal d_model.
      d_ff: width of the gated feed-forward layer (one of gate or up, not their sum).
      max_length: largest number of positions, in tokens.
      layer_types: one of FULL, SLIDING or RECURRENT per layer; its length is the depth.
      window: tokens that a sliding layer sees, the current one included.
      qk_norm: RMSNorm on queries and keys per head (Gemma 3).
      query_scalar: queries are multiplied by query_scalar ** -0.5; not always head_dim.
      post_norms: RMSNorm after attention and after the feed-forward layer too (Gemma 2 and 3).
      norm_eps: added to the mean square in every norm.
      attention_cap, final_cap: soft-caps c * tanh(x / c) of attention scores and of logits, or None.
      rope_full, rope_sliding: rotary embedding of each layer type.
      biases: biases on the feed-forward layers and on attention's output (RecurrentGemma).
      bfloat16_scale: the embedding's scale sqrt(d_model) is rounded to bfloat16 in any compute type (RecurrentGemma).
      lru_width, conv_width: width of the recurrent unit and taps of its causal convolution; used by RECURRENT layers.
      model_type: the family's name in Hugging Face config files.
      lora: adapters beside the linear layers, or None.
    """

    vocab_size: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_length: int
    layer_types: tuple[str, ...]
    window: int
    query_scalar: float
    qk_norm: bool = False
    post_norms: bool = False
    norm_eps: float = 1e-6
    attention_cap: float | None = None
    final_cap: float | None = None
    rope_full: Rope = Rope()
    rope_sliding: Rope = Rope()
    biases: bool = False
    bfloat16_scale: bool = False
    lru_width: int = 0
    conv_width: int = 4
    model_type: str = "vaultgemma"
    lora: Lora | None = None

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {self.model_type!r}")
        sizes = (
            "vocab_size",
            "d_model",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "d_ff",
            "max_length",
            "window",
            "query_scalar",
        )
        whole = [
            name
            for name in (*sizes[:-1], "conv_width")
            if type(getattr(self, name)) is not int or getattr(self, name) < 1
        ]
        if whole:
            raise ValueError(f"{', '.join(whole)} must be a positive whole number")
        positive = [
            self.query_scalar,
            self.norm_eps,
            *(cap for cap in (self.attention_cap, self.final_cap) if cap is not None),
        ]
        if not all(type(value) in (int, float) and 0 < value < float("inf") for value in positive):
            raise ValueError("query_scalar, norm_eps and soft-caps must be positive numbers")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.rope_full.share != self.rope_sliding.share or self.head_dim * self.rope_full.share % 2:
            raise ValueError(f"all layers must rotate the same, even part of head_dim ({self.head_dim})")
        unknown = set(self.layer_types) - {FULL, SLIDING, RECURRENT}
        if unknown or not self.layer_types:
            raise ValueError(
                f"layer_types must name {FULL}, {SLIDING} or {RECURRENT} for every layer, got {sorted(unknown)}"
            )
        if RECURRENT in self.layer_types and (self.lru_width <= 0 or self.lru_width % self.num_heads):
            raise ValueError(
                f"lru_width ({self.lru_width}) must be a positive multiple of num_heads ({self.num_heads})"
            )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "GemmaConfig":
        """The inverse of dataclasses.asdict, also after a passage through JSON."""
        parts = dict(content, layer_types=tuple(content["layer_types"]))
        parts |= {name: Rope(**content[name]) for name in ("rope_full", "rope_sliding")}
        if content["lora"] is not None:
            parts["lora"] = Lora(**dict(content["lora"], targets=tuple(content["lora"]["targets"])))
        return cls(**parts)

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    def adapter(self, name: str) -> Lora | None:
        """The adapter of the linear layer with this Hugging Face name."""
        return self.lora if self.lora is not None and name in self.lora.targets else None

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with attention, in order."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind != RECURRENT)

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with a recurrent unit, in order."""
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == RECURRENT)
