"""A training run from its first or its resumed step to its report."""

import contextlib
import json
import math
import signal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from accounting import run_files
from accounting.accountant import Accountant
from accounting.curve import EpsilonCurve
from accounting.errors import InputError
from accounting.ledger import executed
from accounting.ledger.chain import Ledger
from dpgemma.data.dataset import Dataset, spread
from dpgemma.gemma import lora
from dpgemma.objectives import causal as loss_lib
from dpgemma.privacy.noise import noise_keys
from dpgemma.privacy.samplers import PoissonSampler
from dpgemma.sharding import mesh as mesh_lib
from dpgemma.training import clipping_choice, environment, plan, progress, reporting
from dpgemma.training import optimizer as optimizer_lib
from dpgemma.training.checkpoint import Checkpoints
from dpgemma.training.run import RunDirectory
from dpgemma.training.settings import TrainConfig
from dpgemma.training.start import StartingPoint
from dpgemma.training.step import TrainState, make_train_step


@contextlib.contextmanager
def stop_on_signal():
    """Yields a function that tells whether SIGINT or SIGTERM has come; a second SIGINT interrupts at once."""
    received = []

    def note(number, frame):
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer:
    """One run. Its mechanism, built once from the resolved configuration, is all that sampler, step, ledger and report
    see of it.

    Attributes:
      first_step: with which `train` began.
      interrupted: whether a signal came while it took steps; even where it came during the last one.
    """

    def __init__(self, config: TrainConfig, start: StartingPoint, tokenizer, data: Dataset, run: RunDirectory):
        self.config, self.start, self.tokenizer, self.data, self.run = config, start, tokenizer, data, run
        self.mechanism = plan.mechanism_of(config)
        self.accountant = Accountant(self.mechanism, claimed=math.isfinite(config.epsilon))
        if self.accountant.upper(config.delta) > config.epsilon:
            raise InputError(
                f"{config.steps} steps would exceed epsilon {config.epsilon:g}: take fewer steps or start another run"
            )
        self.mesh = mesh_lib.make(config.mesh)
        self.optimizer = optimizer_lib.make(config)
        self.first_step = 0
        self.interrupted = False
        self.computation = dict(
            bos=tokenizer.bos, dtype=jnp.dtype(config.dtype), remat=config.remat, attention=config.attention
        )

    def train(self) -> float | None:
        """Runs to the last step; returns bits per byte on the held-out rows (NaN if there are none), or None if a
        signal came first.
        """
        with Checkpoints(self.run.checkpoints, self.config.keep_checkpoints) as checkpoints:
            with contextlib.closing(self.run.open_ledger()) as ledger:
                for deviation in executed.of(ledger.records).deviations:
                    progress.warn(deviation)
                self.first_step, state, frozen = self._start_or_resume(checkpoints, ledger)
                step, state = self._take_steps(self.first_step, state, frozen, checkpoints, ledger)
                if step < self.mechanism.steps:
                    progress.inform(
                        f"stopped at step {step} of {self.mechanism.steps}; the same command goes on from here"
                    )
                    return None
                return self._finish(lora.join(state.parameters, frozen), ledger)

    def _start_or_resume(self, checkpoints: Checkpoints, ledger: Ledger) -> tuple[int, TrainState, dict]:
        replicated = NamedSharding(self.mesh, PartitionSpec())
        trainable, frozen = self.start.parameters(self.config.seed, replicated)
        clip_norm = (
            None
            if self.config.clip_quantile is None
            else jax.device_put(jnp.float32(self.config.clip_norm), replicated)
        )
        state = TrainState(trainable, jax.jit(self.optimizer.init, out_shardings=replicated)(trainable), clip_norm)
        here = environment.description()
        if len(ledger.records) == 1 and ledger.records[0]["environment"] == here:  # the start event alone
            return 0, state, frozen
        step, state = checkpoints.restore(state, ledger, progress.warn) or (0, state)
        if step < self.mechanism.steps:
            environment.check_repeats(ledger.records, step, here)
            ledger.append("resume", step=step, environment=here)
            progress.inform(f"resuming at step {step} of {self.mechanism.steps}")
        return step, state, frozen

    def _take_steps(
        self, first: int, state: TrainState, frozen: dict, checkpoints: Checkpoints, ledger: Ledger
    ) -> tuple[int, TrainState]:
        config, mechanism, keys = self.config, self.mechanism, self.run.keys()
        if first == mechanism.steps:
            return first, state
        loss = loss_lib.row_loss(self.start.model, **self.computation)
        options = clipping_choice.options(config)
        dp_step = make_train_step(loss, self.optimizer, mechanism, self.mesh, plan.adaptive_clipping(config), **options)
        sampler = PoissonSampler(mechanism.num_units, mechanism.sampling_probability, mechanism.max_batch_size)
        curve = EpsilonCurve(self.accountant, config.delta)
        rate = optimizer_lib.learning_rate(config)
        with (
            stop_on_signal() as stopped,
            progress.Progress(mechanism.steps, first, config.batch_size, config.sequence_length, config.epsilon) as bar,
            progress.MetricsFile(self.run.metrics_file, first) as public,
            progress.MetricsFile(self.run.private / "metrics.jsonl", first) as private,
        ):
            for t in range(first, mechanism.steps):
                units = sampler.draw(keys.sampling, t)
                batch, mask = spread(*self.data.batch(units, mechanism.max_batch_size), self.mesh.size)
                ledger.append_step(t, mechanism.group)
                state, stats = jax.block_until_ready(dp_step(state, frozen, batch, mask, noise_keys(keys.noise, t)))

                done, epsilon = t + 1, curve.at(t + 1)
                summary = progress.private_summary(stats, len(units))
                public.write(step=t, epsilon=run_files.encode(epsilon), learning_rate=float(rate(t)))
                private.write(step=t, **summary)
                bar.update(epsilon, summary["loss"])
                if stopped() or done % config.checkpoint_every == 0 or done == mechanism.steps:
                    # In this order a crash leaves a report that says too much, never too little.
                    reporting.write(self.run, ledger, self.accountant, with_page=False)
                    checkpoints.save(done, state, ledger, metrics_sha256=public.digest)
                if stopped():
                    self.interrupted = True
                    return done, state
        return mechanism.steps, state

    def _finish(self, parameters: dict, ledger: Ledger) -> float:
        data = self.data
        bits = loss_lib.bits_per_byte(
            self.start.model, parameters, data.rows, data.held_out, self.tokenizer, **self.computation
        )
        with open(self.run.private / "held_out.jsonl", "a") as file:
            file.write(json.dumps({"step": self.mechanism.steps, "bits_per_byte": bits}) + "\n")
        if not ledger.finished:
            ledger.append("evaluation", step=self.mechanism.steps, units="held_out")
            ledger.append("finish", step=self.mechanism.steps)
            ledger.sync()
        reporting.write(self.run, ledger, self.accountant, with_page=True)
        progress.inform(
            f"ledger head {ledger.head}: deposit it elsewhere, and nobody can rewrite this run's ledger unnoticed"
        )
        return bits
