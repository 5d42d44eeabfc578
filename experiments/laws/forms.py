"""Parametric forms of the loss in model size M, steps T and noise-batch ratio r, and how they are fitted.

L1 and L2 are those of arXiv 2501.18914, appendix E (with T for the number of examples, which at a fixed physical batch
is the same up to a constant); "coupled" says that noise makes steps worth less, the more so the larger the model.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import optimize

from experiments.laws.points import Points

# Exponents that arXiv 2501.18914 printed; E, A, B and C were not.
PUBLISHED_L2 = {"a": 0.47, "b": 0.12, "g": 0.95, "g2": -0.07}
_HUBER = 1e-3  # of the residual in ln loss, as in the Chinchilla fits (arXiv 2203.15556, section 3.3)


def sigmoid_of_noise(ratio):
    """s = sigmoid((ln r + 8) / 1.6); 0 without noise."""
    with np.errstate(divide="ignore"):
        return 1 / (1 + np.exp(-(np.log(np.asarray(ratio, float)) + 8) / 1.6))


def l1(constants, parameters, steps, ratio):
    """E + A / M^a + B / T^b + C r^g."""
    e, a0, a, b0, b, c0, g = constants
    noise = np.exp(c0 + g * np.log(np.maximum(ratio, 1e-300))) * (np.asarray(ratio) > 0)
    return np.exp(e) + np.exp(a0 - a * np.log(parameters)) + np.exp(b0 - b * np.log(steps)) + noise


def l2(constants, parameters, steps, ratio):
    """E + A / M^a + B / T^b + C s^g / M^g2."""
    e, a0, a, b0, b, c0, g, g2 = constants
    s = sigmoid_of_noise(ratio)
    noise = np.exp(c0 + g * np.log(np.maximum(s, 1e-300)) - g2 * np.log(parameters)) * (s > 0)
    return np.exp(e) + np.exp(a0 - a * np.log(parameters)) + np.exp(b0 - b * np.log(steps)) + noise


def coupled(constants, parameters, steps, ratio):
    """E + A / M^a + B (1 + (r M^h / r0)^g)^k / T^b."""
    e, a0, a, b0, b, r0, h, g, k = constants
    with np.errstate(divide="ignore"):
        relative = g * (np.log(np.asarray(ratio, float)) + h * np.log(parameters) - r0)
    worth = np.exp(k * np.logaddexp(0.0, relative))
    return np.exp(e) + np.exp(a0 - a * np.log(parameters)) + np.exp(b0 - b * np.log(steps)) * worth


def l2_own_sigmoid(constants, parameters, steps, ratio):
    """L2 with a sigmoid of its own: s = sigmoid((ln r - x) / w)."""
    e, a0, a, b0, b, c0, g, g2, x, w = constants
    with np.errstate(divide="ignore"):
        log_sigmoid = -np.logaddexp(0.0, -(np.log(np.asarray(ratio, float)) - x) / w)
    noise = np.exp(c0 + g * log_sigmoid - g2 * np.log(parameters))
    return np.exp(e) + np.exp(a0 - a * np.log(parameters)) + np.exp(b0 - b * np.log(steps)) + noise


@dataclasses.dataclass(frozen=True)
class Form:
    """A form, with starts of its fit and bounds of its constants: logarithms of E, A, B, C and the exponents as they
    are.

    Sizes and steps are divided by their geometric means before, so that the constants of any table are of order one.
    """

    name: str
    function: Callable
    starts: tuple[tuple[float, ...], ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


FORMS = {
    "L1": Form(
        "L1", l1, ((0.3, -2.0, 0.3, 0.0, 0.3, 1.0, 0.5), (-1.0, 0.0, 0.2, 0.0, 0.1, 0.0, 0.3)),
        (-9.0, -12.0, 0.0, -12.0, 0.01, -9.0, 0.02), (3.0, 4.0, 3.0, 4.0, 3.0, 12.0, 4.0),
    ),
    "L2": Form(
        "L2", l2, ((0.3, -2.0, 0.3, 0.0, 0.3, 1.0, 1.0, -0.1), (-1.0, 0.0, 0.2, 0.0, 0.1, 0.0, 0.6, 0.0)),
        (-9.0, -12.0, 0.0, -12.0, 0.01, -9.0, 0.05, -2.0), (3.0, 4.0, 3.0, 4.0, 3.0, 9.0, 12.0, 2.0),
    ),
    "coupled": Form(
        "coupled", coupled,
        ((0.3, -2.0, 0.3, 0.0, 0.3, -4.0, 0.3, 1.0, 0.5), (-1.0, 0.0, 0.2, 0.0, 0.2, -5.0, 0.5, 2.0, 0.2)),
        (-9.0, -12.0, 0.0, -12.0, 0.01, -14.0, -1.0, 0.1, 0.01), (3.0, 4.0, 3.0, 4.0, 3.0, 3.0, 2.0, 6.0, 4.0),
    ),
}  # fmt: skip
# Those that are fitted to tables of optima (optima.py), whose rows reach into noise that leaves nothing to learn.
OWN_SIGMOID = "L2, own sigmoid"
FORMS_OF_OPTIMA = {
    OWN_SIGMOID: Form(
        OWN_SIGMOID, l2_own_sigmoid, ((-0.8, -0.5, 0.35, -0.6, 0.4, 2.0, 1.0, -0.12, -8.0, 1.6),),
        (-9.0, -12.0, 0.0, -12.0, 0.01, -9.0, 0.05, -2.0, -14.0, 0.5),
        (3.0, 4.0, 3.0, 4.0, 3.0, 9.0, 12.0, 2.0, 0.0, 6.0),
    ),
    "L2": FORMS["L2"],
    "coupled": FORMS["coupled"],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Parametric:
    """A fitted form.

    Attributes:
      form: its name in FORMS or FORMS_OF_OPTIMA.
      constants: as Form says.
      scale: geometric means of sizes and steps, by which they are divided.
    """

    form: str
    constants: tuple[float, ...]
    scale: tuple[float, float]

    def loss(self, parameters, steps, ratio) -> np.ndarray:
        m, t = np.asarray(parameters, float) / self.scale[0], np.asarray(steps, float) / self.scale[1]
        return (FORMS | FORMS_OF_OPTIMA)[self.form].function(self.constants, m, t, ratio)


def fit(points: Points, form: str, start: Parametric | None = None) -> Parametric:
    """Least squares of the residual in ln loss, with Huber's loss, from several starts (the best wins).

    Args:
      start: an earlier fit to nearly the same points, from which this one begins.
    """
    chosen = FORMS[form]
    means = tuple(float(np.exp(np.log(values).mean())) for values in (points.parameters, points.steps))
    scale = means if start is None else start.scale
    m, t, target = points.parameters / scale[0], points.steps / scale[1], np.log(points.loss)
    low, high = np.array(chosen.low), np.array(chosen.high)

    def residual(constants):
        return np.log(chosen.function(constants, m, t, points.ratio)) - target

    starts = chosen.starts if start is None else (start.constants,)
    fits = [
        optimize.least_squares(
            residual,
            np.clip(x0, low + 1e-9, high - 1e-9),
            bounds=(low, high),
            loss="huber",
            f_scale=_HUBER,
            x_scale="jac",
            max_nfev=400,
        )
        for x0 in starts
    ]
    winner = min(fits, key=lambda found: found.cost)
    return Parametric(form, tuple(map(float, winner.x)), scale)


def fit_l2_constants(parameters, steps, ratio, loss) -> np.ndarray:
    """E, A, B, C of L2 with its published exponents, by least squares of the relative residual; none is negative."""
    design = l2_design(parameters, steps, ratio)
    constants, _ = optimize.nnls(design / loss[:, None], np.ones(len(loss)))
    return constants


def l2_design(parameters, steps, ratio) -> np.ndarray:
    """The columns [n, 4] that E, A, B and C multiply in L2 with its published exponents."""
    p = PUBLISHED_L2
    return np.stack(
        [
            np.ones(len(parameters)),
            parameters ** -p["a"],
            steps ** -p["b"],
            sigmoid_of_noise(ratio) ** p["g"] / parameters ** p["g2"],
        ],
        axis=-1,
    )
