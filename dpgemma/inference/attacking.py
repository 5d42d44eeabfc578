"""The attack on a finished run's canaries, measured anew from its checkpoint, its keys and what was observed."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from accounting import run_files
from accounting.empirical import protocol as protocol_lib
from accounting.empirical.protocol import Assessment, Protocol
from accounting.errors import InputError
from accounting.ledger import chain
from accounting.ledger import executed as executed_lib
from accounting.ledger.executed import Executed
from dpgemma.data.canaries import Canaries
from dpgemma.gemma import lora
from dpgemma.inference import models
from dpgemma.inference.memorisation import check_alike, is_run, model_of
from dpgemma.training import attack, observed
from dpgemma.training import canaries as canaries_lib
from dpgemma.training.prepare import objective_of
from dpgemma.training.run import RunDirectory
from dpgemma.training.settings import Settings

_LONGEST_CHAIN = 20  # of models, each of which started from another


def attacked(workdir: pathlib.Path, advance: Callable[[int], None] = lambda canaries: None) -> Assessment:
    """The lower bounds of the registered protocol.

    Args:
      workdir: of a run that planted canaries, with its private/.
      advance: is told how many more canaries were measured, of twice as many as there are.

    Raises:
      InputError: a run without canaries, one that is not finished, or one whose files are missing or damaged.
    """
    run, executed, canaries = _finished(workdir)
    protocol = Protocol.of_facts(executed.declared["audit_protocol"])
    if canaries_lib.coordinates_of(canaries) is not None:
        seen = observed.read(run.observed_file, executed.planned.steps, canaries.count)
        scores = attack.observed_scores(seen, executed.planned)
    else:
        settings = Settings.of_config(run.config())
        objective = objective_of(settings)
        trained = lora.split(objective.model, models.load(str(workdir)).parameters)
        scores = attack.text_scores(objective, trained, objective.init(settings.seed), canaries, advance)
    return _assessed(workdir, protocol, scores, canaries, executed)


def attacked_against(workdir: pathlib.Path, reference: str) -> Assessment:
    """The lower bounds of a score that is the loss of a canary against its loss under a reference model.

    The reference may be chosen after the run: it is no part of the registered protocol.

    Formal guarantee: if the reference does not depend on the canaries' coins, and is the only one that is tried, the
    probability that any of these bounds is wrong is at most protocol.SIGNIFICANCE (as protocol.py states it). A model
    is refused that says of itself, or of one that it started from, that canaries were planted; of all others the first
    condition is assumed, and the second is always. Tested by tests/training/attack_test.py::
    test_a_reference_model_gives_a_score_and_bounds_of_their_own and
    ::test_a_reference_that_learned_canaries_anywhere_is_refused.

    Args:
      workdir: of a run that planted canaries which are text, with its private/.
      reference: folder of a run without canaries, or a Hugging Face directory, with the same tokenizer.

    Raises:
      InputError: a reference that cannot be one, and as `attacked` does.
    """
    run, executed, canaries = _finished(workdir)
    if canaries_lib.coordinates_of(canaries) is not None:
        raise InputError(f"{workdir} planted gradient canaries, which are no text that a model could be asked for")
    _check_reference(reference)
    trained, other = models.load(str(workdir)), model_of(reference)
    check_alike(other, reference, trained)
    objective = objective_of(Settings.of_config(run.config()))
    if objective.length > other.config.max_length:
        raise InputError(f"{reference} takes rows of {other.config.max_length}, and canaries have {objective.length}")
    start = dataclasses.replace(objective.start, name=other.config.model_type, model=other.config)
    as_reference = dataclasses.replace(objective, start=start)
    after = attack.losses(objective, lora.split(objective.model, trained.parameters), canaries)
    before = attack.losses(as_reference, lora.split(other.config, other.parameters), canaries)
    scores = {protocol_lib.LOSS_AGAINST_REFERENCE: before - after}
    return _assessed(workdir, protocol_lib.of_texts_against_reference(), scores, canaries, executed)


def _check_reference(reference: str) -> None:
    """Refuses models that were trained on canaries, as far as they or what they started from say so.

    Raises:
      InputError: it was.
    """
    named: str | None = reference
    for _ in range(_LONGEST_CHAIN):
        if named is None:
            return
        folder, start = pathlib.Path(named), None
        card = folder / run_files.CARD
        planted = card.is_file() and "canaries" in card.read_text(errors="replace")
        if is_run(named):
            config = RunDirectory(folder).config()
            planted, start = bool(config.get("canaries")), config.get("init_from")
        if planted:
            raise InputError(f"{named} was trained with canaries: a reference must not have learned any")
        named = start


def _finished(workdir: pathlib.Path) -> tuple[RunDirectory, Executed, Canaries]:
    """A finished run, and its canaries as its ledger registered them.

    Raises:
      InputError: as `attacked` does.
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
    canaries = canaries_lib.kept(workdir, run.keys.holdout)
    if canaries.digest() != executed.declared.get("canary_sha256"):
        raise InputError(f"the canaries in {workdir} are not those that its ledger registered: run dpgemma audit")
    return run, executed, canaries


def _assessed(
    workdir: pathlib.Path, protocol: Protocol, scores: dict[str, np.ndarray], canaries: Canaries, executed: Executed
) -> Assessment:
    found = attack.assess(protocol, scores, canaries, executed)
    if found is None:
        raise InputError(
            f"every canary of {workdir} was planted several times, which no epsilon of one unit bounds: see"
            " --memorisation"
        )
    return found
