"""The doors for NNX objects and Equinox modules give what that of functions gives, on any tree."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import ORDINARY, examples, is_float, methods, problems
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from public import WHOLE
from test_execution import STATELESS

import sam_optax
import sam_optax.equinox
import sam_optax.nnx

# NNX gives the optimizer parameters without the rest of the model, integers among it.
DTYPES = ["float32", "bfloat16", "complex64"]
REMEMBERING = sorted(set(WHOLE) - set(STATELESS))


@pytest.fixture(autouse=True)
def by_hand():
    with jax.disable_jit():
        yield


class Holder(eqx.Module):
    tree: Any
    name: str = "what is no array"


class Object(nnx.Module):
    """Its floating leaves are parameters, its integers state."""

    def __init__(self, tree):
        for i, leaf in enumerate(jax.tree.leaves(tree)):
            kind = nnx.Param if is_float(leaf) else nnx.BatchStat
            setattr(self, f"leaf{i:02}", kind(jnp.asarray(leaf)))


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if is_float(x)]


def loss_of(leaves):
    """A loss in which every entry has a part of its own."""
    entries = [w.astype(jnp.result_type(w, "float32")) for w in leaves]
    terms = [jnp.sum(jnp.abs(w) ** 2 / 2 + (w * (i + 1)).real) for i, w in enumerate(entries)]
    return sum(terms, jnp.zeros(()))


def of_holder(holder):
    assert holder.name == "what is no array"
    return loss_of(floats(holder.tree))


def of_object(module):
    return loss_of(jax.tree.leaves(nnx.state(module, nnx.Param)))


DOORS = {  # the door, the model of a tree, its loss, and its parameters
    "equinox": (
        sam_optax.equinox,
        Holder,
        of_holder,
        lambda model: eqx.filter(model, eqx.is_inexact_array),
    ),
    "nnx": (sam_optax.nnx, Object, of_object, lambda model: nnx.state(model, nnx.Param)),
}


def assert_same(a, b):
    for x, y in zip(floats(a), floats(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def arrays(tree):
    """Equinox takes what is no JAX array for no parameter."""
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize("door", DOORS)
@examples(8)
@given(st.data())
def test_the_first_door(door, data):
    problem = data.draw(problems(sizes=ORDINARY, dtypes=DTYPES))
    tx = data.draw(methods(names=STATELESS, scheduled=False)).build()
    params = arrays(problem.params)
    doors, model_of, loss_fn, _ = DOORS[door]
    value, grads = doors.value_and_grad(loss_fn, tx)(model_of(params))
    by_function = sam_optax.value_and_grad(lambda w: loss_of(floats(w)), tx, allow_int=True)
    expected, wanted = by_function(params)
    assert_same(value, expected)
    assert_same(grads, wanted)


@pytest.mark.parametrize("door", DOORS)
@examples(8)
@given(st.data())
def test_the_second_door(door, data):
    """With the memory of methods, over two steps."""
    problem = data.draw(problems(sizes=ORDINARY, dtypes=DTYPES))
    tx = data.draw(methods(names=REMEMBERING)).build()
    params = floats(arrays(problem.params))  # all that NNX and Equinox hand on
    doors, model_of, loss_fn, params_of = DOORS[door]
    model = model_of(arrays(problem.params))
    state, other = tx.init(params_of(model)), tx.init(params)
    for _ in range(2):
        value, grads, grad_fn = doors.value_and_grad_fn(loss_fn)(model)
        own = {"grad_fn": grad_fn, "previous_grad_fn": grad_fn}
        updates, state = tx.update(grads, state, params_of(model), **own)
        expected, clean, by_function = sam_optax.value_and_grad_fn(loss_of)(params)
        own = {"grad_fn": by_function, "previous_grad_fn": by_function}
        wanted, other = tx.update(clean, other, params, **own)
        assert_same(value, expected)
        assert_same(updates, wanted)
    assert_same(jax.tree.leaves(state), jax.tree.leaves(other))
