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

from sam_optax import _checks, _numerics
from sam_optax._measures import chart, streams

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

    with streams.bar(progress, len(rows), label) as tick:
        return streams.means(streams.batches(data), len(rows), loss, tick)


def coordinates(name: str, values: Any) -> np.ndarray:
    """The values of an axis, in float64."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"{name} must be a list of numbers or an array of one axis, such as "
            f"np.linspace(-1, 1, 25), got {values!r}"
        )
    return array


def settled_batch_norm(
    batch_norm: BatchNorm | None, statistics: Sequence[Any] | None, solutions: int
) -> BatchNorm:
    """What to do with the statistics of several solutions, where the caller left it open.

    Any of the choices is another figure unless all the statistics are alike.
    """
    if statistics is None:
        return batch_norm or "frozen"
    given: Any = statistics
    if not isinstance(given, Sequence) or len(given) != solutions:
        raise ValueError(
            f"statistics must be a sequence of {solutions} trees, one for each solution, got "
            f"{type(statistics).__name__} of {len(statistics)} "
            f"(for one tree everywhere: [statistics] * {solutions})"
        )
    if batch_norm is None and not all(_alike(statistics[0], other) for other in statistics[1:]):
        raise ValueError(
            "batch_norm must be given where the solutions' statistics differ: 'recomputed' "
            "measures each point as it would be used (needs recompute), 'interpolated' mixes them "
            "as the parameters, 'frozen' takes those of the first solution everywhere, also for "
            "the others; got None"
        )
    return batch_norm or "frozen"


def _alike(a: Any, b: Any) -> bool:
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x is y or np.array_equal(x, y) for x, y in pairs)


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
    own = () if statistics is None else (statistics,)
    return chart.scalar_loss(loss_fn, params, *own, batch)
