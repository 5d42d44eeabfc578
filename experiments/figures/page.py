"""The scaling figures of a law as files, and one page that holds them all, self-contained and readable on a phone."""

import dataclasses
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

from accounting.errors import InputError
from dpgemma import user_cache
from experiments.figures import ablations, drawing, fixed, loss_curves, noise_fields, optima, saturation, scales
from experiments.figures.drawing import Key, Plot
from experiments.figures.saturation import Row
from experiments.figures.scales import Scale
from experiments.figures.study import Study
from experiments.laws.fitting import FittedLaw
from experiments.laws.law import Domain
from experiments.planning.noise import NoiseSurface
from experiments.planning.optimum import Budget

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 4rem; background: #fff; color: #222;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; }
p, ul { max-width: 46rem; } .quiet { color: #666; font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: right; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #eee;
         font-variant-numeric: tabular-nums;
  white-space: nowrap; }
th { font-weight: 600; } th.text, td.text { text-align: left; }
figure { margin: 0; } figcaption { max-width: 46rem; color: #444; margin-top: .4rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); gap: .75rem 1rem; }
svg { width: 100%; height: auto; max-width: 30rem; display: block; }
.keys { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; margin: .3rem 0; padding: 0;
        list-style: none; font-size: .9rem; }
.keys li { display: flex; align-items: center; gap: .4rem; }
.mark { display: inline-block; width: 1.4rem; height: 0; border-top: 3px solid; }
.dashed { border-top-style: dashed; border-top-width: 2px; } .dotted { border-top-style: dotted; }
.band { height: .8rem; border: 0; background: currentColor; opacity: .25; }
.dot, .ring { width: .6rem; height: .6rem; border: 2px solid; border-radius: 50%; } .dot { background: currentColor; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2, h3 { break-after: avoid; } svg, tr { break-inside: avoid; }
  .panels { grid-template-columns: repeat(3, 1fr); } }
"""
_TABLE = (
    "The least compute whose predicted loss is within 1 % of the lowest over all compute; a row that ends at the edge"
    " of what was trained is a bound and no optimum."
)


@dataclasses.dataclass(frozen=True)
class Detail:
    """How a page is computed: by default in full.

    Attributes:
      study: makes a Study of a law, a row length, a delta and a cache folder.
      surface: makes a NoiseSurface of an epsilon, a delta and a cache folder.
      powers: exponents of two at which figure 4 computes the noise, by budget.
    """

    study: Callable[..., Study] = Study
    surface: Callable[..., NoiseSurface] = NoiseSurface
    powers: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=lambda: noise_fields.POWERS)


FULL = Detail()


def write(
    fitted: FittedLaw, budget: Budget, folder: pathlib.Path, scale: Scale | None = None, detail: Detail = FULL
) -> pathlib.Path:
    """Writes every figure as SVG and PNG, table2.csv and index.html, and returns the path of the last.

    Args:
      budget: the centre of figures 1, 3c, 5 and 6; its delta holds for all but figure 4.
      scale: units and epsilons to show; by default what suits the law.
      detail: how finely.

    Raises:
      InputError: the folder exists and is not empty, or cannot be made.
    """
    claim(folder)
    scale = scale or scales.of_law(fitted.law)
    asked = detail.study(fitted.law, fitted.sequence_length, budget.delta, user_cache.folder())
    rows = saturation.table(asked, scale.table_units, scale.epsilons)
    plots = build(fitted, asked, budget, scale, detail)
    for plot in plots:
        drawing.save(plot, folder)
    saturation.write(folder / "table2.csv", rows)
    path = folder / "index.html"
    path.write_text(render(fitted, budget, plots, rows))
    return path


def claim(folder: pathlib.Path) -> None:
    """Makes the folder, if what it would hold cannot mix with anything.

    Raises:
      InputError: it holds something, or cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{folder} is not empty: give a new folder for the figures")
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}): give another folder for the figures") from None


def build(fitted: FittedLaw, asked: Study, budget: Budget, scale: Scale, detail: Detail = FULL) -> list[Plot]:
    """Every figure, in the order of the paper."""
    units, epsilon, compute = budget.num_units, budget.epsilon, budget.compute
    centre = (epsilon, units, compute)

    def with_own(values, own):
        return sorted({*values, own})

    surfaces: dict[float, NoiseSurface] = {}

    def for_fields(e):
        return surfaces.setdefault(e, detail.surface(e, noise_fields.DELTA, user_cache.folder()))

    return [
        optima.plot(asked, optima.curves(asked, units, scale.epsilons)),
        loss_curves.plot_losses(asked, [loss_curves.losses(asked, scale.num_units, e) for e in scale.loss_epsilons]),
        loss_curves.plot_tokens(
            loss_curves.tokens_per_parameter(asked, units, scale.ratio_epsilons),
            units,
            loss_curves.without_privacy(asked, fitted.non_private, fitted.physical_batch),
        ),
        noise_fields.plot([noise_fields.field(x, y, detail.powers, for_fields) for x, y in noise_fields.PAIRS]),
        fixed.plot(fixed.compare(asked, fitted.sizes, compute, units, with_own(scale.swept_epsilons, epsilon))),
        ablations.plot(
            ablations.ablations(
                asked,
                centre,
                with_own(scale.epsilons, epsilon),
                with_own(scale.num_units, units),
                ablations.computes(asked, compute, units),
            ),
            centre,
        ),
    ]


def render(fitted: FittedLaw, budget: Budget, plots: Sequence[Plot], rows: Sequence[Row]) -> str:
    """The page."""
    title = "Scaling figures of a law"
    body = [
        f"<h1>{title}</h1>",
        f"<p>The law was fitted to {_html(domain_text(fitted.law.domain))}. Curves end where these do: nothing is"
        " extrapolated.</p>",
        f"<p>Privacy budgets are at δ = {budget.delta:g}; compute is 6 × parameters × batch × {fitted.sequence_length}"
        f" tokens × steps. Where the figures have a centre, it is ε = {budget.epsilon:g}, {budget.num_units:,.0f} units"
        f" and {_html(drawing.power(budget.compute))} FLOP.</p>",
        "<h2>How far the law can be trusted</h2>",
        _errors(fitted),
        *(_figure(plot) for plot in plots),
        f"<h2>Enough compute</h2>\n{_table(rows)}\n<p>{_TABLE} The same numbers are in table2.csv.</p>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def domain_text(domain: Domain) -> str:
    """What was measured, in words: "sizes 20,184 to 205,632, 80 to 640 steps, noise-batch ratio up to $2^{-3}$"."""
    power = f"{math.log2(domain.ratio[1]):.2f}".rstrip("0").rstrip(".") if domain.ratio[1] > 0 else None
    ratio = "no noise" if power is None else f"noise-batch ratio up to $2^{{{power}}}$"

    def ends(values):
        return f"{values[0]:,.0f} to {values[1]:,.0f}"

    return f"sizes {ends(domain.parameters)}, {ends(domain.steps)} steps, {ratio}"


def _html(text: str) -> str:
    """Escaped text, with the exponents of matplotlib's mathematics as HTML's."""
    text = re.sub(
        r"\$(.*?)\$",
        lambda found: re.sub(r"\^\{(.*?)\}", r"<sup>\1</sup>", found[1]).replace("\\times", "×"),
        escape(text),
    )
    return text.replace("<sup>-", "<sup>−")


def _errors(fitted: FittedLaw) -> str:
    if not fitted.errors:
        return (
            "<p>There are too few models, steps and noise levels to leave any of them out: the law has not been"
            " tested.</p>"
        )
    lines = [
        (
            kind,
            f"{100 * error.median:.2g} %",
            f"{100 * error.ninety:.2g} %",
            f"{100 * error.coverage:.0f} %",
            f"{error.count:,}",
        )
        for kind, error in fitted.errors.items()
    ]
    return (
        "<p>Relative errors of its predictions of runs that were left out of the fit, by what leaving them out asks"
        " for: a model size or noise level between others, a larger model, a longer run, more noise. The law states an"
        " interval for each, which should hold nine of ten.</p>"
        + _rows(
            ("what was left out", "median error", "nine of ten within", "in the stated interval", "points"),
            lines,
            text_columns=(0,),
        )
    )


def _figure(plot: Plot) -> str:
    parts = []
    for row, panels in zip(plot.rows, drawing.panel_svgs(plot), strict=True):
        heading = f"<h3>{escape(row.heading[:1].upper() + row.heading[1:])}</h3>" if row.heading else ""
        # Screen readers announce each panel by the plot's title.
        labelled = [svg.replace("<svg", f'<svg role="img" aria-label="{escape(plot.title)}"', 1) for svg in panels]
        parts.append(
            f'{heading}{_keys(row.keys)}<div class="panels">{"".join(f"<div>{svg}</div>" for svg in labelled)}</div>'
        )
    caption = f"<figcaption>{_html(plot.caption)}</figcaption>"
    return f'<h2>{escape(plot.title)}</h2>\n<figure id="{plot.name}">{"".join(parts)}{caption}</figure>'


def _keys(keys: Sequence[Key]) -> str:
    if not keys:
        return ""
    items = (
        f'<li><span class="mark {key.mark}" style="color:{key.colour}"></span>{_html(key.label)}</li>' for key in keys
    )
    return f'<ul class="keys">{"".join(items)}</ul>'


def _table(rows: Sequence[Row]) -> str:
    head = (
        "units",
        "epsilon",
        "compute",
        "loss",
        "model size",
        "steps",
        "batch",
        "tokens per parameter",
        "at the edge of the data",
    )
    lines = []
    for row in rows:
        start = _html(drawing.power(row.num_units)), f"{row.epsilon:g}"
        if np.isnan(row.compute):
            lines.append((*start, "none within the data", *[""] * 6))
            continue
        middle = (
            _html(drawing.power(row.compute)),
            f"{row.loss:.3f}",
            *map(drawing.number, (row.parameters, row.steps, row.batch_size)),
        )
        lines.append((*start, *middle, f"{row.tokens_per_parameter:.3g}", ", ".join(row.at_end)))
    return _rows(head, lines, text_columns=(8,))


def _rows(head: Sequence[str], lines: Sequence[Sequence[str]], text_columns: Sequence[int]) -> str:
    """A table of cells that are HTML already."""

    def kind(i):
        return ' class="text"' if i in text_columns else ""

    titles = "".join(f"<th{kind(i)}>{name}</th>" for i, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(line)) + "</tr>\n" for line in lines
    )
    return f'<div class="scroll"><table><tr>{titles}</tr>\n{body}</table></div>'
