"""LookSAM (Liu et al., 2022): what is paid for every k steps is reused in between."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._cadence import every
from sam_optax._rules import transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


def keep_orthogonal() -> optax.GradientTransformationExtraArgs:
    r"""A descent that passes g_s on and keeps the direction of its part orthogonal to g.

    That part changes slowly; `reuse_orthogonal` adds it to the clean gradients
    of the steps that a cadence does not pay for.

        out = g_s;  v <- unit(g_s - <g_s, u> u),  u = g/||g||

    Returns:
      A descent rule whose state is v, like params; the only one of a method,
      since `otherwise` shares it.

    Raises:
      ValueError: at the call, outside `sharpness_aware`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> keep = sam_optax.keep_orthogonal()
      >>> g_s, g = jnp.array([2.0, 3.0]), jnp.array([2.0, 0.0])
      >>> print(keep.update(g_s, keep.init(g), clean=g))
      (Array([2., 3.], dtype=float32), Array([0., 1.], dtype=float32))

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022, algorithm 1.

    Note:
      No gradient evaluation; one copy of the parameters in the state.
    """

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        clean: optax.Updates,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.Updates]:
        del params, extra_args
        part = _numerics.orthogonal_part(updates, clean)
        # Where g_s is parallel to g the rest is rounding, which its norm would blow up.
        length, direction = _numerics.norm_and_unit(part)
        whole, _ = _numerics.norm_and_unit(updates)
        rounding = [jnp.finfo(x.dtype).eps for x in _numerics.perturbable_part(state)[0]]
        noise = 10 * max(rounding, default=0.0) * whole
        new = _numerics.map_wide(lambda kept, d: jnp.where(length > noise, d, 0), state, direction)
        return updates, _numerics.keep_if_nonfinite(updates, new, state, by_norm=True)

    return transformation(optax.tree.zeros_like, update)


def reuse_orthogonal(alpha: jax.typing.ArrayLike = 0.7) -> optax.GradientTransformationExtraArgs:
    r"""What `keep_orthogonal` kept, added to the clean gradient: an `otherwise` rule.

        out = g + alpha ||g|| v

    Args:
      alpha: weight of the part that is reused, at least 0.

    Returns:
      A rule for `sharpness_aware(otherwise=...)`, beside a descent that is
      `keep_orthogonal`.

    Raises:
      ValueError: if alpha is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> g, v = jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0])
      >>> print(sam_optax.reuse_orthogonal(0.5).update(g, v)[0])
      [2. 1.]

    References:
      As for `keep_orthogonal`.

    Note:
      No gradient evaluation.
    """
    _checks.at_least("alpha", alpha, 0.0)

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.Updates]:
        del params, extra_args
        length, _ = _numerics.norm_and_unit(updates)
        return _numerics.map_wide(lambda g, d: g + alpha * length * d, updates, state), state

    return transformation(optax.tree.zeros_like, update)


def look_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    k: int = 5,
    alpha: jax.typing.ArrayLike = 0.7,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM every k steps, and its lasting part reused in between.

    The part of SAM's gradient orthogonal to the clean one changes slowly, so
    it is kept and added to the clean gradients of the next steps. A part of
    SAM's gain for a part of its extra cost.

        every k steps:  out = g_s,  keep unit(g_v),  g_v = g_s - <g_s, u> u,  u = unit(g)
        otherwise:      out = g + alpha ||g|| unit(g_v)

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      k: steps between two evaluations of g_s, at least 1; 1 is SAM.
      alpha: weight of the part that is reused, at least 0.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      A transformation with state: chain it. Norms and projections run over all
      leaves; weight decay belongs after it and is not seen by it.

    Raises:
      ValueError: if rho or alpha is negative or k below 1.

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: w[0] ** 2 + 10 * w[1] ** 2, jnp.array([1.0, 0.1])
      >>> tx = sam_optax.look_sam(rho=0.1, k=2)
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     out, state = tx.update(jax.grad(loss_fn)(w), state, w, value_fn=loss_fn)
      ...     print(*(f"{x:.2f}" for x in out))
      2.14 3.41
      0.60 3.40

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022, algorithm 1. No code of the
      authors was found.

    Note:
      1 + 1/k gradient evaluations a step; one copy of the parameters in the
      state.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    otherwise = reuse_orthogonal(alpha)
    return sharpness_aware(ascent, keep_orthogonal(), when=every(k), otherwise=otherwise)
