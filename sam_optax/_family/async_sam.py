"""AsyncSAM (2025): ascent along the previous gradient."""

from typing import Any, NamedTuple

import jax
import optax

from sam_optax import _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._rules import transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


class PreviousState(NamedTuple):
    """The gradient given in the previous step; zero at first."""

    gradient: optax.Updates


def previous() -> optax.GradientTransformationExtraArgs:
    r"""A filter that hands on the gradient of the step before.

    Takes an ascent off the critical path, since its direction is known before
    this step's data.

        out = g_prev, 0 in the first step;  then g_prev <- g

    Returns:
      A filter with state, for a chain before an ascent.

    Raises:
      ValueError: never; a gradient of another structure fails in JAX.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> late = sam_optax.previous()
      >>> state = late.init(jnp.zeros(1))
      >>> for g in (1.0, 3.0):
      ...     out, state = late.update(jnp.array([g]), state)
      ...     print(out)
      [0.]
      [1.]

    References:
      `Asynchronous Sharpness-Aware Minimization For Fast and Accurate Deep
      Learning <https://arxiv.org/abs/2503.11147>`_, 2025.

    Note:
      No gradient evaluation; one copy of the parameters in the state.
    """

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, PreviousState]:
        del params, extra_args
        old = _numerics.map_wide(lambda g, old: old, updates, state.gradient)
        new = PreviousState(_numerics.map_wide(lambda s, g: g, state.gradient, updates))
        return old, _numerics.keep_if_nonfinite(updates, new, state)

    return transformation(lambda params: PreviousState(optax.tree.zeros_like(params)), update)


def async_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    descent: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM with the previous clean gradient as ascent direction.

    Takes the ascent off the critical path: the perturbation is known before
    this step's data, so both gradients can be computed at the same time. The
    gradients given may come from a smaller batch.

        e = rho g_prev/||g_prev||, 0 in the first step;  then g_prev <- g

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if rho is negative.

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w, x: jnp.sum((w - x) ** 2)
      >>> tx, w = sam_optax.async_sam(rho=0.1), jnp.zeros(2)
      >>> state = tx.init(w)
      >>> for x in (jnp.array([-1.0, 0.0]), jnp.array([0.0, -1.0])):
      ...     grad_fn = lambda w: jax.grad(loss_fn)(w, x)
      ...     out, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     print(out)  # at [0, 0], then at [0.1, 0]
      [2. 0.]
      [0.2 2. ]

    References:
      `Asynchronous Sharpness-Aware Minimization For Fast and Accurate Deep
      Learning <https://arxiv.org/abs/2503.11147>`_, 2025, staleness 1. From
      secondary sources: no code of the authors was found, and the first step
      is our choice.

    Note:
      Two gradient evaluations, one on the critical path; one copy of the
      parameters in the state.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(optax.chain(previous(), ascent), descent)
