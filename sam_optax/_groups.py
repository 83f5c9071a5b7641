"""Disjoint groups of examples on one device: split the batch, average the results.

`optax.microbatching` does the same for any function but deals examples out to
groups in strides, which is not how devices share a batch; groups here are
contiguous, so that micro-batches and devices give the same numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sam_optax import _numerics


def mean_over_groups(
    group_value_and_grad: Callable[[Any, Any], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    size: int,
    argnums: int | str | Sequence[int | str] | None,
    unroll: int | bool,
    stack_aux: bool,
) -> Any:
    """Mean of ((loss, aux), grads) over groups, in the memory of one group."""
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
    groups = _number_of_groups(size, [x for b, x in zip(is_batch, leaves, strict=True) if b])
    split = [
        jnp.reshape(x, (groups, size, *jnp.shape(x)[1:]))
        for b, x in zip(is_batch, leaves, strict=True)
        if b
    ]

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

    def body(total: Any, group: Any) -> Any:
        averaged, stacked = evaluate(*group)
        return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, averaged), stacked

    indices = jnp.arange(groups)
    # Abstract evaluation fills the cache of the jitted function: one trace in all.
    like, _ = jax.eval_shape(evaluate, indices[0], [x[0] for x in split])
    zeros = jax.tree.map(lambda x: _numerics.widened(jnp.zeros_like(x)), like)
    total, aux = jax.lax.scan(body, zeros, (indices, split), unroll=unroll)
    loss, grads, averaged_aux = jax.tree.map(lambda t, x: (t / groups).astype(x.dtype), total, like)
    return (loss, aux if stack_aux else averaged_aux), grads


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
