"""Two virtual CPU devices for every test, so that sharded code is exercised; nothing reaches the network.

Compiled programs are kept in one folder for the length of a test run: its many processes compile a program once.
"""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The second flag is one that training sets: with it, processes of their own find the programs that were compiled here,
# and the reverse.
FLAGS = "--xla_force_host_platform_device_count=2 --xla_gpu_deterministic_ops=true"
if FLAGS not in os.environ.get("XLA_FLAGS", ""):  # the workers of a parallel test run inherit them
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers of a parallel test run inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dpgemma-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


@pytest.fixture
def quick_compiles():
    """Programs without the compiler's costliest passes, for tests that mostly compile and that compare within a
    tolerance.

    Tests of bits, of rounding and of whole runs have the programs that users have.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
