"""Runs that have diverged are stopped by a public rule, and no law is fitted to them."""

import json

import numpy as np
import pytest

from dpgemma.training.observers import Private, Released
from experiments.laws import soundness
from experiments.sweep import divergence, harvest, launchers
from experiments.sweep.divergence import Divergence
from tests.experiments.sweeps import GRID, run_sweep, toml


def told(watched, losses, first=0):
    """The steps after which a run with these losses, one a step, is stopped."""
    for taken, loss in enumerate(losses, first + 1):
        watched.step(Released(taken, 0.0, 0.01), Private(3, loss, []))
    return watched.stopped_at


@pytest.mark.parametrize(
    ("losses", "stopped_at"),
    [
        ([5.0] * 64 + [6.0] * 256, 80 + 10),  # windows of ten steps, of which the seventh is half above
        ([5.0] * 64 + [np.nan] * 256, 100),
        ([np.nan] * 320, 40),
        (np.linspace(5.0, 2.0, 320), None),
        ([5.0] * 10 + [7.0, 7.0, 4.0] * 100 + [4.0] * 10, 40),
        ([5.0] * 10 + [4.0] * 10 + ([6.0] * 20 + [4.0] * 10) * 10, None),  # never three in a row
    ],
)
def test_a_run_is_stopped_after_three_points_above_its_first(losses, stopped_at):
    losses = np.asarray(losses)
    assert told(Divergence(320), losses) == stopped_at
    ends = harvest.ends(320)
    curve = [
        np.nanmean([*losses[a:b], np.nan]) if np.isfinite(losses[a:b]).any() else None
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]
    verdicts = [divergence.has_diverged(curve[: i + 1]) for i in range(len(curve))]
    assert (ends[verdicts.index(True)] if True in verdicts else None) == stopped_at


def test_a_run_that_goes_on_is_judged_by_all_its_losses(tmp_path):
    losses = [5.0] * 40 + [6.0] * 100
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        "".join(json.dumps({"step": t, "units": 3, "loss": loss}) + "\n" for t, loss in enumerate(losses[:57]))
    )
    watched = Divergence(320)
    watched.take_up(metrics)
    assert told(watched, losses[57:], 57) == told(Divergence(320), losses) == 70


@pytest.mark.slow
def test_a_diverging_run_ends_early_and_has_no_part_in_a_law(notes, tmp_path):
    config = toml(
        tmp_path / "grid.toml", notes, GRID | {"learning_rate": ["2^-7", 8.0], "noise_batch_ratio": 0, "steps": 64}
    )
    outcome = run_sweep(config, tmp_path / "out", launchers.make("local", 2, tmp_path))
    assert not outcome.failed
    table = outcome.table
    wild = table["Learning Rate"] == 8.0
    cut = table["Iterations"][wild & np.isnan(table["Cross Entropy"])].min()
    assert 4 <= cut < 64 and np.isfinite(table["Cross Entropy"][~wild]).all()
    (place,) = [
        p
        for p in (tmp_path / "out" / "runs").iterdir()
        if json.loads((p / "result.json").read_text()).get("stopped_at")
    ]
    assert sum(1 for _ in open(place / "run" / "metrics.jsonl")) < 64
    kept, left_out = soundness.sound(table)
    assert set(kept["Learning Rate"]) == {2.0**-7} and "it diverged" in left_out[0]


@pytest.mark.slow
def test_a_diverging_run_on_private_data_takes_all_its_steps(notes, tmp_path):
    wild = GRID | {"learning_rate": 8.0, "noise_batch_ratio": 0.25, "steps": 64}
    config = toml(tmp_path / "grid.toml", notes, wild, public_data=False)
    outcome = run_sweep(config, tmp_path / "out", launchers.make("local", 2, tmp_path))
    assert not outcome.failed
    (place,) = (tmp_path / "out" / "runs").iterdir()
    result = json.loads((place / "private" / "result.json").read_text())
    assert divergence.has_diverged([loss for _, loss in result["curve"]]), "else the test shows nothing"
    assert "stopped_at" not in result and sum(1 for _ in open(place / "run" / "metrics.jsonl")) == 64
