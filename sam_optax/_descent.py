"""Descent rules: what the base optimizer sees, from the perturbed gradient and the clean one."""

from typing import Any

import optax

from sam_optax import _checks, _numerics
from sam_optax._hyperparameters import count_for, scheduled
from sam_optax._rules import transformation
from sam_optax._types import GradFn


def extrapolate(weight: optax.ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""A descent on the line from the clean to the perturbed gradient, and beyond.

    Weighs sharpness against the loss: 0 is the base optimizer, 1 is SAM, more
    penalises sharpness more. `gradient_norm_penalty` and `wsam` are this rule.

        out = g + weight (g_s - g)

    Args:
      weight: at least 0: a number, a traced scalar or a schedule of the step.

    Returns:
      A descent rule for `sharpness_aware`; it chains with others.

    Raises:
      ValueError: if weight is negative; at the call, outside `sharpness_aware`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
      >>> ascent = sam_optax.dual_ascent(rho=0.5)
      >>> for weight in (0.0, 1.0, 2.0):
      ...     method = sam_optax.sharpness_aware(ascent, sam_optax.extrapolate(weight))
      ...     print(*(f"{x:.1f}" for x in sam_optax.grad(loss_fn, method)(w)))
      6.0 8.0
      6.6 8.8
      7.2 9.6

    References:
      Zhao et al., `Penalizing Gradient Norm for Efficiently Improving
      Generalization in Deep Learning <https://arxiv.org/abs/2202.03599>`_,
      2022, equation 11; Yue et al., `Sharpness-Aware Minimization Revisited
      <https://arxiv.org/abs/2305.15817>`_, 2023, algorithm 1.

    Note:
      No gradient evaluation of its own; one with descent_grad_fn, since g and
      g_s then both come from it.
    """
    _checks.at_least("weight", weight, 0.0)

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        clean: optax.Updates,
        grad_fn: GradFn | None = None,
        descent_grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        w, state = scheduled(weight, state)
        clean = of_the_descent(clean, params, grad_fn, descent_grad_fn)
        return _numerics.map_wide(lambda g_s, g: g + w * (g_s - g), updates, clean), state

    return transformation(lambda params: count_for(weight), update)


def of_the_descent(
    clean: optax.Updates,
    params: Any,
    grad_fn: GradFn | None,
    descent_grad_fn: GradFn | None,
) -> optax.Updates:
    """The clean gradient of the function that g_s came from, given what a descent is given.

    What is combined with g_s belongs to the same examples: a difference of two functions'
    gradients is no measure of sharpness.
    """
    return clean if descent_grad_fn is None or grad_fn is None else grad_fn(params)
