"""One update of DP-SGD on a mesh of devices (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

Formal guarantee: the new state is a function of the old state and of one NoisedMean, the release that the accountant
charges: the sum of per-unit gradients scaled to a bounded norm, over the units of one draw, plus noise of the
mechanism, divided by a public constant (and, where the clip norm adapts, the noised count that clip_norm.py accounts
for in the same sigma). Nothing else that depends on the batch reaches the state; raw losses and norms come back as
PrivateStats. Tested by tests/training/step_test.py::test_update_is_clip_sum_noise_divide and
::test_the_optimizer_takes_nothing_but_a_noised_mean.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from accounting.mechanism import Clip, Mechanism
from accounting.mechanism.clip import CLIP
from dpgemma.data.batch import Batch, Unit
from dpgemma.objectives.probes import Coordinates, without_probes
from dpgemma.privacy import clip_norm, clipping, tracking
from dpgemma.privacy.clipping import ClippedSum, PrivateStats, Strategy
from dpgemma.privacy.noise import NoisedMean, NoisedSum, divide, scale
from dpgemma.privacy.noisers import Noiser, noiser_of
from dpgemma.sharding import place
from dpgemma.sharding.place import Places

Loss = Callable[[Any, Any, Unit], jax.Array]

# By platform. The TPU compiler orders a whole program by the one of three rules that needs least memory. Which one that
# is hangs on a few bytes, and the orders differ by 5 % in cycles: depth first is the best of them for VaultGemma 1B
# (experiments.benchmarks.step_tpu prints all). Where layers are spread over chips it also cuts products into windows,
# to hide transfers: those of single rows fall to pieces, which doubles their cycles (benchmarks.clipping_tpu), so no
# array is large enough for it.
COMPILER_OPTIONS = {"tpu": {"xla_memory_scheduler": "dfs", "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
      parameters: the trained ones.
      optimizer_state: the optimizer's own state, update counter included.
      clip_norm: the current C where it adapts, or None.
      noise_state: that of a noiser which has one, or ().
    """

    parameters: Any
    optimizer_state: Any
    clip_norm: Any = None
    noise_state: Any = ()

    def as_dict(self) -> dict[str, Any]:
        """By name, parameters and optimizer state, and those of the other fields that hold an array."""
        optional = {"clip_norm": self.clip_norm, "noise_state": self.noise_state}
        kept = {name: value for name, value in optional.items() if jax.tree.leaves(value)}
        return {"parameters": self.parameters, "optimizer_state": self.optimizer_state, **kept}

    def apply(self, optimizer: optax.GradientTransformation, gradient: NoisedMean) -> "TrainState":
        """Takes one update. Raises TypeError for any gradient that is not a NoisedMean."""
        if not isinstance(gradient, NoisedMean):
            raise TypeError(f"the optimizer takes a NoisedMean, got {type(gradient).__name__}")
        updates, optimizer_state = optimizer.update(gradient.mean, self.optimizer_state, self.parameters)
        parameters = optax.apply_updates(self.parameters, updates)
        return dataclasses.replace(self, parameters=parameters, optimizer_state=optimizer_state)


def sharded_clipped_sum(
    loss: Loss,
    trainable: Any,
    frozen: Any,
    batch: Batch,
    clip: Clip,
    how: Strategy,
    mesh: Mesh,
    norm: Any = None,
    steps: Any = None,
    places: Places | None = None,
) -> ClippedSum:
    """clipped_sum over a batch whose slots are spread over the devices, each unit on exactly one row of them.

    Gradients are taken, and therefore clipped, with respect to `trainable` alone. Rows of devices have disjoint units,
    so the sensitivity of the sum over the rows is that of one row's sum.

    Args:
      loss: loss(trainable, frozen, unit) -> scalar, of one unit alone.
      norm: the current clip norm where it adapts.
      steps: of a grid, as clipped_sum takes them.
      places: where the parameters lie, in use and at rest, and the sum as at rest; None where every device keeps all.
    """
    shared: Any = place.SHARED
    spread: Any = place.spread(mesh)
    in_use = at_rest = jax.tree.map(lambda _: place.SHARED, trainable)
    of_frozen = jax.tree.map(lambda _: place.SHARED, frozen)
    if places is not None:
        in_use, at_rest, of_frozen = map(place.specs, (places.in_use, places.at_rest, places.frozen))
        trainable = jax.lax.with_sharding_constraint(trainable, places.in_use)
    # What a row of devices holds: all, or with an fsdp axis shards, which operations gather where they use them.
    by_rows, frozen_by_rows = place.of_rows(in_use), place.of_rows(of_frozen)
    shards, frozen_shards = place.shards(by_rows), place.shards(frozen_by_rows)
    count = shared if clip.adapts else None
    on_grid = None if steps is None else shared
    totals = place.side_by_side(mesh, by_rows)
    out_specs = ClippedSum(totals, PrivateStats(spread, spread), clip.sensitivity, count=count, steps=on_grid)
    # A clip norm that adapts is an array like the others; a constant one stays a number, because the sensitivity is
    # made of it.
    current = {name: x for name, x in (("norm", norm), ("steps", steps)) if x is not None}
    in_specs = (by_rows, frozen_by_rows, spread, shared)
    over, in_step = place.axes_of_rows(mesh), place.axes_in_step(mesh)

    def on_one_row(trainable: Any, frozen: Any, batch: Batch, current: dict[str, Any]) -> ClippedSum:
        frozen = tracking.gathered_where_used(frozen, frozen_shards)

        def of_unit(trainable: Any, unit: Unit) -> jax.Array:
            return loss(trainable, frozen, unit)

        local = clipping.clipped_sum(of_unit, trainable, batch, clip, how, shards=shards, together=in_step, **current)
        # Sums of rows side by side: they are added where no compiler decides how they are spread.
        stacked = jax.tree.map(lambda leaf: leaf[None], local.total)
        added = local.count if place.is_one_row(mesh) else jax.lax.psum(local.count, over)
        return dataclasses.replace(local, total=stacked, count=added)

    clipped = place.on_each_row(mesh, on_one_row, in_specs, out_specs)(trainable, frozen, batch, current)
    return dataclasses.replace(clipped, total=place.sum_over_rows(mesh, clipped.total, in_use, at_rest))


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """`step(state, frozen, batch, noise_keys) -> (state, PrivateStats)`; the old state's memory is reused.

    The noise multiplier is an argument of the compiled program and not a part of it, so that runs which differ in
    nothing else share one program; it is fixed here, where the step is made.

    Attributes:
      program: the compiled function of state, frozen parameters, batch, keys, noise multiplier and probes.
      noise_multiplier: of the gradients.
      noiser: whose state the first TrainState has to hold.
      probes: where gradient canaries are observed; None where there are none.
    """

    program: Any
    noise_multiplier: np.float32
    noiser: Noiser
    probes: Coordinates | None = None

    def __call__(self, state: TrainState, frozen: Any, batch: Batch, noise_keys: Any) -> Any:
        return self.program(state, frozen, batch, noise_keys, self.noise_multiplier, self.probes)

    def compiled(self, state: TrainState, frozen: Any, batch: Batch, noise_keys: Any) -> "TrainStep":
        """The step as it is compiled for such arguments, without computing anything."""
        return dataclasses.replace(self, program=self.lower(state, frozen, batch, noise_keys).compile())

    @property
    def memory(self) -> Any:
        """Of a compiled step, what the compiler says of a device's memory; None where it says nothing."""
        return self.program.memory_analysis()

    def lower(self, state: TrainState, frozen: Any, batch: Batch, noise_keys: Any) -> Any:
        return self.program.lower(state, frozen, batch, noise_keys, self.noise_multiplier, self.probes)


def _observed(probes: Coordinates, noised: NoisedSum, others: ClippedSum) -> jax.Array:
    """What a release holds at the places of gradient canaries, less the sum of all other units, in sensitivities."""
    unit = 1.0 if others.steps is None else others.sensitivity / others.steps
    return (probes.of(noised.total) - probes.of(others.total) * unit) / others.sensitivity


def state_shardings(optimizer: optax.GradientTransformation, at_rest: Any, mesh: Mesh) -> TrainState:
    """Where the arrays of a state lie whose parameters have the shardings `at_rest`: moments where their parameters
    do, all else on every device.
    """
    whole = place.replicated(mesh)
    structure = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), np.float32), at_rest)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, structure),
        at_rest,
        transform_non_params=lambda _: whole,
    )
    rest: Any = whole
    return TrainState(at_rest, moments, clip_norm=rest, noise_state=rest)


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    mechanism: Mechanism,
    mesh: Mesh,
    how: Strategy = Strategy(),
    places: Places | None = None,
    cast: Callable[[Any], Any] = lambda trainable: trainable,
    probes: Coordinates | None = None,
) -> TrainStep:
    """The step of one mechanism, compiled when it is first called.

    Args:
      loss: loss(trainable, frozen, unit) -> scalar, of one unit alone; `frozen` are public parameters that stay as they
        are.
      mechanism: clip norm, noise and the public divisor come from here and from nowhere else.
      how: the way in which the clipped sum is computed.
      places: where parameters lie. Sums, noise and moments lie as the trained parameters at rest: these are gathered
        once in a step, and their sum is scattered once. None: every device holds all.
      cast: from the parameters at rest to those that the loss takes, in other types; gradients are those by its result.
      probes: where gradient canaries move parameters; given, PrivateStats hold what is observed there, which takes the
        clipped sum of all other units once more.

    Raises:
      InputError: the count of clipped units leaves no noise for the gradients.
    """
    clip, noiser = mechanism.clip, noiser_of(mechanism)
    in_shards = None
    if places is not None:
        specs = [sharding.spec for sharding in jax.tree.leaves(places.at_rest)]
        in_shards = functools.partial(place.in_shards, mesh, specs)

    def dp_train_step(
        state: TrainState, frozen: Any, batch: Batch, noise_keys: Any, noise_multiplier: Any, probes: Coordinates | None
    ) -> tuple[TrainState, PrivateStats]:
        steps, cast_parameters = noiser.steps(noise_multiplier), cast(state.parameters)

        def clipped_sum_of(batch: Batch) -> ClippedSum:
            return sharded_clipped_sum(
                loss, cast_parameters, frozen, batch, clip, how, mesh, state.clip_norm, steps, places
            )

        clipped = clipped_sum_of(batch)
        noised, noise_state = noiser.add(clipped, state.noise_state, noise_keys, noise_multiplier, in_shards)
        stats = clipped.stats
        if probes is not None:
            stats = dataclasses.replace(
                stats, observed=_observed(probes, noised, clipped_sum_of(without_probes(batch)))
            )
        mean = divide(noised, mechanism.expected_batch_size)
        if clip.adapts and clip.scaling == CLIP:
            mean = scale(mean, state.clip_norm)  # the gradients were divided by it: their sensitivity is constant
        norm = state.clip_norm
        if clip.adapts:
            assert noised.count is not None
            norm = clip_norm.following(clip, norm, noised.count, mechanism.expected_batch_size)
        state = dataclasses.replace(state, clip_norm=norm, noise_state=noise_state)
        return state.apply(optimizer, mean), stats

    replicated, spread = place.replicated(mesh), place.over_units(mesh)
    state: Any = replicated if places is None else state_shardings(optimizer, places.at_rest, mesh)
    of_frozen = replicated if places is None else places.frozen
    program = jax.jit(
        dp_train_step,
        donate_argnums=0,
        in_shardings=(state, of_frozen, spread, replicated, replicated, replicated),
        out_shardings=(state, replicated),
        compiler_options=COMPILER_OPTIONS.get(mesh.devices.flat[0].platform),
    )
    return TrainStep(program, np.float32(noiser.multiplier), noiser, probes)
