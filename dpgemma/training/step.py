"""One update of DP-SGD on a mesh of devices (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

Formal guarantee: the new state is a function of the old state and of one NoisedMean, the release that the accountant charges: the
sum of per-unit gradients clipped to C, over the units of one Poisson draw, plus Gaussian noise of standard deviation sigma * C,
divided by a public constant. Nothing else that depends on the batch reaches the state; raw losses and norms come back as
PrivateStats. Tested by tests/training/step_test.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from accounting.mechanism import DpSgdMechanism
from dpgemma.privacy import clipping, noise
from dpgemma.training.mesh import DATA_AXIS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds: the trained parameters and the optimizer's own state, update counter included."""

    parameters: Any
    optimizer_state: Any

    def apply(self, optimizer: optax.GradientTransformation, gradient: noise.NoisedMean) -> "TrainState":
        """Takes one update. Raises TypeError for any gradient that is not a NoisedMean."""
        if not isinstance(gradient, noise.NoisedMean):
            raise TypeError(f"the optimizer takes a NoisedMean, got {type(gradient).__name__}")
        updates, optimizer_state = optimizer.update(gradient.mean, self.optimizer_state, self.parameters)
        return TrainState(optax.apply_updates(self.parameters, updates), optimizer_state)


def sharded_clipped_sum(loss, trainable, frozen, batch, mask, mechanism: DpSgdMechanism, mesh, **clipping_options) -> clipping.ClippedSum:
    """clipped_sum over a batch whose leading axis is spread over the devices, each unit on exactly one of them.

    Gradients are taken, and therefore clipped, with respect to `trainable` alone.
    """
    spread, replicated = PartitionSpec(DATA_AXIS), PartitionSpec()
    out_specs = clipping.ClippedSum(replicated, clipping.PrivateStats(spread, spread), sensitivity=float(mechanism.clip_norm))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(replicated, replicated, spread, spread), out_specs=out_specs, check_vma=False)
    def on_each_device(trainable, frozen, batch, mask):
        of_example = lambda trainable, example: loss(trainable, frozen, example)
        local = clipping.clipped_sum(of_example, trainable, batch, mask, mechanism.clip_norm, **clipping_options)
        return clipping.sum_over_devices(local, DATA_AXIS)

    return on_each_device(trainable, frozen, batch, mask)


def make_train_step(loss, optimizer: optax.GradientTransformation, mechanism: DpSgdMechanism, mesh, **clipping_options):
    """Compiles `step(state, frozen, batch, mask, noise_keys) -> (state, PrivateStats)`; the old state's memory is reused.

    Args:
      loss: loss(trainable, frozen, example) -> scalar, of one example alone; `frozen` are public parameters that stay as they are.
      mechanism: clip norm, noise multiplier and the public divisor come from here and from nowhere else.
      clipping_options: strategy and microbatch_size of clipping.clipped_sum.
    """

    def dp_train_step(state: TrainState, frozen, batch, mask, noise_keys):
        clipped = sharded_clipped_sum(loss, state.parameters, frozen, batch, mask, mechanism, mesh, **clipping_options)
        noised = noise.add_gaussian_noise(clipped, mechanism.noise_multiplier, noise_keys)
        mean = noise.divide(noised, mechanism.expected_batch_size)
        return state.apply(optimizer, mean), clipped.stats

    replicated, spread = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    return jax.jit(
        dp_train_step,
        donate_argnums=0,
        in_shardings=(replicated, replicated, spread, spread, replicated),
        out_shardings=(replicated, replicated),
    )
