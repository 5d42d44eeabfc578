"""Copies and backups of a run that go on: what they release, compared with what the run released."""

import json
import pathlib
import shutil
import subprocess

import numpy as np
import orbax.checkpoint as ocp
import pytest

from dpgemma.training import environment
from tests.training.runs import COMMAND, ENVIRONMENT, call, flags, run

ROOT = pathlib.Path(__file__).parents[2]
# With plain SGD and its momentum of 0.9, two checkpoints tell what was released between them.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
SETTINGS = dict(model="ladder_20k", optimizer="sgd", checkpoint_every=1, keep_checkpoints=10)


def released(workdir, step):
    """The noised mean of one step: a vector."""
    traces = []
    for number in (step, step + 1):
        restored = ocp.PyTreeCheckpointer().restore((workdir / "checkpoints" / str(number) / "state").absolute())
        found = []
        leaves_of_trace(restored["optimizer_state"], found)
        traces.append(np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in found]))
    return traces[1] - 0.9 * traces[0]


def leaves_of_trace(tree, found, inside=False):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for name, item in items:
        leaves_of_trace(item, found, inside or name == "trace")
    if inside and not items and getattr(tree, "ndim", None):
        found.append(tree)


def correlation(a, b):
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.fixture(scope="module")
def original(text, tmp_path_factory):
    """A run of 6 steps, and its backup from after the fourth."""
    workdir = tmp_path_factory.mktemp("original") / "run"
    assert call(*flags(text, workdir, steps=6, **SETTINGS)).returncode == 0
    backup = pathlib.Path(shutil.copytree(workdir, workdir.with_name("backup")))
    for number in (5, 6):
        shutil.rmtree(backup / "checkpoints" / str(number))
    for name in ("report.html", "private/held_out.jsonl"):
        (backup / name).unlink()
    for name in ("metrics.jsonl", "private/metrics.jsonl"):
        lines = (backup / name).read_text().splitlines(keepends=True)
        (backup / name).write_text("".join(lines[:4]))
    lines = (backup / "ledger.jsonl").read_text().splitlines(keepends=True)
    (end,) = (i for i, line in enumerate(lines) if (r := json.loads(line))["kind"] == "stored" and r["step"] == 4)
    (backup / "ledger.jsonl").write_text("".join(lines[: end + 1]))
    return workdir, backup


def edited(folder):
    """The program with another formula of the same function, which rounds otherwise."""
    for package in ("dpgemma", "accounting"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "dpgemma/gemma/blocks/layers.py"
    path.write_text(path.read_text() + "\n# edited\n")
    return {"PYTHONPATH": str(folder)}


PLACES = {
    "edited source": edited,
    "compiled for an older processor": lambda _: {"XLA_FLAGS": "--xla_cpu_max_isa=AVX"},
    "other flags": lambda _: {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
    "not compiled": lambda _: {"JAX_DISABLE_JIT": "1"},
    "a number of threads": lambda _: {"NPROC": "16"},
    "another mesh": lambda _: {},
}
SLOW = ("compiled for an older processor", "other flags", "not compiled", "a number of threads", "another mesh")


@pytest.mark.parametrize("place", [pytest.param(p, marks=pytest.mark.slow if p in SLOW else ()) for p in PLACES])
def test_what_goes_on_elsewhere_has_other_noise(place, original, text, tmp_path):
    """Two vectors of 20,000 coordinates that are nearly all noise: a correlation above 0.1 of independent ones is
    a deviation of 14 sigma. The sum of both, and the audit of each, say what happened.
    """
    whole, backup = original
    copy = pathlib.Path(shutil.copytree(backup, tmp_path / "copy"))
    devices = {"mesh": "data:1"} if place in ("not compiled", "another mesh") else {}
    arguments = flags(text, copy, steps=6, **SETTINGS, **devices)
    variables = ENVIRONMENT | PLACES[place](tmp_path)
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], env=variables, capture_output=True, text=True, timeout=500, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "resuming at step 4 of 6\nthis is another environment, so noise differs from here on (there " in done.stderr
    for step in (4, 5):
        assert abs(correlation(released(whole, step), released(copy, step))) < 0.1
    assert correlation(released(whole, 3), released(copy, 3)) == 1
    composed = json.loads(call("account", f"--compose={whole},{copy}", "--json").stdout)
    assert composed["steps"] == 8 and "1 of them is a copy of another" in composed["statement"]
    result = json.loads(call("audit", copy, "--json").stdout)
    assert result["consistent"] and any(
        "from step 4 on the run was executed in another environment" in n for n in result["notices"]
    )


def test_a_backup_that_goes_on_in_its_place_releases_the_same_bits(original, text, tmp_path):
    """So both together cost what one costs."""
    whole, backup = original
    copy = pathlib.Path(shutil.copytree(backup, tmp_path / "copy"))
    done = run(*flags(text, copy, steps=6, **SETTINGS))
    assert done.returncode == 0, done.stderr
    for step in (4, 5):
        np.testing.assert_array_equal(released(whole, step), released(copy, step))
    composed = json.loads(call("account", f"--compose={whole},{copy}", "--json").stdout)
    assert composed["steps"] == 6
    # What was spent does not depend on how often a run was interrupted, and its report says the same.
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, copy)]
    assert reports[0].pop("ledger_head") != reports[1].pop("ledger_head") and reports[0] == reports[1]
    assert reports[0]["steps"] == 6 and reports[0]["epsilon"] > 0
    result = json.loads(call("audit", copy, "--json").stdout)
    assert result["consistent"], result["findings"]


def test_the_features_of_a_processor_are_part_of_its_name(tmp_path):
    """Under some hypervisors the name of the model is that of all processors of a manufacturer."""
    described = []
    for features in ("sse4_2", "sse4_2 avx", "avx sse4_2"):
        path = tmp_path / "cpuinfo"
        path.write_text(f"processor : 0\nmodel name : AMD EPYC\nflags : {features}\n")
        described.append(environment._cpu(str(path)))
    assert described[0] != described[1] == described[2] and all(name.startswith("AMD EPYC") for name in described)
