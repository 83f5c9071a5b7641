"""Gradient norm aware minimization: a chain of points, each found from the one before."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._gradients import gradient_functions
from sam_optax._types import GradFn, Mask, Normalization


class GAMState(NamedTuple):
    """Counts of the schedules of the radii, if they are schedules.

    Attributes:
      outer: state of the ascent of the gradient norm.
      inner: state of the ascents of the loss.
    """

    outer: optax.OptState
    inner: optax.OptState


def gam(
    rho: optax.ScalarOrSchedule = 0.2,
    rho_inner: optax.ScalarOrSchedule = 0.02,
    beta0: jax.typing.ArrayLike = 0.5,
    beta1: jax.typing.ArrayLike = 0.6,
    gamma: jax.typing.ArrayLike = 0.03,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient norm aware minimization: low curvature in the whole neighbourhood.

    Penalises the largest gradient norm within rho, first-order flatness,
    rather than the largest loss. At twice the price of SAM, prefer it where
    SAM has helped and training time is no concern.

        g0 = grad L(w)       g1 = grad L(w + rho_inner unit(g0))
        w1 = w + rho unit(g1 - g0)
        g2 = grad L(w1)      g3 = grad L(w1 + rho_inner unit(g2))
        A = beta1 g1 + (1 - beta1) g3,  M = g0 + |1 - beta0| g2
        out = A - gamma (M - <M, unit(A)> unit(A))

    g1 - g0 is rho_inner H unit(g0) to first order, the direction in which the
    gradient norm grows fastest.

    Args:
      rho: radius within which the gradient norm is raised, at least 0: a
        number, a traced scalar or a schedule.
      rho_inner: radius of SAM's step at w and at w1, at least 0, likewise.
        Published: 0.02 to 0.04.
      beta0: |1 - beta0| weights g2 in M. Published: 0.1 to 0.5.
      beta1: weight of g1 in A; the rest goes to g3. Published: 0.1 to 0.6.
      gamma: weight of the part of M orthogonal to A, at least 0. With gamma = 0
        and beta1 = 1 the result is SAM's of radius rho_inner.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`; taken where the ascent starts. The authors'
        adaptive form is elementwise(0, normalize_bias=True).
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      A transformation from gradients to GAM's, for `value_and_grad` or
      `optax.chain`; in a chain its update needs params and grad_fn or
      value_fn. The state has no arrays for constant radii.

    Raises:
      ValueError: if rho, rho_inner or gamma is negative; at the call, if
        params or grad_fn are missing or grad_fn returns another structure.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w: w[0] ** 2 + 10 * w[1] ** 2
      >>> w = jnp.array([1.0, 0.1])  # gradient [2, 2]; the second is the sharp direction
      >>> print(sam_optax.grad(loss_fn, sam_optax.sam(0.02))(w).round(1))
      [2.  2.3]
      >>> print(sam_optax.grad(loss_fn, sam_optax.gam())(w).round(1))
      [2.  3.9]

    References:
      Zhang et al., `Gradient Norm Aware Minimization Seeks First-Order Flatness
      and Improves Generalization <https://arxiv.org/abs/2303.03108>`_, 2023;
      the accelerated form of the authors' code.

    Note:
      Four gradient evaluations, the caller's included, one after another, and
      four gradients of memory. With descent_grad_fn, g1 and g3 in A come from
      it and all else from grad_fn: five, since g1 is needed of both. The main
      text of the paper has a Hessian-vector product instead; the published code
      and its settings, followed here, do not. beta0 enters as |1 - beta0| only
      and g0 has weight 1, as executed there.
    """
    _checks.at_least("rho_inner", rho_inner, 0.0)
    _checks.at_least("gamma", gamma, 0.0)
    outer, inner = (
        dual_ascent(radius, p=p, normalization=normalization, mask=mask)
        for radius in (rho, rho_inner)
    )

    def init(params: optax.Params) -> GAMState:
        return GAMState(outer.init(params), inner.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        grad_fn: GradFn | None = None,
        value_fn: Callable[[optax.Params], jax.Array] | None = None,
        descent_grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GAMState]:
        del extra_args
        ascent_grad_fn, descent = gradient_functions(
            updates, params, grad_fn, value_fn, descent_grad_fn
        )

        def sam_step(g: Any, w: Any) -> tuple[optax.Params, optax.OptState]:
            """Where SAM goes from w, and the memory of the radius."""
            perturbation, memory = inner.update(g, state.inner, w)
            return optax.apply_updates(w, perturbation), memory

        near, _ = sam_step(updates, params)
        g1 = descent(near)
        # The direction of w1 is a difference of one function's gradients.
        end = g1 if descent is ascent_grad_fn else ascent_grad_fn(near)
        growth = _numerics.map_wide(lambda g1, g0: g1 - g0, end, updates)
        perturbation, outer_state = outer.update(growth, state.outer, params)
        w1 = optax.apply_updates(params, perturbation)
        g2 = ascent_grad_fn(w1)
        beyond, inner_state = sam_step(g2, w1)
        g3 = descent(beyond)
        A = _numerics.map_wide(lambda g1, g3: beta1 * g1 + (1 - beta1) * g3, g1, g3)
        M = _numerics.map_wide(lambda g2, g0: g0 + abs(1 - beta0) * g2, g2, updates)
        part = _numerics.orthogonal_part(M, A)
        result = _numerics.map_wide(lambda A, part: A - gamma * part, A, part)
        return result, GAMState(outer_state, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
