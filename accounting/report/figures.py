"""The plots of a report or a plan: epsilon over the steps, and what an attacker can reach against random guessing."""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from accounting.accountant import Accountant
from accounting.conversions import PrivacyProfile
from accounting.errors import InputError

FORMATS = (".svg", ".png", ".pdf")
_STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False
}  # fmt: skip
_INK, _ACCENT = "#333333", "#0b5fa5"


def epsilon_points(accountant: Accountant, delta: float, points: int = 24) -> list[tuple[int, float]]:
    """(steps, epsilon) at evenly spread steps, first none and then the last included; upper bounds."""
    total = accountant.steps
    interval = 4 * accountant.interval_for(delta)
    steps = sorted({1, *(max(1, round(total * i / points)) for i in range(1, points))})
    whole = accountant.epsilon(delta).upper
    found = [(t, min(whole, accountant.upper(delta, t, interval))) for t in steps if t < total]
    return [(0, accountant.upper(delta, 0)), *found, (total, whole)]


def _draw_epsilon(axes: Any, points: Sequence[tuple[int, float]], target: float | None) -> None:
    steps, epsilons = zip(*points, strict=True)
    # A staircase: between two points only the later one's epsilon is an upper bound.
    axes.plot(steps, epsilons, color=_ACCENT, drawstyle="steps-pre")
    if target is not None and np.isfinite(target):
        axes.axhline(target, color=_INK, linestyle="--", linewidth=1)
        axes.annotate("target", (0, target), xytext=(2, -11), textcoords="offset points", color=_INK, fontsize=9)
    axes.set(xlabel="steps", ylabel="epsilon", title="Epsilon over the steps", xlim=(0, None), ylim=(0, None))


def _draw_tradeoff(axes: Any, profile: PrivacyProfile) -> None:
    rates = np.concatenate([[0.0], np.logspace(-6, 0, 400)])
    axes.plot([0, 1], [1, 0], color=_INK, linestyle="--", linewidth=1, label="random guessing")
    axes.plot(rates, profile.tradeoff(rates), color=_ACCENT, label="the best attack, at most this good")
    axes.fill_between(rates, profile.tradeoff(rates), 1 - rates, color=_ACCENT, alpha=0.12, linewidth=0)
    axes.set(
        xlabel="false-positive rate",
        ylabel="false-negative rate",
        title="Telling whether a unit took part",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _figure(draw_all: Sequence[Any], width: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * len(draw_all), 3.4), layout="constrained")
    for axes, draw in zip(np.atleast_1d(figure.subplots(1, len(draw_all))), draw_all, strict=True):
        draw(axes)
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure


def _drawers(points: Any, target: float | None, profile: Any) -> list[Any]:
    drawers = [lambda axes: _draw_epsilon(axes, points, target)] if points else []
    return drawers + ([lambda axes: _draw_tradeoff(axes, profile)] if profile is not None else [])


def svgs(points: Sequence[tuple[int, float]], target: float | None, profile: PrivacyProfile | None) -> list[str]:
    """Each plot as an SVG element to put into a page; none without a guarantee."""
    return [_svg(draw, f"plot {number}") for number, draw in enumerate(_drawers(points, target, profile))]


def _svg(draw: Any, name: str) -> str:
    """One plot as an SVG element.

    Args:
      name: that no other plot of the page has.
    """
    import matplotlib

    # Identifiers must differ between the plots of one page, and not from one writing of it to the next.
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        buffer = io.StringIO()
        _figure([draw], 5.6).savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def roc_svg(roc: Mapping[str, Mapping[str, Sequence[float]]], profile: PrivacyProfile | None) -> str:
    """The rates of attacks on canaries, and above them the most that any attack can reach, as an SVG element."""

    def draw(axes: Any) -> None:
        if profile is not None:
            rates = np.concatenate([[0.0], np.logspace(-6, 0, 400)])
            axes.plot(rates, 1 - profile.tradeoff(rates), color=_ACCENT, label="no attack is better (proved)")
        for name, curve in roc.items():
            axes.plot(curve["false_positive_rate"], curve["true_positive_rate"], linewidth=1, label=name)
        axes.plot([0, 1], [0, 1], color=_INK, linestyle="--", linewidth=1, label="random guessing")
        axes.set(
            xlabel="false-positive rate",
            ylabel="true-positive rate",
            title="Attack on the canaries",
            xlim=(0, 1),
            ylim=(0, 1),
        )
        axes.legend(frameon=False, loc="lower right", fontsize=9)

    return _svg(draw, "attack")


def save(
    path: pathlib.Path, points: Sequence[tuple[int, float]], target: float | None, profile: PrivacyProfile | None
) -> None:
    """Writes the plots side by side.

    Raises:
      InputError: the file's ending is none of FORMATS, or there is no guarantee to plot.
    """
    check_format(path)
    drawers = _drawers(points, target, profile)
    if not drawers:
        raise InputError("there is no finite epsilon to plot: give noise or a finite `epsilon`")
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        _figure(drawers, 5.0).savefig(path)


def check_format(path: pathlib.Path) -> None:
    if path.suffix not in FORMATS:
        raise InputError(f"`plot`={path} must end in one of {', '.join(FORMATS)}")
