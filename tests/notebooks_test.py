"""The notebooks of docs/ run as they are, and say what they promise."""

import os
import pathlib
import subprocess
import sys

import pytest

NOTEBOOKS = pathlib.Path(__file__).parents[1] / "docs" / "notebooks"


def executed(name, **variables):
    done = subprocess.run(
        [sys.executable, NOTEBOOKS / f"{name}.py"], capture_output=True, text=True, timeout=400,
        env=os.environ | {"PYTHONPATH": str(NOTEBOOKS.parents[1])} | variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_notebook_is_tried_here():
    assert {path.stem for path in NOTEBOOKS.glob("*.py")} == {"own_model", "finetune_and_audit"}


def test_a_network_of_ones_own_is_trained_privately_in_forty_lines():
    code = [line for line in (NOTEBOOKS / "own_model.py").read_text().splitlines() if line and not line.startswith("#")]
    assert len(code) <= 40
    told = executed("own_model")
    assert "epsilon 3.0 at delta 1e-05" in told
    assert int(told.partition("delta 1e-05: ")[2].partition("%")[0]) >= 90


@pytest.mark.slow
def test_a_run_is_evaluated_and_audited():
    told = executed("finetune_and_audit", STEPS="4")
    assert "consistent: finished run, 4 steps" in told and "model.safetensors" in told
    assert "whose field 'patient' has one value" in told
