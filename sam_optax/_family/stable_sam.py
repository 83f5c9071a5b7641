"""Stable-SAM (Tan et al., 2024): SAM's direction, the clean gradient's length."""

from typing import Any

import jax
import optax

from sam_optax import _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._rules import stateless
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


def renormalise() -> optax.GradientTransformationExtraArgs:
    r"""A descent along the perturbed gradient with the length of the clean one.

    Keeps any method from overshooting where its result is much longer than the
    gradient: chain it last.

        out = ||g|| g_s/||g_s||

    Returns:
      A descent rule for `sharpness_aware`; it chains with others.

    Raises:
      ValueError: at the call, outside `sharpness_aware`.

    Example:
      >>> import jax.numpy as jnp, optax, sam_optax
      >>> descent = optax.chain(sam_optax.extrapolate(9.0), sam_optax.renormalise())
      >>> method = sam_optax.sam(0.5, descent=descent)
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
      >>> print(jnp.linalg.norm(sam_optax.grad(loss_fn, method)(w)))
      10.0

    References:
      Tan et al., `Stabilizing Sharpness-aware Minimization Through A Simple
      Renormalization Strategy <https://arxiv.org/abs/2401.07250>`_, 2024.

    Note:
      No gradient evaluation of its own.
    """

    def combine(perturbed: optax.Updates, *, clean: optax.Updates, **rest: Any) -> optax.Updates:
        length, _ = _numerics.norm_and_unit(clean)
        _, direction = _numerics.norm_and_unit(perturbed)
        return _numerics.map_wide(lambda g_s, u: length * u, perturbed, direction)

    return stateless(combine)


def stable_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM's direction with the length of the clean gradient.

    Keeps SAM from overshooting where the perturbed gradient is much longer, at
    high learning rates or in the first steps.

        out = ||g|| g_s/||g_s||,  e = rho g/||g||

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

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
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(ascent, renormalise())
