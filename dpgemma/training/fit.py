"""Differentially private training of any model that JAX can differentiate: parameters in, parameters out.

No folder, ledger or tokenizer: what `dpgemma train` adds for runs that are kept, resumed and audited is left out.
Batches, clipping, noise and accounting are those of every run.
"""

import dataclasses
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from accounting import calibration, rounding
from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.loss_distribution import truncation
from accounting.mechanism import ZERO_OUT, Mechanism, dp_sgd, grid
from dpgemma.choices import EXAMPLE_SCAN
from dpgemma.data.batch import Unit, collate
from dpgemma.data.source import InMemory
from dpgemma.privacy.clipping import SMALLEST_CLIP_NORM, Strategy
from dpgemma.privacy.noise import noise_keys
from dpgemma.privacy.samplers import sampler_of
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.training.plan import check_delta, on_fitting_grid
from dpgemma.training.step import TrainState, make_train_step

Example = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Keys:
    """What batches and noise are made from; whoever knows them can take the noise off again."""

    sampling: bytes
    noise: bytes

    @classmethod
    def new(cls) -> "Keys":
        """Keys of 256 bits from the operating system."""
        return cls(secrets.token_bytes(32), secrets.token_bytes(32))


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training gave.

    Attributes:
      parameters: trained, float32.
      epsilon: at `delta`, an upper bound, rounded up to four digits.
      delta: as it was given.
      mechanism: the public facts from which epsilon follows.
      losses: float64 [steps], the mean loss of each batch. Private: the guarantee does not cover them.
    """

    parameters: Any
    epsilon: float
    delta: float
    mechanism: Mechanism
    losses: np.ndarray


def plan(
    num_records: int,
    trained: int,
    *,
    delta: float,
    batch_size: int,
    steps: int,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    clip_norm: float = 1.0,
    multiple: int = 1,
) -> Mechanism:
    """The mechanism of a run of `fit`, for epsilon or for a noise multiplier.

    >>> plan(1000, 10, delta=1e-5, batch_size=50, steps=20, noise_multiplier=1.0).max_batch_size
    120

    Args:
      num_records: N, which is public.
      trained: parameters, which decide how fine the grid of the sums can be.
      multiple: of which the largest batch is one.

    Raises:
      InputError: both or neither of epsilon and noise, or a budget that no noise reaches.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise InputError("give one of `epsilon` and `noise_multiplier`")
    for name, value in (("epsilon", epsilon), ("noise_multiplier", noise_multiplier), ("clip_norm", clip_norm)):
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"`{name}` must be positive and finite, got {value:g}")
    if clip_norm < SMALLEST_CLIP_NORM:
        raise InputError(f"`clip_norm`={clip_norm:g} is too small for float32: use at least {SMALLEST_CLIP_NORM:g}")
    if steps < 1 or batch_size < 1:
        raise InputError("`steps` and `batch_size` must be at least 1")
    if batch_size > num_records:
        raise InputError(f"`batch_size`={batch_size} exceeds the {num_records} records: lower it")
    target = math.inf if epsilon is None else epsilon
    cap = truncation.plan_max_batch_size(num_records, batch_size, steps, target, delta, multiple=multiple)
    mechanism = dp_sgd(
        num_records,
        batch_size,
        cap,
        noise_multiplier=noise_multiplier or 0.0,
        clip_norm=clip_norm,
        steps=steps,
        neighbouring_relation=ZERO_OUT,
        grid_bits=grid.LAW_BITS,
    )
    if epsilon is not None:
        check_delta(epsilon, delta, steps)
        mechanism = calibration.noise_multiplier(mechanism, epsilon, delta)
    mechanism = on_fitting_grid(mechanism, trained)
    check_delta(Accountant(mechanism).upper(delta), delta, steps)
    return mechanism


def fit(
    loss: Callable[[Any, Example], jax.Array],
    parameters: Any,
    records: Mapping[str, Any],
    *,
    delta: float,
    batch_size: int,
    steps: int,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    clip_norm: float = 1.0,
    optimizer: optax.GradientTransformation | None = None,
    records_at_once: int = 8,
    keys: Keys | None = None,
) -> Fitted:
    """Trains parameters privately on records.

    Formal guarantee: the trained parameters are (epsilon, delta)-differentially private with respect to one record,
    whose place an empty one takes in a neighbouring data set, whatever the record holds; given that `loss` of a record
    is a function of that record and the parameters, that the start and the optimizer are public, that the keys stay
    secret, and that no loss is shown. Tested by tests/training/fit_test.py::test_epsilon_is_that_of_the_command_line,
    ::test_steps_are_those_that_keys_and_data_say and ::test_one_record_moves_the_sum_by_no_more_than_the_clip_norm.

    >>> import jax.numpy as jnp
    >>> x = np.random.default_rng(0).normal(size=(2000, 3)).astype(np.float32)
    >>> data = {"x": x, "y": x @ np.array([1, 2, 3], np.float32)}
    >>> def squared_error(w, record): return (record["x"] @ w - record["y"]) ** 2
    >>> done = fit(squared_error, jnp.zeros(3), data, epsilon=4.0, delta=1e-5, batch_size=200, steps=40,
    ...            optimizer=optax.adam(0.2))
    >>> bool(np.abs(done.parameters - np.array([1, 2, 3])).max() < 0.5), done.epsilon
    (True, 4.0)

    Args:
      loss: loss(parameters, record) -> scalar; a record has every column without its first axis.
      parameters: any tree of float32 arrays.
      records: arrays [N, ...] by name; record i is row i of each.
      batch_size: the EXPECTED Poisson batch.
      clip_norm: L2 bound of each record's gradient.
      optimizer: of optax; by default Adam at 1e-3.
      records_at_once: whose gradients are held at the same time; they change time and memory alone.
      keys: from the operating system, if they are not given; two runs with the same keys on different data leak.

    Raises:
      InputError: records of unequal numbers, or a budget that cannot be met.
    """
    columns = {name: np.asarray(column) for name, column in records.items()}
    if len({len(column) for column in columns.values()}) != 1:
        raise InputError("all columns must have one row for each record")
    source = InMemory(columns)
    how = Strategy(EXAMPLE_SCAN, records_at_once)
    trained = sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(parameters))
    mechanism = plan(
        source.num_units,
        trained,
        delta=delta,
        batch_size=batch_size,
        steps=steps,
        epsilon=epsilon,
        noise_multiplier=noise_multiplier,
        clip_norm=clip_norm,
        multiple=records_at_once,
    )
    optimizer = optimizer or optax.adam(1e-3)
    keys = keys or Keys.new()

    def of_unit(parameters: Any, frozen: Any, unit: Unit) -> jax.Array:
        return loss(parameters, {name: column[0] for name, column in unit.rows.items()})

    step = make_train_step(of_unit, optimizer, mechanism, mesh_lib.make("data:1"), how)
    parameters = jax.tree.map(
        lambda leaf: jax.numpy.array(leaf, jax.numpy.float32), parameters
    )  # copied: steps reuse it
    state = TrainState(parameters, optimizer.init(parameters), None, step.noiser.init(parameters))
    sampler, losses = sampler_of(mechanism.sampling), np.zeros(steps)
    assert mechanism.max_batch_size is not None
    for t in range(steps):
        drawn = sampler.draw(keys.sampling, t)
        batch = collate(source, drawn, mechanism.max_batch_size)
        state, stats = step(state, {}, batch, noise_keys(keys.noise, t))
        losses[t] = float(np.asarray(stats.losses).sum()) / max(1, len(drawn))
    spent = rounding.round_up(Accountant(mechanism).upper(delta))
    return Fitted(state.parameters, spent, delta, mechanism, losses)
