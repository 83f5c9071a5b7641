"""CR-SAM (Wu et al., 2023): curvature by finite differences."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._descent import of_the_descent
from sam_optax._rules import stateless
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import GradFn, Mask, Normalization


def curvature(
    gamma: jax.typing.ArrayLike = 0.1, beta: jax.typing.ArrayLike = 0.01
) -> optax.GradientTransformationExtraArgs:
    r"""A descent that adds finite differences over both sides of the perturbation.

    Penalises the curvature along e, and the growth of the loss along it, beside
    the perturbed loss.

        out = g_s + gamma (g+ + g- - 2 g) + beta (g+ - g-),  g+- = grad L(w +- e)

    g+ is the perturbed gradient as it comes: g_s, or what rules before this one
    in a chain have made of it.

    Args:
      gamma: weight of the curvature, at least 0.
      beta: weight of the growth, at least 0.

    Returns:
      A descent rule for `sharpness_aware`; put it first in a chain of descents.

    Raises:
      ValueError: if gamma or beta is negative; at the call, outside
        `sharpness_aware`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> method = sam_optax.sam(0.5, descent=sam_optax.curvature(0.1, 0.1))
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
      >>> print(sam_optax.grad(loss_fn, method)(w))
      [6.72 8.96]

    References:
      Wu et al., `CR-SAM: Curvature Regularized Sharpness-Aware Minimization
      <https://arxiv.org/abs/2312.13555>`_, 2023; the authors' code.

    Note:
      One gradient evaluation, two with descent_grad_fn: all of g+, g- and the
      g between them then come from it, finite differences of one function.
    """
    _checks.at_least("gamma", gamma, 0.0)
    _checks.at_least("beta", beta, 0.0)

    def combine(
        perturbed: optax.Updates,
        params: optax.Params,
        *,
        clean: optax.Updates,
        perturbation: optax.Updates,
        grad_fn: GradFn,
        descent_grad_fn: GradFn | None = None,
        **rest: Any,
    ) -> optax.Updates:
        middle = of_the_descent(clean, params, grad_fn, descent_grad_fn)
        back = _numerics.map_wide(jnp.negative, perturbation)
        opposite = grad_fn(optax.apply_updates(params, back))
        return _numerics.map_wide(
            lambda plus, g, minus: plus + gamma * (plus + minus - 2 * g) + beta * (plus - minus),
            perturbed,
            middle,
            opposite,
        )

    return stateless(combine)


def cr_sam(
    rho: optax.ScalarOrSchedule = 0.1,
    gamma: jax.typing.ArrayLike = 0.1,
    beta: jax.typing.ArrayLike = 0.01,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Curvature-regularised SAM: adds finite differences on both sides of w.

    Penalises the curvature along the gradient, and the gradient's norm, beside
    SAM's own loss. Where SAM's one-step ascent has become a poor guide, late
    in training.

        out = g+ + gamma (g+ + g- - 2 g) + beta (g+ - g-),  g+- = grad L(w +- e)

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      gamma: weight of the curvature term, at least 0.
      beta: weight of the gradient's norm, at least 0.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho, gamma or beta is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
      >>> print(sam_optax.grad(loss_fn, sam_optax.cr_sam(0.5, 0.1, 0.1))(w))
      [6.72 8.96]

    References:
      Wu et al., `CR-SAM: Curvature Regularized Sharpness-Aware Minimization
      <https://arxiv.org/abs/2312.13555>`_, 2023; the authors' code, which is
      linear in the finite differences where the paper has logarithms.

    Note:
      Three gradient evaluations and one copy of the parameters. With
      descent_grad_fn all of g+, g- and the g between them come from it, one
      evaluation more: finite differences of one function.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(ascent, curvature(gamma, beta))
