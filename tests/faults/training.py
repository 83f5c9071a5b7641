"""A training run that can die: every method with memory, SWA and the first door, with Orbax.

    PYTHONPATH=tests python tests/faults/training.py DIRECTORY kill_after_step
    (dies by SIGKILL after a step that was not saved), or kill_while_saving (right after a save
    has begun).

Started again it goes on from the last checkpoint that is whole.
"""

import functools
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from public import UNMAPPED, build, own_inputs

import sam_optax
from sam_optax.averaging import swa

STEPS = 6  # enough for cadences and schedules to turn
PARAMS = {"w": jnp.cos(jnp.arange(12.0)).reshape(4, 3), "b": jnp.ones(3)}


def loss_fn(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2)


def batch(step):
    return jnp.asarray(np.random.default_rng(step).normal(size=(8, 4)), jnp.float32)


def remembers(method):
    return bool(jax.tree.leaves(jax.eval_shape(method.init, PARAMS)))


SAM = sam_optax.sam(optax.linear_schedule(0.1, 0.2, STEPS))
METHODS = {name: build(name) for name in UNMAPPED if remembers(build(name))}
SECOND_DOOR = {name: optax.chain(method, optax.adam(0.01)) for name, method in METHODS.items()}
SECOND_DOOR["SWA"] = swa(optax.chain(SAM, optax.sgd(0.1, momentum=0.9)), start=2, every=2)
SECOND_DOOR["EMA"] = optax.chain(SAM, optax.sgd(0.1), optax.ema(0.9))
FIRST_DOOR = {"sam": sam_optax.sam(0.1), "asam": sam_optax.asam(0.5), "gsam": sam_optax.gsam(0.1)}
BASE = optax.adam(0.01)


def initial():
    runs = {name: (PARAMS, tx.init(PARAMS)) for name, tx in SECOND_DOOR.items()}
    runs |= {f"first door, {name}": (PARAMS, BASE.init(PARAMS)) for name in FIRST_DOOR}
    return jax.tree.map(jnp.asarray, runs)


@jax.jit
def step(runs, x):
    new = {}
    for name, tx in SECOND_DOOR.items():
        params, state = runs[name]
        _, grads, grad_fn = sam_optax.value_and_grad_fn(loss_fn)(params, x)
        extra = own_inputs(grad_fn, functools.partial(loss_fn, x=x)) | {"grad_fn": grad_fn}
        updates, state = tx.update(grads, state, params, **extra)
        new[name] = optax.apply_updates(params, updates), state
    for name, method in FIRST_DOOR.items():
        params, state = runs[f"first door, {name}"]
        grads = sam_optax.grad(loss_fn, method)(params, x)
        updates, state = BASE.update(grads, state, params)
        new[f"first door, {name}"] = optax.apply_updates(params, updates), state
    return new


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train(directory=None, how_to_die=None):
    """The runs after all steps; with a directory, from the last whole checkpoint in it."""
    runs, start = initial(), 0
    if directory is not None:
        manager = ocp.CheckpointManager(Path(directory).resolve())
        if (last := manager.latest_step()) is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, runs)
            runs, start = manager.restore(last, args=ocp.args.StandardRestore(like)), last + 1
    for i in range(start, STEPS):
        runs = step(runs, batch(i))
        if directory is None:
            continue
        if how_to_die == "kill_after_step" and i == 2:
            die()
        manager.save(i, args=ocp.args.StandardSave(runs))
        if how_to_die == "kill_while_saving" and i == 3:
            die()
        manager.wait_until_finished()
    return jax.tree.map(np.asarray, runs), start


if __name__ == "__main__":
    train(*sys.argv[1:])
