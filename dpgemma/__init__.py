"""Differentially private training of Gemma models.

The public names below are imported when they are first used, so that `import dpgemma` is cheap and brings no jax:

| name | what it is |
|---|---|
| `dp_sgd`, `Mechanism`, `Clip` | the public facts of a run |
| `Accountant` | epsilon of a mechanism, as a certified bracket |
| `Batch`, `Unit` | privacy units on their way to a loss |
| `clipped_sum`, `Strategy`, `ClippedSum` | the sum of per-unit gradients, each of bounded norm |
| `add_gaussian_noise`, `divide`, `noise_keys` | from a clipped sum to what an optimizer may take |
| `sampler_of`, `noiser_of` | the generators of a mechanism's batches and noise |
| `Settings`, `prepare`, `Trainer` | a run, from its settings to its report |
| `load`, `load_directory` | a trained model, or a Hugging Face directory |
| `fit` | private training of a model of your own, in memory |
| `evaluate`, `export`, `audit` | what a model predicts, its Hugging Face directory, the check of its run |
| `InputError` | the input is wrong, and the sentence says what to do |
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

_MODULES = {
    "Accountant": "accounting.accountant",
    "Batch": "dpgemma.data.batch",
    "Clip": "accounting.mechanism",
    "ClippedSum": "dpgemma.privacy.clipping",
    "InputError": "accounting.errors",
    "Mechanism": "accounting.mechanism",
    "Settings": "dpgemma.training.settings",
    "Strategy": "dpgemma.privacy.clipping",
    "Trainer": "dpgemma.training.trainer",
    "Unit": "dpgemma.data.batch",
    "add_gaussian_noise": "dpgemma.privacy.noise",
    "audit": "dpgemma.training.auditing",
    "clipped_sum": "dpgemma.privacy.clipping",
    "divide": "dpgemma.privacy.noise",
    "dp_sgd": "accounting.mechanism",
    "evaluate": "dpgemma.inference.evaluating",
    "export": "dpgemma.inference.exporting",
    "fit": "dpgemma.training.fit",
    "load": "dpgemma.inference.models",
    "load_directory": "dpgemma.inference.models",
    "noise_keys": "dpgemma.privacy.noise",
    "noiser_of": "dpgemma.privacy.noisers",
    "prepare": "dpgemma.training.prepare",
    "sampler_of": "dpgemma.privacy.samplers",
}

if TYPE_CHECKING:
    from accounting.accountant import Accountant
    from accounting.errors import InputError
    from accounting.mechanism import Clip, Mechanism, dp_sgd
    from dpgemma.data.batch import Batch, Unit
    from dpgemma.inference.evaluating import evaluate
    from dpgemma.inference.exporting import export
    from dpgemma.inference.models import load, load_directory
    from dpgemma.privacy.clipping import ClippedSum, Strategy, clipped_sum
    from dpgemma.privacy.noise import add_gaussian_noise, divide, noise_keys
    from dpgemma.privacy.noisers import noiser_of
    from dpgemma.privacy.samplers import sampler_of
    from dpgemma.training.auditing import audit
    from dpgemma.training.fit import fit
    from dpgemma.training.prepare import prepare
    from dpgemma.training.settings import Settings
    from dpgemma.training.trainer import Trainer

__all__ = [
    "Accountant", "Batch", "Clip", "ClippedSum", "InputError", "Mechanism", "Settings", "Strategy", "Trainer", "Unit",
    "add_gaussian_noise", "audit", "clipped_sum", "divide", "dp_sgd", "evaluate", "export", "fit", "load",
    "load_directory", "noise_keys", "noiser_of", "prepare", "sampler_of",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dpgemma' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
