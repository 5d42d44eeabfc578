"""The wheel holds all that the program needs, and runs outside of the source tree."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

import dpgemma

ROOT = pathlib.Path(dpgemma.__file__).parents[1]
PACKAGES = ("accounting", "dpgemma", "experiments")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(wheel, folder with its content), built without the network from a copy of the tree."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(place), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(place / "site")
    return wheel, place / "site"


def run(site, cwd, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "dpgemma", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=cwd)


def test_the_wheel_is_complete(installed):
    wheel, site = installed
    assert wheel.name.startswith(f"dpgemma-{dpgemma.__version__}-")
    for folder in PACKAGES:
        ours = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")}
        assert ours == {path.relative_to(site) for path in (site / folder).rglob("*.py")}
    for name in ("accounting/py.typed", "dpgemma/py.typed", "experiments/shakespeare/law.json"):
        assert (site / name).is_file(), name
    assert not (site / "tests").exists()


@pytest.mark.slow
def test_the_program_runs_from_the_wheel(installed, tmp_path):
    site = installed[1]
    (tmp_path / "notes.txt").write_text("seen today, cough, rest. " * 400)
    flags = ["--model=ladder_20k", "--data=notes.txt", "--sequence_length=16", "--batch_size=16", "--steps=2"]
    done = run(site, tmp_path, "train", *flags, "--workdir=run")
    assert done.returncode == 0 and "held-out" in done.stdout, done.stderr
    assert run(site, tmp_path, "audit", "run").returncode == 0
    plan = run(site, tmp_path, "plan", "--help")
    assert plan.returncode == 0 and "--compute" in plan.stdout
