import random
import shutil

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dpgemma.training import checkpoint
from tests.training.runs import ENVIRONMENT, call, flags, run


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs are kept between the many processes of these tests, and for the runs within this one."""
    folder = str(tmp_path_factory.mktemp("xla"))
    ENVIRONMENT["JAX_COMPILATION_CACHE_DIR"] = folder
    ENVIRONMENT["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # else, where something has been compiled before without one, there is none from then on
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(
        " ".join(rng.choice(["fever", "cough", "rest", "Ada", "B12", "ward", "seen", "today"]) for _ in range(2000))
    )
    return path


@pytest.fixture(scope="session")
def finished(text, cache, tmp_path_factory):
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
