"""ImbSAM (Zhou et al., 2023): SAM for the rare classes alone; a method with an input of its own."""

from typing import Any

import jax
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._gradients import checked
from sam_optax._rules import stateless, transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import GradFn, Mask, Normalization, Result


def imb_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""ImbSAM: SAM on the loss of the rare classes, the plain gradient of the rest.

    For data with few examples of many classes, whose minima are sharp for the
    rare ones. It takes the gradient of the rare classes' part of the loss as an
    input of its own, tail_grad_fn, beside the gradient of the whole.

        L = L_head + L_tail;  out = grad L_head(w) + grad L_tail(w + e),
        e = rho unit(grad L_tail(w))

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      A transformation. Its update needs params, grad_fn or value_fn, and
      tail_grad_fn, a function from params to the gradient of L_tail; with
      `value_and_grad` give it by extra_args. The state has no arrays for a
      constant rho. A batch without rare classes gives the gradient given.

    Raises:
      ValueError: if rho is negative; at the call, without tail_grad_fn, or with
        descent_grad_fn, whose place it takes.

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> losses = lambda w, x: (w - x) ** 2
      >>> loss_fn = lambda w, x, rare: jnp.mean(losses(w, x))
      >>> def of_tail(w, x, rare):
      ...     return {"tail_grad_fn": jax.grad(lambda w: jnp.mean(rare * losses(w, x)))}
      >>> sharp = sam_optax.grad(loss_fn, sam_optax.imb_sam(rho=0.5), extra_args=of_tail)
      >>> print(sharp(jnp.array(1.0), jnp.array([0.0, 0.0, 0.0, 3.0]), jnp.array([0, 0, 0, 1])))
      0.25
      >>> print(jax.grad(loss_fn)(jnp.array(1.0), jnp.array([0.0, 0.0, 0.0, 3.0]), None))
      0.5

    References:
      Zhou et al., `ImbSAM: A Closer Look at Sharpness-Aware Minimization in
      Class-Imbalanced Recognition <https://arxiv.org/abs/2308.07815>`_, 2023;
      the authors' code, whose script counts the tail's loss twice: give a
      weighted L_tail, and a whole loss that contains it, for that.

    Note:
      Three gradient evaluations: one of the whole and two of the tail, which are
      as much cheaper as the tail is smaller where its examples are gathered.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    ascent = optax.chain(stateless(_tail_gradient), ascent)
    return _along_the_tail(sharpness_aware(ascent, stateless(_add_head)))


def _along_the_tail(
    method: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """The method with tail_grad_fn as the function that its perturbed gradient comes from."""

    def update(
        updates: Any, state: Any, params: Any = None, *, tail_grad_fn: GradFn, **given: Any
    ) -> Result:
        use = "tail_grad_fn takes its place; aux_from must be 'clean'"
        _checks.left_out("descent_grad_fn", given.get("descent_grad_fn"), use)
        tail = checked("tail_grad_fn", tail_grad_fn, updates)
        given |= {"tail_grad_fn": tail, "descent_grad_fn": tail}
        return method.update(updates, state, params, **given)

    return transformation(method.init, update)


def _tail_gradient(
    updates: optax.Updates, params: optax.Params, tail_grad_fn: GradFn
) -> optax.Updates:
    return tail_grad_fn(params)


def _add_head(
    perturbed: optax.Updates, clean: optax.Updates, params: optax.Params, tail_grad_fn: GradFn
) -> optax.Updates:
    """grad L_tail(w + e) + (grad L(w) - grad L_tail(w))."""
    add_head = lambda moved, whole, tail: moved + (whole - tail)
    return _numerics.map_wide(add_head, perturbed, clean, tail_grad_fn(params))
