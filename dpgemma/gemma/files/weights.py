"""Weights of Hugging Face directories: one table of names for both directions, read and written tensor by tensor."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from accounting.errors import InputError
from dpgemma.gemma import decoder
from dpgemma.gemma.config import GemmaConfig
from dpgemma.gemma.decoder import ATTENTION_BLOCKS, RECURRENT_BLOCKS
from dpgemma.gemma.families import family_of
from dpgemma.gemma.family import (
    CHANNELS,
    EMBEDDING,
    LINEAR,
    Weight,
    attention,
    norms_and_mlp,
    outside_of_layers,
    recurrent_unit,
)
from dpgemma.gemma.files import tensor_files
from dpgemma.gemma.files.tensor_files import INDEX_FILE, SINGLE_FILE, TensorFiles
from dpgemma.sharding.rules import RANK

SHARD_BYTES = 4 * 10**9

_HEAD = "lm_head.weight"

Path = tuple[str, ...]  # of a parameter in its tree


def table(config: GemmaConfig) -> list[Weight]:
    """Every parameter of a decoder, adapters left out."""
    family = family_of(config)
    weights = outside_of_layers(family)
    if config.attention_layers:
        weights += norms_and_mlp(family, config, ATTENTION_BLOCKS) + attention(family, config, ATTENTION_BLOCKS)
    if config.recurrent_layers:
        weights += norms_and_mlp(family, config, RECURRENT_BLOCKS) + recurrent_unit(family, RECURRENT_BLOCKS)
    return weights


def axes(config: GemmaConfig) -> dict[str, Any]:
    """The tree of parameters, adapters included, with logical axis names in the place of every array."""
    found: dict[Path, tuple[str, ...]] = {}
    for weight in table(config):
        found[weight.path] = weight.axes
        if weight.layout != LINEAR:
            continue
        layers, rest = weight.axes[:1], weight.axes[1:]
        found[(*weight.path[:-1], "lora_a")] = (*layers, *rest[: weight.inputs], RANK)
        found[(*weight.path[:-1], "lora_b")] = (*layers, RANK, *rest[weight.inputs :])
    return tree_of({path: found[path] for path in leaves(decoder.parameter_shapes(config))})


def matrices(config: GemmaConfig) -> dict[str, Any]:
    """The tree of parameters, adapters included, with True for those that are multiplied or looked up as matrices, in
    the compute type, and False for those that are used in float32.
    """
    linear = {weight.path[:-1] for weight in table(config) if weight.layout == LINEAR}
    embedding = {weight.path for weight in table(config) if weight.name == EMBEDDING}

    def is_matrix(path: Path) -> bool:
        return path in embedding or (path[:-1] in linear and path[-1] in ("w", "lora_a", "lora_b"))

    return tree_of({path: is_matrix(path) for path in leaves(decoder.parameter_shapes(config))})


def layers_of(config: GemmaConfig, weight: Weight) -> tuple[int, ...]:
    """Numbers of the layers that a stacked parameter holds; none for the parameters outside of layers."""
    return {ATTENTION_BLOCKS: config.attention_layers, RECURRENT_BLOCKS: config.recurrent_layers}.get(
        weight.path[0], ()
    )


def leaves(tree: Any, prefix: Path = ()) -> dict[Path, Any]:
    """Leaves of nested dicts by path."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: leaf for name, branch in tree.items() for path, leaf in leaves(branch, (*prefix, name)).items()}


def tree_of(leaves_by_path: dict[Path, Any]) -> dict[str, Any]:
    """The inverse of `leaves`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves_by_path.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree


def file_shape(shape: tuple[int, ...], weight: Weight, fan_in: int) -> tuple[int, ...]:
    """Returns the shape that a file stores for a parameter whose shape in the parameter tree is `shape`."""
    if weight.layout == LINEAR:
        return math.prod(shape) // fan_in, fan_in
    return (shape[0], 1, shape[1]) if weight.layout == CHANNELS else shape


def to_file(array: np.ndarray, weight: Weight, fan_in: int) -> np.ndarray:
    if weight.layout == LINEAR:
        array = array.reshape(fan_in, -1).T
    return np.ascontiguousarray(
        array.reshape(file_shape(array.shape, weight, fan_in) if weight.layout == CHANNELS else array.shape)
    )


def from_file(array: np.ndarray, weight: Weight, shape: tuple[int, ...]) -> np.ndarray:
    return (array.T if weight.layout == LINEAR else array).reshape(shape)


def fan_in(weight: Weight, shape: tuple[int, ...]) -> int:
    """Rows of a linear layer's matrix: the product of the axes that it contracts."""
    return math.prod(shape[: weight.inputs])


def load(config: GemmaConfig, directory: pathlib.Path, sharding: Any = None, dtype: Any = None) -> dict[str, Any]:
    """The parameter tree of a directory, adapters left out.

    One stacked parameter is in host memory at a time, beside those that are done.

    Args:
      config: as `config_json.read` gives it.
      sharding: of every array, or a tree like the result of each array's own; by default the first device.
      dtype: of every array; by default the file's.

    Raises:
      InputError: names the missing, superfluous or misshapen tensors.
    """
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    own = leaves(sharding) if isinstance(sharding, dict) else None
    plain = dataclasses.replace(config, lora=None)
    shapes = {path: leaf.shape for path, leaf in leaves(decoder.parameter_shapes(plain)).items()}
    parameters = {}
    with TensorFiles(directory) as checkpoint:
        _check(plain, checkpoint, shapes)
        for weight in table(plain):
            placed = sharding if own is None else own[weight.path]
            parameters[weight.path] = _load_one(plain, checkpoint, weight, shapes[weight.path], placed, dtype)
    return tree_of(parameters)


def check(config: GemmaConfig, directory: pathlib.Path) -> None:
    """Reads all tensors once, one at a time, so that a run finds before it begins what `load` would refuse.

    Args:
      config: without adapters.

    Raises:
      InputError: as `load` does.
    """
    shapes = {path: leaf.shape for path, leaf in leaves(decoder.parameter_shapes(config)).items()}
    with TensorFiles(directory) as checkpoint:
        _check(config, checkpoint, shapes)
        for weight in table(config):
            for name in _names(config, weight):
                checkpoint.read(name)


def _names(config: GemmaConfig, weight: Weight) -> list[str]:
    """The tensors that a parameter is made of."""
    return [weight.name.format(i) for i in layers_of(config, weight)] or [weight.name]


def _check(config: GemmaConfig, checkpoint: TensorFiles, shapes: dict[Path, tuple[int, ...]]) -> None:
    expected = {name: weight for weight in table(config) for name in _names(config, weight)}
    missing, extra = sorted(set(expected) - checkpoint.names), sorted(checkpoint.names - set(expected) - {_HEAD})
    if missing or extra:
        raise InputError(
            f"the weights do not fit the architecture {config.model_type}: missing {', '.join(missing) or 'nothing'};"
            f" superfluous {', '.join(extra) or 'nothing'}"
        )
    for name, weight in expected.items():
        shape = shapes[weight.path][1:] if layers_of(config, weight) else shapes[weight.path]
        wanted, found = file_shape(shape, weight, fan_in(weight, shape)), checkpoint.shape(name)
        # Vocabularies may be padded; the padding has no token, and under DP it would be given noise.
        padded = name == EMBEDDING and found[1:] == wanted[1:] and found[0] >= wanted[0]
        if found != wanted and not padded:
            raise InputError(f"tensor {name} has shape {found}, but the architecture wants {wanted}")
    if _HEAD in checkpoint.names and not np.array_equal(checkpoint.read(_HEAD), checkpoint.read(EMBEDDING)):
        raise InputError(f"{_HEAD} differs from the embedding: Gemma decoders tie the two, so this is another model")


def _load_one(
    config: GemmaConfig, checkpoint: TensorFiles, weight: Weight, shape: tuple[int, ...], sharding: Any, dtype: Any
) -> Any:
    names = _names(config, weight)
    dtype = dtype or checkpoint.dtype(names[0])

    def part(index: Any) -> np.ndarray:
        if not layers_of(config, weight):
            rows = range(*index[0].indices(shape[0]))
            return np.asarray(checkpoint.read(names[0], slice(rows.start, rows.stop))[(slice(None), *index[1:])], dtype)
        chosen = names[index[0]]
        result = np.empty(
            (len(chosen), *(len(range(*s.indices(n))) for s, n in zip(index[1:], shape[1:], strict=True))), dtype
        )
        for i, name in enumerate(chosen):
            result[i] = from_file(checkpoint.read(name), weight, shape[1:])[index[1:]]
        return result

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))


def tensors(config: GemmaConfig, parameters: dict[str, Any], dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of the file, one at a time; adapters left out.

    Args:
      dtype: of the arrays; by default each parameter's own.

    Raises:
      InputError: a parameter has no name in the table.
    """
    by_path = {path: leaf for path, leaf in leaves(parameters).items() if path[-1] not in ("lora_a", "lora_b")}
    unknown = set(by_path) ^ {weight.path for weight in table(config)}
    if unknown:
        raise InputError(f"no tensor name is known for {', '.join('/'.join(path) for path in sorted(unknown))}")
    for weight in table(config):
        array, layers = by_path[weight.path], layers_of(config, weight)
        for i, name in enumerate(_names(config, weight)):
            one = np.asarray(array[i] if layers else array, dtype)
            yield name, to_file(one, weight, fan_in(weight, one.shape))


def save(
    config: GemmaConfig,
    parameters: dict[str, Any],
    directory: pathlib.Path,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the safetensors files, with an index if one file is not enough; one file's tensors are in memory at a
    time.
    """
    shard: dict[str, np.ndarray] = {}
    places: dict[str, str] = {}
    sizes: list[int] = []

    def flush() -> None:
        name = f"model-{len(sizes) + 1:05d}.safetensors"
        tensor_files.save(shard, directory / name)
        places.update(dict.fromkeys(shard, name))
        sizes.append(sum(array.nbytes for array in shard.values()))
        shard.clear()

    for name, array in tensors(config, parameters, dtype):
        if shard and sum(a.nbytes for a in shard.values()) + array.nbytes > shard_bytes:
            flush()
        shard[name] = array
    flush()
    if len(sizes) == 1:
        (directory / places[EMBEDDING]).rename(directory / SINGLE_FILE)
        return
    final = {
        f"model-{i + 1:05d}.safetensors": f"model-{i + 1:05d}-of-{len(sizes):05d}.safetensors"
        for i in range(len(sizes))
    }
    for old, new in final.items():
        (directory / old).rename(directory / new)
    index = {
        "metadata": {"total_size": sum(sizes)},
        "weight_map": {name: final[place] for name, place in places.items()},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n")
