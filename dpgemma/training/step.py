"""One update of DP-SGD on a mesh of devices (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

Formal guarantee: the new state is a function of the old state and of one NoisedMean, the release that the accountant
charges: the sum of per-unit gradients scaled to a bounded norm, over the units of one Poisson draw, plus Gaussian noise
  of standard deviation sigma
times that bound, divided by a public constant (and, where the clip norm adapts, the noised count that adaptive.py
accounts for in the same sigma). Nothing else that depends on the batch reaches the state; raw losses and norms come
back as PrivateStats. Tested by tests/training/step_test.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from accounting.mechanism import Mechanism
from dpgemma.privacy import clipping, noise
from dpgemma.privacy.adaptive import AdaptiveClipping
from dpgemma.sharding.mesh import DATA_AXIS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds: the trained parameters, the optimizer's own state, update counter included,
    and the clip norm where it adapts."""

    parameters: Any
    optimizer_state: Any
    clip_norm: Any = None

    def as_dict(self) -> dict:
        """What there is of it, by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is not None}

    def apply(self, optimizer: optax.GradientTransformation, gradient: noise.NoisedMean) -> "TrainState":
        """Takes one update. Raises TypeError for any gradient that is not a NoisedMean."""
        if not isinstance(gradient, noise.NoisedMean):
            raise TypeError(f"the optimizer takes a NoisedMean, got {type(gradient).__name__}")
        updates, optimizer_state = optimizer.update(gradient.mean, self.optimizer_state, self.parameters)
        return dataclasses.replace(
            self, parameters=optax.apply_updates(self.parameters, updates), optimizer_state=optimizer_state
        )


def sharded_clipped_sum(
    loss, trainable, frozen, batch, mask, clip_norm, mesh, **clipping_options
) -> clipping.ClippedSum:
    """clipped_sum over a batch whose leading axis is spread over the devices, each unit on exactly one of them.

    Gradients are taken, and therefore clipped, with respect to `trainable` alone.
    """
    spread, replicated = PartitionSpec(DATA_AXIS), PartitionSpec()
    scaling = clipping_options.get("scaling", clipping.CLIP)
    out_specs = clipping.ClippedSum(
        total=replicated,
        stats=clipping.PrivateStats(spread, spread),
        sensitivity=clipping.sensitivity(scaling, clip_norm),
        count=replicated if clipping_options.get("counted") else None,
    )
    # A clip norm that adapts is an array like the others; a constant one must stay a number, because the sensitivity is
    # made of it.
    adapts = isinstance(clip_norm, jax.Array)
    inputs = (trainable, frozen, batch, mask, *([clip_norm] if adapts else []))
    in_specs = (replicated, replicated, spread, spread, *([replicated] if adapts else []))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    def on_each_device(trainable, frozen, batch, mask, clip_norm=clip_norm):
        def of_example(trainable, example):
            return loss(trainable, frozen, example)

        local = clipping.clipped_sum(of_example, trainable, batch, mask, clip_norm, **clipping_options)
        return clipping.sum_over_devices(local, DATA_AXIS)

    return on_each_device(*inputs)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """`step(state, frozen, batch, mask, noise_keys) -> (state, PrivateStats)`; the old state's memory is reused.

    The noise multiplier is an argument of the compiled program and not a part of it, so that runs which differ in
    nothing else share one program; it is fixed here, where the step is made.
    """

    program: Any
    noise_multiplier: np.float32

    def __call__(self, state: TrainState, frozen, batch, mask, noise_keys):
        return self.program(state, frozen, batch, mask, noise_keys, self.noise_multiplier)

    def lower(self, state: TrainState, frozen, batch, mask, noise_keys):
        return self.program.lower(state, frozen, batch, mask, noise_keys, self.noise_multiplier)


def make_train_step(
    loss,
    optimizer: optax.GradientTransformation,
    mechanism: Mechanism,
    mesh,
    adaptive: AdaptiveClipping | None = None,
    **clipping_options,
) -> TrainStep:
    """The step of one mechanism, compiled when it is first called.

    Args:
      loss: loss(trainable, frozen, example) -> scalar, of one example alone; `frozen` are public parameters that stay
        as they are.
      mechanism: clip norm, noise multiplier and the public divisor come from here and from nowhere else.
      adaptive: how the clip norm moves, from the mechanism's on; None where it stays.
      clipping_options: strategy, microbatch_size, scaling and thresholds of clipping.clipped_sum.
    """

    if adaptive and clipping_options.get("scaling", clipping.CLIP) == clipping.AUTOMATIC:
        raise ValueError("automatic clipping has no clip norm that could adapt")

    noise_multiplier = adaptive.gradient_noise_multiplier if adaptive else mechanism.noise_multiplier
    if not 0 <= noise_multiplier < float("inf"):
        raise ValueError(f"the noise multiplier must be finite and not negative, got {noise_multiplier}")
    noisy = noise_multiplier > 0

    def dp_train_step(state: TrainState, frozen, batch, mask, noise_keys, noise_multiplier):
        clipped = sharded_clipped_sum(
            loss, state.parameters, frozen, batch, mask, mechanism.clip_norm, mesh, **clipping_options
        )
        noised = noise.add_gaussian_noise(clipped, noise_multiplier if noisy else 0.0, noise_keys)
        mean = noise.divide(noised, mechanism.expected_batch_size)
        return state.apply(optimizer, mean), clipped.stats

    def adaptive_train_step(state: TrainState, frozen, batch, mask, noise_keys, noise_multiplier):
        options = clipping_options | {"scaling": clipping.NORMALISE, "counted": True}
        clipped = sharded_clipped_sum(loss, state.parameters, frozen, batch, mask, state.clip_norm, mesh, **options)
        noised = noise.add_gaussian_noise(clipped, noise_multiplier if noisy else 0.0, noise_keys, adaptive.count_noise)
        mean = noise.divide(noised, mechanism.expected_batch_size)
        if clipping_options.get("scaling", clipping.CLIP) == clipping.CLIP:
            mean = noise.scale(
                mean, state.clip_norm
            )  # the gradients were divided by it, so that their sensitivity is a constant
        state = dataclasses.replace(state, clip_norm=adaptive.update(state.clip_norm, noised.count))
        return state.apply(optimizer, mean), clipped.stats

    replicated, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    program = jax.jit(
        adaptive_train_step if adaptive else dp_train_step,
        donate_argnums=0,
        in_shardings=(replicated, replicated, spread, spread, replicated, replicated),
        out_shardings=(replicated, replicated),
    )
    return TrainStep(program, np.float32(noise_multiplier))
