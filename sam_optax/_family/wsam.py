"""WSAM (Yue et al., 2023): sharpness with a weight of its own, coupled and decoupled."""

from typing import Any, NamedTuple

import jax
import optax

from sam_optax import _checks, _descent, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._gradients import gradient_functions
from sam_optax._rules import stateless
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


class DecoupledWSAMState(NamedTuple):
    """State of `decoupled_wsam`.

    Attributes:
      base: state of the base optimizer.
      sharpness: state of the sharpness term: counts of schedules, if any.
    """

    base: optax.OptState
    sharpness: optax.OptState


def wsam(
    rho: optax.ScalarOrSchedule = 0.05,
    gamma: float | jax.Array = 0.9,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted SAM, coupled: sharpness as a regulariser with a weight of its own.

    Extrapolates beyond SAM's gradient for gamma above 1/2, which is SAM. Clip
    after it: at gamma = 0.9 the gradients enter with weights 9 and -8.

        out = g + gamma/(1 - gamma) (g_s - g),  e = rho g/||g||

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule.
      gamma: weight of sharpness, in [0, 1): 0 is the base optimizer. The
        authors use 0.8 to 0.95.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho is negative or gamma outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(w**2), jnp.array([3.0, 4.0])
      >>> for gamma in (0.0, 0.5, 0.9):
      ...     print(sam_optax.grad(loss_fn, sam_optax.wsam(0.05, gamma))(w).round(2))
      [6. 8.]
      [6.06 8.08]
      [6.54 8.72]

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as
      a Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023,
      algorithm 1. The authors' code defaults to the decoupled form, which is
      `decoupled_wsam`.

    Note:
      Two gradient evaluations and one copy of the parameters; with
      descent_grad_fn one evaluation more, since g and g_s then both come from it.
    """
    _checks.in_interval("gamma", gamma, "[0, 1)")
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(ascent, _descent.extrapolate(gamma / (1 - gamma)))


def decoupled_wsam(
    base: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    rho: optax.ScalarOrSchedule = 0.05,
    gamma: jax.typing.ArrayLike = 0.9,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Weighted SAM, decoupled: sharpness descends beside the base optimizer.

    The base optimizer sees the clean gradient alone; the difference that
    sharpness makes is stepped along by the learning rate, without momentum or
    preconditioning, as weight decay is in AdamW. Prefer it to `wsam` with
    adaptive base optimizers, whose moments then stay those of the loss.

        updates = base(g) - lr gamma/(1 - gamma) (g_s - g)

    Args:
      base: the base optimizer, its learning rate included.
      learning_rate: lr, a number, a traced scalar or a schedule: the one that
        base has.
      rho: radius of SAM's step, at least 0: a number, a traced scalar or a
        schedule.
      gamma: weight of sharpness, in [0, 1); 0 is the base optimizer.
        Published: 0.8 to 0.95.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      An optimizer: the updates are to be added to params. Its update needs
      params and grad_fn or value_fn.

    Raises:
      ValueError: if rho is negative or gamma is outside [0, 1); at the call,
        if params or grad_fn are missing.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> w = jnp.array([3.0, 4.0])
      >>> for gamma in (0.0, 0.5, 0.9):
      ...     tx = sam_optax.decoupled_wsam(optax.adam(0.1), 0.1, rho=0.05, gamma=gamma)
      ...     updates, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w, value_fn=loss_fn)
      ...     print(np.array(updates).round(3))
      [-0.1 -0.1]
      [-0.106 -0.108]
      [-0.154 -0.172]

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as
      a Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023; the
      authors' code, where this form is the default.

    Note:
      Two gradient evaluations and the state of the base optimizer; with
      descent_grad_fn one more, since g and g_s in the equation then both come
      from it. The authors can also clip g and g_s, each by itself: a clip in base
      reaches g alone.
    """
    _checks.in_interval("gamma", gamma, "[0, 1)")

    def difference(perturbed: optax.Updates, *, own: optax.Updates) -> optax.Updates:
        # The links that follow are Optax's, which do not take float0.
        return _numerics.map_wide(lambda g_s, g: g_s - g, _numerics.movable(perturbed), own)

    base = optax.with_extra_args_support(base)
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    sharpness = optax.chain(
        sharpness_aware(ascent, stateless(difference)),
        optax.scale(gamma / (1 - gamma)),
        optax.scale_by_learning_rate(learning_rate),
    )

    def init(params: optax.Params) -> DecoupledWSAMState:
        return DecoupledWSAMState(base.init(params), sharpness.init(params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DecoupledWSAMState]:
        functions = {k: extra_args.get(k) for k in ("grad_fn", "value_fn", "descent_grad_fn")}
        _, descend = gradient_functions(updates, params, **functions)
        # Base sees the loss that is descended, of which the difference is taken.
        own = updates if functions["descent_grad_fn"] is None else descend(params)
        term, term_state = sharpness.update(updates, state.sharpness, params, own=own, **extra_args)
        step, base_state = base.update(_numerics.movable(own), state.base, params, **extra_args)
        both = _numerics.map_wide(lambda a, b: a + b, step, term)
        return both, DecoupledWSAMState(base_state, term_state)

    return optax.GradientTransformationExtraArgs(init, update)
