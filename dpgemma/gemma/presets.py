"""The published models and our small ones, as data, and VaultGemma's block in sizes of one's own."""

import dataclasses

from accounting.errors import InputError
from dpgemma.gemma.config import FULL, RECURRENT, SLIDING, GemmaConfig, Rope

# How a name begins that says the sizes itself, what must follow, and what may.
BLOCK = "block:"
BLOCK_SIZES, BLOCK_EXTRAS = ("layers", "d_model", "heads", "d_ff"), {"max_length": 1024, "vocab_size": 260}
_LARGEST_SIZE = 10**7


def _pattern(period: tuple[str, ...], layers: int) -> tuple[str, ...]:
    return (period * layers)[:layers]


def _gemma1(layers: int, d_model: int, heads: int, kv_heads: int, d_ff: int) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=256_000, d_model=d_model, num_heads=heads, num_kv_heads=kv_heads, head_dim=256, d_ff=d_ff,
        max_length=8192,
        layer_types=(FULL,) * layers, window=8192, query_scalar=256, model_type="gemma",
    )  # fmt: skip


def _gemma2(
    layers: int, d_model: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, query_scalar: int
) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=256_000, d_model=d_model, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, d_ff=d_ff,
        max_length=8192,
        layer_types=_pattern((SLIDING, FULL), layers), window=4096, query_scalar=query_scalar, post_norms=True,
        attention_cap=50.0,
        final_cap=30.0, model_type="gemma2",
    )  # fmt: skip


def _gemma3(
    layers: int, d_model: int, heads: int, kv_heads: int, head_dim: int, d_ff: int, query_scalar: int, *, large: bool
) -> GemmaConfig:
    """`large`: from 4B on, with the vocabulary of the multimodal files, a longer window and context, and scaled global
    positions.
    """
    return GemmaConfig(
        vocab_size=262_208 if large else 262_144, d_model=d_model, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, d_ff=d_ff,
        max_length=131_072 if large else 32_768, layer_types=_pattern((SLIDING,) * 5 + (FULL,), layers),
        window=1024 if large else 512,
        query_scalar=query_scalar, qk_norm=True, post_norms=True, rope_full=Rope(1e6, 8.0 if large else 1.0),
        rope_sliding=Rope(1e4),
        model_type="gemma3_text",
    )  # fmt: skip


def _recurrent(layers: int, d_model: int, heads: int, d_ff: int) -> GemmaConfig:
    rope = Rope(share=0.5)
    return GemmaConfig(
        vocab_size=256_000, d_model=d_model, num_heads=heads, num_kv_heads=1, head_dim=256, d_ff=d_ff, max_length=8192,
        layer_types=_pattern((RECURRENT, RECURRENT, SLIDING), layers), window=2048, query_scalar=256, final_cap=30.0,
        rope_full=rope,
        rope_sliding=rope, biases=True, bfloat16_scale=True, lru_width=d_model, model_type="recurrent_gemma",
    )  # fmt: skip


def _ladder(layers: int, d_model: int, heads: int, d_ff: int, *, max_length: int = 256) -> GemmaConfig:
    """VaultGemma's block on bytes, so that hardly a parameter is an embedding's: sizes for sweeps."""
    return GemmaConfig(
        vocab_size=260, d_model=d_model, num_heads=heads, num_kv_heads=heads, head_dim=d_model // heads, d_ff=d_ff,
        max_length=max_length,
        layer_types=(FULL,) * layers, window=max_length // 2, query_scalar=d_model // heads,
    )  # fmt: skip


PRESETS = {
    # VaultGemma's block at a size that trains in minutes on two cores; the vocabulary is the byte tokenizer's.
    "tiny": GemmaConfig(
        vocab_size=260, d_model=96, num_heads=4, num_kv_heads=4, head_dim=24, d_ff=256, max_length=256,
        layer_types=(FULL,) * 2,
        window=128, query_scalar=24,
    ),
    "ladder_20k": _ladder(2, 24, 2, 64),
    "ladder_45k": _ladder(2, 36, 2, 116),
    "ladder_95k": _ladder(3, 48, 4, 128),
    "ladder_200k": _ladder(4, 64, 4, 160),
    "ladder_400k": _ladder(4, 88, 4, 240),
    "ladder_850k": _ladder(5, 112, 4, 336),
    # The sizes of arXiv 2501.18914, table 1.
    "ladder_4m": _ladder(6, 256, 4, 640, max_length=1024),
    "ladder_11m": _ladder(6, 384, 6, 1152, max_length=1024),
    "ladder_29m": _ladder(8, 512, 8, 1664, max_length=1024),
    "ladder_41m": _ladder(10, 576, 9, 1600, max_length=1024),
    "ladder_109m": _ladder(12, 768, 12, 2944, max_length=1024),
    "ladder_335m": _ladder(24, 1024, 16, 3184, max_length=1024),
    "ladder_778m": _ladder(24, 1536, 24, 4992, max_length=1024),
    "vaultgemma_1b": GemmaConfig(
        vocab_size=256_000, d_model=1152, num_heads=4, num_kv_heads=4, head_dim=256, d_ff=6912, max_length=1024,
        layer_types=(FULL,) * 26, window=512, query_scalar=256,
    ),
    "gemma_2b": _gemma1(18, 2048, 8, 1, 16_384),
    "gemma_7b": _gemma1(28, 3072, 16, 16, 24_576),
    "gemma2_2b": _gemma2(26, 2304, 8, 4, 256, 9216, 256),
    "gemma2_9b": _gemma2(42, 3584, 16, 8, 256, 14_336, 256),
    "gemma2_27b": _gemma2(46, 4608, 32, 16, 128, 36_864, 144),
    "gemma3_270m": _gemma3(18, 640, 4, 1, 256, 2048, 256, large=False),
    "gemma3_1b": _gemma3(26, 1152, 4, 1, 256, 6912, 256, large=False),
    "gemma3_4b": _gemma3(34, 2560, 8, 4, 256, 10_240, 256, large=True),
    "gemma3_12b": _gemma3(48, 3840, 16, 8, 256, 15_360, 256, large=True),
    "gemma3_27b": _gemma3(62, 5376, 32, 16, 128, 21_504, 168, large=True),
    "recurrentgemma_2b": _recurrent(26, 2560, 10, 7680),
    "recurrentgemma_9b": _recurrent(38, 4096, 16, 12_288),
}  # fmt: skip
# The same text decoders under another name.
PRESETS |= {
    "codegemma_2b": PRESETS["gemma_2b"],
    "codegemma_7b": PRESETS["gemma_7b"],
    "medgemma_4b": PRESETS["gemma3_4b"],
    "medgemma_27b": PRESETS["gemma3_27b"],
}


def named(name: str) -> GemmaConfig:
    """The model of a name: a preset's, or one such as block:layers=6,d_model=256,heads=4,d_ff=640, which is
    VaultGemma's block in these sizes, on bytes and for rows of up to 1024 tokens unless it says vocab_size and
    max_length.

    Raises:
      InputError: no such model.
    """
    if name in PRESETS:
        return PRESETS[name]
    if not name.startswith(BLOCK):
        raise InputError(
            f"`model`={name} is no preset: choose one of {', '.join(PRESETS)}, or give `init_from`=FOLDER, or"
            f" {BLOCK}layers=6,d_model=256,heads=4,d_ff=640 for VaultGemma's block in sizes of your own"
        )
    sizes: dict[str, int] = {}
    for part in name.removeprefix(BLOCK).split(","):
        key, _, value = part.partition("=")
        if key not in (*BLOCK_SIZES, *BLOCK_EXTRAS) or key in sizes or not value.isascii() or not value.isdecimal():
            raise InputError(
                f"`model`={name}: {part!r} is not one of {', '.join([*BLOCK_SIZES, *BLOCK_EXTRAS])} with a whole number"
            )
        sizes[key] = int(value)
    missing = [key for key in BLOCK_SIZES if key not in sizes]
    if missing:
        raise InputError(f"`model`={name} lacks {', '.join(missing)}")
    if not all(1 <= value <= _LARGEST_SIZE for value in sizes.values()):
        raise InputError(f"`model`={name}: sizes lie between 1 and {_LARGEST_SIZE:g}")
    if sizes["d_model"] % (2 * sizes["heads"]):
        raise InputError(f"`model`={name}: d_model must be a multiple of twice the heads, whose halves are rotated")
    sizes = BLOCK_EXTRAS | sizes
    return dataclasses.replace(
        _ladder(*(sizes[key] for key in BLOCK_SIZES), max_length=sizes["max_length"]), vocab_size=sizes["vocab_size"]
    )
