"""A training run from its first or its resumed step to its report."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from accounting import run_files
from accounting.accountant import Accountant
from accounting.curve import EpsilonCurve
from accounting.errors import InputError
from accounting.ledger import events, executed
from accounting.ledger.chain import Ledger
from dpgemma.data.batch import collate
from dpgemma.data.source import UnitSource
from dpgemma.objectives.protocol import Objective
from dpgemma.privacy import clip_norm
from dpgemma.privacy.noise import noise_keys
from dpgemma.privacy.samplers import sampler_of
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding import place
from dpgemma.training import environment, evaluation, metrics, report_files
from dpgemma.training import optimizer as optimizer_lib
from dpgemma.training.checkpoint import Checkpoints
from dpgemma.training.observers import Observer, Private, Released
from dpgemma.training.plan import Plan
from dpgemma.training.run import RunDirectory
from dpgemma.training.step import TrainState, TrainStep, make_train_step


class Trainer:
    """One run. Its plan's mechanism is all that sampler, step, ledger and report see of it.

    It prints nothing, changes nothing of the process, and has its keys from the opened run.

    >>> import pathlib, tempfile, dpgemma
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "notes.txt").write_text("seen today, cough, rest. " * 200)
    >>> settings = dpgemma.Settings(
    ...     model="ladder_20k", data=str(folder / "notes.txt"), sequence_length=16, batch_size=16, steps=2,
    ...     mesh="data:1",
    ... )
    >>> trainer = dpgemma.prepare(settings, str(folder / "run"))
    >>> sorted(trainer.train())
    ['bits_per_byte']
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
    ) -> None:
        """Takes the run as it was opened or created.

        Args:
          source: the training units.
          held_out: units to measure when all steps are taken.

        Raises:
          InputError: the steps of the plan would exceed its target.
          ValueError: the source has other columns than the objective reads.
        """
        if dict(source.spec) != dict(objective.spec):
            raise ValueError(f"the objective reads rows of {dict(objective.spec)}, the data have {dict(source.spec)}")
        self.plan, self.objective, self.source, self.run = plan, objective, source, run
        self.observers, self.held_out = tuple(observers), held_out
        self.mechanism = plan.mechanism
        self.accountant = Accountant(self.mechanism, claimed=math.isfinite(plan.epsilon))
        if self.accountant.upper(plan.delta) > plan.epsilon:
            raise InputError(
                f"{self.mechanism.steps} steps would exceed epsilon {plan.epsilon:g}: take fewer steps or start another"
                " run"
            )
        self.mesh = mesh_lib.make(plan.mesh)
        self.optimizer = optimizer_lib.make(plan.optimization)
        self.dp_step: TrainStep = make_train_step(
            objective.loss, self.optimizer, self.mechanism, self.mesh, plan.strategy
        )
        self.first_step = 0

    def train(self, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Runs to the last step.

        Args:
          stop: asked before the first step and after every one; once it says so, the run is saved and ends there.

        Returns:
          The objective's measures of the held-out units, empty where there are none; None if it stopped before the last
          step.
        """
        with Checkpoints(self.run.checkpoints, self.plan.keep_checkpoints) as checkpoints:
            with contextlib.closing(self.run.open_ledger()) as ledger:
                for deviation in executed.of(ledger.records).deviations:
                    self._warn(deviation)
                self.first_step, state, frozen = self._start_or_resume(checkpoints, ledger)
                step, state = self._take_steps(self.first_step, state, frozen, checkpoints, ledger, stop)
                if step < self.mechanism.steps:
                    self._inform(
                        f"stopped at step {step} of {self.mechanism.steps}; the same command goes on from here"
                    )
                    return None
                return self._finish(state.parameters, frozen, ledger)

    def _inform(self, message: str) -> None:
        for observer in self.observers:
            observer.inform(message)

    def _warn(self, message: str) -> None:
        for observer in self.observers:
            observer.warn(message)

    def _start_or_resume(self, checkpoints: Checkpoints, ledger: Ledger) -> tuple[int, TrainState, Any]:
        replicated = place.replicated(self.mesh)
        of_trainable, of_frozen = (self.plan.layout.shardings(self.mesh, axes) for axes in self.objective.axes())
        trainable, frozen = self.objective.init(self.plan.seed, (of_trainable, of_frozen))
        norm = clip_norm.start(self.mechanism.clip)
        state = TrainState(
            trainable,
            jax.jit(self.optimizer.init, out_shardings=replicated)(trainable),
            None if norm is None else jax.device_put(norm, replicated),
            self.dp_step.noiser.init(trainable),
        )
        here = environment.description()
        if len(ledger.records) == 1 and ledger.records[0]["environment"] == here:  # the start event alone
            return 0, state, frozen
        step, state = checkpoints.restore(state, ledger, self._warn) or (0, state)
        if step < self.mechanism.steps:
            environment.check_repeats(ledger.records, step, here, jax.devices()[0].platform)
            ledger.append(events.RESUME, step=step, environment=here)
            self._inform(f"resuming at step {step} of {self.mechanism.steps}")
        return step, state, frozen

    def _take_steps(
        self,
        first: int,
        state: TrainState,
        frozen: Any,
        checkpoints: Checkpoints,
        ledger: Ledger,
        stop: Callable[[], bool],
    ) -> tuple[int, TrainState]:
        plan, mechanism, keys = (
            self.plan,
            self.mechanism,
            self.run.step_keys(ledger.records[0], environment.description()),
        )
        if first == mechanism.steps or stop():
            return first, state
        sampler = sampler_of(mechanism.sampling)
        curve = EpsilonCurve(self.accountant, plan.delta)
        rate = optimizer_lib.learning_rate(plan.optimization)
        slots = mechanism.max_batch_size
        assert slots is not None, "a run has a cap, which fixes the shapes"
        with (
            self._watched(first),
            metrics.MetricsFile(self.run.metrics_file, first) as public,
            metrics.MetricsFile(self.run.private_metrics_file, first) as private,
        ):
            for t in range(first, mechanism.steps):
                units = sampler.draw(keys.sampling, t)
                batch = collate(self.source, units, slots).dealt(self.mesh.size)
                ledger.append_step(t, mechanism.group)
                state, stats = jax.block_until_ready(self.dp_step(state, frozen, batch, noise_keys(keys.noise, t)))

                done = t + 1
                released = Released(done, curve.at(done), float(rate(t)))
                raw = Private(**metrics.private_summary(stats, len(units)))
                public.write(step=t, epsilon=run_files.encode(released.epsilon), learning_rate=released.learning_rate)
                private.write(step=t, **dataclasses.asdict(raw))
                for observer in self.observers:
                    observer.step(released, raw)
                stopped = stop()
                if stopped or done % plan.checkpoint_every == 0 or done == mechanism.steps:
                    # In this order a crash leaves a report that says too much, never too little.
                    report_files.write(self.run, ledger, self.accountant, with_page=False)
                    checkpoints.save(done, state, ledger, metrics_sha256=public.digest)
                if stopped:
                    return done, state
        return mechanism.steps, state

    @contextlib.contextmanager
    def _watched(self, first: int) -> Any:
        for observer in self.observers:
            observer.begin(self.plan, first, self.objective.volume)
        try:
            yield
        finally:
            for observer in self.observers:
                observer.end()

    def _finish(self, trainable: Any, frozen: Any, ledger: Ledger) -> dict[str, float]:
        measured = {} if self.held_out is None else evaluation.measure(self.objective, trainable, frozen, self.held_out)
        with open(self.run.held_out_file, "a") as file:
            file.write(json.dumps({"step": self.mechanism.steps, **measured}) + "\n")
        if not ledger.finished:
            ledger.append(events.EVALUATION, step=self.mechanism.steps, units="held_out")
            ledger.append(events.FINISH, step=self.mechanism.steps)
            ledger.sync()
        report_files.write(self.run, ledger, self.accountant, with_page=True)
        self._inform(
            f"ledger head {ledger.head}: deposit it elsewhere, and nobody can rewrite this run's ledger unnoticed"
        )
        return measured
