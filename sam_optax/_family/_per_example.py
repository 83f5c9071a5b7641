"""What methods that choose examples by their losses share.

The loss returns one value per example. Each method differentiates the mean of
those it chooses, and gives their gradient to the core.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax import _axes, _checks


def constant(rho: Any) -> Any:
    """The radius, which cannot be a schedule where no state counts the steps."""
    if callable(rho):
        raise ValueError(
            "rho must be a number or a traced scalar, since no state counts steps here: give the "
            f"value of the schedule at your step, got {rho!r}"
        )
    _checks.at_least("rho", rho, 0.0)
    return rho


def losses_and_aux(
    loss_fn: Callable[..., Any], has_aux: bool, params: Any, batch: Any, kwargs: Any
) -> tuple[jax.Array, Any]:
    out = loss_fn(params, *batch, **kwargs)
    losses, aux = out if has_aux else (out, None)
    if np.ndim(losses) != 1 or np.size(losses) == 0:
        raise ValueError(
            f"loss_fn must return a vector with one loss per example, got shape {np.shape(losses)}"
        )
    for leaf in jax.tree.leaves(batch):
        if np.shape(leaf)[:1] != np.shape(losses):
            raise ValueError(
                "batch must hold arrays with the examples on axis 0 (others go by keyword), got "
                f"shape {np.shape(leaf)} for {np.size(losses)} losses"
            )
    return losses, aux


def largest(values: jax.Array, k: int, batch: Any) -> Any:
    """The k examples of largest value, of the first ones among equals."""
    if k > values.size:
        raise ValueError(f"k must be at most the number of examples, {values.size}, got {k}")
    _, index = jax.lax.top_k(jax.lax.stop_gradient(values), k)
    return jax.tree.map(lambda x: jnp.take(x, index, axis=0), batch)


def result(
    losses: jax.Array, aux: Any, grads: Any, has_aux: bool, axis_name: _axes.AxisName | None
) -> Any:
    loss = jnp.mean(losses)
    if axis_name is not None:
        loss, grads = _axes.mean((loss, grads), axis_name)
    return ((loss, aux) if has_aux else loss), grads
