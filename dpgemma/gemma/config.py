"""The architecture of a Gemma decoder as one frozen dataclass, and the presets as data.

Every switch that distinguishes the published text decoders is a field here (Gemma 1, 2, 3, VaultGemma); everything else is
constant across the family. The parameterisation is the published one (norms multiply by 1 + w, the embedding is stored unscaled):
under DP-SGD clip norm and noise act in parameter space, so another parameterisation would be another mechanism.
"""

import dataclasses

FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: base frequency and the factor by which positions are divided (linear scaling)."""

    theta: float = 10_000.0
    linear_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """Shape and switches of one decoder.

    Attributes:
      vocab_size: rows of the tied embedding.
      d_model: width of the residual stream.
      num_heads, num_kv_heads, head_dim: attention heads; heads * head_dim need not equal d_model.
      d_ff: width of the gated feed-forward layer (one of gate or up, not their sum).
      max_length: largest number of positions, in tokens.
      layer_types: one of FULL or SLIDING per layer; its length is the depth.
      window: tokens that a sliding layer sees, the current one included.
      causal: whether a position sees only itself and earlier ones.
      qk_norm: RMSNorm on queries and keys per head (Gemma 3).
      query_scalar: queries are multiplied by query_scalar ** -0.5; not always head_dim.
      post_norms: RMSNorm after attention and after the feed-forward layer too (Gemma 2 and 3).
      norm_eps: added to the mean square in every norm.
      attention_cap, final_cap: soft-caps c * tanh(x / c) of attention scores and of logits, or None.
      rope_full, rope_sliding: rotary embedding of each layer type.
      model_type: the family's name in Hugging Face config files.
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
    causal: bool = True
    qk_norm: bool = False
    post_norms: bool = False
    norm_eps: float = 1e-6
    attention_cap: float | None = None
    final_cap: float | None = None
    rope_full: Rope = Rope()
    rope_sliding: Rope = Rope()
    model_type: str = "vaultgemma"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even for rotary embeddings")
        unknown = set(self.layer_types) - {FULL, SLIDING}
        if unknown or not self.layer_types:
            raise ValueError(f"layer_types must name {FULL} or {SLIDING} for every layer, got {sorted(unknown)}")

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)


PRESETS = {
    # VaultGemma's block at a size that trains in minutes on two cores; the vocabulary is the byte tokenizer's.
    "tiny": GemmaConfig(
        vocab_size=260,
        d_model=96,
        num_heads=4,
        num_kv_heads=4,
        head_dim=24,
        d_ff=256,
        max_length=256,
        layer_types=(FULL,) * 2,
        window=128,
        query_scalar=24,
    ),
    # google/vaultgemma-1b: 1,038,741,120 parameters.
    "vaultgemma_1b": GemmaConfig(
        vocab_size=256_000,
        d_model=1152,
        num_heads=4,
        num_kv_heads=4,
        head_dim=256,
        d_ff=6912,
        max_length=1024,
        layer_types=(FULL,) * 26,
        window=512,
        query_scalar=256,
    ),
}
