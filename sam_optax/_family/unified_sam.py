"""Unified SAM (Oikonomou and Loizou, 2025): between the normalised ascent and the plain one."""

import jax
import optax

from sam_optax import _checks
from sam_optax._ascent import dual_ascent, proportional_ascent
from sam_optax._hyperparameters import combined
from sam_optax._joined import sum_of
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


def unified_sam(
    rho: optax.ScalarOrSchedule = 0.1,
    lmbda: optax.ScalarOrSchedule = 0.5,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    descent: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Unified SAM: a mixture of SAM's ascent and the unnormalised one.

    The perturbation fades near minima as far as lmbda is below 1, and keeps a
    part of the length that makes SAM's rho easy to choose.

        e = rho (1 - lmbda + lmbda/||g||) g;  out = grad L(w + e)

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      lmbda: degree of normalisation, in [0, 1]: 1 is `sam`, 0 is
        `unnormalised_sam`. A number, a traced scalar or a schedule; the authors
        try 1/t and 1 - 1/t as well, t counting from 1.
      p: order of the norm of the normalised part, see `dual_ascent`.
      normalization: operator T of the normalised part, such as `elementwise()`,
        see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho is negative or lmbda outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.array([0.3, 0.4])
      >>> for lmbda in (0.0, 0.5, 1.0):
      ...     print(sam_optax.grad(loss_fn, sam_optax.unified_sam(0.1, lmbda))(w))
      [0.72 0.96]
      [0.72 0.96]
      [0.72 0.96]
      >>> print(sam_optax.grad(loss_fn, sam_optax.unified_sam(0.1, 0.5))(10 * w))
      [6.66 8.88]

    References:
      Oikonomou and Loizou, `Sharpness-Aware Minimization: General Analysis and
      Improved Rates <https://arxiv.org/abs/2503.02225>`_, 2025; the authors'
      code.

    Note:
      Two gradient evaluations and one copy of the parameters. Depends on the
      scale of the loss where lmbda is below 1.
    """
    _checks.at_least("rho", rho, 0.0)
    _checks.in_interval("lmbda", lmbda, "[0, 1]")
    plain = proportional_ascent(combined(lambda r, x: r * (1 - x), rho, lmbda), mask=mask)
    length = combined(lambda r, x: r * x, rho, lmbda)
    normalised = dual_ascent(length, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(sum_of(plain, normalised), descent)
