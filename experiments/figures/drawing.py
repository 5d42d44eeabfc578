"""How figures look, and their two forms: one picture of all panels as a file, and the panels one by one for a page.

The panels are separate elements of a page so that a phone can put them one below the other.
"""

import dataclasses
import io
import pathlib
from collections.abc import Callable

import numpy as np

INK, ACCENT, QUIET = "#333333", "#0b5fa5", "#767676"
# Okabe and Ito's colours, which people with any colour vision can tell apart, for what has no order.
UNORDERED = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")
_STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#555555", "ytick.color": "#555555", "axes.titlelocation": "left", "lines.linewidth": 1.7,
    "mathtext.default": "regular",
}  # fmt: skip
_PANEL = (3.7, 3.0)  # inches
_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclasses.dataclass(frozen=True)
class Key:
    """A line of a legend. `mark` is "line", "dashed", "dotted", "dot", "ring" or "band"."""

    label: str
    colour: str
    mark: str = "line"


@dataclasses.dataclass(frozen=True)
class Row:
    """Panels side by side, what their colours mean, and a heading ("" for none).

    Attributes:
      panels: each draws into the axes that it is given.
    """

    panels: tuple[Callable, ...]
    keys: tuple[Key, ...] = ()
    heading: str = ""


@dataclasses.dataclass(frozen=True)
class Plot:
    """One figure of the page.

    Attributes:
      name: of its files.
      title: what it is, in a few words.
      caption: one sentence that says what it shows.
    """

    name: str
    title: str
    caption: str
    rows: tuple[Row, ...]


def ordered(count: int) -> list[str]:
    """Colours that go from light to dark, and tell apart without hue."""
    import matplotlib
    from matplotlib import colors

    return [
        colors.to_hex(matplotlib.colormaps["viridis"](x))
        for x in (np.linspace(0.8, 0.05, count) if count > 1 else [0.3])
    ]


def save(plot: Plot, folder: pathlib.Path) -> None:
    """NAME.svg and NAME.png."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": plot.name}):
        beside = all(len(row.panels) == 1 for row in plot.rows)
        width = _PANEL[0] * max(len(row.panels) for row in plot.rows) + 2.2 * beside
        height = sum(_PANEL[1] + 0.35 * bool(row.keys and not beside) for row in plot.rows)
        figure = Figure(figsize=(width, height), layout="constrained")
        parts = np.atleast_1d(figure.subfigures(len(plot.rows), 1))
        for part, row in zip(parts, plot.rows, strict=True):
            grid = part.subplots(1, len(row.panels), squeeze=False)[0]
            for axes, draw in zip(grid, row.panels, strict=True):
                _draw(axes, draw)
            if row.keys:
                handles = [_handle(key) for key in row.keys]
                place, columns = ("outside right upper", 1) if beside else ("outside upper center", len(handles))
                part.legend(
                    handles=handles,
                    loc=place,
                    ncols=columns,
                    frameon=False,
                    title=row.heading or None,
                    columnspacing=1.2,
                    handlelength=1.6,
                )
        figure.savefig(folder / f"{plot.name}.svg", format="svg", metadata=_METADATA)
        figure.savefig(folder / f"{plot.name}.png", dpi=160)


def panel_svgs(plot: Plot) -> list[list[str]]:
    """Row by row each panel as an SVG element to put into a page."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = []
    for i, row in enumerate(plot.rows):
        elements = []
        for j, draw in enumerate(row.panels):
            # Identifiers must differ between the panels of one page, and not from one writing of it to the next.
            with matplotlib.rc_context(_STYLE | {"svg.hashsalt": f"{plot.name} {i} {j}"}):
                figure = Figure(figsize=_PANEL, layout="constrained")
                _draw(figure.subplots(), draw)
                buffer = io.StringIO()
                figure.savefig(buffer, format="svg", metadata=_METADATA)
            text = buffer.getvalue()
            elements.append(text[text.index("<svg") :])
        rows.append(elements)
    return rows


def _draw(axes, draw: Callable) -> None:
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25, linewidth=0.6)
    draw(axes)
    if not axes.has_data():
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.text(
            0.5,
            0.5,
            "no configuration lies\nwithin the law's data",
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=QUIET,
        )


def _handle(key: Key):
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if key.mark == "band":
        return Patch(color=key.colour, alpha=0.25, linewidth=0, label=key.label)
    if key.mark in ("dot", "ring"):
        face = key.colour if key.mark == "dot" else "white"
        return Line2D(
            [], [], linestyle="", marker="o", color=key.colour, markerfacecolor=face, markersize=5, label=key.label
        )
    style = {"line": "-", "dashed": "--", "dotted": ":"}[key.mark]
    return Line2D([], [], linestyle=style, color=key.colour, label=key.label)


def line(axes, x, y, colour: str, **style) -> None:
    """Draws a curve; draws nothing if all its points are missing, so that `axes.has_data` stays false."""
    if np.isfinite(y).any():
        axes.plot(x, y, color=colour, **style)


def dot(axes, x: float, y: float, colour: str, *, ring: bool = False) -> None:
    if np.isfinite(y):
        axes.plot([x], [y], "o", color=colour, markerfacecolor="white" if ring else colour, markersize=5, zorder=5)


def number(value: float) -> str:
    """A size or a count in a few characters: 640, 20.2K, 1.3M."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def power(value: float) -> str:
    """A large number as matplotlib's mathematics: 10^16, or 1.3 x 10^16."""
    mantissa, exponent = f"{value:.1e}".split("e")
    head = "" if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}\\times "
    return f"${head}10^{{{int(exponent)}}}$"


def plain_ticks(axis) -> None:
    """Round numbers as they are spoken, where a logarithmic axis spans too little for powers of ten."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    if high > 60 * low:
        return
    axis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(lambda value, _: number(value))
    axis.set_minor_locator(ticker.NullLocator())
