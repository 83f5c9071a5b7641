"""Passes that overflow, on every method, under both guards that the documentation tells.

By hand: parameters and the whole optimizer state are kept where the final updates are not finite.
`optax.apply_if_finite` around the base optimizer: the method's own memory is then its own affair.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from public import WHOLE, build, own_inputs

import sam_optax

PARAMS = {"w": jnp.cos(jnp.arange(12.0)).reshape(4, 3), "b": jnp.ones(3)}
X = jnp.sin(jnp.arange(32.0)).reshape(8, 4)
OPTIMIZERS = [n for n in WHOLE if sam_optax.FAMILY[n][0] == "optimizer"]
LINKS = [n for n in WHOLE if n not in OPTIMIZERS]
BOTH = ("clean", "perturbed")
# Which passes of a step overflow: three in a row, and the sixth, which a cadence of five looks at.
RUN = [(), ("clean",), ("perturbed",), BOTH, (), BOTH, ()]


def loss_fn(params):
    return jnp.mean(jnp.tanh(X @ params["w"] + params["b"][None]) ** 2)


def poisoned(tree):
    """One entry of one leaf, as where a sum in half precision overflows."""
    return tree | {"w": tree["w"].at[1, 2].set(np.inf)}


def step(tx, params, state, which):
    good = jax.grad(loss_fn)
    other = (lambda p: poisoned(good(p))) if "perturbed" in which else good
    grads = poisoned(good(params)) if "clean" in which else good(params)
    extra = own_inputs(other, loss_fn) | {"grad_fn": other, "value": loss_fn(params)}
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def all_finite(tree):
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return all(np.isfinite(np.asarray(x)).all() for x in floats)


@pytest.mark.parametrize("name", WHOLE)
def test_kept_where_the_updates_are_not_finite(name):
    """Nothing that is not finite hides in the memory behind updates that are."""
    tx = build(name) if name in OPTIMIZERS else optax.chain(build(name), optax.sgd(0.1, 0.9))
    tx = optax.with_extra_args_support(tx)
    with jax.disable_jit():
        params, state, skipped = PARAMS, tx.init(PARAMS), 0
        for which in RUN:
            new = step(tx, params, state, which)
            if all_finite(new[0]):
                params, state = new
            else:
                skipped += 1
            assert all_finite(state), which
    assert 0 < skipped <= 4


@pytest.mark.parametrize("name", LINKS)
def test_apply_if_finite_around_the_base_optimizer(name):
    guarded = optax.apply_if_finite(optax.sgd(0.1, 0.9), 10)
    tx = optax.chain(build(name), guarded)
    with jax.disable_jit():
        params, state = PARAMS, tx.init(PARAMS)
        for which in RUN:
            params, state = step(tx, params, state, which)
            assert all_finite((params, state)), which
    assert 0 < state[-1].total_notfinite <= 4
