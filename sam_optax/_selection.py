"""Order statistics without a sort, which is slow on a CPU and would gather sharded arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax import _checks


def rounded(rounding: str, place: Any) -> Any:
    """The place as an integer; in double precision, unless it is traced."""
    if _checks.is_traced(place):
        return getattr(jnp, rounding)(place).astype(jnp.int32)
    return int(getattr(np, rounding)(place))


def smallest(arrays: list[jax.Array], k: Any) -> jax.Array:
    """The k-th smallest entry, from 0, of arrays without negative ones.

    Bisects over the bits, which are in the order of the numbers: it needs no
    sort, slow on a CPU, and leaves arrays sharded as they are.
    """
    dtype = jnp.result_type(*arrays)
    kind = jnp.int64 if dtype == jnp.float64 else jnp.int32
    patterns = [jax.lax.bitcast_convert_type(x.astype(dtype), kind) for x in arrays]
    top = jnp.finfo(dtype).bits - 2  # below the sign

    def step(i: Any, found: jax.Array) -> jax.Array:
        # A plain integer where jax.disable_jit writes the loop out.
        candidate = found | (jnp.ones([], kind) << jnp.asarray(top - i, kind))
        below = sum(jnp.sum(x < candidate) for x in patterns)
        return jnp.where(below <= k, candidate, found)

    found = jax.lax.fori_loop(0, top + 1, step, jnp.zeros([], kind))
    return jax.lax.bitcast_convert_type(found, dtype)


def quantile(x: jax.Array, q: Any) -> jax.Array:
    """As `jnp.quantile` of an array without negative entries."""
    place = q * (x.size - 1)
    whole = rounded("floor", place)
    low = smallest([x], whole)
    above = jnp.min(jnp.where(x > low, x, jnp.finfo(x.dtype).max))
    following = jnp.where(jnp.sum(x <= low) > whole + 1, low, above)
    weight = place - whole
    return low * (1 - weight) + jnp.where(weight == 0, 0, following) * weight
