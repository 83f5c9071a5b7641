"""m-sharpness: the mean over groups of examples of each group's own worst case."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from sam_optax import _ascent, _chart, _checks, _numerics, _streams
from sam_optax._types import Normalization
from sam_optax.sharpness import _worst_case as worst


@dataclasses.dataclass(frozen=True)
class MSharpness:
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


def m_sharpness(
    loss_fn: _chart.LossFn,
    params: optax.Params,
    data: Any,
    *,
    m: int,
    key: int | jax.Array | None = None,
    rho: float = 0.05,
    p: float = 2.0,
    normalization: Normalization | None = None,
    mask: _ascent.Mask | None = None,
    steps: int = 1,
    step_size: float | None = None,
    restarts: int = 0,
    progress: bool = False,
) -> MSharpness:
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
      m: examples in a group, at least 1. Examples at the end that fill no
        group are left out and counted.
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
      An `MSharpness`.

    Raises:
      ValueError: if m is below 1 or above the number of examples, or as
        `worst_case`.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> loss_fn = lambda w, x: jnp.mean(x @ w)
      >>> w, x = jnp.zeros(2), jnp.array([[3.0, 4.0], [-3.0, -4.0]])
      >>> for m in (1, 2):  # the two examples pull in opposite directions
      ...     print(round(sharpness.m_sharpness(loss_fn, w, x, m=m, rho=0.1).value, 4))
      0.5
      0.0

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, section 4.1.

    Note:
      steps gradients and one loss over the data, in groups; one group is in
      memory at a time.
    """
    key = None if key is None else _numerics.as_key(key)
    _checks.integer_at_least("m", m, 1)
    simple = steps == 1 and restarts == 0
    if simple:
        _checks.at_least("rho", rho, 0.0)
        _checks.at_least("p", p, 1.0)
    else:
        worst.check_ascent(rho, p, steps, step_size, restarts, key)
    place = _chart.chart(params, normalization, mask)
    rises, left_out = [], 0
    with _streams.bar(progress, 0, "m-sharpness") as tick:
        for i, (group, count) in enumerate(_streams.groups(_streams.batches(data), m)):
            if count < m:
                left_out = count
            elif simple:
                rises.append(worst.rise_at_one_step(loss_fn, place, [group], rho, p)[0])
            else:
                own = None if key is None else jax.random.fold_in(key, i)
                rises.append(
                    worst.best_of_ascents(
                        loss_fn, place, [group], rho, p, steps, step_size, restarts, own, tick
                    )[0]
                )
            tick()
    if not rises:
        raise ValueError(f"m must be at most the number of examples, {left_out}, got {m}")
    value, error = worst.mean_and_error(np.asarray(jax.device_get(rises), np.float64))
    return MSharpness(value, error, m, len(rises), left_out, rho, p, steps)
