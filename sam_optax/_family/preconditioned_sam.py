"""Preconditioned SAM (Singh et al., 2025): an ascent scaled like a step of Adam."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._rules import stateless, transformation
from sam_optax._sharing import kept_by, sharing
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization, Result


class SecondMomentState(NamedTuple):
    """The running mean of the squares of the gradients returned so far, in float32 or wider."""

    nu: optax.Updates


def keep_second_moment(b2: jax.typing.ArrayLike = 0.999) -> optax.GradientTransformationExtraArgs:
    r"""A descent that passes its gradient on and keeps Adam's second moment of what passed.

    For `precondition`. It is a copy of what Adam keeps, if it has Adam's b2.

        out = g_s;  v <- b2 v + (1 - b2) g_s^2

    Args:
      b2: decay of v, in [0, 1).

    Returns:
      A descent rule with state, a `SecondMomentState`; it chains with others.

    Raises:
      ValueError: if b2 is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> keep = sam_optax.keep_second_moment(0.5)
      >>> state = keep.init(jnp.zeros(1))
      >>> for g in (1.0, 3.0):
      ...     _, state = keep.update(jnp.array([g]), state)
      >>> print(state.nu)
      [4.75]

    References:
      As for `precondition`.

    Note:
      No gradient evaluation; one copy of the parameters in the state.
    """
    _checks.in_interval("b2", b2, "[0, 1)")

    def empty(w: Any) -> Any:
        if not _numerics.is_perturbable(w):
            return jnp.zeros_like(w)
        return jnp.zeros_like(w, jnp.promote_types(jnp.finfo(w.dtype).dtype, jnp.float32))

    def update(updates: optax.Updates, state: Any, params: Any = None, **_: Any) -> Result:
        square = lambda v, g: b2 * v + (1 - b2) * _numerics.abs_square(g)
        new = _numerics.map_wide(square, state.nu, updates)
        return updates, SecondMomentState(_numerics.keep_if_nonfinite(updates, new, state.nu))

    return transformation(lambda params: SecondMomentState(jax.tree.map(empty, params)), update)


def precondition(eps: jax.typing.ArrayLike = 1e-8) -> optax.GradientTransformationExtraArgs:
    r"""A filter that divides by the root of the second moment that Adam keeps.

    After an ascent it scales the perturbation as Adam scales a step, as
    `preconditioned_sam` does; before `dual_ascent` the length stays rho.

        out = d/(sqrt(v) + eps);  d itself in entries where v is 0

    Args:
      eps: added to the root, at least 0.

    Returns:
      A filter without state, for a chain before or after an ascent. It reads v
      from `keep_second_moment` among the descents, or, within `sharing`, from
      the optimizer (the `nu` of Adam, AdamW and their like, without its bias
      correction).

    Raises:
      ValueError: if eps is negative; at the call, if no second moment is kept,
        or several.

    Example:
      >>> import jax.numpy as jnp, optax, sam_optax
      >>> ascent = optax.chain(sam_optax.dual_ascent(rho=0.5), sam_optax.precondition())
      >>> tx = sam_optax.sharpness_aware(ascent, sam_optax.keep_second_moment(0.0))
      >>> w, loss_fn = jnp.array([3.0, 4.0]), lambda w: jnp.sum(w**2) / 2
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     out, state = tx.update(w, state, w, value_fn=loss_fn)
      ...     print(out.round(2))  # the second: [3, 4] + [.3, .4]/[3.3, 4.4]
      [3.3 4.4]
      [3.09 4.09]

    References:
      Singh et al., `Avoiding spurious sharpness minimization broadens
      applicability of SAM <https://arxiv.org/abs/2502.02407>`_, 2025.

    Note:
      No gradient evaluation.
    """
    _checks.at_least("eps", eps, 0.0)

    def scale(d: jax.Array, v: jax.Array) -> jax.Array:
        unknown = v == 0  # nothing to divide by yet
        return jnp.where(unknown, d, d / (jnp.sqrt(jnp.where(unknown, 1, v)) + eps))

    def scaled(
        updates: optax.Updates, descent_state: Any = None, base_state: Any = None
    ) -> optax.Updates:
        states = {"descent": descent_state, "base": base_state}
        return _numerics.map_wide(scale, updates, kept_by(("nu",), states, updates))

    return stateless(scaled)


def preconditioned_sam(
    rho: optax.ScalarOrSchedule = 0.001,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditioned SAM: SAM's perturbation, scaled as Adam scales a step.

    Perturbs weights with small gradients more. Reported to help language models
    where SAM hurts. Give it the b2 of the Adam that follows;
    `shared_preconditioned_sam` reads that one instead.

        e = (rho/||g||) g/(sqrt(v) + eps), without the divisor in the first step;
        out = g_s;  then v <- b2 v + (1 - b2) g_s^2

    Args:
      rho: radius before the scaling, at least 0: a number, a traced scalar or a
        schedule. The length of e is about rho/||g|| times the root of the
        number of parameters, so rho wants to be far below SAM's.
      b2: decay of v, in [0, 1).
      eps: added to the root, at least 0.
      p: order of the norm before the scaling, see `dual_ascent`.
      normalization: operator T of the ascent before the scaling, such as
        `elementwise()`, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if rho or eps is negative or b2 outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2) / 2
      >>> tx, w = sam_optax.preconditioned_sam(rho=0.5, b2=0.0), jnp.array([3.0, 4.0])
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     out, state = tx.update(w, state, w, value_fn=loss_fn)
      ...     print(out.round(2))
      [3.3 4.4]
      [3.09 4.09]

    References:
      Singh et al., `Avoiding spurious sharpness minimization broadens
      applicability of SAM <https://arxiv.org/abs/2502.02407>`_, 2025. No code of
      the authors was found. The norm, that of g and not of the scaled g, and v
      without bias correction are those of a reimplementation by others; a second
      one agrees on the norm, and corrects v in a way of its own.

    Note:
      Two gradient evaluations; one copy of the parameters in the state. A weight
      whose v is tiny moves far: a schedule that starts rho at 0 spares the first
      steps. Not invariant to the scale of the loss.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(optax.chain(ascent, precondition(eps)), keep_second_moment(b2))


def shared_preconditioned_sam(
    base: optax.GradientTransformation,
    rho: optax.ScalarOrSchedule = 0.001,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditioned SAM that reads the second moment of the optimizer: no copy of it.

    Prefer it to `preconditioned_sam` where Adam stands right after; the numbers
    are the same.

        e = (rho/||g||) g/(sqrt(v) + eps);  updates = base(grad L(w + e)),
        v: the second moment in the state of base before this step

    Args:
      base: the base optimizer, its learning rate included, with one second
        moment, a field `nu`, in its state: Adam, AdamW and their like.
      rho: radius before the scaling, at least 0: a number, a traced scalar or a
        schedule, see `preconditioned_sam`.
      eps: added to the root, at least 0.
      p: order of the norm before the scaling, see `dual_ascent`.
      normalization: operator T of the ascent before the scaling, such as
        `elementwise()`, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      An optimizer: the updates are to be added to params. Its update needs
      params and grad_fn or value_fn.

    Raises:
      ValueError: if rho or eps is negative; at the call, if the state of base
        holds no second moment or several.

    Example:
      >>> import jax.numpy as jnp, optax, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2) / 2
      >>> tx = sam_optax.shared_preconditioned_sam(optax.adam(0.1), rho=0.001)
      >>> w = jnp.array([3.0, 4.0])
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(w, state, w, value_fn=loss_fn)
      ...     print(updates.round(3))
      [-0.1 -0.1]
      [-0.1 -0.1]

    References:
      As for `preconditioned_sam`.

    Note:
      Two gradient evaluations, and no state beside that of base.
    """
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharing(sharpness_aware(optax.chain(ascent, precondition(eps))), base)
