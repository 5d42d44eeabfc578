"""From flags to a run that can start: every omitted setting resolved, every impossible combination refused."""

import dataclasses
import math

from accounting import calibration, run_files
from accounting.accountant import Accountant
from accounting.errors import InputError
from accounting.loss_distribution import truncation
from accounting.mechanism import ADD_OR_REMOVE, ZERO_OUT, Mechanism, dp_sgd
from dpgemma.gemma import decoder, lora
from dpgemma.privacy.adaptive import AdaptiveClipping
from dpgemma.privacy.clipping import SMALLEST_CLIP_NORM
from dpgemma.training.settings import SEALS, TrainConfig
from dpgemma.training.start import StartingPoint


def mechanism_of(config: TrainConfig) -> Mechanism:
    """The mechanism of a resolved configuration: the one object that trainer and accountant share."""
    return dp_sgd(
        num_units=config.num_units,
        expected_batch_size=config.batch_size,
        max_batch_size=config.max_batch_size,
        noise_multiplier=config.noise_multiplier,
        clip_norm=config.clip_norm,
        steps=config.steps,
        neighbouring_relation=config.neighbouring_relation,
    )


def adaptive_clipping(config: TrainConfig) -> AdaptiveClipping | None:
    """How the clip norm of a resolved configuration moves.

    Raises:
      InputError: the noise leaves nothing for the count of clipped units.
    """
    if config.clip_quantile is None:
        return None
    try:
        return AdaptiveClipping(config.clip_quantile, config.noise_multiplier, config.batch_size)
    except ValueError as error:
        raise InputError(f"`clip_quantile` cannot be followed: {error}; raise `batch_size`, or drop it") from None


def resolve(config: TrainConfig, counted_units: int, devices: int, *, epsilon_given: bool) -> TrainConfig:
    """The configuration with units, cap, noise, target and steps filled in.

    Args:
      config: with clipping and microbatch_size chosen.
      counted_units: training units that the data hold.
      devices: N of the mesh; the cap is a multiple of it.
      epsilon_given: whether the target was asked for, beside a noise multiplier; then the steps end where the target
        would be passed.

    Raises:
      InputError: a combination that cannot be trained or has no guarantee.
    """
    num_units = check(config, counted_units)
    multiple = devices * config.microbatch_size
    # Where epsilon follows from the noise, the cap is planned for a generous one: truncation costs the less, the
    # smaller it is.
    planned_for = math.inf if config.noise_multiplier is not None and not epsilon_given else config.epsilon
    cap = config.max_batch_size
    if cap is None:
        cap = truncation.plan_max_batch_size(
            num_units, config.batch_size, config.steps, planned_for, config.delta, multiple=multiple
        )
    elif cap < config.batch_size:
        raise InputError(
            f"`max_batch_size`={cap} is below the expected batch of {config.batch_size}: raise it or omit it"
        )
    elif cap % multiple:
        raise InputError(
            f"`max_batch_size`={cap} must be a multiple of {multiple} ({devices} devices, {config.microbatch_size}"
            f" units at a time): use {-(-cap // multiple) * multiple}"
        )
    resolved = dataclasses.replace(
        config, num_units=num_units, max_batch_size=cap, noise_multiplier=config.noise_multiplier or 0.0
    )
    mechanism = mechanism_of(resolved)
    if config.noise_multiplier is None:
        mechanism = calibration.noise_multiplier(mechanism, config.epsilon, config.delta)
        return dataclasses.replace(resolved, noise_multiplier=mechanism.noise_multiplier)
    if math.isinf(config.epsilon):  # noise for its own sake: nothing is claimed, so nothing has to be kept to
        return resolved
    if not epsilon_given:
        return dataclasses.replace(resolved, epsilon=Accountant(mechanism).upper(config.delta))
    affordable = calibration.steps(mechanism, config.epsilon, config.delta, largest=config.steps).steps
    if affordable == 0:
        raise InputError(
            f"`noise_multiplier`={config.noise_multiplier:g} passes epsilon {config.epsilon:g} in the first step: raise"
            " either"
        )
    return dataclasses.replace(resolved, steps=affordable)


def check(config: TrainConfig, counted_units: int) -> int:
    """The number of units, or what can be refused before anything is computed.

    Raises:
      InputError: data, batch size or clip norm that do not go together.
    """
    num_units = _units(config, counted_units)
    if config.batch_size > num_units:
        raise InputError(
            f"`batch_size`={config.batch_size} exceeds the {num_units} training units: lower it or use more data"
        )
    if config.clip_norm < SMALLEST_CLIP_NORM:
        raise InputError(
            f"`clip_norm`={config.clip_norm:g} is too small for float32 norms: use at least {SMALLEST_CLIP_NORM:g}"
        )
    return num_units


def _units(config: TrainConfig, counted: int) -> int:
    if config.neighbouring_relation == ADD_OR_REMOVE:
        if config.num_units is None:
            raise InputError(
                "under `neighbouring_relation`=add_or_remove the number of units is private: declare it with"
                " `num_units`"
            )
        if counted > config.num_units:
            raise InputError(
                f"the data hold more training units than the declared `num_units`={config.num_units}: raise the"
                " declaration"
            )
        return config.num_units
    if config.num_units not in (None, counted):
        raise InputError(
            f"`num_units`={config.num_units} differs from the {counted} training units counted: omit it under zero_out"
        )
    return counted


def start_event(config: TrainConfig, start: StartingPoint, held_out: int, *, secret_keys: bool) -> dict:
    """The public facts with which a ledger opens; the report is written from these and the steps alone.

    Args:
      held_out: units held out.
      secret_keys: whether the keys came from the operating system.
    """
    facts = dataclasses.asdict(mechanism_of(config)) | {"secret_keys": secret_keys}
    facts.update(
        epsilon=config.epsilon,
        delta=config.delta,
        privacy_unit=config.privacy_unit,
        sequence_length=config.sequence_length,
    )
    facts.update(clip_scaling=config.clip_scaling, clip_quantile=config.clip_quantile)
    facts.update(model=start.name, architecture=dataclasses.asdict(start.model), init_sha256=start.sha256)
    shapes = decoder.parameter_shapes(start.model)
    trainable, _ = lora.split(start.model, shapes)
    facts.update(
        parameters=decoder.count(shapes), trained_parameters=decoder.count(trainable), seal=SEALS[config.ledger_seal]
    )
    # Under add_or_remove a count of units would be a count of the private data.
    facts.update(held_out_units=held_out if config.neighbouring_relation == ZERO_OUT else None)
    return run_files.encode(facts)


def summary(config: TrainConfig, start: StartingPoint, path) -> str:
    """One line for the terminal."""
    m = mechanism_of(config)
    privacy = (
        f"epsilon {config.epsilon:.4g} at delta {config.delta:g}, noise multiplier {m.noise_multiplier:.4g}, clip norm"
        f" {m.clip_norm:g}"
    )
    size = f"{m.num_units} units, batch {config.batch_size} (at most {m.max_batch_size}), {m.steps} steps"
    if not m.is_private:
        privacy = "NO PRIVACY (baseline)"
    elif math.isinf(config.epsilon):
        privacy = f"NO PRIVACY CLAIMED, noise multiplier {m.noise_multiplier:.4g}, clip norm {m.clip_norm:g}"
    return f"{start.name} in {path}: {size}, {privacy}"
