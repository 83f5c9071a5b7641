"""bSAM: SAM as variational Bayes, an optimizer that learns a precision for every weight."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _axes, _checks, _numerics
from sam_optax._gradients import gradient_functions
from sam_optax._hyperparameters import count_for, scheduled
from sam_optax._types import GradFn


class BSAMState(NamedTuple):
    """State of `bsam`; the trees are like params, in float32 or wider.

    Attributes:
      key: data of the random key (`jax.random.key_data`), which any
        checkpoint can hold.
      momentum: average of the descent gradients.
      scale: s; the posterior has precision data_size * s.
      counts: counts of steps for the learning rate and rho that are schedules.
    """

    key: jax.Array
    momentum: optax.Params
    scale: optax.Params
    counts: tuple[optax.OptState, optax.OptState]


def bsam(
    learning_rate: optax.ScalarOrSchedule,
    data_size: jax.typing.ArrayLike,
    rho: optax.ScalarOrSchedule = 0.01,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    prior_precision: jax.typing.ArrayLike = 40.0,
    damping: jax.typing.ArrayLike = 0.1,
    scale: jax.typing.ArrayLike = 1.0,
    key: jax.Array | int = 0,
    axis_name: _axes.AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Bayesian SAM: the optimal relaxation of variational Bayes, Adam-like.

    An optimizer whose one vector s scales the noise, the perturbation and the
    step, and whose result is a posterior: w with precision data_size s, to be
    sampled for calibrated predictions. Prefer it to `sam` where uncertainty
    counts.

        n ~ N(0, 1),  g = grad L(w + n/sqrt(N s)),  g_s = grad L(w + rho g/s)
        m <- b1 m + (1 - b1) (g_s + delta w)
        updates = -learning_rate m/s
        s <- b2 s + (1 - b2) (sqrt(s) |g| + damping + delta)

    with N = data_size and delta = prior_precision/N; s is the old one
    throughout, and the noise is left out of the point of g_s.

    Args:
      learning_rate: number, traced scalar or schedule. Published: 0.5, for
        damping 0.1.
      data_size: number N of training examples, above 0, times the number of
        augmentations that count as independent (4 in the paper on CIFAR).
      rho: factor of the perturbation, at least 0: a number, a traced scalar or
        a schedule. Not a length: e is not normalised.
      b1: decay of the momentum m, in [0, 1).
      b2: decay of s, in [0, 1).
      prior_precision: of the Gaussian prior, at least 0; the weight decay.
      damping: added to s, at least 0.
      scale: s at the start, above 0.
      key: random key or seed of the noise; with `inject_hyperparams` name it in
        static_args.
      axis_name: mapped axis over whose groups g_s and sqrt(s) |g| are averaged,
        each group with its own noise (key folded with its index) and its own
        e, as the authors run 8 groups a batch.

    Returns:
      An optimizer: the updates are to be added to params. Its update needs
      params and grad_fn or value_fn, for the mean negative log-likelihood
      without weight decay. The gradient given is not used, only its structure.

    Raises:
      ValueError: if an argument is out of its range; at the call, if params or
        grad_fn are missing or grad_fn returns another structure.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.array([1.0, 9.0]) * w**2)
      >>> tx = sam_optax.bsam(0.05, data_size=1e4, b2=0.9, damping=0.01)
      >>> w = jnp.array([1.0, 1.0])
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     grads = jax.grad(loss_fn)(w)
      ...     updates, state = tx.update(grads, state, w, value_fn=loss_fn)
      ...     return optax.apply_updates(w, updates), state
      >>> for _ in range(100):
      ...     w, state = step(w, state)
      >>> print(loss_fn(w) < 0.01, state.scale[1] > state.scale[0])  # the sharp one is more certain
      True True

    References:
      Möllenhoff and Khan, `SAM as an Optimal Relaxation of Bayes
      <https://arxiv.org/abs/2210.01620>`_, 2022, algorithm 1; the authors' code.

    Note:
      Two gradient evaluations and two copies of the parameters. Loss scaling
      changes e and s: unscale in grad_fn. No bias correction, no warm-up, as
      in the authors' optimizer; their warm-up is in the learning rate.
    """
    for name, value in {"rho": rho, "prior_precision": prior_precision, "damping": damping}.items():
        _checks.at_least(name, value, 0.0)
    _checks.in_interval("b1", b1, "[0, 1)")
    _checks.in_interval("b2", b2, "[0, 1)")
    _checks.in_interval("data_size", data_size, "(0, inf)")
    _checks.in_interval("scale", scale, "(0, inf)")
    delta = prior_precision / data_size
    first, draw = _numerics.key_stream(key)

    def init(params: optax.Params) -> BSAMState:
        def wide(value: Any) -> optax.Params:
            def leaf(w: Any) -> jax.Array:
                zeros = jnp.zeros_like(w)
                if not _numerics.is_perturbable(w):
                    return zeros
                return jnp.full_like(_numerics.widened(zeros), value)

            return jax.tree.map(leaf, params)

        return BSAMState(
            key=first(),
            momentum=wide(0.0),
            scale=wide(scale),
            counts=(count_for(learning_rate), count_for(rho)),
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        grad_fn: GradFn | None = None,
        value_fn: Callable[[optax.Params], jax.Array] | None = None,
        descent_grad_fn: GradFn | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, BSAMState]:
        del extra_args
        ascend, descend = gradient_functions(updates, params, grad_fn, value_fn, descent_grad_fn)
        lr, lr_count = scheduled(learning_rate, state.counts[0])
        factor, rho_count = scheduled(rho, state.counts[1])
        next_key, (key,) = draw(state.key)
        s, wide = state.scale, _numerics.map_wide
        if axis_name is not None:
            # Noise, and so both points, then vary over the axis: the gradients are each group's.
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        noise = _numerics.random_normal(key, s)
        sample = wide(lambda w, n, s: w + n / jnp.sqrt(data_size * s), params, noise, s)
        g = ascend(sample)
        g_s = descend(wide(lambda w, g, s: w + factor * g / s, params, g, s))
        curvature = wide(lambda s, g: jnp.sqrt(s) * jnp.abs(g), s, g)
        if axis_name is not None:
            g_s, curvature = _axes.mean((g_s, curvature), axis_name)
        momentum = wide(
            lambda m, g, w: b1 * m + (1 - b1) * (g + delta * w), state.momentum, g_s, params
        )
        zeros = optax.tree.zeros_like(params)
        result = wide(lambda _, m, s: -lr * m / s, zeros, momentum, s)
        next_scale = wide(lambda s, h: b2 * s + (1 - b2) * (h + damping + delta), s, curvature)
        return result, BSAMState(next_key, momentum, next_scale, (lr_count, rho_count))

    return optax.GradientTransformationExtraArgs(init, update)
