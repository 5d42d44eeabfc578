"""Results tables made from known laws, with what real sweeps suffer from."""

import dataclasses

import numpy as np

from experiments.sweep import results

SIZES = np.array([20e3, 45e3, 100e3, 220e3, 480e3])
STEPS = np.round(np.geomspace(50, 1600, 20))
RATIOS = np.array([0.0, *(2.0 ** -np.arange(14.0, 2.0, -1.5))])
LENGTH, BATCH = 64, 32


# How noise acts: it adds up to a ceiling; makes steps worth less; adds the more the larger the model, as a logarithm;
# makes steps worth less, up to a loss that nothing exceeds; adds the more the longer the run.
CEILING, WORTH, LOGARITHM, PLATEAU, RISING = "ceiling", "worth", "logarithm", "plateau", "rising"
FAMILIES = (WORTH, CEILING, LOGARITHM, PLATEAU, RISING)
_PLATEAU = 3.35


@dataclasses.dataclass(frozen=True)
class PlantedLaw:
    """A law of one of the families, and learning rates whose optimum moves with size, steps and noise."""

    family: str
    constants: tuple[float, ...]
    rate: tuple[float, ...]
    curvature: float

    @classmethod
    def draw(cls, seed: int, family: str | None = None) -> "PlantedLaw":
        """One of the first two families in turn, unless another is named."""
        rng = np.random.default_rng(seed)
        u = rng.uniform
        constants = (
            u(1.0, 1.8),  # E
            u(0.1, 0.6), u(0.2, 0.6),  # of the size, at 1e5 parameters
            u(0.5, 1.5), u(0.3, 0.6),  # of the steps, at 300
            u(0.3, 1.2), u(0.8, 1.5), u(0.0, 0.3),  # of the noise, at 2^-6
        )  # fmt: skip
        rate = u(-7.6, -6.4), u(-0.3, 0.1), u(-0.4, 0.0), u(-0.3, 0.1)
        return cls(family or FAMILIES[seed % 2], constants, rate, u(0.01, 0.03))

    def loss(self, parameters, steps, ratio):
        """At the best learning rate."""
        e, a0, a, b0, b, c, g, h = self.constants
        m, t, r = np.asarray(parameters) / 1e5, np.asarray(steps) / 300, np.asarray(ratio) * 2**6
        without_steps, noise = e + a0 * m**-a, r * m**h
        if self.family == CEILING:
            relative = np.divide(1.0, noise, out=np.full(np.broadcast(r, m).shape, np.inf), where=noise > 0)
            return without_steps + b0 * t**-b + c / (1 + relative**g)
        if self.family == LOGARITHM:
            return without_steps + b0 * t**-b + c / 12 * np.log1p((16 * r) ** 2 * np.sqrt(m))
        if self.family == RISING:
            return without_steps + b0 * t**-b + c / 2 * noise ** (0.6 * g) * t**0.15
        if self.family == PLATEAU:
            worth = t / (1 + (c * 10 * r * m**0.25) ** g * t**0.3)
            return ((without_steps + b0 * worth**-b) ** -8 + _PLATEAU**-8) ** (-1 / 8)
        return without_steps + b0 * (t / (1 + (c * 10 * noise) ** g)) ** -b

    def best_rate(self, parameters, steps, ratio):
        x0, xm, xt, xr = self.rate
        noise = np.log(np.maximum(ratio, 2.0**-16) * 2**6) / 4
        return x0 + xm * np.log(parameters / 1e5) + xt * np.log(steps / 300) / 2 + xr * noise

    def table(
        self,
        seed: int,
        noise: float = 0.004,
        missing: float = 0.1,
        *,
        of_runs: float = 0.0,
        diverging: float = 0.0,
        wrong: float = 0.0,
    ) -> results.Table:
        """A sweep's table: measurement noise, runs that are missing, and a grid of three rates that the optimum often
        lies outside of.

        Args:
          noise, of_runs: standard deviations of the ln loss of a point, and of what all points of a run share.
          missing, diverging, wrong: shares of runs that are not there, that end on a finite plateau (of those at the
            highest rate), that are on another scale.
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
                    if of_runs:
                        loss = loss * np.exp(of_runs * rng.standard_normal())
                    if diverging and x == -6.0 and rng.random() < diverging:
                        loss = rng.uniform(5.5, 8.5) * np.exp(0.01 * rng.standard_normal(len(STEPS)))
                    elif wrong and rng.random() < wrong:
                        loss = loss * rng.choice([1 / np.log(2), np.log(2), 0.01])
                    records += [
                        {
                            results.MODEL: f"model_{i}", results.LEARNING_RATE: 2.0**x, results.ITERATIONS: t,
                            results.RATIO: r,
                            results.LOSS: value, results.PARAMETERS: m, results.LENGTH: LENGTH, results.BATCH: BATCH,
                        }
                        for t, value in zip(STEPS, loss, strict=True)
                    ]  # fmt: skip
        return results.of_records(records)
