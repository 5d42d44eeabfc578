"""Where a model lies that is named by a folder, or by its name on the Hugging Face hub."""

import os
import pathlib
import re

from accounting.errors import InputError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(name: str) -> bool:
    """Whether a name is one of the hub, and no folder or file here.

    >>> is_hub_name("google/gemma-3-1b-pt"), is_hub_name("models/a/b"), is_hub_name("./gemma")
    (True, False, False)
    """
    is_path = name.startswith(("/", ".", "~")) or os.path.exists(name)
    return not is_path and _HUB_NAME.fullmatch(name) is not None


def absolute(name: str) -> str:
    """A name that means the same model from every folder: that of the hub, or the whole path."""
    return name if is_hub_name(name) else os.path.abspath(os.path.expanduser(name))


def located(name: str) -> pathlib.Path:
    """The folder of a model; for a name of the hub, where an earlier download put its files. Nothing is downloaded.

    Raises:
      InputError: a name of the hub whose files are not here.
    """
    if not is_hub_name(name):
        return pathlib.Path(os.path.expanduser(name))
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (huggingface_hub.errors.HFValidationError, huggingface_hub.errors.LocalEntryNotFoundError):
        raise InputError(
            f"{name} is no folder here, and no model that was downloaded: `hf download {name}` gets it from the hub;"
            " where it is gated, accept its licence on its page there first, and log in by `hf auth login`"
        ) from None
