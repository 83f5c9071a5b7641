"""Runs that are killed and go on: bit for bit, for every method with memory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import training
from jax.sharding import NamedSharding, PartitionSpec

import sam_optax

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")  # orbax's own


@pytest.fixture
def shared_cache(tmp_path):
    """Programs that one process has compiled serve the next, here and there."""
    variables = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    tests = str(Path(training.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    return os.environ | variables | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": paths}


def test_a_run_that_is_killed_twice_ends_where_an_uninterrupted_one_does(tmp_path, shared_cache):
    """Once between steps, once while a checkpoint is written; each process starts from disk."""
    checkpoints = tmp_path / "checkpoints"
    for how_to_die in ("kill_after_step", "kill_while_saving"):
        script = Path(training.__file__)
        ended = subprocess.run(
            [sys.executable, script, checkpoints, how_to_die],
            env=shared_cache,
            capture_output=True,
            check=False,
        )
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    resumed, start = training.train(checkpoints)
    assert start in (3, 4)  # whether the last save was whole, or not there
    expected, _ = training.train()
    assert set(expected) >= {*training.METHODS, "SWA", "first door, sam"}
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)


def test_the_methods_with_memory_are_those_of_the_library():
    assert {"look_sam", "friendly_sam", "vasso", "bsam", "eigen_sam"} <= set(training.METHODS)
    assert "sam" not in training.METHODS


def test_from_eight_devices_onto_four(tmp_path):
    """To rounding: the order in which devices add their parts of a sum is another."""
    tx = optax.chain(
        sam_optax.look_sam(optax.linear_schedule(0.1, 0.2, 4), k=2, alpha=0.5), optax.adam(0.01)
    )
    params = {"w": jnp.sin(jnp.arange(64.0)).reshape(16, 4), "b": jnp.ones(4)}
    x = jnp.cos(jnp.arange(128.0)).reshape(8, 16)
    loss_fn = lambda params: jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2)

    @jax.jit
    def step(params, state):
        grad_fn = jax.grad(loss_fn)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    def placed(tree, devices):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
        rows = lambda x: PartitionSpec("fsdp") if jnp.ndim(x) == 2 else PartitionSpec()
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, rows(x))), tree)

    run = placed((params, tx.init(params)), 8)
    for _ in range(2):
        run = step(*run)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", run)
    like = placed((params, tx.init(params)), 4)
    with ocp.StandardCheckpointer() as checkpointer:
        onto_four = checkpointer.restore(
            tmp_path / "run", jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        )
    assert onto_four[0]["w"].sharding.num_devices == 4
    jax.tree.map(np.testing.assert_array_equal, onto_four, run)
    for _ in range(2):
        run, onto_four = step(*run), step(*onto_four)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, onto_four, run)
