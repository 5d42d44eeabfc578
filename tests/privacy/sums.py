"""Clipped sums of units of one row each, for losses that are written for a row."""

import jax

from accounting.mechanism import Clip
from dpgemma.data.batch import Batch
from dpgemma.privacy import clipping
from dpgemma.privacy.clipping import Strategy


def of_unit(loss):
    """The loss of a unit, from loss(params, row)."""
    return lambda params, unit: loss(params, jax.tree.map(lambda x: x[0], unit.rows))


def clipped_sum(
    loss, params, rows, mask, clip_norm, *, strategy="example_scan", microbatch_size=1, scaling="clip", counted=False,
    thresholds="uniform", shards=None, steps=None,
):  # fmt: skip
    """dpgemma's sum. A clip norm that is traced is the current one of a step; `counted` as where it adapts."""
    traced = isinstance(clip_norm, jax.core.Tracer)
    clip = Clip(1.0 if traced else clip_norm, scaling, 0.5 if counted else None)
    how = Strategy(strategy, microbatch_size, thresholds)
    norm = clip_norm if traced else None
    return clipping.clipped_sum(
        of_unit(loss), params, Batch.of_rows(rows, mask), clip, how, norm=norm, shards=shards, steps=steps
    )
