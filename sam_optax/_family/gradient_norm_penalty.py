"""Gradient norm penalty (Zhao et al., 2022)."""

import jax
import optax

from sam_optax import _checks, _descent
from sam_optax._ascent import dual_ascent
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


def gradient_norm_penalty(
    rho: optax.ScalarOrSchedule = 0.1,
    alpha: optax.ScalarOrSchedule = 0.8,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Penalises the norm of the gradient: descends L + alpha rho ||grad L||.

    A mixture of the clean and SAM's gradient; alpha is the ratio of the
    penalty's weight to the radius. Between the base optimizer (alpha = 0) and
    SAM (alpha = 1).

        out = g + alpha (g_s - g),  e = rho g/||g||

    Args:
      rho: radius of the finite difference, at least 0: a number, a traced
        scalar or a schedule.
      alpha: weight, at least 0. Published: rho 0.1 and alpha 0.8 on CIFAR, rho
        0.05 on ImageNet.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho or alpha is negative.

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
      >>> penalised = lambda w: loss_fn(w) + 0.08 * jnp.linalg.norm(jax.grad(loss_fn)(w))
      >>> print(sam_optax.grad(loss_fn, sam_optax.gradient_norm_penalty(0.1, 0.8))(w))
      [6.096 8.128 ]
      >>> print(jax.grad(penalised)(w))  # exact for a quadratic
      [6.096 8.128]

    References:
      Zhao et al., `Penalizing Gradient Norm for Efficiently Improving
      Generalization in Deep Learning <https://arxiv.org/abs/2202.03599>`_,
      2022, algorithm 1. The authors' code since June 2022 mixes in the unit
      vector g/||g|| in place of g; this is the paper's form.

    Note:
      Two gradient evaluations and one copy of the parameters; with
      descent_grad_fn one evaluation more, since g and g_s then both come from it.
    """
    _checks.at_least("alpha", alpha, 0.0)
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(ascent, _descent.extrapolate(alpha))
