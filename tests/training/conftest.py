import random
import shutil

import pytest

from dpgemma.training import checkpoint
from tests.training.runs import call, flags, run


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(
        " ".join(rng.choice(["fever", "cough", "rest", "Ada", "B12", "ward", "seen", "today"]) for _ in range(2000))
    )
    return path


@pytest.fixture(scope="session")
def finished(text, tmp_path_factory):
    """A finished run, never changed by a test: (folder, completed process)."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    done = run(*flags(text, workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done


@pytest.fixture(scope="session")
def exported(finished, tmp_path_factory):
    """A finished run with an export inside its folder; never changed."""
    workdir = shutil.copytree(finished[0], tmp_path_factory.mktemp("audited") / "run")
    done = call("export", f"--workdir={workdir}", f"--out={workdir / 'export'}")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture
def workdir(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "elsewhere" / "copy")


@pytest.fixture(scope="session")
def summaries(exported):
    return checkpoint.summaries(exported / "checkpoints")
