"""Held-out configurations of planted laws, and where a sweep says what came of them."""

import json
import math

import numpy as np
import pytest

from experiments.commands import sweep as command
from experiments.laws import fitting, held_out
from experiments.sweep import results
from experiments.sweep.folder import SweepFolder
from experiments.sweep.grid import Grid
from experiments.sweep.sweep import Outcome
from tests.experiments import planted

# Larger, longer, and with a noise that lies between those of the sweep.
PLACES = ((900e3, 1600, 2.0**-8), (100e3, 3200, 2.0**-8), (100e3, 1600, 2.0**-7.2))


@pytest.fixture(scope="module")
def table(truth):
    """The sweep of `truth` and three held-out configurations of it, each at three learning rates."""
    swept, records = truth.table(0), []
    for parameters, steps, ratio in PLACES:
        for x in (-6.0, -7.0, -8.0):
            for t in [*(t for t in planted.STEPS if t < steps), steps]:
                off = truth.curvature * (x - truth.best_rate(parameters, t, ratio)) ** 2
                loss = float(truth.loss(parameters, t, ratio)) * math.exp(off)
                cells = (f"model_{parameters:g}", 2**x, t, ratio, loss, parameters, planted.LENGTH, planted.BATCH)
                names = (*results.PUBLISHED, results.PARAMETERS, results.LENGTH, results.BATCH)
                records.append(dict(zip(names, cells, strict=True)))
    tested = results.of_records(records)
    columns = {name: np.concatenate([swept[name], tested[name]]) for name in swept.columns}
    return results.Table(columns | {results.HELD_OUT: np.repeat([0.0, 1.0], [len(swept), len(tested)])})


@pytest.fixture(scope="module")
def trials(fitted, table):
    return held_out.trials(fitted, table)


def test_trials_hold_the_law_against_what_was_measured(fitted, truth, table, trials):
    by_place = {(trial.parameters, trial.steps, trial.ratio): trial for trial in trials}
    assert set(by_place) == set(PLACES)
    for place, trial in by_place.items():
        assert (
            trial.model == f"model_{place[0]:g}"
            and trial.predicted == fitted.law.loss(*place)
            and trial.low <= trial.high
        )
        # The loss at the vertex of the three rates' parabola is that at the best rate.
        assert trial.measured == pytest.approx(truth.loss(*place), rel=2e-3) and abs(trial.error) < 0.02
        assert math.log(trial.learning_rate) == pytest.approx(math.log(2) * truth.best_rate(*place), abs=0.05)
    larger, longer, noise = (by_place[place].beyond for place in PLACES)
    assert (larger, longer, noise) == (("larger model",), ("longer run",), ("between",))
    # They have no part in the law.
    assert fitting.fit(table).law.as_dict() == fitted.law.as_dict()


@pytest.mark.parametrize("public", [True, False])
def test_losses_of_a_sweep_of_private_data_are_not_printed(public, fitted, table, trials, tmp_path, capsys):
    folder, grid = SweepFolder(tmp_path, public), Grid((), public)
    folder.results_file.parent.mkdir(exist_ok=True)
    law, saved = command.save_law(folder, fitted, trials)
    for as_json in (True, False):
        assert command.report(folder, grid, Outcome(table, {}), law, saved, as_json=as_json) == 0
        out = capsys.readouterr().out
        if as_json:
            said = json.loads(out)
            assert (said["held_out"] is not None) == public and said["law"] == law
        for trial in trials:
            assert (f"{trial.measured:.4f}" in out or str(trial.measured) in out) == public
            assert f"{trial.measured:.4f}" in folder.results_file.with_name("held_out.txt").read_text()
