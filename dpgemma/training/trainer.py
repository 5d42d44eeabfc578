"""A training run from its first or its resumed step to its report."""

import contextlib
import dataclasses
import json
import math
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import jax

from accounting import rounding, run_files
from accounting.accountant import Accountant
from accounting.curve import EpsilonCurve
from accounting.errors import InputError
from accounting.ledger import events, executed
from accounting.ledger.chain import Ledger
from accounting.ledger.history import History
from dpgemma.data.batch import Batch, collate
from dpgemma.data.source import UnitSource
from dpgemma.objectives.protocol import Objective
from dpgemma.privacy import clip_norm
from dpgemma.privacy.noise import noise_keys
from dpgemma.privacy.samplers import sampler_of
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.sharding import place
from dpgemma.sharding.place import Layout
from dpgemma.training import environment, evaluation, metrics, report_files
from dpgemma.training import optimizer as optimizer_lib
from dpgemma.training.checkpoint import Checkpoints
from dpgemma.training.observers import Observer, Private, Released
from dpgemma.training.plan import Plan
from dpgemma.training.run import RunDirectory
from dpgemma.training.step import TrainState, TrainStep, make_train_step, state_shardings

# In which another machine may find another epsilon for the same facts.
_LAST_BITS = 1e-9


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
        self.accountant = self._accountant(repeated=0)
        if self.accountant.upper(plan.delta) > plan.epsilon * (1 + _LAST_BITS):
            raise InputError(
                f"{self.mechanism.steps} steps would exceed epsilon {plan.epsilon:g}: take fewer steps or start another"
                " run"
            )
        self.mesh = mesh_lib.make(plan.mesh)
        self.optimizer = optimizer_lib.make(plan.optimization)
        self.places = Layout(self.mesh).places(objective.axes(), objective.shapes())
        self.dp_step: TrainStep = make_train_step(
            objective.loss, self.optimizer, self.mechanism, self.mesh, plan.strategy, self.places, objective.cast
        )
        self.first_step = 0

    def train(self, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Runs to the last step.

        Args:
          stop: asked before the first step and after every one; once it says so, the run is saved and ends there.

        Returns:
          The objective's measures of the held-out units, empty where there are none; None if it stopped before the last
          step.

        Raises:
          InputError: lost steps that would have to be executed again elsewhere, beyond the target; a step that was
            saved before with another state; checkpoints of another ledger; a full disk.
        """
        with Checkpoints(self.run.checkpoints, self.plan.keep_checkpoints, self.run.damaged) as checkpoints:
            with contextlib.closing(self.run.open_ledger()) as ledger:
                for deviation in executed.of(ledger.records).deviations:
                    self._warn(deviation)
                self.first_step, state, frozen = self._start_or_resume(checkpoints, ledger)
                step, state = self._take_steps(self.first_step, state, frozen, checkpoints, ledger, stop)
                if step < self.mechanism.steps:
                    self._inform(
                        f"stopped at step {step} of {self.mechanism.steps}; the same command goes on from here"
                        f" (ledger head {ledger.head})"
                    )
                    return None
                return self._finish(state.parameters, frozen, ledger)

    def _accountant(self, repeated: int) -> Accountant:
        """Of all planned steps and of so many that were executed once more, elsewhere."""
        releases = self.mechanism.replace(steps=self.mechanism.steps + repeated)
        return Accountant(releases, claimed=math.isfinite(self.plan.epsilon))

    def _inform(self, message: str) -> None:
        for observer in self.observers:
            observer.inform(message)

    def _warn(self, message: str) -> None:
        for observer in self.observers:
            observer.warn(message)

    def _start_or_resume(self, checkpoints: Checkpoints, ledger: Ledger) -> tuple[int, TrainState, Any]:
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
        here, platform = environment.description(mesh_lib.shape(self.plan.mesh)), jax.devices()[0].platform
        same_bits = environment.is_deterministic(here, platform)
        untouched = len(ledger.records) == 1  # the start event alone
        if untouched and same_bits and ledger.records[0]["environment"] == here:
            return 0, state, frozen
        step, state = checkpoints.restore(state, ledger, self._warn) or (0, state)
        if step < self.mechanism.steps:
            facts = {"environment": here} | ({} if same_bits else {"continuation": secrets.token_hex(16)})
            self._charge_repeats(ledger.history.with_resume({"kind": events.RESUME, "step": step, **facts}), step)
            before = ledger.history.lineage[-1][1]
            ledger.append(events.RESUME, step=step, **facts)
            after = ledger.history.lineage[-1][1]
            self._inform(f"resuming at step {step} of {self.mechanism.steps}")
            if before != after:
                found = _differing(before, after)
                self._inform(f"this is another environment, so noise differs from here on ({found})")
        return step, state, frozen

    def _charge_repeats(self, history: History, step: int) -> None:
        """Takes steps into account that were executed in another environment, are lost, and are executed once more.

        Formal guarantee: every execution of a step that can give other bits than an earlier one is charged, has its own
        line in the ledger, and keeps the run within its target. Tested by
        tests/training/moving_test.py::test_steps_that_are_repeated_elsewhere_are_charged_again.

        Args:
          history: as it is once the run goes on.
          step: at which the run goes on.

        Raises:
          InputError: with them the run would exceed its target.
        """
        if not history.repeated:
            return
        self.accountant = self._accountant(history.repeated)
        spent = self.accountant.upper(self.plan.delta)
        if spent > self.plan.epsilon * (1 + _LAST_BITS):
            raise InputError(
                f"{history.repeated} steps from step {step} on were executed before, in another environment, and were"
                " lost: executing them once more gives other bits, costs epsilon"
                f" {rounding.upper(rounding.round_up(spent))} in all, and the target is {self.plan.epsilon:g}; go on"
                f" where they were executed ({_places(history)}), or start another run in a new `workdir`"
            )
        self._warn(
            f"{history.repeated} steps that were executed in another environment and lost are executed once more, with"
            " other noise: they are charged again"
        )

    def _take_steps(
        self,
        first: int,
        state: TrainState,
        frozen: Any,
        checkpoints: Checkpoints,
        ledger: Ledger,
        stop: Callable[[], bool],
    ) -> tuple[int, TrainState]:
        """Takes steps to the last one, or until it shall stop: (steps taken, state).

        Formal guarantee: the line of every step is in the ledger's file before the devices are given that step, so no
        result is seen, by an observer or after a crash, that the ledger does not know. Tested by
        tests/training/run_test.py::test_a_step_is_in_the_ledger_before_it_is_computed.
        """
        plan, mechanism = self.plan, self.mechanism
        if first == mechanism.steps or stop():
            return first, state
        keys = self.run.step_keys(ledger.records[0], ledger.history.lineage)
        repeated = ledger.history.repeated
        curve = EpsilonCurve(self.accountant, plan.delta)
        with (
            self._watched(first),
            metrics.MetricsFile(self.run.metrics_file, first) as public,
            metrics.MetricsFile(self.run.private_metrics_file, first) as private,
        ):
            drawn = self._draw(keys.sampling, first)
            for t in range(first, mechanism.steps):
                done, (count, batch) = t + 1, drawn
                due = (t + 1) % plan.checkpoint_every == 0 or t + 1 == mechanism.steps
                ledger.append_step(t, mechanism.group)
                result = self.dp_step(state, frozen, batch, noise_keys(keys.noise, t))
                if not due:
                    drawn = self._draw(keys.sampling, done)  # while the devices compute
                state, stats = jax.block_until_ready(result)

                released = Released(done, curve.at(done + repeated), optimizer_lib.public_rate(plan.optimization, t))
                raw = Private(**metrics.private_summary(stats, count))
                epsilon = run_files.encode(rounding.round_up(released.epsilon))
                public.write(step=t, epsilon=epsilon, learning_rate=released.learning_rate)
                private.write(step=t, **dataclasses.asdict(raw))
                for observer in self.observers:
                    observer.step(released, raw)
                stopped = stop()
                if stopped or due:
                    # In this order a crash leaves a report that says too much, never too little.
                    report_files.write(self.run, ledger, self.accountant, with_page=False)
                    checkpoints.save(done, state, ledger, metrics_sha256=public.digest)
                if stopped:
                    return done, state
                if due and done < mechanism.steps:
                    drawn = self._draw(keys.sampling, done)  # data that cannot be read cost no step that was saved
        return mechanism.steps, state

    def _draw(self, key: bytes, t: int) -> tuple[int, Batch]:
        """The number of units of batch t, and the batch on its way to the devices."""
        units = sampler_of(self.mechanism.sampling).draw(key, t)
        batch = collate(self.source, units, self.plan.slots).dealt(place.rows(self.mesh))
        return len(units), jax.device_put(batch, place.over_units(self.mesh))

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
        measured = {}
        if self.held_out is not None:
            gathered = jax.device_put(trainable, self.places.in_use)
            measured = evaluation.measure(self.objective, gathered, frozen, self.held_out)
        with open(self.run.held_out_file, "a") as file:
            known = {name: value if math.isfinite(value) else None for name, value in measured.items()}
            file.write(json.dumps({"step": self.mechanism.steps, **known}) + "\n")
        if not ledger.finished:
            ledger.append(events.EVALUATION, step=self.mechanism.steps, units="held_out")
            ledger.append(events.FINISH, step=self.mechanism.steps)
            ledger.sync()
        report_files.write(self.run, ledger, self.accountant, with_page=True)
        self._inform(
            f"ledger head {ledger.head}: deposit it elsewhere, and nobody can rewrite this run's ledger unnoticed"
        )
        return measured


def _places(history: History) -> str:
    """Where the steps were executed that are no part of the present lineage: in which parts it differs from here."""
    here = history.lineage[-1][1]
    lost = {lineage[-1][1] for _, lineage in history.executions if lineage[-1][1] != here}
    return " or ".join(_differing(place, here) for place in sorted(lost))


def _differing(there: str, here: str) -> str:
    """The parts in which two descriptions of environments differ."""
    parts = [set(re.split("[,;] ", place)) for place in (there, here)]
    only = [", ".join(sorted(parts[i] - parts[1 - i])) or "nothing further" for i in (0, 1)]
    return f"there {only[0]}; here {only[1]}"
