"""Fisher SAM (Kim et al., 2022): a neighbourhood measured by the Fisher information."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._rules import transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask


def fisher_ascent(
    rho: optax.ScalarOrSchedule,
    eta: jax.typing.ArrayLike = 1.0,
    *,
    p: jax.typing.ArrayLike | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An ascent measured by the diagonal Fisher information of the direction itself.

    Moves less where the gradient is large. `dual_ascent` with an operator made
    of the gradient, not of the parameters.

        e = rho T^2 g/||T g||,  T^2 = 1/(1 + eta g^2)

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      eta: weight of the Fisher information, at least 0; 0 is `dual_ascent`.
      p: order of the norm, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      An ascent rule for `sharpness_aware`.

    Raises:
      ValueError: if rho or eta is negative or p below 1.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> ascent, grads = sam_optax.fisher_ascent(rho=0.1), jnp.array([0.6, 8.0])
      >>> print(ascent.update(grads, ascent.init(grads), grads)[0].round(3))
      [0.04  0.011]

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware
      Minimisation <https://arxiv.org/abs/2206.04920>`_, 2022.

    Note:
      No gradient evaluation. Not invariant to the scale of the loss.
    """
    _checks.at_least("eta", eta, 0.0)
    init = dual_ascent(rho, p=p, mask=mask).init

    def scale(g: Any) -> Any:
        if g is None or not _numerics.is_perturbable(g):
            return None if g is None else jnp.ones(())
        return jax.lax.rsqrt(1 + eta * _numerics.abs_square(_numerics.widened(g)))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        operator = jax.tree.map(scale, updates, is_leaf=lambda x: x is None)
        rule = dual_ascent(rho, p=p, normalization=lambda params: operator, mask=mask)
        # The operator is no function of params, which are only asked for a mask.
        return rule.update(updates, state, updates if params is None else params, **extra_args)

    return transformation(init, update)


def fisher_sam(
    rho: optax.ScalarOrSchedule = 0.1,
    eta: jax.typing.ArrayLike = 1.0,
    *,
    p: jax.typing.ArrayLike | None = None,
    mask: Mask | None = None,
    descent: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Fisher SAM: a neighbourhood measured by the diagonal Fisher information.

    Moves less where the gradient is large. With mean gradients below 0.1 or so
    the metric is nearly flat and the method nearly SAM.

        e = rho T^2 g/||T g||,  T^2 = 1/(1 + eta g^2)

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      eta: weight of the Fisher information, at least 0; 0 is SAM.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho or eta is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> print(sam_optax.grad(loss_fn, sam_optax.fisher_sam(0.1))(jnp.array([0.3, 4.0])).round(3))
      [0.679 8.022]

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware
      Minimisation <https://arxiv.org/abs/2206.04920>`_, 2022. From secondary
      sources: no code of the authors was found; the Fisher information is the
      square of the batch's mean gradient.

    Note:
      Two gradient evaluations. Not invariant to the scale of the loss.
    """
    return sharpness_aware(fisher_ascent(rho, eta, p=p, mask=mask), descent)
