"""Global configuration of JAX for the tests; nothing else sets it."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """Float64 for one test, to compare with NumPy to rounding."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quickly_compiled():
    """For hundreds of small programs of which numbers alone count, not speed or memory."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
