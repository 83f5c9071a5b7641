"""States and transformations on disk and elsewhere: Orbax, Flax, optax.tree, pickle, jax.export."""

import copy
import functools
import pickle

import cloudpickle
import flax.serialization
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from public import METHODS, UNMAPPED, build, own_inputs

import sam_optax

PARAMS = {"w": jnp.ones((4, 3)) / 3, "b": jnp.arange(3.0), "n": jnp.arange(2), "none": None}


def loss_fn(params):
    x = jnp.cos(jnp.arange(8.0)).reshape(2, 4)
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2)


def step(tx, params, state):
    grad_fn = jax.grad(loss_fn, allow_int=True)
    extra = own_inputs(grad_fn, loss_fn) | {"grad_fn": grad_fn}
    updates, state = tx.update(grad_fn(params), state, params, **extra)
    floats = {name: updates[name] for name in ("w", "b")}
    return params | optax.apply_updates({k: params[k] for k in floats}, floats), state


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@functools.cache
def after_one_step():
    """Every transformation with its state, which is not that of the start."""
    with jax.disable_jit():
        states = {}
        for name in UNMAPPED:
            tx = build(name)
            states[name] = step(tx, PARAMS, tx.init(PARAMS))[1]
    return states


def orbax(states, tmp_path):
    """All of them in one checkpoint, as one run has them."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), states)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(tmp_path / "states", like)


def flax_state_dict(states, tmp_path):
    del tmp_path
    return flax.serialization.from_state_dict(states, flax.serialization.to_state_dict(states))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # orbax's own
@pytest.mark.parametrize(
    "save",
    [
        orbax,
        flax_state_dict,
        lambda states, _: pickle.loads(pickle.dumps(states)),
        lambda states, _: copy.deepcopy(states),
        lambda states, _: cloudpickle.loads(cloudpickle.dumps(states)),
    ],
    ids=["orbax", "flax", "pickle", "deepcopy", "cloudpickle"],
)
def test_states_come_back_as_they_were(save, tmp_path):
    assert_same(save(after_one_step(), tmp_path), after_one_step())


@pytest.mark.parametrize("name", METHODS)
def test_transformations_travel_by_cloudpickle(name):
    """To a worker process, say; made from functions, they are nothing for pickle."""
    build_again = cloudpickle.loads(cloudpickle.dumps(build(name)))
    assert isinstance(build_again, optax.GradientTransformationExtraArgs)
    assert_same(jax.eval_shape(build_again.init, PARAMS), jax.eval_shape(build(name).init, PARAMS))


@pytest.mark.parametrize("name", UNMAPPED)
def test_optax_finds_what_is_like_params_in_a_state(name):
    """optax.tree.map_params, by which states get shardings, touches that and nothing else."""
    tx = build(name)
    state = after_one_step()[name]
    named = jax.tree.map(lambda w: f"{w.dtype}{w.shape}", PARAMS)
    marked = optax.tree.map_params(tx, lambda s, like: (s.shape, like), state, named)
    shapes = {f"{w.dtype}{w.shape}": w.shape for w in jax.tree.leaves(PARAMS)}
    is_mark = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], str)
    marks = [x for x in jax.tree.leaves(marked, is_leaf=is_mark) if is_mark(x)]
    assert all(shapes[like] == shape for shape, like in marks)
    like_params = [x for x in jax.tree.leaves(state) if x.shape == (4, 3)]
    assert sum(like == "float32(4, 3)" for _, like in marks) == len(like_params)
    assert_same(optax.tree.map_params(tx, lambda s: s, state), state)


def test_optax_gets_and_sets_what_is_in_a_state():
    make = optax.inject_hyperparams(sam_optax.vasso)
    tx = optax.chain(make(rho=0.1, theta=0.5), optax.adam(1e-3))
    params = {k: PARAMS[k] for k in ("w", "b")}
    _, state = step(tx, params, tx.init(params))
    assert optax.tree.get(state, "rho") == pytest.approx(0.1)
    assert optax.tree.get(state, "average")["w"].shape == (4, 3)
    changed = optax.tree.set(state, rho=jnp.float32(0.0))
    assert optax.tree.get(changed, "rho") == 0.0
    assert_same(optax.tree.set(changed, rho=jnp.float32(0.1)), state)
    plain, _ = step(tx, params, changed)
    at_rest, _ = step(optax.adam(1e-3), params, state[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, at_rest)


@pytest.mark.parametrize("name", ["sam", "look_sam", "vasso", "eigen_sam", "random_perturbation"])
def test_a_step_is_exported_and_compiled_ahead_of_time_with_donation(name):
    tx = optax.chain(build(name), optax.sgd(0.1))
    params = {k: PARAMS[k] for k in ("w", "b")}
    run = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
    start = lambda: jax.tree.map(jnp.array, (params, tx.init(params)))
    expected = jax.jit(functools.partial(step, tx))(*start())

    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), start())
    compiled = run.lower(*like).compile()
    given = start()
    assert_same(compiled(*given), expected)
    assert given[0]["w"].is_deleted()

    # By leaves: a container that is a named tuple would have to be registered first.
    flat, treedef = jax.tree.flatten(like)

    def of_leaves(*leaves):
        return jax.tree.leaves(step(tx, *jax.tree.unflatten(treedef, leaves)))

    exported = jax.export.export(jax.jit(of_leaves))(*flat)
    again = jax.export.deserialize(exported.serialize())
    for a, b in zip(again.call(*jax.tree.leaves(start())), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
