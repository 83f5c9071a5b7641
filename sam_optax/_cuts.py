"""A batch cut into groups that take turns, some evaluated together, and what they give joined.

On a mesh of explicit axes arrays are sharded by type, so the sharding of all that is made here of
a batch is asked for. On automatic axes the partitioner follows from the order of the cuts.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sam_optax import _numerics


def spread_over(batch: list[Any]) -> tuple[Any, tuple[str, ...]]:
    """The mesh, and those axes of it that examples are spread over as far as types tell.

    They do on explicit axes, and only there the sharding of what is made of them is asked for.
    """
    for x in batch:
        sharding = jax.typeof(x).sharding
        first = sharding.spec[0] if sharding.spec else None
        if first is not None:
            return sharding.mesh, (first,) if isinstance(first, str) else tuple(first)
    return None, ()


def split(x: Any, groups: int, together: int, spread: tuple[Any, tuple[str, ...]]) -> jax.Array:
    """Groups of consecutive examples as (turns, those evaluated together, examples).

    Together are groups from all over the batch: turn t has the t-th of each of as many equal
    parts. A batch on several devices is cut where it lies, as long as each has a group.
    """
    x, (mesh, names) = jnp.asarray(x), spread
    sizes = (together, groups // together, len(x) // groups)
    shape = (*sizes, *x.shape[1:])
    if not names:
        return jnp.swapaxes(jnp.reshape(x, shape), 0, 1)
    # The groups are spread over as many axes as divide them, examples of a group over the rest.
    over = lambda names: math.prod(mesh.shape[name] for name in names)
    own = next(n for n in range(len(names), -1, -1) if together % over(names[:n]) == 0)
    shared = names[own:] if sizes[-1] % over(names[own:]) == 0 else ()
    # With its mesh: outside of jit there may be no mesh in context.
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*(names or None for names in spec)))
    rest = jax.typeof(x).sharding.spec[1:]
    x = jax.sharding.reshard(x, place(names if len(x) % over(names) == 0 else (), *rest))
    x = jax.lax.reshape(x, shape, out_sharding=place(names[:own], (), shared, *rest))
    return jnp.swapaxes(x, 0, 1)


def entry(x: jax.Array, axes: int) -> jax.ShapeDtypeStruct:
    """What an array holds at a place of its first axes."""
    sharding = jax.typeof(x).sharding
    spec = PartitionSpec(*sharding.spec[axes:])
    own = None if sharding.mesh.empty else NamedSharding(sharding.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape[axes:], x.dtype, sharding=own)


def in_order(x: jax.Array) -> jax.Array:
    """Results of groups, stacked as `split` stacks groups, on one axis in the order of these."""
    x = jnp.swapaxes(x, 0, 1)
    shape = (x.shape[0] * x.shape[1], *x.shape[2:])
    spec = jax.typeof(x).sharding.spec
    if not any(spec):
        return jnp.reshape(x, shape)
    spec = PartitionSpec(spec[0], *spec[2:])
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(jax.typeof(x).sharding.mesh, spec))


def first(x: jax.Array) -> jax.Array:
    """The first entry, which cannot be cut out of an axis that is spread over devices by type."""
    sharding = jax.typeof(x).sharding
    if any(sharding.spec[:1]):
        spec = PartitionSpec(None, *sharding.spec[1:])
        x = jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))
    return x[0]


def sum_over_first_axis(x: jax.Array) -> jax.Array:
    """As a product, because XLA sums over a leading axis some fifty times slower on a CPU."""
    wide = _numerics.widened(x)
    if any(jax.typeof(x).sharding.spec[:1]):
        return jnp.sum(wide, axis=0)
    ones = jnp.ones(len(x), wide.dtype)
    return jnp.tensordot(ones, wide, 1, precision=jax.lax.Precision.HIGHEST)


def wide_zeros(x: Any) -> jax.Array:
    zeros = _numerics.widened(jnp.zeros_like(x))
    # Gradients of parameters sharded over explicit axes are so by type.
    sharded = isinstance(x.sharding, NamedSharding) and any(x.sharding.spec)
    return jax.sharding.reshard(zeros, x.sharding) if sharded else zeros
