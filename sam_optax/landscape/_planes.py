"""Two-dimensional landscapes: random planes, planes through solutions and trajectories."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from sam_optax import _numerics
from sam_optax.landscape import _directions, _evaluate
from sam_optax.landscape._results import Plane
from sam_optax.sharpness._worst_case import seed_of


def random_plane(
    loss_fn: Callable[..., Any],
    params: optax.Params,
    data: Any,
    *,
    key: int | jax.Array,
    x: Any = None,
    y: Any = None,
    filter_axes: _directions.FilterAxes = _directions.flax_filters,
    statistics: Any = None,
    batch_norm: _evaluate.BatchNorm = "frozen",
    recompute: _evaluate.Recompute | None = None,
    progress: bool = False,
) -> Plane:
    r"""Loss on a random plane around a solution, filter-normalised.

    The usual picture of a minimum. Scaling each filter of the directions to
    the size of the solution's own makes networks of different scale
    comparable; the same key gives all of them the same Gaussian draw.

        L(w + x d1 + y d2),   d_f = N(0, 1) scaled to ||d_f|| = ||w_f||

    Args:
      loss_fn: loss_fn(params, batch), or loss_fn(params, statistics, batch);
        see `rays`.
      params: w, a tree of real arrays.
      data: one batch or a re-iterable of batches, see `rays`.
      key: random key, or a seed, of the directions.
      x: (nx,) coordinates; by default 25 from -1 to 1.
      y: (ny,) coordinates; those of x by default.
      filter_axes: which axes lie within a filter, a function of path and leaf;
        see `flax_filters`, which keeps biases and normalization parameters in
        place.
      statistics: what the model holds besides params (BatchNorm's averages).
      batch_norm: "frozen" or "recomputed", see `rays`.
      recompute: recompute(params, statistics) returns statistics for params.
      progress: show a progress bar (needs tqdm).

    Returns:
      A `Plane`. The directions are not made orthogonal; its cosine says how
      far from it they are. The loss at (0, 0) is L(w) to the last bit.

    Raises:
      ValueError: if batch_norm does not fit the rest.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import landscape
      >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(w**2)
      >>> w = jnp.array([[3.0], [4.0]])
      >>> plane = landscape.random_plane(
      ...     loss_fn, w, jnp.ones(2), key=jax.random.key(0), x=[-1.0, 0.0, 1.0])
      >>> print(plane.values.shape, plane.values[1, 1], plane.values[1, [0, 2]].mean().round(3))
      (3, 3) 25.0 50.0

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018, section 4.

    Note:
      nx * ny losses in one pass over the data; memory of four copies of the
      parameters.
    """
    key = _numerics.as_key(key)
    if batch_norm == "interpolated":
        raise ValueError(
            "batch_norm must be 'frozen' or 'recomputed' around one solution, got 'interpolated'"
        )
    x = np.linspace(-1, 1, 25) if x is None else _evaluate.coordinates("x", x)
    y = x if y is None else _evaluate.coordinates("y", y)
    d1, d2 = (
        _directions.filter_direction(jax.random.fold_in(key, i), params, filter_axes)
        for i in range(2)
    )
    across, up = _grid(x, y)
    values, examples = _evaluate.losses(
        loss_fn,
        (params, d1, d2),
        np.stack([np.ones_like(across), across, up], axis=1),
        data,
        statistics=None if statistics is None else (statistics,),
        statistic_weights=None,
        batch_norm=batch_norm,
        recompute=recompute,
        progress=progress,
        label="plane",
    )
    return Plane(
        x,
        y,
        values.reshape(len(y), len(x)),
        points=np.zeros((1, 2)),
        cosine=_directions.cosine(d1, d2),
        explained=np.zeros(0),
        kind="random",
        batch_norm=batch_norm,
        examples=examples,
        seed=seed_of(key),
    )


def plane_through(
    loss_fn: Callable[..., Any],
    solutions: Sequence[optax.Params],
    data: Any,
    *,
    x: Any = None,
    y: Any = None,
    statistics: Sequence[Any] | None = None,
    batch_norm: _evaluate.BatchNorm | None = None,
    recompute: _evaluate.Recompute | None = None,
    progress: bool = False,
) -> Plane:
    r"""Loss on the plane through three solutions, at their true distances.

    Puts several optimizers, or several seeds, on one map: which lie in one
    valley, and how wide each one's is.

        L(w1 + x a + y b),   a = (w2 - w1) / ||w2 - w1||, b the unit vector
        towards w3 orthogonal to it

    Args:
      loss_fn: loss_fn(params, batch), or loss_fn(params, statistics, batch);
        see `rays`.
      solutions: w1, w2, w3, three trees of the same shapes, not on one line.
      data: one batch or a re-iterable of batches, see `rays`.
      x: (nx,) coordinates, distances; by default 25 that reach a quarter of the
        extent beyond the solutions.
      y: (ny,) coordinates, as x.
      statistics: the three models' statistics.
      batch_norm: "frozen" takes those of w1 everywhere, "interpolated" mixes
        them as the parameters, "recomputed" calls recompute, which measures all
        three as they would be used. There is no default between statistics
        that differ; "frozen" otherwise.
      recompute: recompute(params, statistics) returns statistics for params.
      progress: show a progress bar (needs tqdm).

    Returns:
      A `Plane`, with the solutions' coordinates as points.

    Raises:
      ValueError: if there are not three solutions of one structure and shapes,
        or they lie on one line, or batch_norm does not fit the rest or is
        missing.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import landscape
      >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(w**2)
      >>> solutions = [jnp.array([0.0, 0.0]), jnp.array([2.0, 0.0]), jnp.array([1.0, 3.0])]
      >>> plane = landscape.plane_through(
      ...     loss_fn, solutions, jnp.ones(2), x=[0.0, 1.0], y=[0.0, 3.0])
      >>> print(plane.values)
      [[ 0.  1.]
       [ 9. 10.]]
      >>> print(plane.points[2])
      [1. 3.]

    References:
      Garipov et al., `Loss Surfaces, Mode Connectivity, and Fast Ensembling of
      DNNs <https://arxiv.org/abs/1802.10026>`_, 2018, figure 1.

    Note:
      nx * ny losses in one pass over the data; memory of four copies of the
      parameters.
    """
    if isinstance(solutions, Mapping) or len(solutions) != 3:
        raise ValueError(
            "solutions must be a list of three trees of parameters, got "
            f"{type(solutions).__name__} of {len(solutions)}"
        )
    solutions = tuple(solutions)
    _directions.require_alike("solutions", solutions)
    batch_norm = _evaluate.settled_batch_norm(batch_norm, statistics, 3)
    a, b = (_directions.difference(w, solutions[0]) for w in solutions[1:])
    width = _directions.dot(a, a) ** 0.5
    shift = _directions.dot(a, b) / width if width else 0.0
    height = max(_directions.dot(b, b) - shift**2, 0.0) ** 0.5
    if not width or height < 1e-4 * max(width, abs(shift)):
        raise ValueError(
            "solutions must not lie on one line, got a triangle of base "
            f"{width:.3g} and height {height:.3g}"
        )
    points = np.array([[0.0, 0.0], [width, 0.0], [shift, height]])
    x, y = _axis("x", x, points[:, 0]), _axis("y", y, points[:, 1])
    across, up = _grid(x, y)
    # Barycentric: the third's weight is y / height, then x = width * second + shift * third.
    third = up / height
    second = (across - shift * third) / width
    weights = np.stack([1 - second - third, second, third], axis=1)
    values, examples = _evaluate.losses(
        loss_fn,
        solutions,
        weights,
        data,
        statistics=statistics,
        statistic_weights=weights,
        batch_norm=batch_norm,
        recompute=recompute,
        progress=progress,
        label="plane",
    )
    return Plane(
        x,
        y,
        values.reshape(len(y), len(x)),
        points,
        cosine=0.0,
        explained=np.zeros(0),
        kind="solutions",
        batch_norm=batch_norm,
        examples=examples,
        seed=(),
    )


def trajectory_plane(
    loss_fn: Callable[..., Any],
    trajectory: Sequence[optax.Params],
    data: Any,
    *,
    x: Any = None,
    y: Any = None,
    statistics: Any = None,
    batch_norm: _evaluate.BatchNorm = "frozen",
    recompute: _evaluate.Recompute | None = None,
    progress: bool = False,
) -> Plane:
    r"""Loss on the principal plane of a training trajectory, with the path on it.

    The plane through the last parameters that shows most of how training got
    there; explained says how much. The path is projected, so its losses are
    not those of the surface below it.

        w_n + x d1 + y d2,   d1, d2 the principal components of w_i - w_n

    Args:
      loss_fn: loss_fn(params, batch), or loss_fn(params, statistics, batch);
        see `rays`.
      trajectory: w_0 to w_n, at least three trees of the same shapes. Copy
        them where training donates its buffers.
      data: one batch or a re-iterable of batches, see `rays`.
      x: (nx,) coordinates, distances; by default 25 that reach a quarter of the
        extent beyond the path.
      y: (ny,) coordinates, as x.
      statistics: those of the last parameters.
      batch_norm: "frozen" or "recomputed", see `rays`.
      recompute: recompute(params, statistics) returns statistics for params.
      progress: show a progress bar (needs tqdm).

    Returns:
      A `Plane`, with the projected path as points, its end at (0, 0).

    Raises:
      ValueError: if the trajectory has fewer than three points, of one
        structure and shapes, or spans no plane.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import landscape
      >>> loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(w**2)
      >>> path = [jnp.array([3.0, 0.1, 0.0]), jnp.array([1.0, 1.0, 0.0]), jnp.zeros(3)]
      >>> plane = landscape.trajectory_plane(loss_fn, path, jnp.ones(2))
      >>> print(plane.explained.sum().round(3), plane.points[0].round(2))
      1.0 [2.98 0.32]

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018, section 7.

    Note:
      nx * ny losses in one pass over the data, and inner products of the
      trajectory's points with each other.
    """
    if isinstance(trajectory, Mapping) or len(trajectory) < 3:
        raise ValueError(
            "trajectory must be a list of at least three points, got "
            f"{type(trajectory).__name__} of {len(trajectory)}"
        )
    if batch_norm == "interpolated":
        raise ValueError(
            "batch_norm must be 'frozen' or 'recomputed' on a trajectory, got 'interpolated'"
        )
    _directions.require_alike("trajectory", trajectory)
    last = trajectory[-1]
    steps = [_directions.difference(w, last) for w in trajectory]
    gram = _gram(steps)
    values, vectors = np.linalg.eigh(gram)
    lengths = np.sqrt(np.maximum(values[::-1][:2], 0))
    if not lengths[1] > 1e-4 * lengths[0]:
        raise ValueError(f"trajectory must span a plane, got principal lengths {lengths}")
    # The component of unit length is sum_i u_i (w_i - w_n) / length; w_i has u_i * length on it.
    components = vectors[:, ::-1][:, :2]
    components = components * np.where(components[0] < 0, -1, 1)  # the start lies up and right
    d1, d2 = (_combination(steps, components[:, i] / lengths[i]) for i in range(2))
    points = components * lengths
    x, y = _axis("x", x, points[:, 0]), _axis("y", y, points[:, 1])
    across, up = _grid(x, y)
    surface, examples = _evaluate.losses(
        loss_fn,
        (last, d1, d2),
        np.stack([np.ones_like(across), across, up], axis=1),
        data,
        statistics=None if statistics is None else (statistics,),
        statistic_weights=None,
        batch_norm=batch_norm,
        recompute=recompute,
        progress=progress,
        label="trajectory",
    )
    return Plane(
        x,
        y,
        surface.reshape(len(y), len(x)),
        points,
        cosine=_directions.cosine(d1, d2),
        explained=lengths**2 / np.trace(gram),
        kind="trajectory",
        batch_norm=batch_norm,
        examples=examples,
        seed=(),
    )


def _grid(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of all points, row by row."""
    across, up = np.meshgrid(x, y)
    return across.ravel(), up.ravel()


def _axis(name: str, given: Any, points: np.ndarray) -> np.ndarray:
    if given is not None:
        return _evaluate.coordinates(name, given)
    margin = 0.25 * (points.max() - points.min())
    return np.linspace(points.min() - margin, points.max() + margin, 25)


def _gram(steps: Sequence[Any]) -> np.ndarray:
    """Inner products of the steps with each other, in float64, leaf by leaf."""
    gram = np.zeros((len(steps), len(steps)))
    for leaves in zip(*(jax.tree.leaves(step) for step in steps), strict=True):
        rows = np.stack([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves])
        gram += rows @ rows.T
    return gram


def _combination(steps: Sequence[Any], weights: np.ndarray) -> Any:
    total = _directions.scaled(steps[0], float(weights[0]))
    for step, weight in zip(steps[1:], weights[1:], strict=True):
        total = jax.tree.map(lambda t, s, w=float(weight): t + w * s, total, step)
    return jax.tree.map(_numerics.widened, total)
