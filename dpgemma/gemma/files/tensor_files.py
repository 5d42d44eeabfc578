"""The tensors of a Hugging Face directory, whatever files they lie in, under one spelling of their names."""

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from accounting.errors import InputError, as_os_errors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Text towers inside multimodal files, and what lies beside them.
_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_AT_ONCE = 1 << 20  # numbers that are looked at together
_OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class TensorFiles:
    """The tensors of a directory's safetensors files under canonical names; use as a context manager.

    Raises:
      InputError: no weights there, or files that are damaged or incomplete.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._stack = contextlib.ExitStack()
        self._places: dict[str, tuple[Any, ...]] = {}
        for path in weight_files(directory):
            try:
                file = self._stack.enter_context(safe_open(path, framework="np"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path} cannot be read ({error}): download it again") from None
            for key in file.keys():  # noqa: SIM118, it is no dict
                if key.startswith(_OTHER_TOWERS):
                    continue
                prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
                self._places[_PREFIXES.get(prefix, "") + key.removeprefix(prefix)] = (file, key)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        file, key = self._places[name]
        return tuple(file.get_slice(key).get_shape())

    def dtype(self, name: str) -> np.dtype:
        file, key = self._places[name]
        return file.get_slice(key)[:0].dtype

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some of its rows.

        Raises:
          InputError: a number that is infinite, or none.
        """
        file, key = self._places[name]
        found: np.ndarray = file.get_tensor(key) if rows == slice(None) else file.get_slice(key)[rows]
        if not _is_finite(found):
            raise InputError(f"tensor {name} of {self._directory} holds NaN or infinity: give weights that are whole")
        return found


def _is_finite(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    return all(np.isfinite(flat[i : i + _AT_ONCE]).all() for i in range(0, flat.size, _AT_ONCE))


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a directory, by its index if there is one."""
    index = directory / INDEX_FILE
    if not index.is_file():
        if not (directory / SINGLE_FILE).is_file():
            raise InputError(
                f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}: give a directory with safetensors weights"
            )
        return [directory / SINGLE_FILE]
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{index} is damaged: download it again") from None
    outside = [name for name in names if pathlib.PurePath(name).name != name]
    if outside:
        raise InputError(f"{index} names {outside[0]!r}, which is no file of its folder: download it again")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise InputError(f"{directory} lacks {', '.join(missing)}, which its index names: download them")
    return [directory / name for name in names]


def save(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    """Writes a safetensors file.

    Raises:
      OSError: the disk refuses.
    """
    with as_os_errors(path, SafetensorError):
        save_file(dict(tensors), path, metadata={"format": "pt"})
