"""Optimizers and learning-rate schedules, all from optax. They see noised gradients only."""

import dataclasses
import math
from typing import Any

import optax

from dpgemma.training.settings import Settings

FINAL_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Optimization:
    """How parameters follow the noised mean gradients: public constants.

    Attributes:
      optimizer: one of dpgemma.choices.OPTIMIZERS.
      learning_rate: at the peak.
      warmup_steps: updates of linear warm-up.
      schedule: one of dpgemma.choices.SCHEDULES: the decay from the peak to a tenth of it at the last step.
      weight_decay: decoupled, for adamw.
      steps: updates in all.
    """

    optimizer: str
    learning_rate: float
    warmup_steps: int
    schedule: str
    weight_decay: float
    steps: int

    @classmethod
    def of(cls, settings: Settings, steps: int) -> "Optimization":
        """That of settings, for so many steps."""
        return cls(
            settings.optimizer,
            settings.learning_rate,
            settings.warmup_steps,
            settings.schedule,
            settings.weight_decay,
            steps,
        )


def learning_rate(plan: Optimization) -> optax.Schedule:
    """Returns the schedule: linear warm-up to the peak, then decay to a tenth of it, or the peak if constant.

    A function of public constants and the step.
    """
    peak, decay_steps = plan.learning_rate, max(1, plan.steps - plan.warmup_steps)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=FINAL_SHARE),
        "linear": lambda: optax.linear_schedule(peak, FINAL_SHARE * peak, decay_steps),
        "constant": lambda: optax.constant_schedule(peak),
    }[plan.schedule]()
    if plan.warmup_steps == 0:
        return decay
    # The first update already moves: warm-up starts at peak / (warmup_steps + 1).
    start = peak / (plan.warmup_steps + 1)
    return optax.join_schedules([optax.linear_schedule(start, peak, plan.warmup_steps), decay], [plan.warmup_steps])


def public_rate(plan: Optimization, step: int) -> float:
    """The learning rate of an update, from 0, as the public metrics show it: in closed form, with 9 digits anywhere."""
    peak, warmup, t = plan.learning_rate, plan.warmup_steps, step - plan.warmup_steps
    if t < 0:
        return float(f"{peak * (1 + step) / (warmup + 1):.9g}")
    left = 1 - min(1.0, t / max(1, plan.steps - warmup))
    shares = {"cosine": math.sin(math.pi / 2 * left) ** 2, "linear": left, "constant": 1.0}
    return float(f"{peak * (FINAL_SHARE + (1 - FINAL_SHARE) * shares[plan.schedule]):.9g}")


def make(plan: Optimization) -> optax.GradientTransformation:
    """The optimizer with its schedule."""
    if plan.optimizer == "adamw":
        return optax.adamw(learning_rate(plan), b1=0.9, b2=0.95, weight_decay=plan.weight_decay)
    return optax.sgd(learning_rate(plan), momentum=0.9)


def update_count(optimizer_state: Any) -> int:
    """How many updates the optimizer itself has counted; equals the ledger's steps in an honest run."""
    counts = {int(count) for _, count in optax.tree.get_all_with_path(optimizer_state, "count")}
    if len(counts) != 1:
        raise ValueError(f"the optimizer's counters disagree: {sorted(counts)}")
    return counts.pop()
