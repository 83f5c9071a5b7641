"""Losses at many combinations of a few trees, in one pass over the data.

Every line and plane is a set of weights over corner trees: (1 - a, a) over two
solutions, (1, x, y) over a solution and two directions. A weight of 1 beside
zeros gives the corner back to the last bit.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax import _checks, _numerics, _streams

BatchNorm: TypeAlias = Literal["frozen", "interpolated", "recomputed"]
Recompute: TypeAlias = Callable[[Any, Any], Any]


def losses(
    loss_fn: Callable[..., Any],
    corners: Sequence[Any],
    weights: np.ndarray,
    data: Any,
    *,
    statistics: Sequence[Any] | None,
    statistic_weights: np.ndarray | None,
    batch_norm: BatchNorm,
    recompute: Recompute | None,
    progress: bool,
    label: str,
) -> tuple[np.ndarray, int]:
    """Losses (points,) at the rows of weights (points, corners), and the number of examples.

    statistics are one tree for each solution; statistic_weights (points,
    solutions) is how they mix under "interpolated".
    """
    check_batch_norm(statistics, batch_norm, recompute)
    corners = tuple(corners)
    rows = [tuple(float(x) for x in row) for row in weights]
    own: list[Any] = [None] * len(rows)
    if statistics is not None:
        for i, row in enumerate(rows):
            own[i] = statistics[0]
            if batch_norm == "interpolated":
                assert statistic_weights is not None
                own[i] = _mixed(tuple(statistics), tuple(map(float, statistic_weights[i])))
            elif batch_norm == "recomputed":
                assert recompute is not None
                own[i] = recompute(_mixed(corners, row), statistics[0])

    def loss(i: int, batch: Any) -> jax.Array:
        return _loss(loss_fn, corners, rows[i], own[i], batch)

    with _streams.bar(progress, len(rows), label) as tick:
        return _streams.means(_streams.batches(data), len(rows), loss, tick)


def check_batch_norm(
    statistics: Sequence[Any] | None, batch_norm: str, recompute: Recompute | None
) -> None:
    """Requires what each choice needs."""
    _checks.one_of("batch_norm", batch_norm, ("frozen", "interpolated", "recomputed"))
    if batch_norm != "frozen" and statistics is None:
        raise ValueError(f"statistics must be given for batch_norm={batch_norm!r}, got None")
    if (batch_norm == "recomputed") != (recompute is not None):
        raise ValueError(
            "recompute must be given for batch_norm='recomputed' and for nothing else, "
            f"got {recompute!r} with batch_norm={batch_norm!r}"
        )


def mix(corners: Sequence[Any], weights: Sequence[Any]) -> Any:
    """The weighted sum, in the dtypes of the first corner, which gives all that is not floating."""

    def leaf_mix(first: Any, *others: Any) -> Any:
        if not _numerics.is_perturbable(first):
            return first
        total = _numerics.widened(first) * weights[0]
        for weight, other in zip(weights[1:], others, strict=True):
            total = total + _numerics.widened(other) * weight
        return total.astype(jnp.result_type(first))

    return jax.tree.map(leaf_mix, *corners)


_mixed = jax.jit(mix)


@functools.partial(jax.jit, static_argnames="loss_fn")
def _loss(loss_fn: Any, corners: Any, weights: Any, statistics: Any, batch: Any) -> jax.Array:
    params = mix(corners, weights)
    if statistics is None:
        return loss_fn(params, batch)
    return loss_fn(params, statistics, batch)
