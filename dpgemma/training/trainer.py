"""A training run from its first or its resumed step to its report."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from accounting.ledger.histogram import ReleasedHistogram
from accounting.mechanism.histogram import unit_steps
from dpgemma.data import pipeline
from dpgemma.data.batch import Batch, collate
from dpgemma.data.canaries import Canaries
from dpgemma.data.source import UnitSource
from dpgemma.data.text import prompts
from dpgemma.objectives.protocol import Objective
from dpgemma.privacy import clip_norm
from dpgemma.privacy.noise import noise_keys
from dpgemma.privacy.samplers import sampler_of
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding import place, processes
from dpgemma.sharding.place import Layout
from dpgemma.training import attack, environment, memory, speed
from dpgemma.training import canaries as canaries_lib
from dpgemma.training import histogram as histogram_lib
from dpgemma.training import optimizer as optimizer_lib
from dpgemma.training.checkpoint import Checkpoints
from dpgemma.training.evaluation import measure
from dpgemma.training.observers import Evaluated, Observer
from dpgemma.training.plan import Plan
from dpgemma.training.record import Record
from dpgemma.training.run import RunDirectory
from dpgemma.training.step import TrainState, TrainStep, make_train_step, state_shardings


@dataclasses.dataclass(frozen=True)
class UnitsToMeasure:
    """Units that are measured while steps are taken.

    Attributes:
      source: of the units.
      every: updates between two measurements.
      what: the units in words.
      is_public: whether the operator declared them to be nobody's secret.
    """

    source: UnitSource
    every: int
    what: str
    is_public: bool


@dataclasses.dataclass(frozen=True)
class UnitsToCount:
    """Training units that are counted by the prompts that they answer.

    Attributes:
      source: of the units.
      prompts: public.
      numbers: of the prompts, by what rows begin with (data.text.prompts.beginnings).
    """

    source: UnitSource
    prompts: tuple[str, ...]
    numbers: Mapping[bytes, int]


class Trainer:
    """One run. Its plan's mechanism is all that sampler, step, ledger and report see of it.

    It prints nothing, changes nothing of the process, and has its keys from the opened run. Where several processes
    train one run, each of them has a Trainer, and all call its methods.

    >>> import pathlib, tempfile, dpgemma
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "notes.txt").write_text("seen today, cough, rest. " * 200)
    >>> settings = dpgemma.Settings(
    ...     model="ladder_20k", data=str(folder / "notes.txt"), sequence_length=16, batch_size=16, steps=2,
    ...     mesh="data:1",
    ... )
    >>> trainer = dpgemma.prepare(settings, str(folder / "run"))
    >>> sorted(trainer.train())
    ['bits_per_byte', 'nats_per_token', 'token_accuracy']
    >>> dpgemma.load(str(folder / "run")).step
    2

    Attributes:
      first_step: with which `train` began.
    """

    def __init__(
        self,
        plan: Plan,
        objective: Objective,
        source: UnitSource,
        run: RunDirectory,
        observers: Sequence[Observer] = (),
        *,
        held_out: UnitSource | None = None,
        evaluation: UnitsToMeasure | None = None,
        histogram: UnitsToCount | None = None,
        canaries: Canaries | None = None,
    ) -> None:
        """Takes the run as it was opened or created.

        Args:
          source: the training units.
          held_out: units to measure when all steps are taken.
          evaluation: units to measure meanwhile.
          histogram: of the training units, where one is released before the first step.
          canaries: that are planted among the training units.

        Raises:
          InputError: the steps of the plan would exceed its target.
          ValueError: the source has other columns than the objective reads, or the plan has no histogram and there is
            one to release, or the reverse.
        """
        if (histogram is None) != (not plan.also):
            raise ValueError("a plan with a histogram needs units to count, and only such a plan")
        if dict(source.spec) != dict(objective.spec):
            raise ValueError(f"the objective reads rows of {dict(objective.spec)}, the data have {dict(source.spec)}")
        self.plan, self.objective, self.source, self.run = plan, objective, source, run
        self.held_out, self.evaluation, self.histogram, self.canaries = held_out, evaluation, histogram, canaries
        self.mechanism = plan.mechanism
        self.record = Record(run, plan, observers)
        self.mesh = mesh_lib.make(plan.mesh)
        self.optimizer = optimizer_lib.make(plan.optimization)
        self.places = Layout(self.mesh).places(objective.axes(), objective.shapes())
        self.dp_step: TrainStep = make_train_step(
            objective.loss,
            self.optimizer,
            self.mechanism,
            self.mesh,
            plan.strategy,
            self.places,
            objective.cast,
            canaries_lib.coordinates_of(canaries),
        )
        self.first_step = 0

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        """Lets others have the run."""
        self.run.unlock()

    @property
    def waits_for_checkpoints(self) -> bool:
        """Whether no step is taken while a checkpoint is written: on a CPU that would take memory and time from it."""
        return bool(self.mesh.devices.flat[0].platform == "cpu")

    def train(self, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Runs to the last step.

        Args:
          stop: asked before the first step and after every one; once it says so, in any process, the run is saved and
            ends there.

        Returns:
          The objective's measures of the held-out units, empty where there are none; None if it stopped before the last
          step.

        Raises:
          InputError: lost steps that would have to be executed again elsewhere, beyond the target; a step that was
            saved before with another state; checkpoints of another ledger; a full disk.
        """
        with (
            Checkpoints(
                self.run.checkpoint_files, self.plan.keep_checkpoints, self.run.checkpoint_mirror
            ) as checkpoints,
            self.record.opened(),
        ):
            self.first_step, state, frozen = self._start_or_resume(checkpoints)
            step, state = self._take_steps(self.first_step, state, frozen, checkpoints, stop)
            checkpoints.settle(self.record.ledger)
            if step < self.mechanism.steps:
                self.record.stopped(step)
                return None
            measured = self._measure(state.parameters, frozen, self.held_out, "held-out units")
            self._attack(state.parameters, frozen)
            with self.record.phase("writing the report"):
                self.record.finish(measured)
            return measured

    def _release_histogram(self) -> None:
        """The first process counts, and releases what it has counted, while the others wait.

        Nothing may be left that could refuse the run: another one would have to release another histogram.
        """
        wanted = self.histogram
        if wanted is None:
            return
        noise = self.plan.also[0].noise_multiplier

        def make(key: bytes) -> ReleasedHistogram:
            unit = unit_steps(noise)
            with self.record.phase("counting prompts", wanted.source.num_units) as advance:
                counts = prompts.counted(wanted.source, wanted.numbers, len(wanted.prompts), unit, advance)
            return histogram_lib.released(wanted.prompts, counts, unit, noise, key)

        processes.from_first(lambda: self.record.release_histogram(make))

    def _start_or_resume(self, checkpoints: Checkpoints) -> tuple[int, TrainState, Any]:
        replicated = place.replicated(self.mesh)
        places = self.places
        trainable, frozen = self.objective.init(self.plan.seed, (places.at_rest, places.frozen))
        shardings = state_shardings(self.optimizer, places.at_rest, self.mesh)
        norm = clip_norm.start(self.mechanism.clip)
        state = TrainState(
            trainable,
            jax.jit(self.optimizer.init, out_shardings=shardings.optimizer_state)(trainable),
            None if norm is None else jax.device_put(norm, replicated),
            self.dp_step.noiser.init(trainable),
        )
        here = environment.description(mesh_lib.shape(self.plan.mesh), self.mechanism.noise.is_exact)
        same_bits = environment.is_deterministic(here, jax.devices()[0].platform)
        if self.record.is_untouched(here, same_bits):
            return 0, state, frozen
        step, state = checkpoints.restore(state, self.record.ledger, self.record.warn) or (0, state)
        if step < self.mechanism.steps:
            self.record.resume(step, here, same_bits)
        return step, state, frozen

    def _take_steps(
        self, first: int, state: TrainState, frozen: Any, checkpoints: Checkpoints, stop: Callable[[], bool]
    ) -> tuple[int, TrainState]:
        """Takes steps to the last one, or until it shall stop: (steps taken, state).

        Formal guarantee: the line of every step is in the ledger's file before the devices are given that step, so no
        result is seen, by an observer or after a crash, that the ledger does not know. Tested by
        tests/training/run_test.py::test_a_step_is_in_the_ledger_before_it_is_computed.

        Where several processes train, this holds for the devices of the first one, which writes the line. The new state
        needs their part of the sum, so no other process has it before the line is written: that is argued, not tested.
        """
        plan, steps = self.plan, self.mechanism.steps
        if first == steps or processes.any_of(stop()):
            return first, state
        keys = self.record.step_keys()
        prepared = pipeline.prepared(functools.partial(self._draw, keys.sampling), first, steps)
        batches = ((count, place.from_rows(self.mesh, parts)) for count, parts in prepared)
        drawn = next(batches)
        with self.record.phase("compiling the step"):
            dp_step = self.dp_step.compiled(state, frozen, drawn[1], noise_keys(keys.noise, first))
        self._check_memory(dp_step)
        if self.record.is_kept_here:
            self.record.inform(self._needs(dp_step))
        self._release_histogram()
        observed = 0 if self.canaries is None or self.dp_step.probes is None else self.canaries.count
        with self.record.of_steps(first, self.objective.volume, observed) as record:
            for t in range(first, steps):
                done, (count, batch) = t + 1, drawn
                due = done % plan.checkpoint_every == 0 or done == steps
                record.before(t)
                result = dp_step(state, frozen, batch, noise_keys(keys.noise, t))
                if not due:
                    drawn = next(batches)  # while the devices compute
                state, stats = jax.block_until_ready(result)
                record.after(t, stats, count)
                checkpoints.tidy()
                stopped = processes.any_of(stop())
                if stopped or due:
                    # In this order a crash leaves a report that says too much, never too little.
                    self.record.report()
                    record.flush()
                    checkpoints.save(done, state, self.record.ledger, metrics_sha256=record.metrics_sha256)
                    if self.waits_for_checkpoints:
                        checkpoints.settle(self.record.ledger)
                if stopped:
                    return done, state
                self._evaluate(done, state.parameters, frozen)
                if due and done < steps:
                    drawn = next(batches)  # data that cannot be read cost no step that was saved
        return steps, state

    def _check_memory(self, dp_step: TrainStep) -> None:
        """Refuses a step that does not fit, while nothing was computed.

        Raises:
          InputError: it does not.
        """

        def compare() -> None:
            arrays = memory.Arrays.of(self.objective, self.mesh, self.optimizer)
            needed, known = memory.of_process(dp_step.memory, arrays, self.mesh), memory.limit(self.mesh)
            if needed is not None and known is not None:
                here = known * memory.devices_here(self.mesh)
                memory.check(needed, here, self.plan.strategy.microbatch_size)

        processes.from_all(compare)

    def _needs(self, dp_step: TrainStep) -> str:
        """What the run needs of this computer, as far as it follows from public facts."""
        arrays = memory.Arrays.of(self.objective, self.mesh, self.optimizer)
        needed = memory.of_process(dp_step.memory, arrays, self.mesh)
        known = memory.limit(self.mesh)
        steps = self.mechanism.steps - self.first_step
        seconds = speed.expected_seconds(self.objective, self.mechanism, self.mesh) * steps / self.mechanism.steps
        return "; ".join(
            [
                "expected, data not counted: "
                + (f"{needed / 2**30:.2f} GiB of memory" if needed is not None else "memory unknown")
                + (f" of {known * memory.devices_here(self.mesh) / 2**30:.1f}" if known is not None else ""),
                f"roughly {speed.in_words(seconds)} for {steps} steps",
                f"{self.plan.keep_checkpoints} checkpoints of {memory.of_checkpoint(arrays) / 2**20:.0f} MiB are kept",
            ]
        )

    def _draw(self, key: bytes, t: int) -> tuple[int, dict[int, Batch]]:
        """The number of units of batch t, and the part of the batch for each row of devices here.

        Every process draws the whole batch, and reads the units of its own devices.

        Formal guarantee: each drawn unit lies on exactly one row of devices, of whatever process. Tested by
        tests/data/data_test.py::test_the_rows_of_devices_hold_their_own_parts and
        tests/training/processes_test.py::test_the_states_of_a_run_do_not_depend_on_the_number_of_processes.
        """
        units = sampler_of(self.mechanism.sampling).draw(key, t)
        rows = place.rows(self.mesh)
        slots = self.plan.slots // rows

        return len(units), {
            number: collate(self.source, units, slots, (number, rows)) for number in place.rows_here(self.mesh)
        }

    def _evaluate(self, steps: int, trainable: Any, frozen: Any) -> None:
        """Measures the units of `evaluation` where they are due. What is found decides nothing."""
        wanted = self.evaluation
        if wanted is not None and steps % wanted.every == 0:
            figures = self._measure(trainable, frozen, wanted.source, wanted.what)
            self.record.evaluated(Evaluated(steps, figures, wanted.what, wanted.is_public))

    def _attack(self, trainable: Any, frozen: Any) -> None:
        """Measures what the run's canaries show, by the protocol that its ledger registered."""
        canaries = self.canaries
        if canaries is None:
            return
        with self.record.phase("attacking the canaries", 2 * canaries.count) as advance:
            scores = None
            if canaries_lib.coordinates_of(canaries) is None:
                gathered = jax.jit(lambda x: x, out_shardings=self.places.in_use)
                start = self.objective.init(self.plan.seed, (self.places.at_rest, self.places.frozen))[0]
                trained, start = (gathered(trainable), frozen), (gathered(start), frozen)
                scores = attack.text_scores(self.objective, trained, start, canaries, advance)
            self.record.attacked(canaries, scores)

    def _measure(self, trainable: Any, frozen: Any, source: UnitSource | None, what: str) -> dict[str, float]:
        if source is None or source.num_units == 0:
            return {}
        gathered = jax.jit(lambda x: x, out_shardings=self.places.in_use)(trainable)
        most = min(source.num_units, self.plan.eval_limit)
        with self.record.phase(f"measuring {what}", most) as advance:
            return measure(self.objective, gathered, frozen, source, most=most, advance=advance).figures()
