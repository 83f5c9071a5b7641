"""LE-SAM (Wang et al., 2026): the rise of the loss is fixed, not the radius."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._hyperparameters import count_for, scheduled
from sam_optax._rules import rule, transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization, Result


def limit_rise(
    ascent: optax.GradientTransformation, sigma: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""An ascent that goes no further than to a given rise of the linearised loss.

    Where gradients are large the perturbation is short. Around any ascent whose
    radius is then the largest one; sigma may be any schedule.

        e = e1 min(1, sigma/<d, e1>),  e1 = ascent(d)

    Args:
      ascent: an ascent rule.
      sigma: the rise, in units of the loss, at least 0: a number, a traced
        scalar or a schedule.

    Returns:
      An ascent rule. Where e1 does not rise, <d, e1> <= 0, it is left as it is.

    Raises:
      ValueError: if sigma is negative; at the call, as the ascent.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> ascent = sam_optax.limit_rise(sam_optax.dual_ascent(rho=0.5), sigma=1.0)
      >>> for d in (jnp.array([3.0, 4.0]), jnp.array([0.3, 0.4])):
      ...     print(ascent.update(d, ascent.init(d))[0])
      [0.12 0.16]
      [0.3 0.4]

    References:
      Wang et al., `Fix the Loss, Not the Radius: Rethinking the Adversarial
      Perturbation of Sharpness-Aware Minimization
      <https://arxiv.org/abs/2605.10183>`_, 2026.

    Note:
      No gradient evaluation of its own.
    """
    ascent = rule(ascent)
    _checks.at_least("sigma", sigma, 0.0)

    def update(updates: optax.Updates, state: Any, params: Any = None, **given: Any) -> Result:
        bound, count = scheduled(sigma, state[1])
        perturbation, memory = ascent.update(updates, state[0], params, **given)
        rise = _numerics.inner(updates, perturbation)
        share = jnp.where(rise > bound, bound / _numerics.nonzero(rise), 1)
        return _numerics.map_wide(lambda e: share * e, perturbation), (memory, count)

    return transformation(lambda params: (ascent.init(params), count_for(sigma)), update)


def le_sam(
    rho: optax.ScalarOrSchedule = 0.3,
    sigma: optax.ScalarOrSchedule = 0.35,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    descent: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Loss-equated SAM: the radius that raises the linearised loss by sigma.

    SAM's loss rises by rho ||g|| to first order, which rewards small gradients;
    with a fixed rise what is left is curvature.

        e = rho_t g/||g||,  rho_t = min(sigma_t/||g||, rho);  out = grad L(w + e)

    Args:
      rho: largest radius, at least 0: a number, a traced scalar or a schedule.
      sigma: rise of the linearised loss, at least 0, likewise. The authors
        raise it from 0 over 10 epochs of 200 and anneal it to 0 along a cosine
        from epoch 160 on: give that as a schedule.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`; the rise
        is radius times dual norm for any.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`. The authors' adaptive form goes along |w| g,
        which is not ASAM's direction.
      mask: leaves that are perturbed, see `dual_ascent`.
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho or sigma is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2) / 2, jnp.array([3.0, 4.0])
      >>> for sigma in (1.0, 10.0):
      ...     print(sam_optax.grad(loss_fn, sam_optax.le_sam(0.5, sigma))(w))
      [3.12 4.16]
      [3.3 4.4]

    References:
      Wang et al., `Fix the Loss, Not the Radius: Rethinking the Adversarial
      Perturbation of Sharpness-Aware Minimization
      <https://arxiv.org/abs/2605.10183>`_, 2026; the authors' code and its
      defaults, without its options (hardest examples, mixed gradients).

    Note:
      Two gradient evaluations and one copy of the parameters. Depends on the
      scale of the loss.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(limit_rise(ascent, sigma), descent)
