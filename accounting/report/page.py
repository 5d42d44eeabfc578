"""report.html: the report as one page for people, self-contained, readable on a phone and on paper."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from accounting import rounding
from accounting.conversions import PrivacyProfile
from accounting.empirical import protocol
from accounting.ledger import events
from accounting.ledger.executed import Executed
from accounting.report import figures, words
from accounting.report.tables import Meaning

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 50rem; padding: 1.5rem 1.25rem 4rem; background: #fff; color: #222;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.lead { font-size: 1.05rem; } .quiet { color: #666; font-size: .9rem; }
.number { font-size: 2.6rem; font-weight: 600; color: #0b5fa5; line-height: 1.1; margin: 1rem 0 .2rem; }
.none .number { color: #b00020; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #eee; vertical-align: top; }
td + td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
th { font-weight: 600; }
figure { margin: 0; } svg { width: 100%; height: auto; max-width: 40rem; display: block; }
code { font-size: .85em; overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


def render(executed: Executed, content: dict[str, Any], meaning: Meaning, points: Sequence[tuple[int, float]]) -> str:
    """Returns report.html as text.

    Args:
      executed: what the ledger says.
      content: the report of the same ledger, from report.build.
      meaning: its tables.
      points: (steps, epsilon) for the plot.
    """
    private = math.isfinite(content["epsilon"])
    plots = figures.svgs(points if private else [], content["target_epsilon"], meaning.profile)
    title = f"Privacy report of run {content['run_id'][:8]}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">{escape(_subject(executed))}</p>',
        f'<p class="quiet">{escape(_status(executed))}</p>',
        f'<div class="{"" if private else "none"}"><p class="number">ε = {_number(content["epsilon"])}</p>'
        f'<p class="lead">at δ = {content["delta"]!r}, for one unit:'
        f" {escape(words.unit_text(executed.declared))}.</p></div>",
        _section("Statement", f"<p>{escape(content['statement'])}</p>"),
        _section("Who may see what", _table(("", ""), _audience(private))),
        _section("Parameters", _table(("", ""), _parameters(executed, content))),
        *(
            _section(heading, f"<figure>{plot}</figure>{note}")
            for (heading, note), plot in zip(_PLOT_TEXTS, plots, strict=False)
        ),
        *(_tables(meaning) if private else []),
        *_attack(executed, content, meaning),
        _section("Compute", _table(("", ""), _compute(executed))),
        *([_section("Assumptions", _list(content["assumptions"]))] if content.get("assumptions") else []),
        _section("Deviations", _list(content["deviations"])),
        _section("How to check this", _checking(executed, content)),
    ]
    return _document(title, body)


def _document(title: str, body: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


_PLOT_TEXTS = (
    ("Epsilon over the steps", '<p class="quiet">Upper bounds; what any checkpoint up to a step has spent.</p>'),
    (
        "What an attacker can do",
        '<p class="quiet">Somebody who knows everything but whether one unit took part makes at least these errors. On'
        " the dashed line"
        " nothing better than guessing is possible; the shaded gap is all that the model can give away.</p>",
    ),
)


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{content}</section>"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    titles = "".join(f"<th>{escape(name)}</th>" for name in head) if any(head) else ""
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table>{f"<tr>{titles}</tr>" if titles else ""}\n{lines}</table></div>'


def _bound(value: Any) -> str:
    """An upper bound."""
    return rounding.upper(value, 10) if isinstance(value, float) and math.isfinite(value) else _number(value)


def _number(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, str) or not math.isfinite(value):
        return "∞"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _subject(executed: Executed) -> str:
    """Model and data, in one line."""
    facts = executed.declared
    of = f"{facts['trained_parameters']:,} of {facts['parameters']:,} parameters trained"
    return (
        f"Model {facts['model']} ({of}) on {executed.planned.num_units:,} units of the kind {facts['privacy_unit']!r}."
    )


def _status(executed: Executed) -> str:
    state = "Finished" if executed.finished else "Unfinished: this is what has been spent so far"
    repeated = (
        f" {executed.repeated_steps:,} more were lost, were executed once more in another environment, and are charged"
        " too."
        if executed.repeated_steps
        else ""
    )
    return f"{state}; {executed.updates:,} of {executed.planned.steps:,} planned steps were executed.{repeated}"


def _audience(private: bool) -> list[tuple[str, str]]:
    if not private:
        return [("Nothing may be shown", "This run has no guarantee. Treat its model like the data themselves.")]
    return [
        (
            "Anyone",
            "the model, every checkpoint, this report, config.json, ledger.jsonl, metrics.jsonl and samples from the"
            " model",
        ),
        (
            "The operator only",
            "the folder private/, the terminal's output, and losses on the training or the held-out units",
        ),
        (
            "Not protected",
            "what many units have in common, held-out units, and the choice of settings or tokenizer by looking at the"
            " data",
        ),
    ]


def _parameters(executed: Executed, content: dict[str, Any]) -> list[tuple[str, str]]:
    declared = executed.declared
    return [
        ("Privacy unit", words.unit_text(declared)),
        ("Neighbouring data sets", f"{content['neighbouring_relation']}: {words.relation_text(executed.planned)}"),
        ("Units", _number(content["num_units"])),
        *([("Rows of a unit, drawn one by one", content["items_per_unit"])] if "items_per_unit" in content else []),
        ("Sampling", f"{content['sampler']}, probability {content['sampling_probability']:.6g}"),
        (
            "Expected batch",
            f"{_number(content['expected_batch_size'])} {'units' if executed.planned.items_per_unit == 1 else 'rows'},"
            f" at most {_number(content['max_batch_size'])}",
        ),
        ("Noise multiplier", _number(content["noise_multiplier"])),
        ("Noise-batch ratio", f"{_number(content['noise_batch_ratio'])} (noise on the mean gradient, in clip norms)"),
        ("Clip norm", _number(content["clip_norm"])),
        ("Steps", _number(content["steps"])),
        *_histogram(content),
        ("Epsilon, certified bracket", f"{_number(content['epsilon_lower_numeric'])} to {_bound(content['epsilon'])}"),
        *(
            [("Epsilon for one content against another", _bound(content["epsilon_replace_one"]))]
            if "epsilon_replace_one" in content
            else []
        ),
        ("Epsilon by Rényi accounting", f"{_bound(content['cross_check'])} (a second accountant, looser as a rule)"),
        ("Target epsilon", _number(content["target_epsilon"])),
        ("Delta", f"{content['delta']!r}"),
    ]


def _histogram(content: dict[str, Any]) -> list[tuple[str, str]]:
    if "histogram" not in content:
        return []
    labels, noise = content["histogram"]["labels"], content["histogram"]["noise"]
    return [("Histogram, released once", f"{_number(labels)} public labels, noise of {_number(noise)} units on each")]


def _tables(meaning: Meaning) -> list[str]:
    groups = [(k, _bound(rounding.round_up(epsilon))) for k, epsilon in meaning.groups]
    attacks = [(f"{rate:g}", f"{rounding.upper(detected, 4)}") for rate, detected in meaning.attacks]
    inferences = [(f"{prior:g}", rounding.upper(rate, 4)) for prior, rate in meaning.inferences]
    deltas = [(rounding.upper(epsilon), rounding.upper(delta, 3)) for epsilon, delta in meaning.deltas]
    return [
        _section(
            "Owners of several units",
            "<p>Somebody whose data fill several units is protected by the epsilon in their line, at the same"
            " delta.</p>" + _table(("Units", "Epsilon"), groups),
        ),
        _section(
            "Membership attacks",
            _table(("False-positive rate", "Units detected, at most"), attacks)
            + f"<p>The two rates differ by at most {rounding.upper(meaning.membership_advantage, 4)}. As far as delta"
            " reaches, the run is at least as private as a Gaussian mechanism with μ ="
            f" {rounding.upper(meaning.gaussian_mu, 4)}.</p>",
        ),
        _section(
            "Guesses about a unit",
            "<p>Somebody who guesses an attribute of one unit, or all of it, and would be right at the first rate if it"
            " had not taken part, is right at most at the second one.</p>"
            + _table(("Right guesses without it", "Right guesses with it, at most"), inferences),
        ),
        _section("Delta at other epsilons", _table(("Epsilon", "Delta"), deltas)),
    ]


def _attack(executed: Executed, content: dict[str, Any], meaning: Meaning) -> list[str]:
    """What an attack on planted canaries showed, beside what was proved."""
    if "canaries" not in content:
        return []
    kind, repeats = content["canary_kind"], ", ".join(map(str, content["canary_repeats"]))
    text = (
        f"<p>{content['canaries']:,} canaries of the kind {escape(str(kind))} were planted, each by a secret fair coin"
        f" (as {escape(repeats)} units each, in turn). How they are attacked was registered before the first step.</p>"
    )
    event = next((event for event in executed.events if event["kind"] == events.ATTACK), {})
    if "assessment" in event:
        text += _bounds(executed, event["assessment"], content["epsilon"], meaning.profile)
    elif "kept_sha256" in event:
        text += (
            "<p>What the attack showed follows from the noise too, which this report must not tell. It is in private/,"
            " and <code>dpgemma audit WORKDIR --empirical</code> measures it again.</p>"
        )
    else:
        text += "<p>They were not attacked.</p>"
    return [_section("Attack on canaries", text)]


def attack(executed: Executed, assessment: dict[str, Any], epsilon: float, profile: PrivacyProfile | None) -> str:
    """The page of an attack alone, for private/.

    Args:
      epsilon: that was proved.
      profile: whose trade-off curve no attack can pass; None without a guarantee.
    """
    title = f"Attack on the canaries of run {executed.declared['run_id'][:8]}"
    return _document(title, [f"<h1>{escape(title)}</h1>", _bounds(executed, assessment, epsilon, profile)])


def _bounds(executed: Executed, found: dict[str, Any], epsilon: float, profile: PrivacyProfile | None) -> str:
    verdict = (
        f"<p><strong>The attack shows MORE THAN WAS PROVED: ε of at least {found['lower_bound']:g}. Release nothing of"
        " this run.</strong></p>"
        if found["contradicts"]
        else f"<p>The attack shows that ε is at least {found['lower_bound']:g}; proved is at most {_bound(epsilon)}. A"
        " small lower bound does not show that less leaks than was proved.</p>"
    )
    rows = [
        (bound["score"], protocol.BOUNDS.get(bound["bound"], bound["bound"]), f"{bound['epsilon']:g}")
        for bound in found["bounds"]
    ]
    significance = executed.declared["audit_protocol"]["significance"]
    note = (
        f"<p>Together these lower bounds are wrong in at most {significance:.0%} of runs. Each is stated in"
        " accounting.empirical, with what it assumes.</p>"
    )
    plot = f"<figure>{figures.roc_svg(found['roc'], profile)}</figure>"
    return verdict + _table(("Score", "Bound", "Epsilon, at least"), rows) + note + plot


def _model_size(declared: dict[str, Any]) -> str:
    """Returns the number of parameters, how many were trained, and the checkpoint they started from, as text."""
    everything, trained = declared["parameters"], declared["trained_parameters"]
    text = (
        _number(everything) if trained == everything else f"{_number(everything)}, {_number(trained)} of them trained"
    )
    return (
        text if declared["init_sha256"] is None else f"{text}; from a checkpoint with SHA-256 {declared['init_sha256']}"
    )


def _compute(executed: Executed) -> list[tuple[str, str]]:
    declared, m = executed.declared, executed.planned
    tokens = m.expected_batch_size * declared["sequence_length"] * executed.steps
    rows = [("Model", declared["model"]), ("Parameters", _model_size(declared)), ("Tokens, expected", f"{tokens:.4g}")]
    trained = declared["trained_parameters"]
    flops = (6 * trained + 4 * (declared["parameters"] - trained)) * tokens
    flops = f"{flops:.3g} (6 for each trained parameter and token, 4 for a frozen one; clipping not counted)"
    return [*rows, ("Floating-point operations", flops)]


def _list(lines: Sequence[str]) -> str:
    if not lines:
        return "<p>None.</p>"
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _checking(executed: Executed, content: dict[str, Any]) -> str:
    resumes = sum(event["kind"] == events.RESUME for event in executed.events)
    return (
        "<p><code>dpgemma audit WORKDIR</code> derives epsilon again from the ledger alone and compares it with"
        f" everything else in the folder. {escape(words.seal_text(executed.declared))} The run was resumed {resumes}"
        f" times.</p><p>Ledger head when this was written:<br><code>{escape(content['ledger_head'])}</code></p>"
    )
