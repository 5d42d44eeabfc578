"""Two virtual CPU devices for every test, so that sharded code is exercised; nothing reaches the network."""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"


@pytest.fixture(scope="module")
def quick_compiles():
    """Programs without the compiler's costliest passes, for tests that mostly compile and that compare within a tolerance.

    Tests of bits, of rounding and of whole runs have the programs that users have.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
