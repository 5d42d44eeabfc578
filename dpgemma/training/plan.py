"""From settings to a plan: every omitted setting resolved, every impossible combination refused."""

import dataclasses
import math
from typing import Any

from accounting import calibration, rounding
from accounting.accountant import LARGEST_GROUP, Accountant
from accounting.errors import InputError
from accounting.loss_distribution import truncation
from accounting.mechanism import ADD_OR_REMOVE, Mechanism, dp_sgd, grid, histogram
from dpgemma.choices import EXACT
from dpgemma.privacy.clipping import SMALLEST_CLIP_NORM, Strategy
from dpgemma.privacy.samplers import sampler_of
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.training.optimizer import Optimization
from dpgemma.training.settings import Settings

# Where it is not given, in units.
HISTOGRAM_NOISE = 20.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run does, with nothing left open.

    Attributes:
      mechanism: the one object that trainer, accountant, ledger and report share.
      also: what is released beside its steps, before the first one.
      epsilon: the target, which the run does not exceed; inf where nothing is claimed.
      delta: at which epsilon is stated.
      strategy: how clipped sums are computed.
      optimization: how parameters follow the noised gradients.
      mesh: "data:N" or "data:A,model:B".
      seed: public seed of the initial parameters.
      checkpoint_every: updates between checkpoints.
      keep_checkpoints: checkpoints kept.
      eval_limit: the most units of a measurement.
    """

    mechanism: Mechanism
    also: tuple[Mechanism, ...]
    epsilon: float
    delta: float
    strategy: Strategy
    optimization: Optimization
    mesh: str
    seed: int
    checkpoint_every: int
    keep_checkpoints: int
    eval_limit: int

    @property
    def slots(self) -> int:
        """Slots of a batch: its cap, filled up so that each device has whole microbatches."""
        cap = self.mechanism.max_batch_size
        assert cap is not None, "a run has a cap, which fixes the shapes"
        multiple = mesh_lib.shape(self.mesh).rows * self.strategy.microbatch_size
        return -(-cap // multiple) * multiple

    @property
    def resolved(self) -> dict[str, Any]:
        """The settings that were open, by name, as they are used."""
        return {
            "num_units": self.mechanism.num_units,
            "max_batch_size": self.mechanism.max_batch_size,
            "noise_multiplier": self.mechanism.noise_multiplier,
            "steps": self.mechanism.steps,
            "epsilon": self.epsilon,
            "clipping": self.strategy.name,
            "microbatch_size": self.strategy.microbatch_size,
            "histogram_noise": self.also[0].noise_multiplier if self.also else None,
            "mesh": self.mesh,
        }


def resolve(
    settings: Settings,
    counted_units: int,
    trained: int,
    mesh: str,
    strategy: Strategy,
    *,
    epsilon_given: bool,
    begun: dict[str, Any] | None = None,
    shared_items: int | None = None,
) -> Plan:
    """The plan, with units, cap, noise, target, steps and grid filled in.

    Args:
      counted_units: training units that the data hold.
      trained: parameters that are trained.
      mesh: resolved; the cap of a new run is a multiple of its devices.
      strategy: the chosen way of clipping.
      epsilon_given: whether the target was asked for, beside a noise multiplier; then the steps end where the target
        would be passed.
      begun: the settings with which a run began that goes on: where its cap was planned, it stays.
      shared_items: number of records, where one may be that of several units.

    Raises:
      InputError: a combination that cannot be trained or has no guarantee.
    """
    num_units = check(settings, counted_units, shared_items)
    items, target = settings.items_per_unit, settings.epsilon
    drawn_from = num_units * items if shared_items is None else shared_items
    if settings.release == EXACT:
        check_delta(settings.epsilon, settings.delta, settings.steps)
    counted = settings.prompt_histogram is not None
    noise = HISTOGRAM_NOISE if settings.histogram_noise is None else settings.histogram_noise
    also = (histogram(num_units, noise, settings.neighbouring_relation),) if counted else ()
    given_noise = settings.noise_multiplier
    # If epsilon follows from the noise it is not known yet, so the cap is planned for a large epsilon: truncation
    # costs less at a smaller one.
    follows = given_noise is not None and not epsilon_given
    mechanism = dp_sgd(
        num_units=num_units,
        expected_batch_size=settings.batch_size,
        max_batch_size=begun["max_batch_size"]
        if begun and settings.max_batch_size in (None, begun["max_batch_size"])
        else _cap(settings, drawn_from, math.inf if follows else target, mesh, strategy),
        noise_multiplier=given_noise or 0.0,
        clip_norm=settings.clip_norm,
        steps=settings.steps,
        neighbouring_relation=settings.neighbouring_relation,
        clip_scaling=settings.clip_scaling,
        clip_quantile=settings.clip_quantile,
        grid_bits=grid.LAW_BITS if settings.release == EXACT else None,  # until noise is known, any grid costs as much
        items_per_unit=items,
        shared_items=shared_items,
    )
    if items > LARGEST_GROUP:
        raise InputError(
            f"`rows_per_unit`={items} is more than the {LARGEST_GROUP} rows of a unit that are accounted for where rows"
            " are drawn one by one: lower it"
        )
    sampler_of(mechanism.sampling)  # refuses what cannot be drawn
    if given_noise is None:
        solved = calibration.noise_multiplier(mechanism, target, settings.delta, also=also)
        mechanism = mechanism.replace(noise_multiplier=_as_begun(solved.noise_multiplier, begun, "noise_multiplier"))
    elif math.isfinite(target):  # an infinite target sets no limit: noise and steps stay as given
        if not epsilon_given:
            target = _as_begun(Accountant(mechanism, also=also).upper(settings.delta), begun, "epsilon")
        else:
            mechanism = calibration.steps(mechanism, target, settings.delta, also=also, largest=settings.steps)
            if mechanism.steps == 0:
                raise InputError(
                    f"`noise_multiplier`={given_noise:g} passes epsilon {target:g} in the first step: raise either"
                )
    mechanism = on_fitting_grid(mechanism, trained)
    _ = mechanism.gradient_noise_multiplier  # refuses a clip norm that cannot adapt, before anything is written
    optimization = Optimization.of(settings, mechanism.steps)
    return Plan(
        mechanism,
        also,
        target,
        settings.delta,
        strategy,
        optimization,
        mesh,
        settings.seed,
        settings.checkpoint_every,
        settings.keep_checkpoints,
        settings.eval_limit,
    )


def _as_begun(value: float, begun: dict[str, Any] | None, name: str) -> float:
    """The value with which a run began, where this machine finds the same but for its last bits."""
    before = begun[name] if begun else None
    return before if isinstance(before, float) and math.isclose(value, before, rel_tol=1e-9) else value


def check_delta(epsilon: float, delta: float, steps: int) -> None:
    """Refuses a delta that the ends of an exact release's noise would take a part of.

    Raises:
      InputError: it is too small for so many steps, or epsilon too large for any.
    """
    if not math.isfinite(epsilon):
        return
    least = 10 * grid.tail_delta(steps, epsilon)
    if least >= 1:
        raise InputError(
            f"`epsilon`={epsilon:g} is more than any delta can be stated at: lower it, or give `epsilon`=inf, which"
            " claims nothing"
        )
    if delta < least:
        raise InputError(
            f"`delta`={delta:g} is smaller than what the noise can hide in {steps} steps at epsilon {epsilon:g}: use at"
            f" least {least:.1e}"
        )


def on_fitting_grid(mechanism: Mechanism, trained: int) -> Mechanism:
    """The mechanism with the grid that its noise, its largest batch and its number of parameters ask for."""
    if not mechanism.noise.is_exact:
        return mechanism.replace(grid_bits=None)
    if trained > grid.MOST_COORDINATES:
        raise InputError(
            f"{trained} trained parameters are more than the {grid.MOST_COORDINATES} for which the noise is certified:"
            " train fewer, by `lora_rank`"
        )
    assert mechanism.max_batch_size is not None
    bits = grid.fitting_bits(mechanism.gradient_noise_multiplier, mechanism.max_batch_size, trained)
    return mechanism.replace(grid_bits=bits)


def _cap(settings: Settings, num_items: int, target: float, mesh: str, strategy: Strategy) -> int:
    """The truncation cap: the one given, or the smallest that costs little."""
    devices, size = mesh_lib.shape(mesh).rows, strategy.microbatch_size
    multiple, cap = devices * size, settings.max_batch_size
    if cap is None:
        return truncation.plan_max_batch_size(
            num_items, settings.batch_size, settings.steps, target, settings.delta, multiple=multiple
        )
    if cap < settings.batch_size:
        raise InputError(
            f"`max_batch_size`={cap} is below the expected batch of {settings.batch_size}: raise it or omit it"
        )
    if cap % multiple:
        raise InputError(
            f"`max_batch_size`={cap} must be a multiple of {multiple} ({devices} devices, {size} units at a time): use"
            f" {-(-cap // multiple) * multiple}"
        )
    return cap


def check(settings: Settings, counted_units: int, shared_items: int | None = None) -> int:
    """Returns the number of units, after the checks that need no computation.

    Args:
      shared_items: number of records, where one may be that of several units.

    Raises:
      InputError: data, batch size or clip norm that do not go together.
    """
    num_units = _units(settings, counted_units)
    items = settings.items_per_unit
    most = num_units * items if shared_items is None else shared_items
    if settings.batch_size > most:
        what = "training units" if items == 1 else f"rows of {num_units} training units"
        raise InputError(f"`batch_size`={settings.batch_size} exceeds the {most} {what}: lower it or use more data")
    if settings.clip_norm < SMALLEST_CLIP_NORM:
        raise InputError(
            f"`clip_norm`={settings.clip_norm:g} is too small for float32 norms: use at least {SMALLEST_CLIP_NORM:g}"
        )
    return num_units


def _units(settings: Settings, counted: int) -> int:
    declared = settings.num_units
    if settings.neighbouring_relation == ADD_OR_REMOVE:
        if declared is None:
            raise InputError(
                "under `neighbouring_relation`=add_or_remove the number of units is private: declare it with"
                " `num_units`"
            )
        if counted > declared:
            raise InputError(
                f"the data hold more training units than the declared `num_units`={declared}: raise the declaration"
            )
        return declared
    if declared not in (None, counted):
        raise InputError(
            f"`num_units`={declared} differs from the {counted} training units counted: omit it under zero_out"
        )
    return counted


def summary(plan: Plan, name: str, place: Any) -> str:
    """One line for the operator.

    Args:
      name: of the model.
      place: where the run lies.
    """
    m = plan.mechanism
    privacy = (
        f"epsilon {rounding.upper(plan.epsilon, 4)} at delta {plan.delta:g}, noise multiplier {m.noise_multiplier:.4g},"
        f" clip norm {m.clip_norm:g}"
    )
    narrow = ""
    if m.noise.is_exact and m.max_batch_size and m.noise.grid_bits:
        room = grid.largest_mean(m.noise.grid_bits, m.gradient_noise_multiplier, m.max_batch_size)
        narrow = f"; a number whose mean gradient exceeds {room:.2g} clip norms wraps around" if room < 1 else ""
    rows = f" with places for {m.items_per_unit} rows each, drawn one by one" if m.items_per_unit > 1 else ""
    size = f"{m.num_units} units{rows}, batch {m.expected_batch_size} (at most {m.max_batch_size}), {m.steps} steps"
    if not m.is_private:
        privacy = "NO PRIVACY (baseline)"
    elif math.isinf(plan.epsilon):
        privacy = f"NO PRIVACY CLAIMED, noise multiplier {m.noise_multiplier:.4g}, clip norm {m.clip_norm:g}"
    counts = "".join(f", counts of prompts with noise of {x.noise_multiplier:g} units" for x in plan.also)
    return f"{name} in {place}: {size}, {privacy}{counts}{narrow}"
