"""Lookbehind: several ascents, a descent after each, then an average."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._gradients import gradient_functions
from sam_optax._types import GradFn, Mask, Normalization


class LookbehindState(NamedTuple):
    """State of `lookbehind`.

    Attributes:
      ascent: count of steps if rho is a schedule.
      base: state of the base optimizer, which moves k times a step.
    """

    ascent: optax.OptState
    base: optax.OptState


def lookbehind(
    base: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.05,
    k: int = 2,
    alpha: jax.typing.ArrayLike | None = 0.5,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lookbehind: climbs k times on one batch, descends after each, and steps back.

    Reaches higher losses than SAM's single ascent; the average with the
    starting point keeps the variance of the k descents down. Prefer it to
    `multi_step_sam` where several ascents are affordable.

        slow = fast = high = w
        k times:  high <- high + rho unit(grad L(high))
                  fast <- fast + base(grad L(high))
        updates = alpha (fast - slow)

    Args:
      base: the base optimizer, its learning rate included. Its momentum and
        weight decay belong to fast, and its schedules count k steps an update.
      rho: radius of one ascent, at least 0: a number, a traced scalar or a
        schedule of updates. The total may reach k rho.
      k: number of ascents and descents, at least 1; with `inject_hyperparams`
        name it in static_args.
      alpha: share of the way that is kept, in [0, 1]. None adapts it leaf by
        leaf: (1 + c)/2, c the cosine of the first descent and the whole way.
        Published: 0.2 to 0.8. k = 1 with alpha = 1 is SAM with base.
      normalization: operator T of the ascents, as in `dual_ascent`, evaluated
        where each starts (Lookbehind-ASAM). None is SAM's.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      An optimizer: the updates are to be added to params. Its update needs
      params and grad_fn or value_fn, and the gradient of the same batch.

    Raises:
      ValueError: if rho is negative, k below 1 or alpha outside [0, 1]; at the
        call, if params or grad_fn are missing or grad_fn returns another
        structure.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> w = jnp.array([3.0, 4.0])
      >>> for k in (1, 2):
      ...     tx = sam_optax.lookbehind(optax.sgd(0.1), rho=0.5, k=k, alpha=1.0)
      ...     updates, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w, value_fn=loss_fn)
      ...     print(np.array(updates).round(2))  # twice -0.2 [3.3, 4.4]; the second at [3.6, 4.8]
      [-0.66 -0.88]
      [-1.38 -1.84]

    References:
      Mordido et al., `Lookbehind-SAM: k steps back, 1 step forward
      <https://arxiv.org/abs/2307.16704>`_, 2023, algorithm 1; the authors' code.

    Note:
      k + 1 gradient evaluations, the caller's included: the gradient after one
      ascent is the one before the next, which the authors' code computes twice
      (2k); so it is here with descent_grad_fn, from which the k descents then
      come while grad_fn serves the ascents. The k steps are written out in the
      compiled program.
    """
    k = _checks.integer_at_least("k", k, 1)
    if alpha is not None:
        _checks.in_interval("alpha", alpha, "[0, 1]")
    base = optax.with_extra_args_support(base)
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)

    def init(params: optax.Params) -> LookbehindState:
        return LookbehindState(ascent.init(params), base.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        grad_fn: GradFn | None = None,
        value_fn: Callable[[optax.Params], jax.Array] | None = None,
        descent_grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, LookbehindState]:
        climb, descend = gradient_functions(updates, params, grad_fn, value_fn, descent_grad_fn)
        extra_args |= {"grad_fn": descend, "value_fn": value_fn}
        climbed = gradient = updates
        high, fast = params, params
        ascent_state, base_state = state.ascent, state.base
        ways = []
        for i in range(k):
            if i:
                climbed = gradient if climb is descend else climb(high)
            perturbation, ascent_state = ascent.update(climbed, state.ascent, high)
            high = optax.apply_updates(high, perturbation)
            gradient = descend(high)
            step, base_state = base.update(
                _numerics.movable(gradient), base_state, fast, **extra_args
            )
            ways.append(optax.tree.add(ways[-1], step) if ways else step)
            fast = optax.apply_updates(params, ways[-1])
        first, whole = ways[0], ways[-1]
        kept = (lambda way, _: alpha * way) if alpha is not None else _by_cosine
        return _numerics.map_wide(kept, whole, first), LookbehindState(ascent_state, base_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _by_cosine(way: jax.Array, first: jax.Array) -> jax.Array:
    """The way scaled by (1 + cos)/2 of its angle with the first step."""
    (_, u), (_, v) = _numerics.norm_and_unit(way), _numerics.norm_and_unit(first)
    return (1 + _numerics.inner(u, v)) / 2 * way
