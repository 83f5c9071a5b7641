"""Worst-case sharpness: how far the loss rises within radius rho."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import _ascent, _chart, _checks, _numerics, _streams
from sam_optax._types import Normalization


@dataclasses.dataclass(frozen=True)
class WorstCase:
    """The rise of the loss at a perturbation, from `one_step` or `worst_case`.

    Attributes:
      value: the rise, L(w + e) - L(w).
      loss: L(w).
      perturbation: e, a tree like params.
      rho: radius, and p: order of the norm that bounds T^-1 e.
      p: see rho.
      steps: ascent steps of each run.
      restarts: runs from random starts, besides the one from 0.
      examples: number of examples in the data.
      seed: the random key's data, empty where none was used.
    """

    value: float
    loss: float
    perturbation: Any
    rho: float
    p: float
    steps: int
    restarts: int
    examples: int
    seed: tuple[int, ...]


def one_step(
    loss_fn: _chart.LossFn,
    params: optax.Params,
    data: Any,
    *,
    rho: float = 0.05,
    p: float = 2.0,
    normalization: Normalization | None = None,
    mask: _ascent.Mask | None = None,
) -> WorstCase:
    r"""Rise of the loss at the perturbation of SAM.

    What SAM itself looks at, for the whole data set: the cheapest measure,
    good for comparing solutions at equal rho. At a minimum its gradient and
    with it the direction are noise; use `worst_case` there.

        S = L(w + e) - L(w),   e = rho T^2 g / ||T g||_2 (for p = 2; see
        `dual_ascent`), 0 where g = 0.

    Args:
      loss_fn: loss_fn(params, batch) returns the scalar mean loss over a batch.
        What else it uses, such as BatchNorm statistics in evaluation mode, is a
        constant of its compiled program: define it anew for each solution.
      params: w, a tree of arrays: what is trained, without BatchNorm statistics.
      data: one batch, a tree of arrays with examples on axis 0, or a list or
        other re-iterable of batches, streamed and weighted by examples.
      rho: radius, at least 0, as in the method whose solution is measured.
      p: order of the norm, from 1 to infinity.
      normalization: the operator T, `sam_optax.elementwise()` for ASAM.
      mask: leaves that are perturbed, as in `sam_optax.dual_ascent`.

    Returns:
      A `WorstCase`. Its value can be negative where the step overshoots.

    Raises:
      ValueError: if rho is negative, p below 1, params hold BatchNorm
        statistics, or the data cannot be read twice.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> loss_fn = lambda w, x: jnp.mean(x @ w**2)
      >>> w, x = jnp.array([1.0, 0.0]), jnp.array([[1.0, 5.0]])
      >>> print(round(sharpness.one_step(loss_fn, w, x, rho=0.1).value, 4))
      0.21

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, equation 2.

    Note:
      One gradient and one loss over the data.
    """
    _checks.at_least("rho", rho, 0.0)
    _checks.at_least("p", p, 1.0)
    place = _chart.chart(params, normalization, mask)
    rise, clean, u, examples = rise_at_one_step(loss_fn, place, _streams.batches(data), rho, p)
    return WorstCase(
        float(rise), float(clean), _chart.perturbation(place, u), rho, p, 1, 0, examples, seed=()
    )


def worst_case(
    loss_fn: _chart.LossFn,
    params: optax.Params,
    data: Any,
    *,
    key: int | jax.Array | None = None,
    rho: float = 0.05,
    p: float = 2.0,
    normalization: Normalization | None = None,
    mask: _ascent.Mask | None = None,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    progress: bool = False,
) -> WorstCase:
    r"""Largest rise of the loss within radius rho, by projected ascent.

    A lower bound of the true maximum that rarely misses it by much, and zero
    or more. It needs its random start at stationary points, where the ascent
    from w itself would stand still.

        max L(w + T u) - L(w) subject to ||u||_p <= rho,
        u <- Proj(u + a T g / ||T g||_2)  (p = inf: u + a sign(T g)),
        the best of all iterates, u = 0 included.

    Args:
      loss_fn: loss_fn(params, batch) returns the scalar mean loss over a batch.
      params: w, a tree of arrays.
      data: one batch or a re-iterable of batches, see `one_step`.
      key: random key, or a seed, for the starts; needed if restarts is above 0.
      rho: radius, at least 0.
      p: 2 or infinity.
      normalization: the operator T, see `one_step`.
      mask: leaves that are perturbed.
      steps: ascent steps of each run, at least 1. With one step, the whole of
        rho and no restart it is the step of SAM.
      step_size: a, in units of u; rho by default, which suits p = 2. For p =
        inf, where steps jump between corners, it is worth trying rho / 4.
      restarts: runs from random starts, besides the one from u = 0: uniform on
        the sphere of radius rho, or in the cube for p = inf.
      progress: show a progress bar (needs tqdm).

    Returns:
      A `WorstCase`.

    Raises:
      ValueError: if rho is negative, p neither 2 nor infinity, steps below 1,
        or key missing though there are restarts.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> loss_fn = lambda w, x: jnp.mean(x @ w**2)  # at its minimum, curvature 2 and 10
      >>> w, x = jnp.zeros(2), jnp.array([[1.0, 5.0]])
      >>> result = sharpness.worst_case(loss_fn, w, x, key=jax.random.key(0), rho=0.1)
      >>> print(round(result.value, 4), sharpness.one_step(loss_fn, w, x, rho=0.1).value)
      0.05 0.0

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, equation 1; Kwon et al.,
      `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, definition 2.

    Note:
      (restarts + 1) * steps gradients over the data; memory of four copies of
      the parameters.
    """
    key = None if key is None else _numerics.as_key(key)
    check_ascent(rho, p, steps, step_size, restarts, key)
    place = _chart.chart(params, normalization, mask)
    total = (restarts + 1) * steps
    with _streams.bar(progress, total, "worst case") as tick:
        rise, clean, u, examples = best_of_ascents(
            loss_fn, place, _streams.batches(data), rho, p, steps, step_size, restarts, key, tick
        )
    seed = () if key is None else seed_of(key)
    return WorstCase(
        float(rise),
        float(clean),
        _chart.perturbation(place, u),
        rho,
        p,
        steps,
        restarts,
        examples,
        seed=seed,
    )


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, NaN where one value gives none."""
    if len(values) == 1:
        return float(values[0]), math.nan
    with np.errstate(invalid="ignore"):  # infinite values pass through without a warning
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def seed_of(key: jax.Array) -> tuple[int, ...]:
    """What a result keeps of its random key."""
    return tuple(int(word) for word in np.ravel(jax.random.key_data(key)))


def rise_at_one_step(
    loss_fn: _chart.LossFn, place: _chart.Chart, data: Iterable[Any], rho: float, p: float
) -> tuple[Any, Any, _chart.Vector, int]:
    """The rise, the clean loss, u and the number of examples."""
    origin = place.zeros()
    (clean, gradient), examples = _streams.mean(
        data, lambda batch: _chart.loss_and_gradient(loss_fn, place, origin, batch)
    )
    u = _climb(origin, gradient, rho, p)
    loss, _ = _streams.mean(data, lambda batch: _chart.loss(loss_fn, place, u, batch))
    return loss - clean, clean, u, examples


def best_of_ascents(
    loss_fn: _chart.LossFn,
    place: _chart.Chart,
    data: Iterable[Any],
    rho: float,
    p: float,
    steps: int,
    step_size: float | None,
    restarts: int,
    key: Any,
    tick: Any,
) -> tuple[Any, Any, _chart.Vector, int]:
    """The same as `rise_at_one_step`, of the best iterate."""
    step_size = rho if step_size is None else step_size
    clean = best = u_best = None
    examples = 0
    for run in range(restarts + 1):
        u = place.zeros()
        if run > 0:
            u = _random_start(jax.random.fold_in(key, run), place, rho, p)
        for _ in range(steps):
            (loss, gradient), examples = _streams.mean(
                data, functools.partial(_chart.loss_and_gradient, loss_fn, place, u)
            )
            if best is None:
                clean, best, u_best = loss, loss, u
            best, u_best = _better(best, u_best, loss, u)
            u = _project(_climb(u, gradient, step_size, p), rho, p)
            tick()
        loss, _ = _streams.mean(data, functools.partial(_chart.loss, loss_fn, place, u))
        best, u_best = _better(best, u_best, loss, u)
    assert best is not None and clean is not None and u_best is not None
    return best - clean, clean, u_best, examples


@functools.partial(jax.jit, static_argnames="p")
def _climb(u: _chart.Vector, gradient: _chart.Vector, length: float, p: float) -> _chart.Vector:
    """u plus the dual step, in coordinates where the norm of e is that of u."""
    ascent = _ascent.dual_ascent(length, p=p)
    move, _ = ascent.update(gradient, ascent.init(u))
    return optax.apply_updates(u, move)  # pyright: ignore[reportReturnType]


@functools.partial(jax.jit, static_argnames="p")
def _project(u: _chart.Vector, rho: float, p: float) -> _chart.Vector:
    """The nearest point of the ball of radius rho."""
    if p == 2:
        norm = jnp.sqrt(_chart.dot(u, u))
        return [a * jnp.where(norm > rho, rho / norm, 1) for a in u]
    # abs and division, not clip: it serves complex u as well.
    return [a * jnp.where(jnp.abs(a) > rho, rho / jnp.abs(a), 1) for a in u]


@functools.partial(jax.jit, static_argnames="p")
def _random_start(key: jax.Array, place: _chart.Chart, rho: float, p: float) -> _chart.Vector:
    if p == 2:
        u = _chart.random(key, place, jax.random.normal)
        norm = jnp.sqrt(_chart.dot(u, u))
        return [rho * a / norm for a in u]
    return [(2 * a - 1) * rho for a in _chart.random(key, place, jax.random.uniform)]


@jax.jit
def _better(best: Any, u_best: Any, loss: Any, u: Any) -> tuple[Any, Any]:
    """The higher of two; a loss that is not a number counts as the highest."""
    higher = (loss > best) | jnp.isnan(loss)
    return jax.tree.map(lambda a, b: jnp.where(higher, b, a), (best, u_best), (loss, u))


def check_ascent(
    rho: float, p: float, steps: int, step_size: float | None, restarts: int, key: Any
) -> None:
    _checks.at_least("rho", rho, 0.0)
    if p not in (2, math.inf):
        raise ValueError(f"p must be 2 or infinity for projected ascent, got {p}")
    _checks.integer_at_least("steps", steps, 1)
    _checks.at_least("step_size", rho if step_size is None else step_size, 0.0)
    _checks.integer_at_least("restarts", restarts, 0)
    if restarts > 0 and key is None:
        raise ValueError(f"key must be given for random starts, got None with {restarts} restarts")
