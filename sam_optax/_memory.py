"""Running averages of gradients that start at the first one."""

from typing import Any

import jax.numpy as jnp
import optax

from sam_optax import _numerics


def zero_memory(params: optax.Params) -> tuple[Any, optax.Updates]:
    """(count, average) before the first step."""
    return jnp.zeros([], jnp.int32), optax.tree.zeros_like(params)


def blended(updates: optax.Updates, state: Any, weight: Any) -> tuple[Any, optax.Updates]:
    """(count, average) moved towards the gradient by a weight; the first gradient at first."""
    first = state.count == 0
    average = _numerics.map_wide(
        lambda m, g: jnp.where(first, g, (1 - weight) * m + weight * g), state.average, updates
    )
    return optax.safe_increment(state.count), average
