"""Methods that ascend along what they remember: averages, the last gradient, the momentum.

Each is a filter before `dual_ascent`, with a memory of the size of the parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import count_for, dual_ascent, scheduled
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Radius, transformation


class AverageState(NamedTuple):
    """Memory of an average of gradients.

    Attributes:
      count: steps seen.
      average: the average, of the shapes and dtypes of params.
    """

    count: jax.typing.ArrayLike
    average: optax.Updates


class PreviousState(NamedTuple):
    """The gradient given in the previous step; zero at first."""

    gradient: optax.Updates


class MomentumState(NamedTuple):
    """The momentum of the gradients returned so far; zero at first."""

    momentum: optax.Updates


def friendly_sam(
    rho: Radius = 0.05,
    sigma: jax.typing.ArrayLike = 1.0,
    lmbda: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly SAM: ascends along the batch's noise, not the full gradient.

    Takes the running average of gradients, an estimate of the full gradient,
    out of the ascent direction, at no extra gradient.

        e = rho d/||d||,  d = g - sigma m;  then m <- lmbda m + (1 - lmbda) g

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule. The
        authors use 0.1 to 0.2.
      sigma: how much of the average is taken out, at least 0; 0 is SAM.
      lmbda: decay of the average, in [0, 1). Published: 0.6 to 0.95.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if rho or sigma is negative or lmbda outside [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w, x: jnp.sum((w - x) ** 2)
      >>> tx, w = sam_optax.friendly_sam(rho=0.1), jnp.zeros(2)
      >>> state = tx.init(w)
      >>> for x in (jnp.array([-1.0, 0.0]), jnp.array([-1.0, -0.5])):
      ...     grad_fn = lambda w: jax.grad(loss_fn)(w, x)
      ...     out, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     print(out)  # at [0.1, 0], then at [0, 0.1]: only what is new
      [2.2 0. ]
      [2.  1.2]

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024; the order of the authors'
      code, which subtracts the average of before this step (for sigma = 1 the
      paper's order gives the same direction) and starts it at the first
      gradient.

    Note:
      Two gradient evaluations; one copy of the parameters in the state. Twice
      the same batch in the first two steps gives e = 0 in the second.
    """
    _checks.at_least("sigma", sigma, 0.0)
    _checks.in_interval("lmbda", lmbda, "[0, 1)")

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, AverageState]:
        del params, extra_args
        first = state.count == 0
        direction = _numerics.map_wide(
            lambda g, m: jnp.where(first, g, g - sigma * m), updates, state.average
        )
        return direction, _numerics.keep_if_nonfinite(
            updates, _averaged(updates, state, 1 - lmbda), state
        )

    average_out = transformation(_average_init, update)
    return sharpness_aware(optax.chain(average_out, dual_ascent(rho)))


def vasso(
    rho: Radius = 0.05, theta: jax.typing.ArrayLike = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Variance-suppressed SAM: ascends along a running average of gradients.

    Steadies the adversary of SAM against the noise of small batches.

        d <- (1 - theta) d + theta g;  e = rho d/||d||

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      theta: weight of the new gradient, in (0, 1]; 1 is SAM. The authors' code
        uses 0.9.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if rho is negative or theta outside (0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w, x: jnp.sum((w - x) ** 2)
      >>> tx, w = sam_optax.vasso(rho=0.1, theta=0.5), jnp.zeros(2)
      >>> state = tx.init(w)
      >>> for x in (jnp.array([-1.0, 0.0]), jnp.array([1.0, -1.0])):
      ...     grad_fn = lambda w: jax.grad(loss_fn)(w, x)
      ...     out, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     print(out)  # at [0.1, 0], then at [0, 0.1]
      [2.2 0. ]
      [-2.   2.2]

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023; the average starts
      at the first gradient, as in the authors' code.

    Note:
      Two gradient evaluations; one copy of the parameters in the state.
    """
    _checks.in_interval("theta", theta, "(0, 1]")

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, AverageState]:
        del params, extra_args
        new = _averaged(updates, state, theta)
        # Integer leaves have no average: hand their gradients on as they are.
        direction = _numerics.map_wide(lambda g, d: d, updates, new.average)
        return direction, _numerics.keep_if_nonfinite(updates, new, state)

    averaging = transformation(_average_init, update)
    return sharpness_aware(optax.chain(averaging, dual_ascent(rho)))


def async_sam(rho: Radius = 0.05) -> optax.GradientTransformationExtraArgs:
    r"""SAM with the previous clean gradient as ascent direction.

    Takes the ascent off the critical path: the perturbation is known before
    this step's data, so both gradients can be computed at the same time. The
    gradients given may come from a smaller batch.

        e = rho g_prev/||g_prev||, 0 in the first step;  then g_prev <- g

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if rho is negative.

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w, x: jnp.sum((w - x) ** 2)
      >>> tx, w = sam_optax.async_sam(rho=0.1), jnp.zeros(2)
      >>> state = tx.init(w)
      >>> for x in (jnp.array([-1.0, 0.0]), jnp.array([0.0, -1.0])):
      ...     grad_fn = lambda w: jax.grad(loss_fn)(w, x)
      ...     out, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     print(out)  # at [0, 0], then at [0.1, 0]
      [2. 0.]
      [0.2 2. ]

    References:
      `Asynchronous Sharpness-Aware Minimization For Fast and Accurate Deep
      Learning <https://arxiv.org/abs/2503.11147>`_, 2025, staleness 1. From
      secondary sources: no code of the authors was found, and the first step
      is our choice.

    Note:
      Two gradient evaluations, one on the critical path; one copy of the
      parameters in the state.
    """

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, PreviousState]:
        del params, extra_args
        previous = _numerics.map_wide(lambda g, old: old, updates, state.gradient)
        new = PreviousState(_numerics.map_wide(lambda s, g: g, state.gradient, updates))
        return previous, _numerics.keep_if_nonfinite(updates, new, state)

    stale = transformation(
        lambda params: PreviousState(optax.tree.zeros_like(params)),
        update,
    )
    return sharpness_aware(optax.chain(stale, dual_ascent(rho)))


def momentum_sam(
    rho: Radius = 0.3, momentum: jax.typing.ArrayLike = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: perturbs against the momentum, for the price of one gradient.

    Use it where two gradients are too much; give it the momentum of the
    optimizer that follows.

        e = -rho v/||v||, 0 in the first step;  out = g_s;  then v <- momentum v + g_s

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule. Wants
        more than SAM: 0.3 to 3 with SGD, 1 with AdamW.
      momentum: decay of v, in [0, 1).

    Returns:
      A transformation with state: chain it. Evaluate the model at params, the
      unperturbed ones.

    Raises:
      ValueError: if rho is negative or momentum outside [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> tx, w = sam_optax.momentum_sam(rho=0.5), jnp.array([3.0, 4.0])
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     out, state = tx.update(jax.grad(loss_fn)(w), state, w, value_fn=loss_fn)
      ...     print(out)  # the second one at [2.7, 3.6]
      [6. 8.]
      [5.4 7.2]

    References:
      Becker et al., `Momentum-SAM: Sharpness Aware Minimization without
      Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024,
      algorithm 1. The authors' code adds L2 decay at the perturbed point, and
      to v; `optax.add_decayed_weights` after this link acts at params.

    Note:
      One gradient evaluation: inside jit the gradients given are unused and
      never computed, but a loss that is logged at params still costs its
      forward pass. One copy of the parameters in the state, and two passes over
      it, which count where a gradient is cheap.
    """
    _checks.at_least("rho", rho, 0.0)
    _checks.in_interval("momentum", momentum, "[0, 1)")

    def init(params: optax.Params) -> tuple[MomentumState, optax.OptState]:
        return MomentumState(optax.tree.zeros_like(params)), count_for(rho)

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        velocity = state[0].momentum
        radius, rho_state = scheduled(rho, state[1])
        # The ascent direction comes from the memory, the clean gradient is not looked at.
        along = dual_ascent(radius).update(velocity, optax.EmptyState())[0]
        against = optax.stateless(lambda updates, params: _numerics.map_wide(jnp.negative, along))
        method = sharpness_aware(against)
        perturbed, _ = method.update(updates, method.init(params), params, **extra_args)
        new = _numerics.map_wide(lambda v, g: momentum * v + g, velocity, perturbed)
        velocity = _numerics.keep_if_nonfinite(perturbed, new, velocity)
        return perturbed, (MomentumState(velocity), rho_state)

    return transformation(init, update)


def _average_init(params: optax.Params) -> AverageState:
    return AverageState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))


def _averaged(updates: optax.Updates, state: AverageState, weight: Any) -> AverageState:
    """The average moved towards the gradient by `weight`; the first gradient at first."""
    first = state.count == 0
    average = _numerics.map_wide(
        lambda m, g: jnp.where(first, g, (1 - weight) * m + weight * g), state.average, updates
    )
    return AverageState(optax.safe_increment(state.count), average)
