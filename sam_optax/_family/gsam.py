"""GSAM (Zhuang et al., 2022): the surrogate gap."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._descent import of_the_descent
from sam_optax._rules import stateless
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import GradFn, Mask, Normalization


def surrogate_gap(alpha: jax.typing.ArrayLike = 0.4) -> optax.GradientTransformationExtraArgs:
    r"""A descent that closes the gap between the perturbed loss and the loss.

    Takes the part of the clean gradient orthogonal to the perturbed one out of
    it, which lowers the gap without raising the perturbed loss. Over any
    ascent, ASAM's for one.

        out = g_s - alpha (g - <g, u> u),  u = g_s/||g_s||

    Args:
      alpha: weight of the orthogonal part, at least 0. Published: 0.4 to 0.6.

    Returns:
      A descent rule for `sharpness_aware`; it chains with others.

    Raises:
      ValueError: if alpha is negative; at the call, outside `sharpness_aware`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: w[0] ** 2 + 10 * w[1] ** 2, jnp.array([1.0, 0.2])
      >>> adaptive = sam_optax.asam(0.1, descent=sam_optax.surrogate_gap(0.5))
      >>> print(sam_optax.grad(loss_fn, adaptive)(w).round(2))
      [1.84 5.88]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware
      Training <https://arxiv.org/abs/2203.08065>`_, 2022, algorithm 1; the
      form of the authors' JAX code.

    Note:
      No gradient evaluation of its own; one with descent_grad_fn, since g and
      g_s then both come from it.
    """
    _checks.at_least("alpha", alpha, 0.0)

    def combine(
        perturbed: optax.Updates,
        params: Any = None,
        *,
        clean: optax.Updates,
        grad_fn: GradFn | None = None,
        descent_grad_fn: GradFn | None = None,
    ) -> optax.Updates:
        clean = of_the_descent(clean, params, grad_fn, descent_grad_fn)
        gap = _numerics.orthogonal_part(clean, perturbed)
        return _numerics.map_wide(lambda g_s, part: g_s - alpha * part, perturbed, gap)

    return stateless(combine)


def gsam(
    rho: optax.ScalarOrSchedule = 0.05,
    alpha: jax.typing.ArrayLike = 0.4,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
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
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

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
      Two gradient evaluations, three with descent_grad_fn, from which g and g_s
      then both come. The authors perturb and project per device:
      `value_and_grad(..., axis_name=...)`, or `pmean` after gsam in a chain.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(ascent, surrogate_gap(alpha))


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
