"""VaSSO (Li and Giannakis, 2023): ascent along a running average."""

from typing import Any, NamedTuple

import jax
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._memory import blended, zero_memory
from sam_optax._rules import transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


class RunningAverageState(NamedTuple):
    """Memory of `running_average`.

    Attributes:
      count: steps seen.
      average: the average, of the shapes and dtypes of params.
    """

    count: jax.typing.ArrayLike
    average: optax.Updates


def running_average(weight: jax.typing.ArrayLike) -> optax.GradientTransformationExtraArgs:
    r"""A filter that hands on a running average of gradients.

    Steadies an ascent against the noise of small batches. Starts at the first
    gradient, so that no debiasing is needed (`optax.ema` starts at 0), and
    forgets a step that is not finite.

        d <- (1 - weight) d + weight g,  at first d = g;  out = d

    Args:
      weight: of the new gradient, in (0, 1]; 1 passes gradients on.

    Returns:
      A filter with state, for a chain before an ascent.

    Raises:
      ValueError: if weight is outside (0, 1].

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> average = sam_optax.running_average(0.5)
      >>> state = average.init(jnp.zeros(1))
      >>> for g in (1.0, 3.0):
      ...     out, state = average.update(jnp.array([g]), state)
      ...     print(out)
      [1.]
      [2.]

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023, algorithm 1.

    Note:
      No gradient evaluation; one copy of the parameters in the state.
    """
    _checks.in_interval("weight", weight, "(0, 1]")

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, RunningAverageState]:
        del params, extra_args
        new = RunningAverageState(*blended(updates, state, weight))
        # Integer leaves have no average: hand their gradients on as they are.
        direction = _numerics.map_wide(lambda g, d: d, updates, new.average)
        return direction, _numerics.keep_if_nonfinite(updates, new, state)

    return transformation(lambda params: RunningAverageState(*zero_memory(params)), update)


def vasso(
    rho: optax.ScalarOrSchedule = 0.05,
    theta: jax.typing.ArrayLike = 0.9,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    descent: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Variance-suppressed SAM: ascends along a running average of gradients.

    Steadies the adversary of SAM against the noise of small batches.

        d <- (1 - theta) d + theta g;  e = rho d/||d||

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      theta: weight of the new gradient, in (0, 1]; 1 is SAM. The authors' code
        uses 0.9.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if rho is negative or theta outside (0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w, x: jnp.sum((w - x) ** 2)
      >>> tx, w = sam_optax.vasso(rho=0.1, theta=0.5), jnp.zeros(2)
      >>> state = tx.init(w)
      >>> for x in (jnp.array([-1.0, 0.0]), jnp.array([1.0, -1.0])):
      ...     grad_fn = lambda w: jax.grad(loss_fn)(w, x)
      ...     out, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     print(out)  # at [0.1, 0], then at [0, 0.1]
      [2.2 0. ]
      [-2.   2.2]

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023; the average starts
      at the first gradient, as in the authors' code.

    Note:
      Two gradient evaluations; one copy of the parameters in the state.
    """
    _checks.in_interval("theta", theta, "(0, 1]")
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(optax.chain(running_average(theta), ascent), descent)
