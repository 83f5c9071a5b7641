"""SAM with a Polyak step (Oikonomou and Loizou, 2026): the learning rate from the loss."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._rules import stateless
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


def polyak_step(
    bound: jax.typing.ArrayLike = 1.0, lowest: jax.typing.ArrayLike = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""A descent whose length is a Polyak step, so that the learning rate is 1.

    The step to where the linearised perturbed loss would reach the lowest loss.
    Over any ascent; follow it by `optax.sgd(1.0)`.

        out = min([L(w + e) - lowest - <g_s, e>]_+ / ||g_s||^2, bound) g_s

    Args:
      bound: largest step, above 0.
      lowest: a lower bound of the loss, 0 for losses that are not negative.

    Returns:
      A descent rule for `sharpness_aware`. It needs value_fn, the loss that g_s
      is the gradient of.

    Raises:
      ValueError: if bound is not above 0 or lowest is no number; at the call,
        without value_fn or outside `sharpness_aware`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> method = sam_optax.sam(0.5, descent=sam_optax.polyak_step())
      >>> loss_fn, w = lambda w: jnp.sum(w**2) / 2, jnp.array([3.0, 4.0])
      >>> print(*(f"{x:.2f}" for x in sam_optax.grad(loss_fn, method)(w)))  # 0.409 [3.3 4.4]
      1.35 1.80

    References:
      Oikonomou and Loizou, `Adaptive Sharpness-Aware Minimization with a
      Polyak-type Step size <https://arxiv.org/abs/2606.01827>`_, 2026.

    Note:
      A forward pass, which inside of jit is that of g_s.
    """
    _checks.in_interval("bound", bound, "(0, inf)")
    _checks.in_interval("lowest", lowest, "(-inf, inf)")

    def combine(g_s: Any, params: Any, *, perturbation: Any, value_fn: Any) -> optax.Updates:
        loss = value_fn(optax.apply_updates(params, perturbation))
        length, direction = _numerics.norm_and_unit(g_s)
        # <g_s, e>/|g_s| and the division by |g_s| apart: a square might leave the range.
        gain = (loss - lowest) / _numerics.nonzero(length)
        gain = gain - _numerics.inner(direction, perturbation)
        step = jnp.clip(gain / _numerics.nonzero(length), 0, bound)
        return _numerics.map_wide(lambda g: step * g, g_s)

    return stateless(combine)


def polyak_sam(
    rho: optax.ScalarOrSchedule = 0.1,
    bound: jax.typing.ArrayLike = 1.0,
    lowest: jax.typing.ArrayLike = 0.0,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM whose learning rate is a Polyak step of the perturbed loss.

    No learning rate to tune and no schedule; fits where the loss can come near
    its lower bound. Follow it by `optax.sgd(1.0)`.

        out = gamma g_s,  gamma = min([L(w + e) - lowest - <g_s, e>]_+ / ||g_s||^2, bound),
        e = rho g/||g||

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      bound: largest learning rate, above 0.
      lowest: a lower bound of the loss, 0 for losses that are not negative.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      A transformation; in a chain its update needs params and value_fn, beside
      grad_fn or in its place. The state has no arrays for a constant rho.

    Raises:
      ValueError: if rho is negative or bound not above 0; at the call, without
        value_fn.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2) / 2
      >>> tx = optax.chain(sam_optax.polyak_sam(rho=0.01), optax.sgd(1.0))
      >>> w = jnp.array([3.0, 4.0])
      >>> state = tx.init(w)
      >>> for _ in range(20):
      ...     updates, state = tx.update(jax.grad(loss_fn)(w), state, w, value_fn=loss_fn)
      ...     w = optax.apply_updates(w, updates)
      >>> print(loss_fn(w) < 1e-4)
      True

    References:
      Oikonomou and Loizou, `Adaptive Sharpness-Aware Minimization with a
      Polyak-type Step size: A Theory-Grounded Scheduler
      <https://arxiv.org/abs/2606.01827>`_, 2026; the authors' package. Their
      weight decay is scaled by gamma: put L2 into the loss for a decay that the
      step knows of, or decay after this link, which is not scaled. Their form
      without normalisation is `polyak_step` over `proportional_ascent`.

    Note:
      Two gradient evaluations and one copy of the parameters. Of groups of
      examples (`axis_name`, `microbatch_size`) each has a step of its own.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(ascent, polyak_step(bound, lowest))
