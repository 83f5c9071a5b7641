"""A log of sharpness inside training, from what the step of SAM computes anyway."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _axes, _checks, _numerics


class MonitorState(NamedTuple):
    """What `monitor` saw at the last step that computed a perturbed gradient.

    Attributes:
      sharpness: rise of the loss from w to w + e, up to third order in e.
      first_order: its linear part, <g, e>.
      curvature: e^T H e / ||e||^2 along the perturbation, up to first order in
        e; 0 for e = 0.
      cosine: of the angle between g and g_s; 0 if either is 0.
      gradient_norm: ||g||.
    """

    sharpness: jax.Array
    first_order: jax.Array
    curvature: jax.Array
    cosine: jax.Array
    gradient_norm: jax.Array


def monitor(axis_name: _axes.AxisName | None = None) -> optax.GradientTransformationExtraArgs:
    r"""Keeps the sharpness that the step of SAM sees in the optimizer's state.

    A descent rule of `sam_optax.sharpness_aware` that passes its gradient on
    unchanged. It costs no gradient and no loss: the clean and the perturbed
    gradient give the rise of the loss by the trapezoidal rule, exact on
    quadratics. Chain it before another descent rule to log that method.

        sharpness = <g + g_s, e> / 2,   curvature = <g_s - g, e> / ||e||^2,
        cosine = <g, g_s> / (||g|| ||g_s||),   g_s = grad L(w + e)

    Args:
      axis_name: mapped axis over which the numbers are averaged, so that the
        state is the same on every device where gradients are not.

    Returns:
      A transformation whose state is a `MonitorState` of float32 scalars, zeros
      before the first step. Read it anywhere in a chain's state with
      `optax.tree.get(state, "sharpness")`, or `"cosine"`.

    Raises:
      ValueError: at the call, outside `sharpness_aware`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> from sam_optax import sharpness
      >>> method = sam_optax.sharpness_aware(
      ...     sam_optax.dual_ascent(rho=0.1), descent=sharpness.monitor())
      >>> tx = optax.chain(method, optax.sgd(0.1))
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> w = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     jax.grad(loss_fn)(w), tx.init(w), w, grad_fn=jax.grad(loss_fn))
      >>> print(optax.tree.get(state, "sharpness"))  # |5.1|^2 - |5|^2
      1.01

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, equation 2.

    Note:
      Four norms and three inner products a step. With descent_grad_fn g and
      g_s are of two functions, whose difference the figures then hold too. The
      figures are those of the step's batch:
      average them over time for a curve.
    """

    def init(params: optax.Params) -> MonitorState:
        del params
        return MonitorState(*(jnp.zeros([], jnp.float32) for _ in MonitorState._fields))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        clean: optax.Updates | None = None,
        perturbation: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MonitorState]:
        del state, params, extra_args
        _checks.given("clean", clean, "monitor is a descent rule for sharpness_aware")
        _checks.given("perturbation", perturbation, "monitor is a descent rule for sharpness_aware")
        # Norms and directions apart: products of gradients leave the range of float32.
        change = jax.tree.map(_difference, updates, clean)
        (g_norm, g), (_, g_s) = map(_numerics.norm_and_unit, (clean, updates))
        (d_norm, d), (e_norm, e) = map(_numerics.norm_and_unit, (change, perturbation))
        rise = g_norm * e_norm * _numerics.inner(g, e)
        bend = d_norm * _numerics.inner(d, e)
        seen = MonitorState(
            sharpness=rise + bend * e_norm / 2,
            first_order=rise,
            curvature=jnp.where(e_norm == 0, 0, bend / _numerics.nonzero(e_norm)),
            cosine=_numerics.inner(g, g_s),
            gradient_norm=g_norm,
        )
        seen = MonitorState(*(x.astype(jnp.float32) for x in seen))
        return updates, seen if axis_name is None else _axes.mean(seen, axis_name)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _difference(a: Any, b: Any) -> Any:
    return _numerics.widened(a) - _numerics.widened(b) if _numerics.is_perturbable(a) else a
