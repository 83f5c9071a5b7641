"""Momentum-SAM (2024): perturbs against the momentum."""

from typing import Any, NamedTuple

import jax
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._rules import transformation, turned
from sam_optax._sharing import kept_by, sharing
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


class MomentumState(NamedTuple):
    """The momentum of the gradients returned so far; zero at first."""

    momentum: optax.Updates


def along_momentum() -> optax.GradientTransformationExtraArgs:
    r"""A filter that hands on the opposite of the momentum that the descent keeps.

    The direction in which momentum will carry the parameters anyway, at no
    gradient: put it before an ascent, and `keep_momentum` among the descents,
    or `sharing` around method and optimizer, whose own momentum it then is: the
    `trace` of SGD, the `mu` of Adam or Lion.

        out = -v

    Returns:
      A filter without state, for a chain before an ascent.

    Raises:
      ValueError: at the call, if no momentum is kept, or several.

    Example:
      >>> import jax.numpy as jnp, optax, sam_optax
      >>> ascent = optax.chain(sam_optax.along_momentum(), sam_optax.dual_ascent(rho=0.5))
      >>> tx = sam_optax.sharpness_aware(ascent, sam_optax.keep_momentum(0.9))
      >>> w, loss_fn = jnp.array([3.0, 4.0]), lambda w: jnp.sum(w**2) / 2
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     out, state = tx.update(w, state, w, value_fn=loss_fn)
      ...     print(out)
      [3. 4.]
      [2.7 3.6]

    References:
      `Momentum-SAM: Sharpness Aware Minimization without Computational Overhead
      <https://arxiv.org/abs/2401.12033>`_, 2024.

    Note:
      No gradient evaluation; the gradient given is not looked at.
    """

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        descent_state: Any = None,
        base_state: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        states = {"descent": descent_state, "base": base_state}
        momentum = kept_by(("momentum", "trace", "mu"), states, updates)
        return _numerics.map_wide(lambda g, v: -v, updates, momentum), state

    return transformation(lambda params: optax.EmptyState(), update)


def keep_momentum(momentum: jax.typing.ArrayLike = 0.9) -> optax.GradientTransformationExtraArgs:
    r"""A descent that passes its gradient on and keeps the momentum of what passed.

    For `along_momentum`. It is a copy of the momentum that the optimizer keeps:
    give it the optimizer's decay.

        out = g_s;  v <- momentum v + g_s

    Args:
      momentum: decay of v, in [0, 1).

    Returns:
      A descent rule with state, a `MomentumState`; it chains with others.

    Raises:
      ValueError: if momentum is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> keep = sam_optax.keep_momentum(0.5)
      >>> state = keep.init(jnp.zeros(1))
      >>> for g in (1.0, 3.0):
      ...     _, state = keep.update(jnp.array([g]), state)
      >>> print(state.momentum)
      [3.5]

    References:
      As for `along_momentum`.

    Note:
      No gradient evaluation; one copy of the parameters in the state.
    """
    _checks.in_interval("momentum", momentum, "[0, 1)")

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, MomentumState]:
        del params, extra_args
        new = _numerics.map_wide(lambda v, g: momentum * v + g, state.momentum, updates)
        kept = _numerics.keep_if_nonfinite(updates, new, state.momentum, by_norm=True)
        return updates, MomentumState(kept)

    return transformation(lambda params: MomentumState(optax.tree.zeros_like(params)), update)


def momentum_sam(
    rho: optax.ScalarOrSchedule = 0.3,
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: perturbs against the momentum, for the price of one gradient.

    Use it where two gradients are too much; give it the momentum of the
    optimizer that follows. `shared_momentum_sam` reads that one instead.

        e = -rho v/||v||, 0 in the first step;  out = g_s;  then v <- momentum v + g_s

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule. Wants
        more than SAM: 0.3 to 3 with SGD, 1 with AdamW.
      momentum: decay of v, in [0, 1).
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

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
      to v: L2 in the loss is that; `optax.add_decayed_weights` after this link
      acts at params.

    Note:
      One gradient evaluation: inside jit the gradients given are unused and
      never computed, but a loss that is logged at params still costs its
      forward pass. One copy of the parameters in the state, and passes over it,
      which count where a gradient is cheap.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(_before(ascent), keep_momentum(momentum))


def shared_momentum_sam(
    base: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.3,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM that reads the momentum of the optimizer: no second copy of it.

    Prefer it to `momentum_sam` where the optimizer has a momentum and stands
    right after; the numbers are the same to rounding.

        e = -rho v/||v||, 0 in the first step;  updates = base(grad L(w + e)),
        v: the momentum in the state of base before this step

    Args:
      base: the base optimizer, its learning rate included, with one momentum in
        its state: the `trace` of SGD, the `mu` of Adam, AdamW or Lion. Adam's is
        an average, (1 - b1) times a sum with its own b1, and as the norm is
        divided out only the direction counts. What stands before the momentum
        in base, such as decay or clipping, is part of v.
      rho: radius, at least 0: a number, a traced scalar or a schedule. Wants
        more than SAM: 0.3 to 3 with SGD, 1 with AdamW.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      An optimizer: the updates are to be added to params. Its update needs
      params and grad_fn or value_fn; the gradient given serves its structure
      alone. Evaluate the model at params, the unperturbed ones.

    Raises:
      ValueError: if rho is negative; at the call, if the state of base holds no
        momentum or several, or if params or grad_fn are missing.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np, optax, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> tx = sam_optax.shared_momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.5)
      >>> w = jnp.array([3.0, 4.0])
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jax.grad(loss_fn)(w), state, w, value_fn=loss_fn)
      ...     print(np.array(updates).round(2))  # the second: -0.1 (0.9 [6, 8] + 2 [2.7, 3.6])
      [-0.6 -0.8]
      [-1.08 -1.44]

    References:
      Becker et al., `Momentum-SAM: Sharpness Aware Minimization without
      Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024,
      algorithm 1.

    Note:
      One gradient evaluation, no state beside that of base, and one pass over
      the momentum. A momentum that is not finite stays so, as it does in base.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharing(sharpness_aware(_before(ascent)), base)


def _before(ascent: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`along_momentum` before an ascent that is odd; the same to the bit, with a pass less.

    Of -v XLA makes a copy, to take the norm of. The sign of v leaves it alone,
    and that of e is part of w + e.
    """
    return optax.chain(turned(along_momentum()), turned(ascent))
