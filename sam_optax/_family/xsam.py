"""XSAM (ICLR 2026): a descent on the arc from the clean to the perturbed gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._hyperparameters import count_for, scheduled
from sam_optax._rules import transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


def arc(alpha: optax.ScalarOrSchedule = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""A descent on the arc from the perturbation through the perturbed gradient.

    Turns beyond SAM's gradient, or less far, without changing its length. Over
    `multi_step` it is XSAM with several ascent steps.

        out = ||g_s|| slerp(e/||e||, g_s/||g_s||; alpha),  from g/||g|| where e = 0
        slerp(a, b; t) = (sin((1-t) th) a + sin(t th) b)/sin(th),  cos(th) = <a, b>

    Args:
      alpha: place on the arc, at least 0: 0 is the direction of e, 1 is SAM. A
        number, a traced scalar or a schedule.

    Returns:
      A descent rule for `sharpness_aware`; it chains with others.

    Raises:
      ValueError: if alpha is negative; at the call, outside `sharpness_aware`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: w[0] ** 2 + 10 * w[1] ** 2, jnp.array([1.0, 0.1])
      >>> method = sam_optax.sam(0.1, descent=sam_optax.arc(2.0))
      >>> print(*(f"{x:.2f}" for x in sam_optax.grad(loss_fn, method)(w)))
      1.32 3.81

    References:
      `Revisiting Sharpness-Aware Minimization: A More Faithful and Effective
      Implementation` (XSAM), ICLR 2026; the authors' code.

    Note:
      No gradient evaluation of its own.
    """
    _checks.at_least("alpha", alpha, 0.0)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: Any = None,
        *,
        clean: optax.Updates,
        perturbation: optax.Updates,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        place, state = scheduled(alpha, state)
        length, end = _numerics.norm_and_unit(updates)
        moved, along = _numerics.norm_and_unit(perturbation)
        _, start = _numerics.norm_and_unit(clean)
        start = _numerics.map_wide(lambda e, g: jnp.where(moved == 0, g, e), along, start)
        direction = _slerp(start, end, place)
        return _numerics.map_wide(lambda g_s, d: length * d, updates, direction), state

    return transformation(lambda params: count_for(alpha), update)


def xsam(
    rho: optax.ScalarOrSchedule = 0.15,
    alpha: optax.ScalarOrSchedule = 1.0,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""XSAM: turns from the perturbation through SAM's gradient, and beyond.

    The direction is taken on the arc from e to g_s at the angle alpha, where
    1 is SAM; the best alpha is measured now and then with `xsam_alpha`.

        out = ||g_s|| slerp(e/||e||, g_s/||g_s||; alpha),  e = rho g/||g||
        slerp(a, b; t) = (sin((1-t) th) a + sin(t th) b)/sin(th),  cos(th) = <a, b>

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      alpha: place on the arc, at least 0: 0 is the clean direction, 1 is SAM,
        the authors search to 2. A number, a traced scalar or a schedule.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho or alpha is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: w[0] ** 2 + 10 * w[1] ** 2, jnp.array([1.0, 0.1])
      >>> for alpha in (0.0, 1.0, 2.0):
      ...     out = sam_optax.grad(loss_fn, sam_optax.xsam(0.1, alpha))(w)
      ...     print([round(float(x), 2) for x in out])
      [2.85, 2.85]
      [2.14, 3.41]
      [1.32, 3.81]

    References:
      `Revisiting Sharpness-Aware Minimization: A More Faithful and Effective
      Implementation` (XSAM), ICLR 2026; the authors' code. For several steps of
      ascent put `arc` over `multi_step`.

    Note:
      Two gradient evaluations; the search costs one forward pass per candidate.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(ascent, arc(alpha))


def xsam_alpha(
    value_fn: Callable[[optax.Params], jax.Array],
    params: optax.Params,
    *,
    rho: float | jax.Array = 0.15,
    rho_max: jax.typing.ArrayLike = 0.3,
    candidates: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    r"""The alpha of `xsam` whose direction raises the loss most at a larger radius.

    Measure it once an epoch on one batch and hand it to `xsam` as a traced
    scalar.

        argmax over candidates of L(w + rho_max slerp(e/||e||, g_s/||g_s||; alpha))

    Args:
      value_fn: loss as a function of params alone.
      params: the parameters.
      rho: radius of the ascent, at least 0, as in `xsam`.
      rho_max: radius of the comparison, at least 0; the authors take twice rho.
      candidates: values to compare, shape (n,); by default 0, 0.1, ..., 2.

    Returns:
      The best candidate, a scalar; the first of equals.

    Raises:
      ValueError: if rho or rho_max is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: w[0] ** 2 + 10 * w[1] ** 2, jnp.array([1.0, 0.1])
      >>> print(sam_optax.xsam_alpha(loss_fn, w))
      1.8

    References:
      As for `xsam`.

    Note:
      Two gradient evaluations and one forward pass per candidate, one after
      another.
    """
    _checks.at_least("rho_max", rho_max, 0.0)
    grads = _numerics.conjugate(jax.grad(value_fn)(params))
    ascent = dual_ascent(rho)
    perturbation, _ = ascent.update(grads, ascent.init(params), params)
    perturbed = jax.grad(value_fn)(optax.apply_updates(params, perturbation))
    _, end = _numerics.norm_and_unit(_numerics.conjugate(perturbed))
    _, start = _numerics.norm_and_unit(perturbation)

    def value(alpha: jax.Array) -> jax.Array:
        step = _numerics.map_wide(lambda d: rho_max * d, _slerp(start, end, alpha))
        return value_fn(optax.apply_updates(params, step))

    alphas = jnp.asarray(jnp.linspace(0.0, 2.0, 21) if candidates is None else candidates)
    return alphas[jnp.argmax(jax.lax.map(value, alphas))]


def _slerp(start: Any, end: Any, place: jax.typing.ArrayLike) -> Any:
    # Accurate for small angles too, where the arc cosine of an inner product is not.
    difference, _ = _numerics.norm_and_unit(_numerics.map_wide(jnp.subtract, end, start))
    total, _ = _numerics.norm_and_unit(_numerics.map_wide(jnp.add, end, start))
    angle = 2 * jnp.arctan2(difference, total)
    sine = jnp.sin(angle)
    parallel = sine < 10 * jnp.finfo(sine.dtype).eps  # of opposite ones the rest is rounding
    divisor = jnp.where(parallel, 1, sine)
    a = jnp.where(parallel, 1 - place, jnp.sin((1 - place) * angle) / divisor)
    b = jnp.where(parallel, place, jnp.sin(place * angle) / divisor)
    return _numerics.map_wide(lambda s, e: a * s + b * e, start, end)
