"""Results tables made from known laws, with what real sweeps suffer from."""

import dataclasses

import numpy as np

from experiments.sweep import results

SIZES = np.array([20e3, 45e3, 100e3, 220e3, 480e3])
STEPS = np.round(np.geomspace(50, 1600, 20))
RATIOS = np.array([0.0, *(2.0 ** -np.arange(14.0, 2.0, -1.5))])
LENGTH, BATCH = 64, 32


@dataclasses.dataclass(frozen=True)
class PlantedLaw:
    """A law of one of two families, and learning rates whose optimum moves with size, steps and noise."""

    additive: bool
    constants: tuple[float, ...]
    rate: tuple[float, ...]
    curvature: float

    @classmethod
    def draw(cls, seed: int) -> "PlantedLaw":
        rng = np.random.default_rng(seed)
        u = rng.uniform
        constants = (
            u(1.0, 1.8),  # E
            u(0.1, 0.6), u(0.2, 0.6),  # of the size, at 1e5 parameters
            u(0.5, 1.5), u(0.3, 0.6),  # of the steps, at 300
            u(0.3, 1.2), u(0.8, 1.5), u(0.0, 0.3),  # of the noise, at 2^-6
        )  # fmt: skip
        return cls(bool(seed % 2), constants, (u(-7.6, -6.4), u(-0.3, 0.1), u(-0.4, 0.0), u(-0.3, 0.1)), u(0.01, 0.03))

    def loss(self, parameters, steps, ratio):
        """At the best learning rate."""
        e, a0, a, b0, b, c, g, h = self.constants
        m, t, r = np.asarray(parameters) / 1e5, np.asarray(steps) / 300, np.asarray(ratio) * 2**6
        if self.additive:
            s = 1 / (
                1 + np.divide(1.0, r * m**h, out=np.full(np.broadcast(r, m).shape, np.inf), where=r * m**h > 0) ** g
            )
            return e + a0 * m**-a + b0 * t**-b + c * s
        return e + a0 * m**-a + b0 * (t / (1 + (c * 10 * r * m**h) ** g)) ** -b

    def best_rate(self, parameters, steps, ratio):
        x0, xm, xt, xr = self.rate
        noise = np.log(np.maximum(ratio, 2.0**-16) * 2**6) / 4
        return x0 + xm * np.log(parameters / 1e5) + xt * np.log(steps / 300) / 2 + xr * noise

    def table(self, seed: int, noise: float = 0.004, missing: float = 0.1) -> results.Table:
        """A sweep's table: measurement noise, runs that are missing, and a grid of three rates that the optimum often
        lies outside of.
        """
        rng = np.random.default_rng(seed)
        records = []
        for i, m in enumerate(SIZES):
            for r in RATIOS:
                for x in (-6.0, -7.0, -8.0):
                    if rng.random() < missing:
                        continue
                    off = self.curvature * (x - self.best_rate(m, STEPS, r)) ** 2
                    loss = self.loss(m, STEPS, np.full(STEPS.shape, r)) * np.exp(
                        off + noise * rng.standard_normal(len(STEPS))
                    )
                    records += [
                        {
                            results.MODEL: f"model_{i}", results.LEARNING_RATE: 2.0**x, results.ITERATIONS: t,
                            results.RATIO: r,
                            results.LOSS: value, results.PARAMETERS: m, results.LENGTH: LENGTH, results.BATCH: BATCH,
                        }
                        for t, value in zip(STEPS, loss, strict=True)
                    ]  # fmt: skip
        return results.of_records(records)
