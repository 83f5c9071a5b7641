"""One-dimensional landscapes: random rays and the line through two solutions."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from sam_optax import _ascent, _checks, _numerics, _streams
from sam_optax.landscape import _directions, _evaluate
from sam_optax.landscape._results import Interpolation, Rays
from sam_optax.sharpness._worst_case import seed_of


def rays(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    data: Any,
    *,
    key: int | jax.Array,
    distances: Any,
    directions: int = 10,
    mask: _ascent.Mask | None = None,
    statistics: Any = None,
    batch_norm: _evaluate.BatchNorm = "frozen",
    recompute: _evaluate.Recompute | None = None,
    progress: bool = False,
) -> Rays:
    r"""Loss along random directions from a solution.

    How wide the valley is in a typical direction. The same key gives the same
    directions for every solution of the same shapes, which makes them fair to
    compare; in many dimensions a random direction misses the few sharp ones.

        L(w + t d),   d uniform on the unit sphere, t a distance

    Args:
      loss_fn: loss_fn(params, batch) returns the scalar mean over a batch, of
        the loss or of any other figure, such as the error. With statistics,
        loss_fn(params, statistics, batch).
      params: w, a tree of real arrays.
      data: one batch, a tree of arrays with examples on axis 0, or a list or
        other re-iterable of batches, streamed and weighted by examples.
      key: random key, or a seed, of the directions.
      distances: (n,) values of t, negative ones too if wanted.
      directions: number of them, at least 1.
      mask: leaves that move, as in `sam_optax.dual_ascent`.
      statistics: what the model holds besides params (BatchNorm's averages).
      batch_norm: "frozen" takes them as they are, "recomputed" calls recompute
        at every point.
      recompute: recompute(params, statistics) returns statistics for params.
      progress: show a progress bar (needs tqdm).

    Returns:
      A `Rays`.

    Raises:
      ValueError: if directions is below 1 or batch_norm does not fit the rest.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import landscape
      >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(w**2)
      >>> result = landscape.rays(
      ...     loss_fn, jnp.zeros(3), jnp.ones(4), key=jax.random.key(0),
      ...     distances=[0.0, 1.0, 2.0], directions=2)
      >>> print(result.values.round(4))
      [[0. 1. 4.]
       [0. 1. 4.]]

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018, figure 4.

    Note:
      directions * n losses in as many passes over the data as directions;
      memory of three copies of the parameters.
    """
    key = _numerics.as_key(key)
    _checks.integer_at_least("directions", directions, 1)
    if batch_norm == "interpolated":
        raise ValueError("batch_norm must be 'frozen' or 'recomputed' on a ray, got 'interpolated'")
    t = _evaluate.coordinates("distances", distances)
    weights = np.stack([np.ones_like(t), t], axis=1)
    values, examples = [], 0
    data = _streams.batches(data)
    for i in range(directions):
        direction = _directions.unit_direction(jax.random.fold_in(key, i), params, mask)
        row, examples = _evaluate.losses(
            loss_fn,
            (params, direction),
            weights,
            data,
            statistics=None if statistics is None else (statistics,),
            statistic_weights=None,
            batch_norm=batch_norm,
            recompute=recompute,
            progress=progress,
            label=f"ray {i + 1} of {directions}",
        )
        values.append(row)
    return Rays(t, np.stack(values), batch_norm, examples, seed_of(key))


def interpolate(
    loss_fn: Callable[..., Any],
    first: optax.Params,
    second: optax.Params,
    data: Any,
    *,
    positions: Any = None,
    statistics: Any = None,
    batch_norm: _evaluate.BatchNorm | None = None,
    recompute: _evaluate.Recompute | None = None,
    progress: bool = False,
) -> Interpolation:
    r"""Loss on the straight line through two solutions.

    Shows whether a barrier parts them, and on which side each is steep. The
    ends give the two losses to the last bit.

        L((1 - a) w1 + a w2),   a in [-0.5, 1.5]

    Args:
      loss_fn: loss_fn(params, batch), or loss_fn(params, statistics, batch);
        see `rays`.
      first: w1, at a = 0.
      second: w2, at a = 1, a tree like first.
      data: one batch or a re-iterable of batches, see `rays`.
      positions: (n,) values of a; by default 41 from -0.5 to 1.5, the ends
        among them.
      statistics: pair of the two models' statistics.
      batch_norm: "frozen" takes those of the first everywhere, "interpolated"
        mixes them as the parameters, "recomputed" calls recompute, which
        measures both solutions as they would be used. There is no default
        between statistics that differ; "frozen" otherwise.
      recompute: recompute(params, statistics) returns statistics for params.
      progress: show a progress bar (needs tqdm).

    Returns:
      An `Interpolation`.

    Raises:
      ValueError: if the solutions differ in structure or shapes, or batch_norm
        does not fit the rest or is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import landscape
      >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum((w**2 - 1) ** 2)
      >>> result = landscape.interpolate(
      ...     loss_fn, -jnp.ones(1), jnp.ones(1), jnp.ones(4), positions=[0.0, 0.5, 1.0])
      >>> print(result.values, result.distance)
      [0. 1. 0.] 2.0

    References:
      Goodfellow et al., `Qualitatively Characterizing Neural Network
      Optimization Problems <https://arxiv.org/abs/1412.6544>`_, 2015.

    Note:
      n losses in one pass over the data; memory of three copies of the
      parameters.
    """
    _directions.require_alike("first and second", (first, second))
    batch_norm = _evaluate.settled_batch_norm(batch_norm, statistics, 2)
    a = np.linspace(-0.5, 1.5, 41)
    if positions is not None:
        a = _evaluate.coordinates("positions", positions)
    weights = np.stack([1 - a, a], axis=1)
    values, examples = _evaluate.losses(
        loss_fn,
        (first, second),
        weights,
        data,
        statistics=statistics,
        statistic_weights=weights,
        batch_norm=batch_norm,
        recompute=recompute,
        progress=progress,
        label="interpolation",
    )
    apart = _directions.difference(second, first)
    return Interpolation(a, values, _directions.dot(apart, apart) ** 0.5, batch_norm, examples)
