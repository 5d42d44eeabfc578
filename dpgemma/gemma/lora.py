"""Low-rank adapters: which parameters are trained, and how adapters are folded into the weights.

Formal guarantee: `split` sorts every parameter into exactly one of two trees, and where a model has adapters the
trainable one holds their matrices and nothing else. The trainer differentiates, clips and noises that tree alone, so
frozen weights are a function of the public checkpoint. Tested by
tests/training/lora_test.py::test_pitfall_20_exactly_the_adapters_are_clipped_and_noised.
"""

from typing import Any

import numpy as np

from accounting.errors import InputError
from dpgemma.gemma.config import GemmaConfig, Lora
from dpgemma.gemma.families import family_of
from dpgemma.gemma.files import weights

ALL = "all"
_MATRICES = ("lora_a", "lora_b")


def adapters(config: GemmaConfig, rank: int, alpha: float, targets: str) -> Lora:
    """The adapters that `lora_rank`, `lora_alpha` and `lora_targets` ask for.

    Args:
      targets: names separated by commas, or "all" for every linear layer of the blocks.

    Raises:
      InputError: a layer that this model does not have, or a rank or scale below what makes sense.
    """
    known = family_of(config).lora_targets
    names = known if targets == ALL else tuple(name.strip() for name in targets.split(",") if name.strip())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(
            f"`lora_targets`={targets} names no linear layer of this model: use {ALL}, or some of {','.join(known)}"
        )
    if rank < 1 or not 0 < alpha < float("inf"):
        raise InputError(f"`lora_rank` must be at least 1 and `lora_alpha` positive, got {rank} and {alpha:g}")
    return Lora(rank, alpha, names)


def split(config: GemmaConfig, parameters: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) parameter trees; without adapters all are trainable."""
    leaves = weights.leaves(parameters)
    if config.lora is None:
        return parameters, {}
    trainable = {path: leaf for path, leaf in leaves.items() if path[-1] in _MATRICES}
    frozen = {path: leaf for path, leaf in leaves.items() if path[-1] not in _MATRICES}
    return weights.tree_of(trainable), weights.tree_of(frozen)


def join(trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    return weights.tree_of(weights.leaves(frozen) | weights.leaves(trainable)) if frozen else trainable


def fold(config: GemmaConfig, parameters: dict[str, Any]) -> dict[str, Any]:
    """Parameters without adapters that compute the same: W + (alpha / rank) A B in float32, layer by layer."""
    leaves = weights.leaves(parameters)
    assert config.lora is not None
    scale = config.lora.alpha / config.lora.rank
    folded = {}
    for path, leaf in leaves.items():
        if path[-1] in _MATRICES:
            continue
        folded[path] = leaf
        a, b = (leaves.get((*path[:-1], name)) for name in _MATRICES)
        if path[-1] == "w" and a is not None and b is not None:
            result = np.empty(leaf.shape, np.float32)
            for i in range(len(result)):
                rank = a.shape[-1]
                low, high = np.asarray(a[i], np.float32), np.asarray(b[i], np.float32)
                product = np.matmul(low.reshape(-1, rank), high.reshape(rank, -1))
                result[i] = np.asarray(leaf[i], np.float32) + scale * product.reshape(result[i].shape)
            folded[path] = result
    return weights.tree_of(folded)
