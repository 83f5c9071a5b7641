"""A method that reads the memory of the optimizer after it."""

from typing import Any, NamedTuple

import jax
import optax

from sam_optax import _checks, _numerics


class SharingState(NamedTuple):
    """State of `sharing`.

    Attributes:
      method: state of the method.
      base: state of the base optimizer, which the method's rules read.
    """

    method: optax.OptState
    base: optax.OptState


def sharing(
    method: optax.GradientTransformation, base: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""A method before its optimizer, whose rules see the optimizer's memory.

    Saves a copy of what an optimizer keeps anyway: its momentum, for
    `along_momentum`, or Adam's second moment, for `precondition`. Otherwise it
    is `optax.chain(method, base)`.

        updates = base(method(g)),  base_state: the state of base before this step

    Args:
      method: any method. Its rules get base_state among the extra arguments.
      base: the base optimizer, its learning rate included.

    Returns:
      An optimizer: the updates are to be added to params. Its update needs what
      that of the method needs.

    Raises:
      ValueError: at the call, as the method: its rules say what they look for
        in the state of base.

    Example:
      >>> import jax.numpy as jnp, optax, sam_optax
      >>> ascent = optax.chain(sam_optax.along_momentum(), sam_optax.dual_ascent(rho=0.5))
      >>> base = optax.sgd(1.0, momentum=0.9)
      >>> tx = sam_optax.sharing(sam_optax.sharpness_aware(ascent), base)
      >>> w, loss_fn = jnp.array([3.0, 4.0]), lambda w: jnp.sum(w**2) / 2
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     updates, state = tx.update(w, state, w, value_fn=loss_fn)
      ...     print(updates.round(2))  # the second: -(0.9 [3, 4] + [2.7, 3.6])
      [-3. -4.]
      [-5.4 -7.2]

    References:
      Becker et al., `Momentum-SAM: Sharpness Aware Minimization without
      Computational Overhead <https://arxiv.org/abs/2401.12033>`_, 2024.

    Note:
      The gradients of the method, and no memory of its own.
    """
    _checks.is_transform("method", method)
    _checks.is_transform("base", base)
    method, base = map(optax.with_extra_args_support, (method, base))

    def init(params: optax.Params) -> SharingState:
        return SharingState(method.init(params), base.init(params))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, SharingState]:
        gradient, method_state = method.update(
            updates, state.method, params, base_state=state.base, **extra_args
        )
        gradient = _numerics.movable(gradient)
        result, base_state = base.update(gradient, state.base, params, **extra_args)
        # Optax would make a float of the momentum of an integer leaf.
        kept = lambda old, new: new if new.dtype == old.dtype else new.astype(old.dtype)
        return result, SharingState(method_state, jax.tree.map(kept, state.base, base_state))

    return optax.GradientTransformationExtraArgs(init, update)


def kept_by(fields: tuple[str, ...], states: dict[str, Any], like: Any) -> Any:
    """The one memory like a tree that the states hold in a field of one of these names.

    The first of the states that has such a field decides; they are named for the error.
    """

    def names(node: Any) -> list[str]:
        return [name for name in fields if name in getattr(node, "_fields", ())]

    def of(state: Any) -> list[Any]:
        nodes = jax.tree.leaves(state, is_leaf=lambda node: bool(names(node)))
        return [getattr(node, name) for node in nodes for name in names(node)]

    found = next(filter(None, map(of, states.values())), [])
    structures = [jax.tree.structure(memory) for memory in found]
    if structures != [jax.tree.structure(like)]:
        raise ValueError(
            f"{' or '.join(states)} must hold one memory of the structure of params in a field "
            f"{', '.join(fields)} for the ascent to read, got {len(found)} of structures "
            f"{structures}"
        )
    return found[0]
