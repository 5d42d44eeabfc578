"""dpgemma data stats: what a run with these settings would train on, and under which noise."""

import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from accounting import rounding, run_files
from accounting.errors import as_flags
from dpgemma.training.settings import Settings

if TYPE_CHECKING:
    from dpgemma.training.statistics import Statistics

_PRIVATE = (
    "These numbers are facts about private data: keep them where the data are kept. Settings that are chosen by them"
    " are public, and reveal something of the data that no report counts."
)


def run(settings: Settings, *, epsilon_given: bool, as_json: bool) -> int:
    """Prints the statistics as text, or as one JSON object."""
    from dpgemma.training import statistics

    result = as_dict(settings, statistics.of(settings, epsilon_given=epsilon_given))
    print(_PRIVATE, file=sys.stderr)
    print(json.dumps(run_files.encode(result)) if as_json else _text(result))
    return 0


def as_dict(settings: Settings, found: "Statistics") -> dict[str, Any]:
    """The statistics by name."""
    m, units = found.plan.mechanism, found.found
    result: dict[str, Any] = {
        "data": settings.data,
        "privacy_unit": units.privacy_unit,
        "units": units.units.num_units,
        "training_units_expected": found.training_units,
        "sequence_length": settings.sequence_length,
        "rows": units.all_rows,
        "rows_kept": units.rows,
        "rows_to_learn": units.rows_to_learn,
        "remarks": [as_flags(remark) for remark in units.remarks],
        "lengths": dict(units.lengths),
        "rows_per_unit": _histogram(found.rows_of_units) if found.rows_of_units is not None else [],
        "epsilon": found.plan.epsilon,
        "delta": found.plan.delta,
        "steps": m.steps,
        "expected_batch_size": m.expected_batch_size,
        "sampling_probability": m.sampling_probability,
        "max_batch_size": m.max_batch_size,
        "noise_multiplier": m.noise_multiplier,
        "choices": [
            {
                "rows_per_unit": c.rows_per_unit,
                "rows_kept": c.rows_kept,
                "users_in_step": c.users,
                "noise_of_users": c.noise_of_users,
                "rows_in_step": c.rows,
                "noise_of_rows": c.noise_of_rows,
                "epsilon_of_rows_with_noise_of_users": c.epsilon_of_rows,
                "largest_ratio": c.largest_ratio,
                "preferred": c.preferred,
            }
            for c in found.choices
        ],
    }
    return result


def _histogram(counts: np.ndarray) -> list[dict[str, int]]:
    """Units by their number of rows, in ranges that double."""
    edges = [1]
    while edges[-1] <= counts.max():
        edges.append(2 * edges[-1])
    numbers, _ = np.histogram(counts, edges)
    return [
        {"from": low, "to": high - 1, "units": int(n)}
        for low, high, n in zip(edges[:-1], edges[1:], numbers, strict=True)
    ]


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{result['data']}: {result['units']} units ({result['privacy_unit']}), about"
        f" {result['training_units_expected']} of them to train on",
        f"rows of {result['sequence_length']}: {result['rows']}, of which {result['rows_kept']} are kept and"
        f" {result['rows_to_learn']} have something to learn",
    ]
    lengths = result["lengths"]
    if lengths and lengths["percentiles"]:
        from dpgemma.data.text.pieces import PERCENTILES

        shown = ", ".join(f"{p} %: {n}" for p, n in zip(PERCENTILES, lengths["percentiles"], strict=True))
        lines.append(f"lengths of records: {shown}; {lengths['longer']} are longer than a row")
    lines += result["remarks"]
    if result["rows_per_unit"]:
        lines += ["", "rows of a unit      units"]
        for part in result["rows_per_unit"]:
            span = str(part["from"]) if part["from"] == part["to"] else f"{part['from']} to {part['to']}"
            lines.append(f"{span:<14} {part['units']:>10}")
    lines += [
        "",
        f"train would take {result['steps']} steps at epsilon {rounding.upper(result['epsilon'])}, delta"
        f" {result['delta']:g}: noise multiplier {rounding.upper(result['noise_multiplier'])}, expected batch"
        f" {result['expected_batch_size']:g}, at most {result['max_batch_size']} (rounded up to the devices' multiple)",
    ]
    if result["choices"]:
        lines += ["", *_choices(result["choices"])]
    return "\n".join(lines)


def _choices(choices: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"To draw users or their rows, at that epsilon and {choices[0]['rows_in_step']:.4g} rows in a step:",
        "  k  rows kept  users drawn: users, noise   rows drawn: noise  epsilon with the users' noise  ratio  draw",
    ]
    for c in choices:
        lines.append(
            f"{c['rows_per_unit']:>3}  {c['rows_kept']:>9}  {c['users_in_step']:>18.4g}, {c['noise_of_users']:>5.3g}"
            f"   {c['noise_of_rows']:>17.3g}  {rounding.upper(c['epsilon_of_rows_with_noise_of_users'], 3):>29}"
            f"  {c['largest_ratio']:>5.2f}  {c['preferred']}"
        )
    lines += [
        "ratio: the noise on a mean gradient where rows are drawn, over that where users are drawn. Users are better"
        " drawn where",
        "their mean gradients are shorter than that share of single gradients: always from 1 on (Charles et al. 2024).",
    ]
    return lines
