"""Ascent rules: Optax transformations that turn a gradient into a perturbation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _masks, _normalization, _numerics
from sam_optax._hyperparameters import count_for, scheduled
from sam_optax._rules import transformation
from sam_optax._types import Mask, Normalization, Result


def dual_ascent(
    rho: optax.ScalarOrSchedule,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The perturbation that raises the linearised loss most within radius rho.

    The ascent step of SAM and ASAM, as an Optax transformation: a gradient
    goes in, the perturbation e comes out, to be added with
    `optax.apply_updates`. Use it inside `sharpness_aware`, alone, or in a
    chain with filters of the gradient before it.

        e = argmax <g, e> subject to ||T^-1 e||_p <= rho
          = rho T sign(g) |T g|^(q-1) / ||T g||_q^(q-1),   1/p + 1/q = 1.

    For p = 2 this is rho T^2 g / ||T g||_2; for p = inf, rho T sign(g); for
    p = 1 all of it goes to the largest |T g| (ties share it).

    Args:
      rho: radius, at least 0: a number, a traced scalar, or a schedule of the
        step. In the units of the parameters, or relative to them under a
        normalization.
      p: order of the norm that bounds e, from 1 to infinity; None is 2. A traced
        p (`optax.inject_hyperparams` makes it one if it is given) works at the
        cost of a power per parameter.
      normalization: the operator T, a function from params to a tree like
        params whose leaves are positive and broadcast against them
        (`elementwise`, `filterwise`, `layerwise`, or your own). None is T = 1.
      mask: tree of booleans like params or a prefix of it, or a function from
        params to one. Leaves under False are not perturbed and do not count
        in the norm.

    Returns:
      A transformation. Its update needs params if a normalization or a mask
      function is given; e has the structure, shapes and dtypes of the
      gradient. Its state is empty for a constant rho and holds the step count
      for a schedule. A zero gradient gives e = 0; a gradient with NaN or
      infinity gives e = NaN, so that guards against non-finite steps see it.

    Raises:
      ValueError: if rho is negative or p is below 1; at the call, if params
        are needed and missing, or T or the mask does not fit the gradient.

    Example:
      >>> import jax.numpy as jnp, optax, sam_optax
      >>> ascent = sam_optax.dual_ascent(rho=0.5)
      >>> params, grads = jnp.array([1.0, 1.0]), jnp.array([3.0, 4.0])
      >>> perturbation, state = ascent.update(grads, ascent.init(params), params)
      >>> print(perturbation, optax.apply_updates(params, perturbation))
      [0.3 0.4] [1.3 1.4]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, equation 2; Kwon et al.,
      `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021, equation 9.

    Note:
      No gradient evaluation. Norms are taken in float32 or wider, and where
      squares would leave its range after scaling by a power of two, so a loss
      scale does not change e. The length is rho for every T g whose largest
      entry is a normal number, in float32 from 1.2e-38 to 3.4e38; below that
      most devices compute with 0, and so e = 0.
    """
    _checks.at_least("rho", rho, 0.0)
    p = 2.0 if p is None else p
    _checks.at_least("p", p, 1.0)

    def update(updates: optax.Updates, state: Any, params: Any = None, **_: Any) -> Result:
        radius, state = scheduled(rho, state)
        scales = _normalization.scales(normalization, updates, params)
        move = lambda grads, scales: _dual(grads, scales, radius, p)
        return _masks.moved(mask, move, updates, params, scales), state

    return transformation(lambda params: count_for(rho), update)


def proportional_ascent(
    rho: optax.ScalarOrSchedule, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""The perturbation that is proportional to its direction: rho is a factor, not a length.

    Use it where the size of the direction says something, as in unnormalised
    SAM, or after a filter that has normalised it already.

        e = rho d

    Args:
      rho: factor, at least 0: a number, a traced scalar or a schedule.
      mask: leaves that are perturbed, as in `dual_ascent`.

    Returns:
      A transformation from a direction to a perturbation. Its state is empty
      for a constant rho and holds the step count for a schedule.

    Raises:
      ValueError: if rho is negative; at the call, if the mask does not fit.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> ascent, grads = sam_optax.proportional_ascent(rho=0.5), jnp.array([3.0, 4.0])
      >>> print(ascent.update(grads, ascent.init(grads))[0])
      [1.5 2. ]

    References:
      Andriushchenko and Flammarion, `Towards Understanding Sharpness-Aware
      Minimization <https://arxiv.org/abs/2206.06232>`_, 2022.

    Note:
      No gradient evaluation. Depends on the scale of the loss.
    """
    _checks.at_least("rho", rho, 0.0)

    def update(updates: optax.Updates, state: Any, params: Any = None, **_: Any) -> Result:
        factor, state = scheduled(rho, state)
        move = lambda directions: [factor * _numerics.widened(d) for d in directions]
        return _masks.moved(mask, move, updates, params), state

    return transformation(lambda params: count_for(rho), update)


def _dual(
    grads: list[Any], scales: list[Any], radius: Any, p: jax.typing.ArrayLike
) -> list[jax.Array]:
    """The equation of `dual_ascent` on the perturbed leaves, v = T g.

    For p = 2 this is rho T v/||v||. Otherwise divide by the largest entry, which
    cancels: with x = v / max|v|, e = rho T d / <x, d>^(1/p) for d = sign(x) |x|^(q-1),
    since (q-1)/q = 1/p. With q - 1 = 1/(p-1), the limits p = 1 (an infinite
    power: 1 at the maximum, else 0) and p = inf (power 0) need no case of their
    own.
    """
    if not grads:
        return []
    v = [g if t is None else _numerics.widened(g) * t for g, t in zip(grads, scales, strict=True)]
    wide = [_numerics.widened(a) for a in v]
    if _is_two(p):
        factor, size = _numerics.factor_and_norm(v)
        directions = [a * factor for a in wide]
        length = _numerics.nonzero(size)
    else:
        size = _numerics.largest(v)
        factor = _numerics.to_one(size)  # or 1/size could be too small for a float
        x = [a * factor / _numerics.nonzero(size * factor) for a in wide]
        order = jnp.asarray(p, size.dtype)
        directions = [_signed_power(a, 1 / (order - 1)) for a in x]
        total = sum(jnp.sum((jnp.conj(a) * d).real) for a, d in zip(x, directions, strict=True))
        length = jnp.where(size == 0, 1, total) ** (1 / order)
        size = size + 0 * total  # of a sharded v the largest entry may leave a NaN out
    # NaN if the size is not finite, which sign() would hide for p = inf; no NaN is written down
    # for a select to leave out, because jax.debug_nans would stop there.
    step = radius / length + 0 * size
    return [
        d * step if t is None else d * t * step for d, t in zip(directions, scales, strict=True)
    ]


@jax.custom_jvp
def _signed_power(x: jax.Array, n: jax.Array) -> jax.Array:
    """sign(x) |x|^n for |x| up to 1 and n from 0 to infinity, in values and derivatives.

    An infinite power is 1 where |x| = 1, else 0; its derivative is that of such
    a constant, and 0 is taken at 0, where the slope of a power below 1 is infinite.
    """
    return jnp.sign(x) * _modulus(x) ** n


def _modulus(x: jax.Array) -> jax.Array:
    # A division may miss 1 by an ulp, which an infinite power would not forgive.
    size = jnp.abs(x)
    return jnp.where(size > 1 - 4 * jnp.finfo(size.dtype).eps, 1, size)


def _slope(dx: jax.Array, power: jax.Array, x: jax.Array, n: jax.Array) -> jax.Array:
    # |x|^(n-1) times n along x and 1 across it, which only a complex x can turn.
    size, along = _modulus(x), jnp.where(jnp.isfinite(n), n, 0)
    vertical = (size == 0) & (n < 1)
    scale = jnp.where(vertical, 0, jnp.where(vertical, 1, size) ** (n - 1))
    return scale * (dx + (along - 1) * jnp.sign(x) * (jnp.conj(jnp.sign(x)) * dx).real)


def _slope_of_exponent(dn: jax.Array, power: jax.Array, x: jax.Array, n: jax.Array) -> jax.Array:
    return power * jnp.log(_numerics.nonzero(_modulus(x))) * dn


_signed_power.defjvps(_slope, _slope_of_exponent)


def _is_two(p: Any) -> bool:
    return not _checks.is_traced(p) and float(p) == 2.0
