"""Methods whose neighbourhood has the shape of the Fisher information or of the Hessian."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import count_for, dual_ascent, scheduled
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import GradFn, Radius, transformation


class EigenState(NamedTuple):
    """Memory of `eigen_sam`.

    Attributes:
      count: steps seen.
      vector: estimate of the top eigenvector of the Hessian, of unit norm.
      rho: state of the radius.
    """

    count: jax.typing.ArrayLike
    vector: optax.Updates
    rho: optax.OptState


def fisher_sam(
    rho: Radius = 0.1, eta: jax.typing.ArrayLike = 1.0
) -> optax.GradientTransformationExtraArgs:
    r"""Fisher SAM: a neighbourhood measured by the diagonal Fisher information.

    Moves less where the gradient is large. With mean gradients below 0.1 or so
    the metric is nearly flat and the method nearly SAM.

        e = rho T^2 g/||T g||,  T^2 = 1/(1 + eta g^2)

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      eta: weight of the Fisher information, at least 0; 0 is SAM.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho or eta is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> print(sam_optax.grad(loss_fn, sam_optax.fisher_sam(0.1))(jnp.array([0.3, 4.0])).round(3))
      [0.679 8.022]

    References:
      Kim et al., `Fisher SAM: Information Geometry and Sharpness Aware
      Minimisation <https://arxiv.org/abs/2206.04920>`_, 2022. From secondary
      sources: no code of the authors was found; the Fisher information is the
      square of the batch's mean gradient.

    Note:
      Two gradient evaluations. Not invariant to the scale of the loss.
    """
    _checks.at_least("rho", rho, 0.0)
    _checks.at_least("eta", eta, 0.0)

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        radius, state = scheduled(rho, state)
        operator = jax.tree.map(_fisher_scale, updates, is_leaf=lambda x: x is None)
        rule = dual_ascent(radius, normalization=lambda params: operator)
        return rule.update(updates, optax.EmptyState(), updates)[0], state

    def _fisher_scale(g: Any) -> Any:
        if g is None or not _numerics.is_perturbable(g):
            return None if g is None else jnp.ones(())
        return jax.lax.rsqrt(1 + eta * _numerics.abs_square(_numerics.widened(g)))

    return sharpness_aware(transformation(lambda params: count_for(rho), update))


def eigen_sam(
    rho: Radius = 0.05,
    alpha: jax.typing.ArrayLike = 0.2,
    every: int = 100,
    power_steps: int = 5,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Eigen-SAM: leans the perturbation towards the top eigenvector of the Hessian.

    SAM shrinks the top eigenvalue only as far as the gradient points along its
    eigenvector; this one helps it. The eigenvector v is refined by power
    iteration every so many steps.

        e = rho (u + alpha sign(<g, v>) (v - <v, u> u)),  u = g/||g||

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule. The
        length of e is rho sqrt(1 + alpha^2 (1 - <v, u>^2)), as in the authors'
        code.
      alpha: weight of the eigenvector, at least 0; 0 is SAM.
      every: steps between refreshes of v, at least 1.
      power_steps: Hessian-vector products per refresh, at least 1.
      key: seed or key of the first v.

    Returns:
      A transformation with state: chain it. grad_fn has to be differentiable.

    Raises:
      ValueError: if a value is outside its range.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: w[0] ** 2 + 10 * w[1] ** 2, jnp.array([1.0, 0.05])
      >>> for alpha in (0.0, 1.0):
      ...     tx = sam_optax.eigen_sam(0.1, alpha, power_steps=20)
      ...     out, _ = tx.update(jnp.array([2.0, 1.0]), tx.init(w), w, value_fn=loss_fn)
      ...     print(out.round(2))
      [2.18 1.89]
      [2.1  3.49]

    References:
      Luo et al., `Explicit Eigenvalue Regularization Improves Sharpness-Aware
      Minimization <https://arxiv.org/abs/2501.12666>`_, 2024; the authors'
      code, except that they ascend unnormalised until the first refresh, at
      step 100, and the first refresh here is at step 0.

    Note:
      Two gradient evaluations a step. A refresh linearises the gradient once
      and takes power_steps Hessian-vector products of about 1.6 gradients each:
      by default 9 gradients more in that step, measured on a dense network,
      and 2.1 a step on average. One copy of the parameters in the state; while
      it refreshes, also what the linearised gradient keeps.
    """
    _checks.at_least("rho", rho, 0.0)
    _checks.at_least("alpha", alpha, 0.0)
    every = _checks.integer_at_least("every", every, 1)
    power_steps = _checks.integer_at_least("power_steps", power_steps, 1)

    def init(params: optax.Params) -> EigenState:
        vector = _numerics.random_normal(_numerics.as_key(key), params)
        return EigenState(jnp.zeros([], jnp.int32), _unit_like(vector, vector), count_for(rho))

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        grad_fn: GradFn,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EigenState]:
        del extra_args

        def refreshed(vector: optax.Updates) -> optax.Updates:
            weights, replaced = _numerics.perturbable_part(params)
            start, completed = _numerics.perturbable_part(vector)

            def gradient(weights: list[Any]) -> list[Any]:
                return _numerics.perturbable_part(grad_fn(replaced(weights)))[0]

            _, hessian_product = jax.linearize(gradient, weights)
            step = lambda _, v: _unit_like(v, hessian_product(v))
            top = jax.lax.fori_loop(0, power_steps, step, start)
            return completed(_numerics.keep_if_nonfinite(top, top, start))

        vector = jax.lax.cond(state.count % every == 0, refreshed, lambda v: v, state.vector)
        radius, rho_state = scheduled(rho, state.rho)
        _, u = _numerics.norm_and_unit(updates)
        side, along = jnp.sign(_numerics.inner(updates, vector)), _numerics.inner(vector, u)
        perturbation = _numerics.map_wide(
            lambda g, u, v: radius * (u + alpha * side * (v - along * u)),
            _numerics.movable(updates),
            u,
            vector,
        )
        return perturbation, EigenState(optax.safe_increment(state.count), vector, rho_state)

    return sharpness_aware(transformation(init, update))


def _unit_like(like: Any, tree: Any) -> Any:
    """The direction of the tree in the dtypes of another."""
    _, direction = _numerics.norm_and_unit(tree)
    return _numerics.map_wide(lambda _, u: u, like, direction)
