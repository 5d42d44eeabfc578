"""Optimizers and learning-rate schedules, all from optax. They see noised gradients only."""

import optax

from dpgemma.training.settings import TrainConfig

FINAL_SHARE = 0.1


def learning_rate(config: TrainConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then decay to a tenth of it at the last step. A function of public constants and the
    step.
    """
    peak, decay_steps = config.learning_rate, max(1, config.steps - config.warmup_steps)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps, alpha=FINAL_SHARE),
        "linear": lambda: optax.linear_schedule(peak, FINAL_SHARE * peak, decay_steps),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if config.warmup_steps == 0:
        return decay
    # The first update already moves: warm-up starts at peak / (warmup_steps + 1).
    start = peak / (config.warmup_steps + 1)
    return optax.join_schedules([optax.linear_schedule(start, peak, config.warmup_steps), decay], [config.warmup_steps])


def make(config: TrainConfig) -> optax.GradientTransformation:
    if config.optimizer == "adamw":
        return optax.adamw(learning_rate(config), b1=0.9, b2=0.95, weight_decay=config.weight_decay)
    return optax.sgd(learning_rate(config), momentum=0.9)


def update_count(optimizer_state) -> int:
    """How many updates the optimizer itself has counted; equals the ledger's steps in an honest run."""
    counts = {int(count) for _, count in optax.tree.get_all_with_path(optimizer_state, "count")}
    if len(counts) != 1:
        raise ValueError(f"the optimizer's counters disagree: {sorted(counts)}")
    return counts.pop()
