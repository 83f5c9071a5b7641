"""SAGM (Wang et al., 2023): matches the gradients of the loss and of the perturbed loss."""

import jax
import optax

from sam_optax import _checks
from sam_optax._ascent import dual_ascent, proportional_ascent
from sam_optax._descent import extrapolate
from sam_optax._joined import sum_of
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


def sagm(
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: optax.ScalarOrSchedule = 0.001,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware gradient matching: the loss, the perturbed loss, and their gap.

    Descends the loss and the perturbed loss alike; the ascent starts a small
    step of descent away, which makes both gradients point the same way. Made
    for domain generalisation.

        e = (rho/||g|| - alpha) g;  out = (g + grad L(w + e))/2

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      alpha: step of descent within the ascent, at least 0, likewise. Published:
        0.0005 and 0.001, with learning rates of 1e-5 to 3e-5.
      p: order of the norm of the part of length rho, see `dual_ascent`.
      normalization: operator T that measures that part, such as `elementwise()`.
        The authors' adaptive form has w^2 on the other part too.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho or alpha is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
      >>> print(sam_optax.grad(loss_fn, sam_optax.sagm(0.5, alpha=0.01))(w))
      [6.24 8.32]

    References:
      Wang et al., `Sharpness-Aware Gradient Matching for Domain Generalization
      <https://arxiv.org/abs/2303.10353>`_, 2023; the authors' code, whose alpha
      does not follow the learning rate.

    Note:
      Two gradient evaluations and one copy of the parameters. Depends on the
      scale of the loss by alpha.
    """
    _checks.at_least("alpha", alpha, 0.0)
    forth = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    back = proportional_ascent(alpha, mask=mask)
    return sharpness_aware(sum_of(forth, back, weight=-1.0), extrapolate(0.5))
