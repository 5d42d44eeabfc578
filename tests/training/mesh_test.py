"""Whole runs on a mesh with a model axis."""

import json
import shutil

import pytest

from tests.training.runs import assert_same_bits, call, final_parameters, flags, run, step_records

SMALL = dict(model="ladder_20k", mesh="data:1,model:2", epsilon=20.0)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("model_axis") / "run"
    done = call(*flags(text, workdir, **SMALL))
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_where_layers_are_spread(finished, text, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/6")
    done = call(*flags(text, workdir, **SMALL))
    assert done.returncode == 0 and "resuming at step 4 of 6" in done.stderr, done.stderr
    assert_same_bits(final_parameters(finished)[1], final_parameters(workdir)[1])
    assert len(step_records(workdir)) == 6 and call("audit", workdir).returncode == 0


@pytest.mark.slow
def test_on_another_mesh_lost_steps_have_other_noise_and_are_charged(finished, text, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints/6")
    done = call(*flags(text, workdir, **{**SMALL, "mesh": "data:2"}))
    assert done.returncode == 0, done.stderr
    assert "there mesh data:1,model:2; here mesh data:2" in done.stderr and "charged again" in done.stderr
    assert len(step_records(workdir)) == 8
    result = json.loads(call("audit", workdir, "--json").stdout)
    assert result["consistent"] and result["steps"] == 8


def test_a_mesh_that_does_not_divide_the_model_leaves_nothing(text, tmp_path):
    workdir = tmp_path / "run"
    done = run(*flags(text, workdir, **{**SMALL, "mesh": "data:1,model:3"}))
    assert done.returncode == 2 and "--mesh spreads heads over 3 devices" in done.stderr, done.stderr
    assert "use a model axis of 2" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not workdir.exists()
