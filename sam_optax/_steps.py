"""Methods with another ascent step than one of length rho: proportional, or several."""

from typing import Any

import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import count_for, dual_ascent, scheduled
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import GradFn, Radius, transformation


def unnormalised_sam(rho: Radius = 0.05) -> optax.GradientTransformationExtraArgs:
    r"""SAM without normalisation: the ascent step is proportional to the gradient.

    The perturbation fades near minima, which theory likes; rho then has units
    and needs tuning anew for every loss scale. `sam` is the safer choice.

        e = rho g;  out = grad L(w + e)

    Args:
      rho: factor, at least 0: a number, a traced scalar or a schedule. Unscale
        gradients first under loss scaling.

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
    _checks.at_least("rho", rho, 0.0)

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        factor, state = scheduled(rho, state)
        return _numerics.map_wide(lambda g: factor * g, _numerics.movable(updates)), state

    return sharpness_aware(transformation(lambda params: count_for(rho), update))


def multi_step_sam(
    rho: Radius = 0.05, steps: int = 2, step_size: Radius | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""SAM with several ascent steps inside the ball.

    Comes closer to the worst case than one step, at one more gradient per
    step; gains over SAM are rarely worth it, so use it to study that.

        e <- Proj(e + s grad L(w + e)/||grad L(w + e)||)  steps times,  ||e|| <= rho

    Args:
      rho: radius of the ball, at least 0: a number, a traced scalar or a
        schedule.
      steps: number of ascent steps, at least 1; 1 with the default step size
        is SAM.
      step_size: length s of a step, at least 0; rho/steps by default.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho or step_size is negative or steps is below 1.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: w[0] ** 2 + 10 * w[1] ** 2, jnp.array([1.0, 0.1])
      >>> for steps in (1, 2, 5):
      ...     print(sam_optax.grad(loss_fn, sam_optax.multi_step_sam(0.1, steps))(w).round(3))
      [2.141 3.414]
      [2.131 3.501]
      [2.125 3.555]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, appendix C; Andriushchenko
      and Flammarion, `Towards Understanding Sharpness-Aware Minimization
      <https://arxiv.org/abs/2206.06232>`_, 2022.

    Note:
      steps + 1 gradient evaluations and one copy of the parameters.
    """
    _checks.at_least("rho", rho, 0.0)
    steps = _checks.integer_at_least("steps", steps, 1)
    if step_size is not None:
        _checks.at_least("step_size", step_size, 0.0)

    def init(params: optax.Params) -> tuple[optax.OptState, optax.OptState]:
        del params
        return count_for(rho), count_for(0.0 if step_size is None else step_size)

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        grad_fn: GradFn,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        radius, rho_state = scheduled(rho, state[0])
        length, step_state = scheduled(radius / steps if step_size is None else step_size, state[1])
        step = dual_ascent(length)
        perturbation = optax.tree.zeros_like(_numerics.movable(updates))
        for i in range(steps):
            gradient = grad_fn(optax.apply_updates(params, perturbation)) if i else updates
            move, _ = step.update(gradient, optax.EmptyState())
            perturbation = _project(optax.apply_updates(perturbation, move), radius)
        return perturbation, (rho_state, step_state)

    return sharpness_aware(transformation(init, update))


def _project(perturbation: optax.Updates, radius: Any) -> optax.Updates:
    """The nearest point of the ball."""
    norm, _ = _numerics.norm_and_unit(perturbation)
    shrink = jnp.where(norm > radius, radius / jnp.where(norm > 0, norm, 1), 1)
    return _numerics.map_wide(lambda e: shrink * e, perturbation)
