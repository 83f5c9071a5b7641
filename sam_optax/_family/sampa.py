"""SAMPa: two gradients a step that do not wait for each other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._gradients import checked, gradient_functions
from sam_optax._types import GradFn, Mask, Normalization


class SAMPaState(NamedTuple):
    """State of `sampa`.

    Attributes:
      gradient: u, the gradient of the last batch at the extra iterate; zero at
        first. Of the shapes and dtypes of params.
      ascent: count of steps if rho is a schedule.
      base: state of the base optimizer.
    """

    gradient: optax.Updates
    ascent: optax.OptState
    base: optax.OptState


def sampa(
    base: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.1,
    lmbda: jax.typing.ArrayLike = 0.2,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SAM parallelized: the ascent gradient is taken ahead, at an extra iterate.

    Both gradients of a step are known from the start, so that on two devices
    it takes the time of one. Prefer it to `sam` where time, not work, is
    scarce. On one device it costs what SAM does.

        y = w + base(u)                      where base would go by u
        p = grad L_prev(w + rho unit(u))     u: gradient of the previous batch
        q = grad L(y)                        L: the current batch
        updates = base((1 - lmbda) p + lmbda q);  u <- q

    Args:
      base: the base optimizer, its learning rate included.
      rho: radius of the ascent step, at least 0: a number, a traced scalar or a
        schedule.
      lmbda: weight of the gradient at the extra iterate, in [0, 1].
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      An optimizer: the updates are to be added to params. Its update needs
      params and two functions from params to gradients: grad_fn (or value_fn)
      for the current batch and previous_grad_fn for the batch of the step
      before (at the first step, the current one). Keep the previous batch in
      your loop. With descent_grad_fn, the q of the mixture comes from it and
      the u that is kept from grad_fn, one evaluation more.
      The gradient given as updates is not used, only its structure.

    Raises:
      ValueError: if rho is negative or lmbda is outside [0, 1]; at the call, if
        params, grad_fn or previous_grad_fn are missing.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax, sam_optax
      >>> tx = sam_optax.sampa(optax.sgd(0.1), rho=0.05)
      >>> gradient = jax.grad(lambda w, x: jnp.sum((w - x) ** 2))
      >>> @jax.jit
      ... def step(w, state, previous, batch):
      ...     updates, state = tx.update(
      ...         gradient(w, batch), state, w,  # the compiler removes this one
      ...         grad_fn=lambda w: gradient(w, batch),
      ...         previous_grad_fn=lambda w: gradient(w, previous))
      ...     return optax.apply_updates(w, updates), state
      >>> w = jnp.array([3.0, 4.0])
      >>> state, previous = tx.init(w), jnp.zeros(2)
      >>> for batch in jnp.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1]]):
      ...     w, state = step(w, state, previous, batch)
      ...     previous = batch
      ...     print(np.array(w).round(2))
      [2.4 3.2]
      [1.94 2.59]
      [1.58 2.09]

    References:
      Xie et al., `SAMPa: Sharpness-aware Minimization Parallelized
      <https://arxiv.org/abs/2410.10683>`_, 2024, algorithm 1; the authors' code.

    Note:
      Two gradient evaluations, independent of each other, one copy of the
      gradient in the state and the state of base. As in the authors' code y
      takes in the momentum and weight decay of SGD (theirs not at the very
      first step); with Adam they step along u plainly, here base does it.
    """
    _checks.in_interval("lmbda", lmbda, "[0, 1]")
    base = optax.with_extra_args_support(base)
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)

    def init(params: optax.Params) -> SAMPaState:
        return SAMPaState(optax.tree.zeros_like(params), ascent.init(params), base.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        grad_fn: GradFn | None = None,
        value_fn: Callable[[optax.Params], jax.Array] | None = None,
        previous_grad_fn: GradFn | None = None,
        descent_grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SAMPaState]:
        ascend, descend = gradient_functions(updates, params, grad_fn, value_fn, descent_grad_fn)
        previous = checked("previous_grad_fn", previous_grad_fn, updates)
        perturbation, ascent_state = ascent.update(state.gradient, state.ascent, params)
        p = previous(optax.apply_updates(params, perturbation))
        ahead, _ = base.update(state.gradient, state.base, params, **extra_args)
        y = optax.apply_updates(params, ahead)
        q = descend(y)
        u = q if descend is ascend else ascend(y)
        mixed = _numerics.map_wide(
            lambda p, q: (1 - lmbda) * p + lmbda * q, _numerics.movable(p), q
        )
        result, base_state = base.update(mixed, state.base, params, **extra_args)
        gradient = _numerics.map_wide(lambda old, u: u, state.gradient, u)
        return result, SAMPaState(gradient, ascent_state, base_state)

    return optax.GradientTransformationExtraArgs(init, update)
