"""From the settings as given to a Trainer that can start, or go on."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dpgemma
from accounting import run_files
from accounting.errors import InputError
from accounting.ledger.events import FORMAT
from accounting.ledger.histogram import labels_sha256
from accounting.ledger.seals import Signature
from accounting.mechanism import ADD_OR_REMOVE, ZERO_OUT
from accounting.report import words
from dpgemma import user_cache
from dpgemma.choices import AUTO, EXAMPLE_SCAN, GRADIENT, OF_SEVERAL_ROWS, SEQUENCE
from dpgemma.data import holdout
from dpgemma.data.canaries import Canaries, Planted, seed_of
from dpgemma.data.source import Items, UnitSource
from dpgemma.data.text import prompts as prompts_lib
from dpgemma.data.text import tokenizer as tokenizer_lib
from dpgemma.data.text.tokenizer import Tokenizer
from dpgemma.data.text.units import Found
from dpgemma.gemma import decoder
from dpgemma.gemma import start as start_lib
from dpgemma.objectives.causal import CausalLM
from dpgemma.objectives.probes import ProbedCausalLM
from dpgemma.objectives.protocol import Objective
from dpgemma.privacy.keys import Keys
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding import processes
from dpgemma.sharding.rules import MeshShape, wanted
from dpgemma.storage import hub
from dpgemma.storage import mirror as mirror_lib
from dpgemma.storage.mirror import Mirror
from dpgemma.storage.objects import is_address
from dpgemma.training import agreement, clipping_choice, data, environment, memory
from dpgemma.training import canaries as canaries_lib
from dpgemma.training import plan as plan_lib
from dpgemma.training import run as run_lib
from dpgemma.training.canaries import kept
from dpgemma.training.observers import Observer, phase
from dpgemma.training.plan import Plan
from dpgemma.training.run import RunDirectory
from dpgemma.training.settings import Settings
from dpgemma.training.trainer import Trainer, UnitsToCount, UnitsToMeasure

# Settings of units of several rows that a ledger records.
_OF_UNITS = ("rows_per_unit", "rows_kept", "user_field", "records_without_user", "user_sampling", "ownership")


@contextlib.contextmanager
def _undone_if_it_fails() -> Iterator[contextlib.ExitStack]:
    """A stack that is closed where the context ends by an exception."""
    with contextlib.ExitStack() as stack:
        yield stack
        stack.pop_all()


def prepare(
    settings: Settings, workdir: str | None = None, *, epsilon_given: bool = False, observers: Sequence[Observer] = ()
) -> Trainer:
    """Resolves the settings, creates or opens the run's folder and returns the Trainer.

    Formal guarantee: the keys of a new run come from the operating system's randomness. Tested by
    tests/training/secrecy_test.py::test_pitfall_15_keys_come_from_the_operating_system.

    >>> prepare(Settings(model="no such model"))
    Traceback (most recent call last):
      ...
    accounting.errors.InputError: `model`=no such model is no preset: choose one of tiny, ...

    Args:
      settings: as given.
      workdir: the run's folder; None for the default.
      epsilon_given: whether epsilon was asked for, rather than a default.

    Raises:
      InputError: anything that the user can mend.
    """
    with _undone_if_it_fails() as undone:
        return _prepare(settings, workdir, Keys.generate(), True, epsilon_given, observers, undone)


def prepare_with_public_keys(
    settings: Settings, keys: Keys, workdir: str | None = None, *, observers: Sequence[Observer] = ()
) -> Trainer:
    """As `prepare`, for a study of public data whose keys are nobody's secret, so that it can be repeated anywhere.

    Formal guarantee: the run's ledger says in its first line that the keys are no secret, and no report, audit or sum
    of runs derives an epsilon from its noise. Tested by
    tests/training/secrecy_test.py::test_pitfall_15_a_run_with_public_keys_claims_nothing_anywhere.

    Raises:
      ValueError: the target is finite.
      InputError: anything that the user can mend.
    """
    if math.isfinite(settings.epsilon):
        raise ValueError("a run with a finite target epsilon needs secret keys")
    with _undone_if_it_fails() as undone:
        return _prepare(settings, workdir, keys, False, True, observers, undone)


def _prepare(
    settings: Settings,
    workdir: str | None,
    new_keys: Keys,
    secret_keys: bool,
    epsilon_given: bool,
    observers: Sequence[Observer],
    undone: contextlib.ExitStack,
) -> Trainer:
    """The Trainer of a run.

    Args:
      undone: closed if the run cannot be prepared.
    """
    observers = observers if processes.is_first() else ()
    objective = objective_of(settings)
    start, tokenizer = objective.start, objective.tokenizer
    named = dataclasses.replace(
        settings, model=start.name, tokenizer=data.tokenizer_of(settings), mesh=memory.resolve_mesh(settings, objective)
    )
    shape = mesh_lib.shape(named.mesh)
    clipping_choice.check(settings.clipping, settings.remat, shape)
    objective = _on(objective, shape)
    if settings.kind_of_canary == GRADIENT:
        if shape.model > 1 or shape.fully_sharded:
            raise InputError("`canary_kind`=gradient needs whole gradients on every device: give `mesh`=data:N")
        if settings.clipping == AUTO:
            settings = settings.replaced(clipping=EXAMPLE_SCAN)
    place = workdir or f"runs/{named.digest()[:8]}"
    agreement.on_settings(named.as_dict() | {"workdir": place, "epsilon_given": epsilon_given})
    mirror: Mirror | None = None
    path = pathlib.Path(place)
    if is_address(place):
        path = user_cache.folder() / "copies" / f"of process {processes.number()}"  # which the first one does not use

    def mirrored() -> None:
        nonlocal mirror, path
        if is_address(place):
            mirror = _mirror_of(place)
            path = mirror.folder
            undone.callback(mirror.close)

    processes.from_first(mirrored)
    agreement.on_environment(environment.description(shape))
    run: RunDirectory | None = None

    def begin() -> dict[str, Any]:
        nonlocal run
        run = run_lib.open_existing(path, mirror)
        if run is None:
            return {"keys": new_keys.as_hex(), "secret": secret_keys, "config": None}
        run.check_format()
        return {"keys": run.keys.as_hex(), "secret": run.has_secret_keys(), "config": run.config()}

    told = processes.from_first(begin)
    keys, begun = Keys.of_hex(told["keys"]), told["config"]

    with phase(observers, "reading the data"):
        found = data.read(settings, tokenizer, start.model.vocab_size, keys.holdout)
    privacy_unit, source, remarks = found.privacy_unit, found.units, _remarks(settings, found)
    if (
        settings.neighbouring_relation == ADD_OR_REMOVE
        and settings.holdout_fraction
        and source.num_units > holdout.MOST_LISTED
    ):
        raise InputError(
            f"of more than {holdout.MOST_LISTED} units a share is held out, which follows their number, and that is"
            " private under `neighbouring_relation`=add_or_remove: give `holdout_fraction`=0"
        )
    training, held_out = holdout.split(source, keys.holdout, settings.holdout_fraction)
    canaries = _canaries(settings, objective, keys.holdout, path if begun else None)
    planted = training if canaries is None else Planted(training, canaries)
    evaluation = _evaluation(settings, objective, held_out)
    to_count = _to_count(settings, privacy_unit, tokenizer, training)
    shared = None if found.users is None else training.num_units
    num_units = planted.num_units if found.users is None else found.users
    places = (settings.num_units or num_units) * settings.items_per_unit
    settings = settings.with_fitting_batch(places if shared is None else shared)
    plan_lib.check(settings, num_units, shared)
    # Chosen once: a run that goes on computes as it began.
    if begun:
        strategy, choice = clipping_choice.as_before(settings, begun), None
    else:
        with phase(observers, "choosing how to clip"):
            strategy, choice = clipping_choice.resolve(settings, named.mesh, objective, observers)
    clipping_choice.check(strategy.name, settings.remat, shape)
    trained = decoder.count(objective.shapes()[0])
    with phase(observers, "solving for the noise"):
        plan = plan_lib.resolve(
            settings,
            num_units,
            trained,
            named.mesh,
            strategy,
            epsilon_given=epsilon_given,
            begun=begun,
            shared_items=shared,
        )
    config = named.as_dict() | _whole_names(named) | {"batch_size": settings.batch_size, "privacy_unit": privacy_unit}
    config |= plan.resolved | settings.units
    fingerprint = (source if canaries is None else Planted(source, canaries)).fingerprint(keys.fingerprint)
    seal = run_lib.seal_of(keys, config)
    seal_key = seal.public.hex() if isinstance(seal, Signature) else None
    facts = start_event(
        plan,
        config,
        objective,
        held_out.num_units,
        secret_keys=told["secret"],
        seal_key=seal_key,
        prompts=() if to_count is None else to_count.prompts,
        canaries=canaries_lib.registered(settings, canaries, plan.mechanism.sampling_probability),
    )
    given = evaluation if settings.eval_data is not None else None
    of_evaluation = "" if given is None else given.source.fingerprint(keys.fingerprint)
    agreement.on_data(f"{fingerprint} {of_evaluation}")
    as_given = {name: getattr(named, name) for name in _whole_names(named)}  # whole paths may differ between machines
    agreement.on_settings(config | as_given | {"init_from's content": facts["init_sha256"]})

    def create_or_check() -> None:
        nonlocal run
        if run is None:
            here = environment.description(mesh_lib.shape(plan.mesh), plan.mechanism.noise.is_exact)
            facts_here = facts | {"environment": here, "program": f"dpgemma {dpgemma.__version__}"}
            private = {} if canaries is None else {run_files.CANARIES: canaries.as_bytes()}
            run = run_lib.create(path, config, keys, fingerprint, facts_here, mirror, private)
        else:
            run.check_resumable(config, fingerprint, facts)

    processes.from_first(create_or_check)
    # Else that of the first process, which has it locked.
    run = run or RunDirectory(path, address=place if is_address(place) else None)
    agreement.on_folder(run)
    if processes.is_first():
        run.remark(remarks)
    for observer in observers:
        observer.inform(plan_lib.summary(plan, start.name, place))
        observer.inform(f"a unit is {words.unit_text(facts)}")
        for field in () if found.people is None else found.people.fields:
            observer.warn(
                f"records have a field {field!r}, and no person is protected by it: `privacy_unit`=user"
                f" `user_field`={field} protects all of a person's records together"
            )
        for path in run.open_to_others():
            observer.warn(f"others can read {path}: take their rights away with chmod -R go= {run.private}")
        for remark in remarks:
            observer.confide(remark)
        observer.inform(_learning(settings, objective))
        if choice:
            observer.inform(choice)
        if seal_key:
            observer.inform(f"the ledger's public key is {seal_key}: give it to whoever audits this run")
    drawn = Items(planted) if settings.items_per_unit > 1 and shared is None else planted
    return Trainer(
        plan,
        objective,
        drawn,
        run,
        observers,
        held_out=held_out,
        evaluation=evaluation,
        histogram=to_count,
        canaries=canaries,
    )


def _canaries(settings: Settings, objective: CausalLM, secret: bytes, folder: pathlib.Path | None) -> Canaries | None:
    """What is planted, in every process.

    Args:
      secret: of the hold-out.
      folder: of a run that goes on, whose canaries are kept there; None for a new one.

    Raises:
      InputError: canaries that cannot be made, or are not there any more.
    """
    if not settings.canaries:
        return None

    def first() -> str:
        canaries = canaries_lib.made(settings, objective, secret) if folder is None else kept(folder, secret)
        return canaries.as_bytes().hex()

    return Canaries.of_bytes(bytes.fromhex(processes.from_first(first)), seed_of(secret))


def _to_count(settings: Settings, privacy_unit: str, tokenizer: Tokenizer, training: UnitSource) -> UnitsToCount | None:
    """What is counted before the first step.

    Raises:
      InputError: no list of prompts, or units that have none.
    """
    if settings.prompt_histogram is None:
        return None
    if privacy_unit == SEQUENCE:
        raise InputError(
            "rows of packed text answer no prompts: drop `prompt_histogram`, or give records with prompt and response,"
            " or with messages"
        )
    data_path, prompts_path = pathlib.Path(settings.data), pathlib.Path(settings.prompt_histogram)
    if data_path.exists() and prompts_path.exists() and data_path.samefile(prompts_path):
        raise InputError("`prompt_histogram` is `data` itself: give a public list, which nobody took from the data")
    texts, weights = prompts_lib.read(prompts_path, "prompt_histogram")
    if weights is not None:
        raise InputError(
            f"`prompt_histogram`={settings.prompt_histogram} has weights, which are to be counted: leave them out"
        )
    return UnitsToCount(training, texts, prompts_lib.beginnings(texts, tokenizer, settings.sequence_length))


def _evaluation(settings: Settings, objective: CausalLM, held_out: UnitSource) -> UnitsToMeasure | None:
    """What is measured while steps are taken.

    Raises:
      InputError: data that cannot be read as records.
    """
    if settings.eval_data is None:
        every = settings.eval_every
        return None if every is None else UnitsToMeasure(held_out, every, "held-out units", is_public=False)
    found = data.records_of(
        settings.eval_data, objective.tokenizer, objective.length, objective.model.vocab_size, settings.text_field
    )
    every = settings.eval_every or settings.checkpoint_every
    return UnitsToMeasure(found.units, every, settings.eval_data, settings.public_eval_data)


def _whole_names(named: Settings) -> dict[str, Any]:
    """What names the model that a run starts from and its tokenizer, as they are found from every folder."""
    models = {"init_from": named.init_from, "tokenizer": named.tokenizer}
    return {
        name: value if value in (None, tokenizer_lib.BYTE) else hub.absolute(value) for name, value in models.items()
    }


def _learning(settings: Settings, objective: CausalLM) -> str:
    """What is trained, and how, for the operator."""
    trained, frozen = (decoder.count(tree) for tree in objective.shapes())
    what = f"{trained:,} of {trained + frozen:,} parameters are trained"
    rate = f"learning rate {settings.learning_rate:g} after {settings.warmup_steps} steps of warm-up"
    fitting = (
        f" (by the model's size: {', '.join(f'`{name}`' for name in settings.omitted)})" if settings.omitted else ""
    )
    return f"{what}, in rows of {settings.sequence_length}, with {rate}, in {settings.dtype}{fitting}"


def _mirror_of(address: str) -> Mirror:
    """What takes a run to an address of an object storage.

    Raises:
      InputError: the address cannot be used, or another process trains there.
    """
    if processes.count() > 1 and not mirror_lib.writes_checkpoints_itself(address):
        raise InputError(
            f"several processes cannot write their parts of checkpoints to {address}: give a folder on a disk that they"
            " share, or gs://BUCKET/FOLDER"
        )
    return Mirror(address, user_cache.folder() / "copies")


def _remarks(settings: Settings, found: Found) -> list[str]:
    """What is worth knowing of single records or units: for the operator alone, because one of them decides it."""
    items = settings.items_per_unit
    if items == 1 or found.users is not None:
        return found.remarks
    filled = found.rows / (found.units.num_units * items)
    return [f"{filled:.0%} of the rows that are drawn hold text, the others are empty", *found.remarks]


def objective_of(settings: Settings) -> CausalLM:
    """What the settings say is learned, and by which model.

    Raises:
      InputError: a model or tokenizer that does not exist, or that does not fit the other settings.
    """
    start, tokenizer = start_of(settings), data.load_tokenizer(settings)
    tokenizer_lib.check_vocabulary(tokenizer, start.model.vocab_size)
    make = ProbedCausalLM if settings.kind_of_canary == GRADIENT else CausalLM
    objective = make(
        start,
        tokenizer,
        settings.sequence_length,
        settings.dtype,
        settings.remat,
        settings.attention,
        across_documents=settings.attend_across_documents,
    )
    shape = wanted(settings.mesh)
    return objective if shape is None else _on(objective, shape)


def _on(objective: CausalLM, mesh: MeshShape) -> CausalLM:
    """The objective as it is computed on a mesh."""
    return dataclasses.replace(objective, vocabulary_is_spread=mesh.model > 1)


def start_of(settings: Settings) -> start_lib.StartingPoint:
    """The model that `model`, or `init_from` and the settings of adapters, name.

    Raises:
      InputError: an unknown preset, a directory that is none, or rows that the model cannot take.
    """
    if settings.init_from is None:
        point = start_lib.of_preset(settings.model)
    elif settings.model is not None:
        raise InputError("`init_from` brings its own architecture: drop `model`")
    else:
        point = start_lib.of_directory(
            hub.located(settings.init_from), settings.lora_rank, settings.lora_alpha, settings.lora_targets
        )
    start_lib.check(point, settings.sequence_length, settings.attention)
    return point


def start_event(
    plan: Plan,
    config: dict[str, Any],
    objective: Objective,
    held_out: int,
    *,
    secret_keys: bool,
    seal_key: str | None = None,
    prompts: tuple[str, ...] = (),
    canaries: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The public facts with which a ledger opens; the report is written from these and the steps alone.

    Args:
      config: every resolved setting.
      held_out: units held out.
      secret_keys: whether the keys came from the operating system.
      seal_key: public key of the ledger's signatures, where it has such.
      prompts: whose units are counted; none where there is no histogram.
      canaries: what is registered of them.
    """
    trainable, frozen = objective.shapes()
    trained = decoder.count(trainable)
    facts = {
        "format": FORMAT,
        **plan.mechanism.facts(),
        "secret_keys": secret_keys,
        "epsilon": plan.epsilon,
        "delta": plan.delta,
        "privacy_unit": config["privacy_unit"],
        **({name: config[name] for name in _OF_UNITS} if config["privacy_unit"] in OF_SEVERAL_ROWS else {}),
        **({"skip_bad_records": True} if config["skip_bad_records"] else {}),
        **(
            {"histogram_sha256": labels_sha256(prompts), "histogram_noise": plan.also[0].noise_multiplier}
            if plan.also
            else {}
        ),
        **(canaries or {}),
        **objective.facts,
        "parameters": trained + decoder.count(frozen),
        "trained_parameters": trained,
        "seal": run_lib.seal_name(config["ledger_seal"]),
        "seal_key": seal_key,
        # Under add_or_remove a count of units would be a count of the private data.
        "held_out_units": held_out if plan.mechanism.neighbouring_relation == ZERO_OUT else None,
    }
    encoded: dict[str, Any] = run_files.encode(facts)
    return encoded
