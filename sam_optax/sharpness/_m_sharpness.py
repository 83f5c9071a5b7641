"""m-sharpness: the mean over groups of examples of each group's own worst case."""

import dataclasses
from collections.abc import Sequence
from typing import Any, overload

import jax
import numpy as np
import optax

from sam_optax import _checks, _numerics
from sam_optax._measures import chart, estimates, streams
from sam_optax._measures.results import Result
from sam_optax._types import Mask, Normalization
from sam_optax.sharpness import _worst_case as worst


@dataclasses.dataclass(frozen=True)
class MSharpness(Result):
    """Mean over groups of m examples of their own worst case, from `m_sharpness`.

    Attributes:
      value: the mean.
      standard_error: standard deviation over groups / sqrt(groups), NaN for one.
      m: examples in a group.
      groups: number of groups.
      left_out: examples at the end of the data that fill no group.
      rho: radius, and p: order of the norm.
      p: see rho.
      steps: ascent steps for each group.
    """

    value: float
    standard_error: float
    m: int
    groups: int
    left_out: int
    rho: float
    p: float
    steps: int


@overload
def m_sharpness(
    loss_fn: chart.LossFn,
    params: optax.Params,
    data: Any,
    *,
    m: int,
    key: int | jax.Array | None = ...,
    rho: float = ...,
    p: float = ...,
    normalization: Normalization | None = ...,
    mask: Mask | None = ...,
    steps: int = ...,
    step_size: float | None = ...,
    restarts: int = ...,
    progress: bool = ...,
) -> MSharpness: ...


@overload
def m_sharpness(
    loss_fn: chart.LossFn,
    params: optax.Params,
    data: Any,
    *,
    m: Sequence[int],
    key: int | jax.Array | None = ...,
    rho: float = ...,
    p: float = ...,
    normalization: Normalization | None = ...,
    mask: Mask | None = ...,
    steps: int = ...,
    step_size: float | None = ...,
    restarts: int = ...,
    progress: bool = ...,
) -> dict[int, MSharpness]: ...


def m_sharpness(
    loss_fn: chart.LossFn,
    params: optax.Params,
    data: Any,
    *,
    m: int | Sequence[int],
    key: int | jax.Array | None = None,
    rho: float = 0.05,
    p: float = 2.0,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    steps: int = 1,
    step_size: float | None = None,
    restarts: int = 0,
    progress: bool = False,
) -> MSharpness | dict[int, MSharpness]:
    r"""Worst-case sharpness of groups of m examples, averaged over the data.

    What SAM with batches of m looks at, and the variant that follows the test
    error most closely: each group may climb in its own direction. Compare only
    at equal m; it grows as m falls.

        mean over groups S of m examples of max L_S(w + e_S) - L_S(w)

    Args:
      loss_fn: loss_fn(params, batch) returns the scalar mean loss over a batch.
      params: w, a tree of arrays.
      data: one batch or a re-iterable of batches, see `one_step`. Groups are
        consecutive in its order and may cross the borders of batches.
      m: examples in a group, at least 1, or several such numbers, which share one
        pass over the data. Examples at the end that fill no group are left out
        and counted.
      key: random key or a seed, needed if restarts is above 0.
      rho: radius, at least 0.
      p: order of the norm: from 1 to infinity for one step, else 2 or infinity.
      normalization: the operator T, see `one_step`.
      mask: leaves that are perturbed.
      steps: 1 takes `one_step` of each group, its value as it is; more takes
        `worst_case`.
      step_size: see `worst_case`.
      restarts: see `worst_case`; above 0 takes it for one step too.
      progress: show a progress bar (needs tqdm).

    Returns:
      An `MSharpness`, or a dictionary of one for each m. Groups of `weighted`
      data are weighted alike, by what weight gives of the group.

    Raises:
      ValueError: if m is below 1 or above the number of examples, or as
        `worst_case`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> loss_fn = lambda w, x: jnp.mean(x @ w)
      >>> w, x = jnp.zeros(2), jnp.array([[3.0, 4.0], [-3.0, -4.0]])
      >>> found = sharpness.m_sharpness(loss_fn, w, x, m=[1, 2], rho=0.1)
      >>> print({m: round(own.value, 4) for m, own in found.items()})  # two that pull apart
      {1: 0.5, 2: 0.0}

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, section 4.1.

    Note:
      steps gradients and one loss over the data, in groups; one group is in
      memory at a time.
    """
    key = None if key is None else _numerics.as_key(key)
    sizes = list(m) if isinstance(m, Sequence) else [m]
    if not sizes:
        raise ValueError(f"m must hold at least one number of examples, got {m!r}")
    for size in sizes:
        _checks.integer_at_least("m", size, 1)
    simple = steps == 1 and restarts == 0
    if simple:
        _checks.at_least("rho", rho, 0.0)
        _checks.at_least("p", p, 1.0)
    else:
        worst.check_ascent(rho, p, steps, step_size, restarts, key)
    place = chart.chart(params, normalization, mask)
    data = streams.batches(data)
    rises: dict[int, list[Any]] = {size: [] for size in sizes}
    weights: dict[int, list[float]] = {size: [] for size in sizes}
    left_out = dict.fromkeys(sizes, 0)
    with streams.bar(progress, 0, "m-sharpness") as tick:
        for size, index, group, count in streams.groups(data, sizes):
            if count < size:
                left_out[size] = count
                continue
            weight = streams.weight_of(data, group)
            if not weight:  # nothing but padding
                continue
            if simple:
                rise = worst.rise_at_one_step(loss_fn, place, [group], rho, p)[0]
            else:
                own = None if key is None else jax.random.fold_in(key, index)
                rise = worst.best_of_ascents(
                    loss_fn, place, [group], rho, p, steps, step_size, restarts, own, tick
                )[0]
            rises[size].append(rise)
            weights[size].append(weight)
            tick()
    found = {}
    for size in sizes:
        if not rises[size]:
            raise ValueError(
                f"m must be at most the number of examples, {left_out[size]}, got {size}"
            )
        values = np.asarray(jax.device_get(rises[size]), np.float64)
        value, error = estimates.mean_and_error(values, np.asarray(weights[size]))
        found[size] = MSharpness(value, error, size, len(values), left_out[size], rho, p, steps)
    return found if isinstance(m, Sequence) else found[m]
