"""Settings that fit a model, where they are left out: public functions of its size, and of whether it is fine-tuned.

They are constants of the model and never taken from data. Nobody tuned them on your data: they are where a search
should begin.
"""

import dataclasses
import math

# Up from here, weights and activations are computed in bfloat16, and activations are recomputed.
_LARGE = 1e8
_LONGEST_ROW = 1024
# From scratch: the rate of our own runs at a quarter of a million parameters, and at a billion about that of the recipe
# for VaultGemma. The power between them is a choice, not a fit.
_SMALL, _RATE_FROM_SCRATCH, _DECAY_FROM_SCRATCH = 2.5e5, 8e-3, -0.25
# Fine-tuning all parameters moves weights that are good already. At a billion parameters the rate is that of this
# package's recipes; at a quarter of a million 8e-3 was the best of four rates (epsilon 3, 3,000 records of a sentence).
# In between the rate falls by a power of the size, which is a choice too.
_BILLION, _RATE_OF_ALL, _DECAY_OF_ALL = 1e9, 1e-4, -0.5
# Adapters bear about ten times the rate of full fine-tuning (Schulman et al. 2025, "LoRA Without Regret").
_ADAPTERS, _HIGHEST_RATE = 10.0, 8e-3


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What is taken where a setting is left out.

    Attributes:
      sequence_length: of a row.
      batch_size: expected, in units.
      learning_rate: at its peak.
      warmup_steps: updates.
      dtype: of activations and matrix products.
      remat: what the backward pass recomputes.
    """

    sequence_length: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    dtype: str
    remat: str


NAMES = tuple(field.name for field in dataclasses.fields(Defaults))


def of(parameters: int, context: int, steps: int, *, from_checkpoint: bool, adapters: bool) -> Defaults:
    """The defaults for one model.

    >>> of(246_624, 256, 160, from_checkpoint=False, adapters=False)
    Defaults(sequence_length=128, batch_size=512, learning_rate=0.008, warmup_steps=10, dtype='float32', remat='none')
    >>> of(999_885_952, 32_768, 400, from_checkpoint=True, adapters=True).learning_rate
    0.001

    Args:
      parameters: of the whole model.
      context: the longest row that it can take.
      steps: updates of the run.
      from_checkpoint: whether it has learned before.
      adapters: whether adapters alone are trained.
    """
    is_large = parameters >= _LARGE
    short = context // 2 if not from_checkpoint and context < 2 * _LONGEST_ROW else context
    return Defaults(
        sequence_length=min(_LONGEST_ROW, short) if not is_large else min(_LONGEST_ROW, context),
        batch_size=1024 if is_large else 512,
        learning_rate=_rate(parameters, from_checkpoint=from_checkpoint, adapters=adapters),
        warmup_steps=min(1000, max(10, round(steps / 16))),
        dtype="bfloat16" if is_large else "float32",
        remat="block" if is_large else "none",
    )


def _rate(parameters: int, *, from_checkpoint: bool, adapters: bool) -> float:
    if not from_checkpoint:
        rate = _RATE_FROM_SCRATCH * max(1.0, parameters / _SMALL) ** _DECAY_FROM_SCRATCH
    else:
        rate = _RATE_OF_ALL * (parameters / _BILLION) ** _DECAY_OF_ALL * (_ADAPTERS if adapters else 1)
    return _two_digits(min(rate, _HIGHEST_RATE))


def _two_digits(value: float) -> float:
    return round(value, 1 - math.floor(math.log10(value)))
