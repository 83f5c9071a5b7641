"""Methods that combine the clean and the perturbed gradient: descent rules over SAM's ascent."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import GradFn, Radius, transformation

Combination = Callable[..., optax.Updates]


def gsam(
    rho: Radius = 0.05, alpha: jax.typing.ArrayLike = 0.4
) -> optax.GradientTransformationExtraArgs:
    r"""Surrogate-gap guided SAM: lowers the perturbed loss and its gap to the loss.

    SAM's gradient, less the part of the clean gradient orthogonal to it, which
    closes the gap without raising the perturbed loss. Prefer it for vision
    transformers with a long schedule, with rho tied to the learning rate by
    `rho_from_learning_rate`.

        out = g_s - alpha (g - <g, u> u),  u = g_s/||g_s||,  e = rho g/||g||

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      alpha: weight of the orthogonal part, at least 0; 0 is SAM. Published: 0.4
        to 0.6.

    Returns:
      A transformation from gradients to GSAM's; in a chain its update needs
      params and grad_fn or value_fn.

    Raises:
      ValueError: if rho or alpha is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w: w[0] ** 2 + 10 * w[1] ** 2
      >>> w = jnp.array([1.0, 0.2])
      >>> for alpha in (0.0, 0.5):
      ...     print(sam_optax.grad(loss_fn, sam_optax.gsam(0.1, alpha))(w).round(2))
      [2.09 5.79]
      [1.84 5.88]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware
      Training <https://arxiv.org/abs/2203.08065>`_, 2022, algorithm 1; the
      form of the authors' JAX code.

    Note:
      Two gradient evaluations. The authors perturb and project per device:
      `value_and_grad(..., axis_name=...)`, or `pmean` after gsam in a chain.
    """
    _checks.at_least("alpha", alpha, 0.0)

    def combine(perturbed: optax.Updates, *, clean: optax.Updates, **rest: Any) -> optax.Updates:
        _, u = _numerics.norm_and_unit(perturbed)
        along = _numerics.inner(clean, u)
        return _numerics.map_wide(
            lambda g_s, g, u: g_s - alpha * (g - along * u), perturbed, clean, u
        )

    return sharpness_aware(dual_ascent(rho), descent_of(combine))


def rho_from_learning_rate(
    learning_rate: optax.Schedule,
    *,
    rho_min: float,
    rho_max: float,
    lr_min: float,
    lr_max: float,
) -> optax.Schedule:
    r"""A schedule of rho that follows the learning rate linearly, as GSAM has it.

    Use it where the learning rate decays: a smaller step near the end wants a
    smaller neighbourhood.

        rho = rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min)

    Args:
      learning_rate: schedule of the learning rate, a function of the step.
      rho_min: radius at lr_min, at least 0.
      rho_max: radius at lr_max, at least 0.
      lr_min: lowest learning rate after warm-up.
      lr_max: highest learning rate, above lr_min.

    Returns:
      A schedule. In warm-up, below lr_min, the line goes on down, but not
      below 0 (the authors' code does not stop there).

    Raises:
      ValueError: if a radius is negative or lr_max is not above lr_min.

    Example:
      >>> import optax, sam_optax
      >>> lr = optax.linear_schedule(0.1, 0.0, 100)
      >>> rho = sam_optax.rho_from_learning_rate(
      ...     lr, rho_min=0.1, rho_max=0.5, lr_min=0.0, lr_max=0.1)
      >>> print([round(float(rho(step)), 2) for step in (0, 50, 100)])
      [0.5, 0.3, 0.1]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware
      Training <https://arxiv.org/abs/2203.08065>`_, 2022, section 5.
    """
    _checks.at_least("rho_min", rho_min, 0.0)
    _checks.at_least("rho_max", rho_max, 0.0)
    _checks.in_interval("lr_min", lr_min, "(-inf, inf)")
    _checks.in_interval("lr_max", lr_max, f"({lr_min}, inf)")  # above lr_min
    slope = (rho_max - rho_min) / (lr_max - lr_min)
    return lambda count: jnp.maximum(rho_min + slope * (learning_rate(count) - lr_min), 0.0)


def wsam(
    rho: Radius = 0.05, gamma: jax.typing.ArrayLike = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted SAM, coupled: sharpness as a regulariser with a weight of its own.

    Extrapolates beyond SAM's gradient for gamma above 1/2, which is SAM. Clip
    after it: at gamma = 0.9 the gradients enter with weights 9 and -8.

        out = g + gamma/(1 - gamma) (g_s - g),  e = rho g/||g||

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      gamma: weight of sharpness, in [0, 1): 0 is the base optimizer. The
        authors use 0.8 to 0.95.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho is negative or gamma outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
      >>> for gamma in (0.0, 0.5, 0.9):
      ...     print(sam_optax.grad(loss_fn, sam_optax.wsam(0.05, gamma))(w).round(2))
      [6. 8.]
      [6.06 8.08]
      [6.54 8.72]

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as
      a Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023,
      algorithm 1. The authors' code defaults to the decoupled form, which is
      `decoupled_wsam`.

    Note:
      Two gradient evaluations and one copy of the parameters.
    """
    _checks.in_interval("gamma", gamma, "[0, 1)")
    weight = gamma / (1 - gamma)
    return sharpness_aware(dual_ascent(rho), descent_of(_extrapolate(weight)))


def gradient_norm_penalty(
    rho: Radius = 0.1, alpha: jax.typing.ArrayLike = 0.8
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
      Two gradient evaluations and one copy of the parameters.
    """
    _checks.at_least("alpha", alpha, 0.0)
    return sharpness_aware(dual_ascent(rho), descent_of(_extrapolate(alpha)))


def stable_sam(rho: Radius = 0.05) -> optax.GradientTransformationExtraArgs:
    r"""SAM's direction with the length of the clean gradient.

    Keeps SAM from overshooting where the perturbed gradient is much longer, at
    high learning rates or in the first steps.

        out = ||g|| g_s/||g_s||,  e = rho g/||g||

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
      >>> print(jnp.linalg.norm(sam_optax.grad(loss_fn, sam_optax.stable_sam(1.0))(w)))
      10.0

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024; the
      authors' code with normalised ascent.

    Note:
      Two gradient evaluations and one copy of the parameters.
    """

    def combine(perturbed: optax.Updates, *, clean: optax.Updates, **rest: Any) -> optax.Updates:
        length, _ = _numerics.norm_and_unit(clean)
        _, direction = _numerics.norm_and_unit(perturbed)
        return _numerics.map_wide(lambda g_s, u: length * u, perturbed, direction)

    return sharpness_aware(dual_ascent(rho), descent_of(combine))


def cr_sam(
    rho: Radius = 0.1,
    gamma: jax.typing.ArrayLike = 0.1,
    beta: jax.typing.ArrayLike = 0.01,
) -> optax.GradientTransformationExtraArgs:
    r"""Curvature-regularised SAM: adds finite differences on both sides of w.

    Penalises the curvature along the gradient, and the gradient's norm, beside
    SAM's own loss. Where SAM's one-step ascent has become a poor guide, late
    in training.

        out = g+ + gamma (g+ + g- - 2 g) + beta (g+ - g-),  g+- = grad L(w +- e)

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      gamma: weight of the curvature term, at least 0.
      beta: weight of the gradient's norm, at least 0.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho, gamma or beta is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
      >>> print(sam_optax.grad(loss_fn, sam_optax.cr_sam(0.5, 0.1, 0.1))(w))
      [6.72 8.96]

    References:
      Wu et al., `CR-SAM: Curvature Regularized Sharpness-Aware Minimization
      <https://arxiv.org/abs/2312.13555>`_, 2023; the authors' code, which is
      linear in the finite differences where the paper has logarithms.

    Note:
      Three gradient evaluations and one copy of the parameters. With
      descent_grad_fn all of g+, g- and the g between them come from it, one
      evaluation more: finite differences of one function.
    """
    _checks.at_least("gamma", gamma, 0.0)
    _checks.at_least("beta", beta, 0.0)

    def combine(
        perturbed: optax.Updates,
        params: optax.Params,
        *,
        clean: optax.Updates,
        perturbation: optax.Updates,
        grad_fn: GradFn,
        descent_grad_fn: GradFn | None = None,
        **rest: Any,
    ) -> optax.Updates:
        # A finite difference of two functions would be the difference of the functions.
        middle = clean if descent_grad_fn is None else grad_fn(params)
        back = _numerics.map_wide(jnp.negative, perturbation)
        opposite = grad_fn(optax.apply_updates(params, back))
        return _numerics.map_wide(
            lambda plus, g, minus: plus + gamma * (plus + minus - 2 * g) + beta * (plus - minus),
            perturbed,
            middle,
            opposite,
        )

    return sharpness_aware(dual_ascent(rho), descent_of(combine))


def descent_of(combine: Combination) -> optax.GradientTransformationExtraArgs:
    """A descent rule without memory from a function of the gradients and what else it names."""

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        return combine(updates, params=params, **extra_args), state

    return transformation(lambda params: optax.EmptyState(), update, needs=combine)


def _extrapolate(weight: jax.typing.ArrayLike) -> Combination:
    def combine(perturbed: optax.Updates, *, clean: optax.Updates, **rest: Any) -> optax.Updates:
        return _numerics.map_wide(lambda g_s, g: g + weight * (g_s - g), perturbed, clean)

    return combine
