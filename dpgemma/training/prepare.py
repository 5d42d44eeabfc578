"""From the settings as given to a Trainer that can start, or go on."""

import dataclasses
import math
import pathlib

from dpgemma.data import dataset
from dpgemma.data.text import tokenizer as tokenizer_lib
from dpgemma.data.text import units
from dpgemma.sharding import mesh
from dpgemma.training import clipping_choice, environment, plan, progress
from dpgemma.training import run as run_directory
from dpgemma.training import start as start_lib
from dpgemma.training import trainer as loop
from dpgemma.training.settings import TrainConfig


def prepare(config: TrainConfig, workdir: str | None = None, *, epsilon_given: bool = False, keys=None) -> loop.Trainer:
    """Resolves the settings, creates or opens the run's folder and returns the Trainer.

    Formal guarantee: a run with a finite target has keys of the operating system's randomness; one whose keys were
    given says in its ledger's first line that they are no secret, and no report, audit or sum of runs derives an
    epsilon from its noise. Tested by
    tests/training/run_test.py::test_pitfall_15_a_run_with_public_keys_claims_nothing_anywhere.

    Args:
      config: the settings as given.
      workdir: the run's folder; None for the default.
      epsilon_given: whether epsilon was asked for, rather than a default.
      keys: of a new run, instead of the operating system's; taken to be public. For sweeps of public data: no flag
        leads here.

    Raises:
      ValueError: keys were given, and the target is finite.
      InputError: anything that the user can mend.
    """
    if keys is not None and math.isfinite(config.epsilon):
        raise ValueError("a run with a finite target epsilon needs secret keys")
    start = start_lib.of(config)
    config = dataclasses.replace(
        config, model=start.name, tokenizer=start_lib.tokenizer_of(config), mesh=mesh.resolve(config.mesh)
    )
    tokenizer = tokenizer_lib.load(config.tokenizer)
    tokenizer_lib.check_vocabulary(tokenizer, start.model.vocab_size)
    path = pathlib.Path(workdir or f"runs/{config.digest()[:8]}")
    run = run_directory.open_existing(path)
    secret_keys = run.has_secret_keys() if run else keys is None
    keys = run.keys() if run else keys or run_directory.Keys.generate()

    unit, rows = units.rows(
        config.privacy_unit, config.data, config.text_field, tokenizer, config.sequence_length, start.model.vocab_size
    )
    config = dataclasses.replace(config, privacy_unit=unit)
    if not rows.scored.any(axis=1).all():
        progress.warn(
            "some records have nothing to learn within `sequence_length`: their prompts fill it; raise it or shorten"
            " them"
        )
    data = dataset.split(rows, keys.holdout, config.holdout_fraction)
    plan.check(config, data.num_units)
    # Chosen once: a run that goes on computes as it began.
    if run:
        config, choice = clipping_choice.as_before(config, run.config())
    else:
        config, choice = clipping_choice.resolve(config, start.model, tokenizer.bos)
    config = plan.resolve(config, data.num_units, int(config.mesh.partition(":")[2]), epsilon_given=epsilon_given)
    plan.adaptive_clipping(config)  # refuses what cannot be, before anything is written
    fingerprint = run_directory.fingerprint(keys, rows)
    start_event = plan.start_event(config, start, len(data.held_out), secret_keys=secret_keys)
    if run:
        run.check_resumable(config.as_dict(), fingerprint, start_event)
    else:
        run = run_directory.create(
            path, config.as_dict(), keys, fingerprint, start_event | {"environment": environment.description()}
        )
    progress.inform(plan.summary(config, start, path))
    if choice:
        progress.inform(choice)
    return loop.Trainer(config, start, tokenizer, data, run)
