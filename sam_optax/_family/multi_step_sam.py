"""SAM with several ascent steps (Foret et al., 2020, appendix C)."""

from typing import Any

import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._hyperparameters import count_for, scheduled
from sam_optax._rules import rule, transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import GradFn


def multi_step(
    ascent: optax.GradientTransformation,
    steps: int = 2,
    radius: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An ascent of several steps, each along the gradient where the last one ended.

    Comes closer to the worst case than one step, at one more gradient for each
    further step.

        e <- Proj(e + ascent(grad L(w + e)))  steps times, from e = 0, ||e|| <= radius

    Args:
      ascent: any ascent rule. Its hyper-parameters and memory are those of the
        whole step: schedules count once, and filters see the gradient at w.
      steps: number of ascent steps, at least 1.
      radius: of the ball that e is projected onto, at least 0: a number, a
        traced scalar or a schedule; None leaves e where it ends.

    Returns:
      An ascent rule for `sharpness_aware`.

    Raises:
      ValueError: if steps is below 1 or radius negative; at the call, without
        grad_fn.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> climb = sam_optax.multi_step(sam_optax.dual_ascent(0.05), steps=2)
      >>> method = sam_optax.sharpness_aware(climb)
      >>> loss_fn, w = lambda w: w[0] ** 2 + 10 * w[1] ** 2, jnp.array([1.0, 0.1])
      >>> print(sam_optax.grad(loss_fn, method)(w).round(3))
      [2.131 3.501]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, appendix C.

    Note:
      steps - 1 gradient evaluations.
    """
    ascent = rule(ascent)
    steps = _checks.integer_at_least("steps", steps, 1)
    if radius is not None:
        _checks.at_least("radius", radius, 0.0)

    def init(params: optax.Params) -> tuple[optax.OptState, optax.OptState]:
        return ascent.init(params), count_for(0.0 if radius is None else radius)

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        grad_fn: GradFn,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        extra_args["grad_fn"] = grad_fn
        perturbation, memory = ascent.update(updates, state[0], params, **extra_args)
        bound, radius_state = scheduled(0.0 if radius is None else radius, state[1])
        inside = (lambda e: e) if radius is None else lambda e: _numerics.into_ball(e, bound)
        perturbation = inside(perturbation)
        for _ in range(steps - 1):
            here = optax.apply_updates(params, perturbation)
            # From the memory of before: the steps of one ascent are one step of its schedules.
            move, _ = ascent.update(grad_fn(here), state[0], here, **extra_args)
            perturbation = inside(optax.apply_updates(perturbation, move))
        return perturbation, (memory, radius_state)

    return transformation(init, update)


def multi_step_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    steps: int = 2,
    step_size: optax.ScalarOrSchedule | None = None,
    *,
    descent: optax.GradientTransformation | None = None,
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
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

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
    if step_size is not None:
        _checks.at_least("step_size", step_size, 0.0)
    length = _shared(rho, steps) if step_size is None else step_size
    return sharpness_aware(multi_step(dual_ascent(length), steps, rho), descent)


def _shared(rho: optax.ScalarOrSchedule, steps: int) -> Any:
    """rho/steps, which may be a schedule."""
    steps = _checks.integer_at_least("steps", steps, 1)
    return (lambda count: rho(count) / steps) if callable(rho) else rho / steps
