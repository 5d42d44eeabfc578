"""What a run writes down while it is trained, and what follows from what it wrote before.

Every process of a run holds a record. The first process alone opens files and tells observers; what decides how the
run goes on, it tells the other processes.
"""

import contextlib
import dataclasses
import json
import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from accounting import rounding, run_files
from accounting.accountant import Accountant
from accounting.curve import EpsilonCurve
from accounting.empirical.protocol import Protocol
from accounting.errors import InputError
from accounting.ledger import events, executed, histogram
from accounting.ledger.chain import Ledger
from accounting.ledger.histogram import ReleasedHistogram
from accounting.ledger.history import History
from dpgemma.data.canaries import Canaries
from dpgemma.privacy.clipping import PrivateStats
from dpgemma.privacy.keys import Keys
from dpgemma.sharding import processes
from dpgemma.training import attack, environment, metrics, report_files
from dpgemma.training import observed as observed_lib
from dpgemma.training import observers as observers_lib
from dpgemma.training import optimizer as optimizer_lib
from dpgemma.training.observed import ObservedFile
from dpgemma.training.observers import Advance, Evaluated, Observer, Private, Released
from dpgemma.training.plan import Plan
from dpgemma.training.run import RunDirectory

# Share of the units below which a list of prompts is taken for another one than was meant.
_FEW = 0.2
# In which another machine may find another epsilon for the same facts.
_LAST_BITS = 1e-9


class Record:
    """Ledger, metric files and reports of one run; use `opened` around all else.

    Attributes:
      is_kept_here: whether this is the first process.
      ledger: of the run, while it is open; None in the other processes.
    """

    def __init__(self, run: RunDirectory, plan: Plan, observers: Sequence[Observer]) -> None:
        """Takes the run as it was opened or created.

        Raises:
          InputError: the steps of the plan would exceed its target.
        """
        self.run, self.plan = run, plan
        self.is_kept_here = processes.is_first()
        self.observers = tuple(observers) if self.is_kept_here else ()
        self.ledger: Ledger | None = None
        self._accountant = self._accountant_of(repeated=0)
        if self._accountant.upper(plan.delta) > plan.epsilon * (1 + _LAST_BITS):
            raise InputError(
                f"{plan.mechanism.steps} steps would exceed epsilon {plan.epsilon:g}: take fewer steps or start another"
                " run"
            )

    def _accountant_of(self, repeated: int) -> Accountant:
        """Of all planned steps and of so many that were executed once more, elsewhere."""
        mechanism = self.plan.mechanism
        releases = mechanism.replace(steps=mechanism.steps + repeated)
        return Accountant(releases, also=self.plan.also, claimed=math.isfinite(self.plan.epsilon))

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Holds the ledger open, and warns of deviations that it knows.

        Raises:
          InputError: its chain does not hold.
        """
        if not self.is_kept_here:
            yield
            return
        with contextlib.closing(self.run.open_ledger()) as self.ledger:
            for deviation in executed.of(self._ledger.records).deviations:
                self.warn(deviation)
            yield

    @property
    def _ledger(self) -> Ledger:
        assert self.ledger is not None, "the first process has it open"
        return self.ledger

    def inform(self, message: str) -> None:
        for observer in self.observers:
            observer.inform(message)

    def warn(self, message: str) -> None:
        for observer in self.observers:
            observer.warn(message)

    def is_untouched(self, here: str, same_bits: bool) -> bool:
        """Whether nothing but a histogram was released since the run was created, in this environment.

        Args:
          here: the environment.
          same_bits: whether a step that is executed again here gives the same bits.
        """

        def compare() -> bool:
            records = self._ledger.records
            nothing_else = {record["kind"] for record in records[1:]} <= {events.HISTOGRAM}
            return nothing_else and same_bits and bool(records[0]["environment"] == here)

        return processes.from_first(compare)

    def release_histogram(self, make: Callable[[bytes], ReleasedHistogram]) -> None:
        """Writes a histogram down, by which it is released, unless the ledger has it.

        Formal guarantee: a run has one histogram at most, and is charged for it from the line on that holds it. One
        that is made again, because its line was lost in a crash, has the same bits. Tested by
        tests/training/histogram_test.py::test_a_histogram_is_released_once_whatever_happens.

        Args:
          make: the histogram with noise from a secret key.
        """
        if self.ledger is None or histogram.is_in(self.ledger.records):
            return
        released = make(self.run.histogram_key(self.ledger.records[0]))
        self.ledger.append(events.HISTOGRAM, **released.facts())
        self.ledger.sync()
        units, answered = self.plan.mechanism.num_units, sum(released.counts)
        self.inform(f"the released counts of prompts add up to {answered:.0f} of {units} units")
        if answered < _FEW * units:
            self.warn(
                "few units answer a prompt of `prompt_histogram`: it counts where a record begins with exactly its"
                " characters, spaces at its end included"
            )

    def resume(self, step: int, here: str, same_bits: bool) -> None:
        """Writes down that the run goes on at a step.

        Raises:
          InputError: lost steps that would have to be executed again elsewhere, beyond the target.
        """

        def write() -> None:
            ledger = self._ledger
            facts = {"environment": here} | ({} if same_bits else {"continuation": secrets.token_hex(16)})
            self._charge_repeats(ledger.history.with_resume({"kind": events.RESUME, "step": step, **facts}), step)
            before = ledger.history.lineage[-1][1]
            ledger.append(events.RESUME, step=step, **facts)
            after = ledger.history.lineage[-1][1]
            self.inform(f"resuming at step {step} of {self.plan.mechanism.steps}")
            if before != after:
                found = environment.differing(before, after)
                self.inform(f"this is another environment, so noise differs from here on ({found})")

        processes.from_first(write)

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
        self._accountant = self._accountant_of(history.repeated)
        spent = self._accountant.upper(self.plan.delta)
        if spent > self.plan.epsilon * (1 + _LAST_BITS):
            raise InputError(
                f"{history.repeated} steps from step {step} on were executed before, in another environment, and were"
                " lost: executing them once more gives other bits, costs epsilon"
                f" {rounding.upper(rounding.round_up(spent))} in all, and the target is {self.plan.epsilon:g}; go on"
                f" where they were executed ({_places(history)}), or start another run in a new `workdir`"
            )
        self.warn(
            f"{history.repeated} steps that were executed in another environment and lost are executed once more, with"
            " other noise: they are charged again"
        )

    def step_keys(self) -> Keys:
        """The keys of batches and noise of the steps that follow.

        Formal guarantee: all processes of a run have the keys that RunDirectory.step_keys binds in the first one, so
        that they deal out one draw and add one noise. Tested by tests/training/processes_test.py::
        test_the_states_of_a_run_do_not_depend_on_the_number_of_processes.
        """

        def bound() -> dict[str, str]:
            return self.run.step_keys(self._ledger.records[0], self._ledger.history.lineage).as_hex()

        return Keys.of_hex(processes.from_first(bound))

    @contextlib.contextmanager
    def of_steps(self, first: int, volume: tuple[str, int], observed: int = 0) -> Iterator["StepRecord"]:
        """The record of the steps from `first` on; observers are told before and after.

        Args:
          volume: of a row, as observers take it.
          observed: gradient canaries, whose observations are kept.
        """
        if not self.is_kept_here:
            yield StepRecord()
            return
        try:
            for observer in self.observers:
                observer.begin(self.plan, first, volume)
            self._compare_metrics(first)
            with (
                metrics.MetricsFile(self.run.metrics_file, first) as public,
                metrics.MetricsFile(self.run.private_metrics_file, first) as private,
            ):
                curve = EpsilonCurve(self._accountant, self.plan.delta)
                repeated = self._ledger.history.repeated
                steps = self.plan.mechanism.steps
                file = ObservedFile(self.run.observed_file, steps, observed) if observed else None
                yield KeptStepRecord(self._ledger, self.plan, self.observers, curve, repeated, public, private, file)
        finally:
            for observer in self.observers:
                observer.end()

    def _compare_metrics(self, first: int) -> None:
        """Where the public metrics of the steps before the first are not those of its checkpoint, keeps them and warns.

        What follows is written behind what is left of them, because no step may wait for a file of metrics.
        """
        digest = metrics.digest_before(self.run.metrics_file, first)
        known = [r for r in self._ledger.records if r["kind"] == events.CHECKPOINT and r["step"] == first]
        if known and known[-1].get("metrics_sha256", digest) != digest:
            self.run.damaged.mkdir(parents=True, exist_ok=True)
            kept = self.run.damaged / f"{run_files.METRICS}.before_step_{first}"
            if self.run.metrics_file.exists():
                shutil.copyfile(self.run.metrics_file, kept)
            self.warn(
                f"{self.run.metrics_file} was changed since step {first} was saved, and dpgemma audit will report it;"
                f" the file is kept as {kept}: to restore it, stop the run first"
            )

    def report(self, *, with_page: bool = False) -> None:
        """Writes the report of what was executed until now, unless the files there are current."""
        if self.ledger is not None:
            report_files.write(self.run, self.ledger, self._accountant, with_page=with_page)

    def _published(self) -> None:
        """Returns when all is where the run's folder lies, be it an object storage."""
        self.run.publish()
        if self.run.mirror is not None:
            self.run.mirror.wait()

    def stopped(self, step: int) -> None:
        """Tells that the run stops at a step before its last one."""
        if self.ledger is not None:
            self._published()
            self.inform(
                f"stopped at step {step} of {self.plan.mechanism.steps}; the same command goes on from here"
                f" (ledger head {self.ledger.head})"
            )

    def phase(self, name: str, total: int | None = None) -> contextlib.AbstractContextManager[Advance]:
        """As observers.phase, for those of this run."""
        return observers_lib.phase(self.observers, name, total)

    def evaluated(self, evaluated: Evaluated) -> None:
        """Keeps figures of units in private/, and tells observers."""
        if self.ledger is None:
            return
        with open(self.run.evaluations_file, "a") as file:
            known = {"step": evaluated.steps, "units": evaluated.what, "public": evaluated.is_public}
            file.write(json.dumps(known | _finite(evaluated.figures)) + "\n")
        for observer in self.observers:
            observer.evaluated(evaluated)

    def attacked(self, canaries: Canaries, scores: dict[str, np.ndarray] | None) -> None:
        """Writes down what an attack on the run's canaries shows, unless the ledger has it.

        Formal guarantee: what goes to public files is a function of the released parameters and of the canaries. The
        scores of gradient canaries also follow from the noise and from what other units' gradients are, so that they
        are kept in private/, and the ledger binds them by a hash under a key. Tested by
        tests/training/attack_test.py::test_nothing_that_was_observed_leaves_private.

        Args:
          scores: of canaries that are text; those of gradient canaries follow from what was observed.
        """
        if self.ledger is None or any(record["kind"] == events.ATTACK for record in self.ledger.records):
            return
        steps = self.plan.mechanism.steps
        done = executed.of(self.ledger.records)
        is_kept = scores is None
        try:
            if scores is None:
                seen = observed_lib.read(self.run.observed_file, steps, canaries.count)
                scores = attack.observed_scores(seen, done.planned)
        except InputError as error:
            self.warn(str(error))
            self.ledger.append(events.ATTACK, step=steps, not_measured="the observations are not whole")
            return
        protocol = Protocol.of_facts(done.declared["audit_protocol"])
        found = attack.assess(protocol, scores, canaries, done)
        if found is None:
            return
        shown = run_files.encode(found.as_dict())
        if is_kept:
            text = run_files.dumps(shown)
            run_files.write(self.run.path / run_files.ATTACK, text)
            run_files.write(self.run.path / run_files.ATTACK_PAGE, report_files.attack_page(done, shown))
            self.ledger.append(events.ATTACK, step=steps, kept_sha256=canaries.bound(text.encode()))
        else:
            self.ledger.append(events.ATTACK, step=steps, assessment=shown)
        self.ledger.sync()
        message = f"an attack on {found.canaries} canaries shows epsilon {found.epsilon:.3g} at least"
        if found.contradicts:
            self.warn(f"{message}, which is MORE THAN WAS PROVED: this program or this machine is broken")
        elif is_kept:
            for observer in self.observers:
                observer.confide(message)
        else:
            self.inform(message)

    def finish(self, measured: Mapping[str, float]) -> None:
        """Closes the run whose steps are all taken.

        Args:
          measured: the objective's measures of the held-out units.
        """
        if self.ledger is None:
            return
        ledger, steps = self.ledger, self.plan.mechanism.steps
        # Written whole: a run that is killed behind this line measures them once more.
        run_files.write(self.run.held_out_file, json.dumps({"step": steps, **_finite(measured)}) + "\n")
        if not ledger.finished:
            ledger.append(events.EVALUATION, step=steps, units="held_out")
            ledger.append(events.FINISH, step=steps)
            ledger.sync()
        self.report(with_page=True)
        self._published()
        self.inform(
            f"ledger head {ledger.head}: deposit it elsewhere, and nobody can rewrite this run's ledger unnoticed"
        )


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


class StepRecord:
    """Of a process that writes nothing down."""

    def before(self, t: int) -> None:
        """Writes down that step t is about to be executed."""

    def after(self, t: int, stats: PrivateStats, drawn: int) -> None:
        """Writes down what step t gave, and tells observers.

        Args:
          drawn: units of its batch.
        """

    def flush(self) -> None:
        """Returns when what a checkpoint needs beside it is on the disk."""

    @property
    def metrics_sha256(self) -> str:
        """SHA-256 of the public metrics so far."""
        return ""


@dataclasses.dataclass
class KeptStepRecord(StepRecord):
    """Of the process that keeps the record."""

    ledger: Ledger
    plan: Plan
    observers: Sequence[Observer]
    curve: EpsilonCurve
    repeated: int
    public: metrics.MetricsFile
    private: metrics.MetricsFile
    observed: ObservedFile | None = None

    def before(self, t: int) -> None:
        self.ledger.append_step(t, self.plan.mechanism.group)

    def after(self, t: int, stats: PrivateStats, drawn: int) -> None:
        done = t + 1
        spent = self.curve.at(done + self.repeated)
        released = Released(done, spent, optimizer_lib.public_rate(self.plan.optimization, t))
        raw = Private(**metrics.private_summary(stats, drawn))
        epsilon = run_files.encode(rounding.round_up(released.epsilon))
        self.public.write(step=t, epsilon=epsilon, learning_rate=released.learning_rate)
        self.private.write(step=t, **dataclasses.asdict(raw))
        if self.observed is not None and stats.observed is not None:
            self.observed.write(t, np.asarray(stats.observed))
        for observer in self.observers:
            observer.step(released, raw)

    def flush(self) -> None:
        if self.observed is not None:
            self.observed.flush()

    @property
    def metrics_sha256(self) -> str:
        return self.public.digest


def _places(history: History) -> str:
    """Where the steps were executed that are no part of the present lineage: in which parts it differs from here."""
    here = history.lineage[-1][1]
    lost = {lineage[-1][1] for _, lineage in history.executions if lineage[-1][1] != here}
    return " or ".join(environment.differing(place, here) for place in sorted(lost))
