"""Disjoint groups of examples on one device: split the batch, average the results.

`optax.microbatching` does the same for any function but deals examples out to
groups in strides, which is not how devices share a batch; groups here are
contiguous, so that micro-batches and devices give the same numbers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sam_optax import _numerics


def mean_over_groups(
    group_value_and_grad: Callable[[Any, Any], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    size: int,
    argnums: int | str | Sequence[int | str] | None,
    unroll: int | bool | None,
    vectorize: int | bool,
    stack_aux: bool,
) -> Any:
    """Mean of ((loss, aux), grads) over groups, in the memory of those evaluated together."""
    if argnums is None:
        argnums = range(1, len(args) + 1)
    elif isinstance(argnums, int | str):
        argnums = (argnums,)
    leaves, treedef = jax.tree.flatten((args, kwargs))
    is_batch = jax.tree.leaves(_named(args, kwargs, argnums))
    # A scalar or a key among the batch arguments belongs to every group.
    is_batch = [
        b and not _is_key(x) and jnp.ndim(x) > 0 for b, x in zip(is_batch, leaves, strict=True)
    ]
    batch = [x for b, x in zip(is_batch, leaves, strict=True) if b]
    groups = _number_of_groups(size, batch)
    together = _number_together(vectorize, groups)
    one_by_one = together == 1
    axes = (groups, size) if one_by_one else (groups // together, together, size)
    split = [_split(x, *axes) for x in batch]
    indices = jnp.arange(groups).reshape(axes[:-1])

    @jax.jit
    def evaluate(index: jax.Array, group: list[jax.Array]) -> Any:
        parts = iter(group)
        merged = [
            next(parts) if b else _own_key(x, index) for b, x in zip(is_batch, leaves, strict=True)
        ]
        (loss, aux), grads = group_value_and_grad(*jax.tree.unflatten(treedef, merged))
        return (
            ((loss, grads, {}), aux) if stack_aux else ((loss, grads, check_averageable(aux)), None)
        )

    # Abstract evaluation fills the cache of the jitted function: one trace in all.
    first = jax.tree.map(lambda x: x[0] if one_by_one else x[0, 0], (indices, split))
    like, _ = jax.eval_shape(evaluate, *first)
    if unroll is None:
        # XLA compiles the gradient of a convolution badly inside of loops on a CPU.
        on_cpu = jax.default_backend() == "cpu"
        unroll = on_cpu and _convolves(jax.make_jaxpr(evaluate)(*first))

    def body(total: Any, part: Any) -> Any:
        if unroll is True or unroll > 1:  # True == 1 in Python
            part = _after(total, part)
        if one_by_one:
            averaged, stacked = evaluate(*part)
        else:
            averaged, stacked = jax.vmap(evaluate)(*part)
            averaged = jax.tree.map(_sum_over_first_axis, averaged)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, averaged), stacked

    zeros = jax.tree.map(lambda x: _numerics.widened(jnp.zeros_like(x)), like)
    total, aux = jax.lax.scan(body, zeros, (indices, split), unroll=unroll)
    loss, grads, averaged_aux = jax.tree.map(lambda t, x: (t / groups).astype(x.dtype), total, like)
    aux = jax.tree.map(lambda x: x.reshape(groups, *x.shape[len(axes) - 1 :]), aux)
    return (loss, aux if stack_aux else averaged_aux), grads


def _split(x: Any, *sizes: int) -> jax.Array:
    """The first axis cut into axes of these sizes, the last of which stays spread over devices."""
    x = jnp.asarray(x)
    shape = (*sizes, *x.shape[1:])
    # Only a mesh of explicit axes tells the sharding here, and only there it is asked for.
    first, *rest = (*jax.typeof(x).sharding.spec, None)[: x.ndim]
    if first is None:
        return jnp.reshape(x, shape)
    mesh = jax.typeof(x).sharding.mesh
    shards = math.prod(mesh.shape[name] for name in ([first] if isinstance(first, str) else first))
    spread = first if sizes[-1] % shards == 0 else None
    spec = PartitionSpec(*[None] * (len(sizes) - 1), spread, *rest)
    return jax.lax.reshape(x, shape, out_sharding=spec)


def _sum_over_first_axis(x: jax.Array) -> jax.Array:
    """As a product, because XLA sums over a leading axis some fifty times slower on a CPU."""
    wide = _numerics.widened(x)
    ones = jnp.ones(len(x), wide.dtype)
    return jnp.tensordot(ones, wide, 1, precision=jax.lax.Precision.HIGHEST)


def _after(done: Any, part: Any) -> Any:
    """The part, tied to a result so that nothing is done with it until that is there.

    Groups written out would otherwise all be evaluated at once, in the memory
    of all. XLA drops `jax.lax.optimization_barrier` on a CPU before it decides
    on the order, but keeps a condition that it cannot see is never met.
    """
    probe = sum(jnp.sum(jnp.real(x)).astype(jnp.float32) for x in jax.tree.leaves(done))
    never = jax.lax.bitcast_convert_type(probe, jnp.int32) | 1 == 0
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), part)


def _convolves(program: Any) -> bool:
    """Whether a program, or one inside of it, holds a convolution."""
    return any(
        eqn.primitive.name == "conv_general_dilated"
        or any(_convolves(p) for p in jax.tree.leaves(eqn.params) if hasattr(p, "eqns"))
        for eqn in program.eqns
    )


def check_averageable(aux: Any) -> Any:
    """The aux, if all of it can be averaged over groups."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                "aux must be floating or complex to be averaged over groups: cast it or set "
                f"average_aux=False, got {jnp.result_type(leaf)} at aux{jax.tree_util.keystr(path)}"
            )
    return aux


def _named(args: Any, kwargs: Any, argnums: Sequence[int | str]) -> Any:
    """Booleans like (args, kwargs): which leaves are in the arguments named."""
    for name in argnums:
        known = name in kwargs if isinstance(name, str) else 1 <= name <= len(args)
        if not known:
            raise ValueError(
                "batch_argnums must be positions of arguments after params (which is 0) or names "
                f"of keyword arguments, got {name!r} with {len(args)} positional arguments after "
                f"params and keywords {sorted(kwargs)}"
            )
    chosen_args = [jax.tree.map(lambda _, n=n: n in argnums, a) for n, a in enumerate(args, 1)]
    chosen_kwargs = {n: jax.tree.map(lambda _, n=n: n in argnums, a) for n, a in kwargs.items()}
    return tuple(chosen_args), chosen_kwargs


def _number_of_groups(size: int, batch: list[Any]) -> int:
    if not batch:
        raise ValueError("batch_argnums must name at least one array to split, got none")
    lengths = [jnp.shape(x)[0] for x in batch]
    if len(set(lengths)) > 1:
        raise ValueError(
            "batch_argnums must name arrays with one common first axis to split, "
            f"got lengths {lengths}"
        )
    if lengths[0] == 0 or lengths[0] % size:
        raise ValueError(
            f"microbatch_size must divide the batch, got microbatch_size {size} "
            f"and a batch of {lengths[0]}"
        )
    return lengths[0] // size


def _number_together(vectorize: int | bool, groups: int) -> int:
    together = groups if vectorize is True else vectorize
    if groups % together:
        raise ValueError(
            "vectorize must divide the number of groups, "
            f"got vectorize {vectorize} and {groups} groups"
        )
    return together


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _own_key(x: Any, index: jax.Array) -> Any:
    """Groups share all that is not split, but not their randomness."""
    if not _is_key(x):
        return x
    fold = jax.random.fold_in
    for _ in range(x.ndim):
        fold = jax.vmap(fold, in_axes=(0, None))
    return fold(x, index)
