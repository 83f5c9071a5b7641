"""Unnormalised SAM (Andriushchenko and Flammarion, 2022): rho is a factor."""

import optax

from sam_optax._ascent import proportional_ascent
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask


def unnormalised_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    mask: Mask | None = None,
    descent: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM without normalisation: the ascent step is proportional to the gradient.

    The perturbation fades near minima, which theory likes; rho then has units
    and needs tuning anew for every loss scale. `sam` is the safer choice.

        e = rho g;  out = grad L(w + e)

    Args:
      rho: factor, at least 0: a number, a traced scalar or a schedule. Unscale
        gradients first under loss scaling.
      mask: leaves that are perturbed, see `dual_ascent`.
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> print(sam_optax.grad(loss_fn, sam_optax.unnormalised_sam(0.1))(jnp.array([3.0, 4.0])))
      [7.2 9.6]

    References:
      Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware
      Minimization <https://arxiv.org/abs/2206.06232>`_, 2022.

    Note:
      Two gradient evaluations and one copy of the parameters.
    """
    return sharpness_aware(proportional_ascent(rho, mask=mask), descent)
