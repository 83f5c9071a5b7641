"""Derivatives through a step, for meta-learning: against central differences in float64."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public import ARGUMENTS, UNMAPPED, as_method, own_inputs

import sam_optax


def loss_fn(params):
    x = jnp.cos(jnp.arange(12.0)).reshape(4, 3)
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2) + jnp.sum(params["b"] ** 4)


def real_numbers(name):
    """Every argument of a method that is a floating number by default, and its value."""
    parameters = inspect.signature(getattr(sam_optax, name)).parameters
    values = {n: p.default for n, p in parameters.items()} | ARGUMENTS.get(name, {})
    optional = {"p": 3.0, "step_size": 0.04}
    values |= {n: optional[n] for n in values.keys() & optional.keys() if values[n] is None}
    return {n: float(v) for n, v in values.items() if type(v) is float}


@pytest.mark.parametrize("name", UNMAPPED)
def test_the_loss_after_two_steps_has_the_derivatives_of_finite_differences(x64, name):
    """With respect to the learning rate, every real argument of the method, and the params."""
    params = {"w": jnp.sin(1 + jnp.arange(6.0)).reshape(3, 2), "b": jnp.array([0.3, -0.7])}
    start = {"learning rate": 0.3} | real_numbers(name)
    start |= {"params": 1.0}  # a factor

    def after(values):
        w = jax.tree.map(lambda w: values["params"] * w, params)
        arguments = {n: v for n, v in values.items() if n not in ("learning rate", "params")}
        arguments = ARGUMENTS.get(name, {}) | arguments
        tx = as_method(name, getattr(sam_optax, name)(**arguments))
        grad_fn = jax.grad(loss_fn)
        state = tx.init(w)
        extra = own_inputs(grad_fn, loss_fn) | {"grad_fn": grad_fn}
        for _ in range(2):
            updates, state = tx.update(grad_fn(w), state, w, **extra)
            w = jax.tree.map(lambda w, u: w - values["learning rate"] * u, w, updates)
        return loss_fn(w)

    with jax.disable_jit():
        derivatives = jax.grad(after)(start)
        # Along one direction, in which each argument has a share of its own.
        share = {n: (1.3 + i / 7) * max(abs(v), 1e-2) for i, (n, v) in enumerate(start.items())}
        up, down = ({n: v + h * share[n] for n, v in start.items()} for h in (3e-6, -3e-6))
        difference = (after(up) - after(down)) / 6e-6
    along = sum(share[n] * d for n, d in derivatives.items())
    np.testing.assert_allclose(along, difference, rtol=1e-5, atol=1e-9)
