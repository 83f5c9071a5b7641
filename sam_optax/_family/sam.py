"""SAM (Foret et al., 2020): the plain configuration of the core."""

import jax
import optax

from sam_optax._ascent import dual_ascent
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


def sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    p: jax.typing.ArrayLike | None = None,
    mask: Mask | None = None,
    second_order: bool = False,
    normalization: Normalization | None = None,
    descent: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization: the gradient at the worst nearby point.

    Descends the loss at w + e, where e climbs the loss by a step of length
    rho, and so prefers flat minima. The first method to try; `asam` where the
    scales of layers differ much.

        e = rho g / ||g||_2 (for p = 2; see `dual_ascent`);  out = grad L(w + e)

    Args:
      rho: length of the ascent step, at least 0, in units of the parameters: a
        number, a traced scalar or a schedule of the step. Start at 0.05; small
        networks often take 0.1 to 0.4. Above the best value training
        collapses abruptly.
      p: order of the norm, from 1 to infinity, see `dual_ascent`; None is 2, which
        the paper finds the best.
      mask: leaves that are perturbed, see `dual_ascent`.
      second_order: keep the term that the paper drops, see `sharpness_aware`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

    Returns:
      A transformation from gradients to sharpness-aware gradients, for
      `value_and_grad` or `optax.chain`; in a chain its update needs params
      and grad_fn or value_fn. The state has no arrays for a constant rho.

    Raises:
      ValueError: if rho is negative or p below 1; at the call, if params or
        grad_fn are missing or grad_fn returns another structure.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.sam(rho=0.05), optax.sgd(0.1))
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> w = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     jax.grad(loss_fn)(w), tx.init(w), w, grad_fn=jax.grad(loss_fn))
      >>> print(updates)  # -0.1 times the gradient at [3.03, 4.04]
      [-0.606 -0.808]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.

    Note:
      Two gradient evaluations a step and one copy of the parameters.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(ascent, descent, second_order=second_order)
