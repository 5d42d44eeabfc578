"""The attack on a finished run's canaries, measured anew from its checkpoint, its keys and what was observed."""

import pathlib
from collections.abc import Callable

from accounting.empirical.protocol import Assessment, Protocol
from accounting.errors import InputError
from accounting.ledger import chain
from accounting.ledger import executed as executed_lib
from dpgemma.gemma import lora
from dpgemma.inference import models
from dpgemma.training import attack, observed
from dpgemma.training import canaries as canaries_lib
from dpgemma.training.prepare import objective_of
from dpgemma.training.run import RunDirectory
from dpgemma.training.settings import Settings


def attacked(workdir: pathlib.Path, advance: Callable[[int], None] = lambda canaries: None) -> Assessment:
    """The lower bounds of the registered protocol.

    Args:
      workdir: of a run that planted canaries, with its private/.
      advance: is told how many more canaries were measured, of twice as many as there are.

    Raises:
      InputError: a run without canaries, one that is not finished, or one whose files are missing or damaged.
    """
    run = RunDirectory(workdir)
    if not run.ledger_file.is_file():
        raise InputError(f"{workdir} is no run directory: it has no ledger")
    if not run.keys_file.is_file():
        raise InputError(f"{workdir} has no private/ here, and an attack on its canaries needs it")
    executed = executed_lib.of(chain.read(run.ledger_file))
    if "audit_protocol" not in executed.declared:
        raise InputError(
            f"{workdir} planted no canaries, so nothing can be measured: train a run with `canaries`=N to attack it"
        )
    if executed.updates < executed.planned.steps:
        raise InputError(
            f"{workdir} has taken {executed.updates} of {executed.planned.steps} steps: its canaries are attacked when"
            " it is finished"
        )
    protocol = Protocol.of_facts(executed.declared["audit_protocol"])
    canaries = canaries_lib.kept(workdir, run.keys.holdout)
    if canaries.digest() != executed.declared.get("canary_sha256"):
        raise InputError(f"the canaries in {workdir} are not those that its ledger registered: run dpgemma audit")
    if canaries_lib.coordinates_of(canaries) is not None:
        seen = observed.read(run.observed_file, executed.planned.steps, canaries.count)
        scores = attack.observed_scores(seen, executed.planned)
    else:
        settings = Settings.of_config(run.config())
        objective = objective_of(settings)
        trained = lora.split(objective.model, models.load(str(workdir)).parameters)
        scores = attack.text_scores(objective, trained, objective.init(settings.seed), canaries, advance)
    found = attack.assess(protocol, scores, canaries, executed)
    if found is None:
        raise InputError(
            f"every canary of {workdir} was planted several times, which no epsilon of one unit bounds: see"
            " --memorisation"
        )
    return found
