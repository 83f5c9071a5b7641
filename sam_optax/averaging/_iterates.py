"""The one wrapper behind `swa` and `snapshots`: remembers some iterates, changes no update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics


def remembering(
    optimizer: optax.GradientTransformation,
    start: int,
    every: int,
    state_type: Callable[..., Any],
    empty: Callable[[optax.Params], Any],
    remember: Callable[[Any, jax.Array, optax.Params], Any],
) -> optax.GradientTransformationExtraArgs:
    """The optimizer, with a memory of the iterates k = start, start + every, ... (k >= 1).

    remember(memory, n, iterate) returns the memory after one more iterate, n
    having been remembered before it. The state is state_type(count, n, memory, inner).
    """
    _checks.integer_at_least("start", start, 0)
    _checks.integer_at_least("every", every, 1)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: optax.Params) -> Any:
        count, n = (jnp.zeros([], jnp.int32) for _ in range(2))  # two buffers, to be donated
        return state_type(count, n, empty(params), optimizer.init(params))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        _checks.given("params", params, "what is remembered is params plus updates")
        count, n, memory, inner = state
        updates, inner = optimizer.update(updates, inner, params, **extra_args)
        count = jnp.asarray(optax.safe_increment(count))
        due = (count >= start) & ((count - start) % every == 0)
        # Outside of the cond it is the sum that the caller computes, and rounded like it.
        iterate = optax.apply_updates(params, _numerics.movable(updates))
        memory = jax.lax.cond(due, lambda: remember(memory, n, iterate), lambda: memory)
        return updates, state_type(count, n + due, memory, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def read(opt_state: optax.OptState, state_type: type, made_by: str) -> tuple[jax.Array, list[Any]]:
    """n and the leaves of the memory of the one such state in an optimizer state."""
    is_state = lambda x: isinstance(x, state_type)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state must hold exactly one {state_type.__name__}, of {made_by}, "
            f"got {len(found)} in {type(opt_state).__name__}"
        )
    _, n, memory, _ = found[0]
    (n,) = jax.tree.leaves(n)
    return n, jax.tree.leaves(memory)


def map_with_params(
    fn: Callable[[Any, Any], Any], memory: list[Any], params: optax.Params
) -> optax.Params:
    """A tree like params of fn(leaf of memory, leaf of params).

    By leaves, because Flax NNX wraps those of an optimizer's state in variables
    of another type than those of params.
    """
    leaves, treedef = jax.tree.flatten(params)
    if len(leaves) != len(memory):
        raise ValueError(
            "params must have the structure of those given to init: "
            f"expected {len(memory)} leaves, got {len(leaves)}"
        )
    return jax.tree.unflatten(treedef, [fn(m, w) for m, w in zip(memory, leaves, strict=True)])
