"""Global configuration of JAX for the tests; nothing else sets it.

The suite is thousands of small programs that run once, so nearly all of its time would go into
compiling them. They are compiled in the fastest way there is, the scripts' too: numbers alone
count. A test that looks at the program itself asks for `optimised`. JAX keeps a bounded number of
programs for all functions together, so one may be gone again: caches are of size 1 at most.
"""

import os

import jax
import pytest

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of the scripts that tests start
jax.config.update("jax_disable_most_optimizations", True)
# XLA ends at a flag it does not know, and later versions do not know the first of these.
if jax.__version_info__ < (0, 11):
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """Float64 for one test, to compare with NumPy to rounding.

    In all threads: the context manager does not reach those that run callbacks.
    """
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture
def optimised():
    """Programs as users have them, for what their text, memory and costs say."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
