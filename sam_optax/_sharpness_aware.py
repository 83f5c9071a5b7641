"""The one generic method: ascend, take the gradient there, descend.

Every named method is `sharpness_aware` over an ascent rule (gradient to
perturbation), a descent rule (perturbed gradient to what the base optimizer
sees) and a cadence (whether to pay for the perturbed gradient at this step).
All three are Optax transformations with their own state.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._types import GradFn, When, transformation


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware`: the states of its parts.

    Attributes:
      cadence: memory of `when`: the count of steps if it is a function, empty
        without a cadence.
      ascent: memory of the ascent rule.
      descent: memory of the descent rule, which `otherwise` shares.
    """

    cadence: optax.OptState
    ascent: optax.OptState
    descent: optax.OptState


class CadenceState(NamedTuple):
    """Count of steps seen by a cadence that is a function of it."""

    count: jax.typing.ArrayLike


def sharpness_aware(
    ascent: optax.GradientTransformation,
    descent: optax.GradientTransformation | None = None,
    *,
    when: When | None = None,
    otherwise: optax.GradientTransformation | None = None,
    second_order: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns a gradient into the gradient at a perturbed point.

    The whole family in three lines; use it to write a method that has no name
    here, and `sam` or `asam` otherwise:

        e    = ascent(g)              g = grad L(w), the updates given
        g_s  = grad L(w + e)
        out  = descent(g_s)           with g and e at hand

    Args:
      ascent: turns the gradient into the perturbation e. It gets grad_fn and
        all extra arguments.
      descent: turns g_s into the result; the identity by default. It gets, as
        extra arguments, clean (g), perturbation (e), grad_fn and the rest.
      when: cadence, whether to pay for g_s at this step: a function of the
        step count to a boolean, or a transformation whose update returns a
        boolean (with memory: a key, running statistics). By default always.
        A step that does not pay does not compute g_s (`jax.lax.cond`); the
        ascent still sees its gradient, so that averages and schedules go on.
      otherwise: used in place of descent on the steps that do not pay: it
        gets g as updates and shares the memory of descent (its own init is
        never called). The clean gradient by default.
      second_order: keeps the term that SAM drops, the derivative of e with
        respect to w: out = descent(g_s + (de/dw)^T g_s). The ascent is then
        differentiated at grad_fn(params) and the updates given serve only as
        clean. Costs about two more gradient evaluations.

    Returns:
      A transformation. Its update needs params and one of two extra arguments:
      grad_fn, a function from params to gradients with the structure of
      params, or value_fn, a function from params to a scalar loss. Optional
      is descent_grad_fn, which replaces grad_fn at w + e (other examples, or
      another precision, than the ascent's). All other extra arguments reach
      ascent and descent and stay available to the rest of a chain. The result
      has the structure of the gradient.

    Raises:
      ValueError: at the call, if params or both of grad_fn and value_fn are
        missing, or grad_fn returns another structure than the updates.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> usual = sam_optax.sharpness_aware(sam_optax.dual_ascent(rho=0.05))
      >>> early = sam_optax.sharpness_aware(  # plain gradients for 1000 steps
      ...     sam_optax.dual_ascent(rho=0.05), when=lambda count: count >= 1000)
      >>> loss_fn = lambda w: jnp.sum(w**4)
      >>> w = jnp.array([1.0, 0.0])
      >>> for tx in (usual, early):
      ...     out, _ = tx.update(jax.grad(loss_fn)(w), tx.init(w), w, value_fn=loss_fn)
      ...     print(out.round(2))
      [4.63 0.  ]
      [4. 0.]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.

    Note:
      Two gradient evaluations a step, one of them the caller's; extra memory
      of one copy of the parameters, the perturbed ones, while g_s is computed.
      With a cadence, convolutions on a CPU are slow: inside of `jax.lax.cond`
      XLA compiles their gradients some ten times slower there.
    """
    ascent = optax.with_extra_args_support(ascent)
    descent = optax.with_extra_args_support(descent or optax.identity())
    otherwise = optax.with_extra_args_support(otherwise or optax.identity())
    cadence = None if when is None else cadence_of(when)

    def init(params: optax.Params) -> SharpnessAwareState:
        return SharpnessAwareState(
            cadence=cadence.init(params) if cadence else optax.EmptyState(),
            ascent=ascent.init(params),
            descent=descent.init(params),
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
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        _checks.given("params", params, "the gradient is taken at a perturbed copy of them")
        grad_fn = checked(grad_fn or gradient_of(value_fn), updates)
        perturbed_grad_fn = checked(descent_grad_fn, updates) if descent_grad_fn else grad_fn
        extra_args |= {"grad_fn": grad_fn, "value_fn": value_fn}

        def ascend(
            gradient: optax.Updates, params: optax.Params
        ) -> tuple[optax.Updates, optax.OptState]:
            return ascent.update(gradient, state.ascent, params, **extra_args)

        def aware() -> tuple[optax.Updates, optax.OptState, optax.OptState]:
            if second_order:
                perturbation, chain_rule, memory = jax.vjp(
                    lambda w: ascend(grad_fn(w), w), params, has_aux=True
                )
                perturbed = perturbed_grad_fn(optax.apply_updates(params, perturbation))
                (term,) = chain_rule(_numerics.conjugate(perturbed))
                perturbed = optax.apply_updates(perturbed, _numerics.conjugate(term))
            else:
                perturbation, memory = ascend(updates, params)
                perturbed = perturbed_grad_fn(optax.apply_updates(params, perturbation))
            given = {"clean": updates, "perturbation": perturbation}
            result, descent_memory = descent.update(
                perturbed, state.descent, params, **extra_args, **given
            )
            return result, memory, descent_memory

        def plain() -> tuple[optax.Updates, optax.OptState, optax.OptState]:
            # The perturbation is unused, so the compiler drops its cost.
            _, memory = ascend(updates, params)
            result, descent_memory = otherwise.update(
                updates, state.descent, params, **extra_args, clean=updates
            )
            return result, memory, descent_memory

        if cadence is None:
            result, memory, descent_memory = aware()
            return result, SharpnessAwareState(state.cadence, memory, descent_memory)
        pay, cadence_memory = cadence.update(updates, state.cadence, params, **extra_args)
        result, memory, descent_memory = jax.lax.cond(
            pay, in_one_dtype(aware, updates, params), in_one_dtype(plain, updates, params)
        )
        return result, SharpnessAwareState(cadence_memory, memory, descent_memory)

    return transformation(init, update)


def cadence_of(when: When) -> optax.GradientTransformationExtraArgs:
    """A cadence as a transformation from a gradient to a boolean."""
    if isinstance(when, optax.GradientTransformation):
        return optax.with_extra_args_support(when)

    def init(params: optax.Params) -> CadenceState:
        del params
        return CadenceState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, CadenceState]:
        del updates, params, extra_args
        return jnp.asarray(when(state.count)), CadenceState(optax.safe_increment(state.count))

    return transformation(init, update)


def gradient_of(value_fn: Callable[[optax.Params], jax.Array] | None) -> GradFn | None:
    if value_fn is None:
        return None
    return lambda params: _numerics.conjugate(jax.grad(value_fn)(params))


def checked(grad_fn: GradFn | None, updates: optax.Updates) -> GradFn:
    """The gradient function, with its result checked against the gradient given."""
    _checks.given("grad_fn or value_fn", grad_fn, "it evaluates the perturbed gradient")
    assert grad_fn is not None

    def checked_gradient(params: optax.Params) -> optax.Updates:
        gradient = grad_fn(params)
        _checks.same_structure("the result of grad_fn", gradient, updates)
        return gradient

    return checked_gradient


def in_one_dtype(
    branch: Callable[[], tuple[Any, ...]], updates: optax.Updates, params: optax.Params
) -> Callable[[], tuple[Any, ...]]:
    """Both branches of a cond must agree, though the clean gradient may be of lower precision."""

    def leaf_cast(result: Any, update: Any, param: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(result), jnp.inexact):
            return result
        return jnp.asarray(result, jnp.promote_types(update.dtype, param.dtype))

    def cast() -> tuple[Any, ...]:
        result, *memories = branch()
        return jax.tree.map(leaf_cast, result, updates, params), *memories

    return cast
