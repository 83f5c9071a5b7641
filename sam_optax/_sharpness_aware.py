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

from sam_optax import _numerics
from sam_optax._cadence import cadence_of, choose
from sam_optax._gradients import gradient_functions
from sam_optax._rules import rule, transformation
from sam_optax._types import GradFn, When


class SharpnessAwareState(NamedTuple):
    """State of `sharpness_aware`: the states of its parts.

    Attributes:
      cadence: memory of `when`, None without a cadence.
      ascent: memory of the ascent rule.
      descent: memory of the descent rule, which `otherwise` shares.
    """

    cadence: optax.OptState | None
    ascent: optax.OptState
    descent: optax.OptState


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
      ascent: turns the gradient into the perturbation e. It gets grad_fn, all
        extra arguments, and descent_state, the memory of the descent.
      descent: turns g_s into the result; the identity by default. It gets, as
        extra arguments, clean (g), perturbation (e), grad_fn, here the function
        that g_s came from, descent_grad_fn (None unless given, and then clean
        came from another function than g_s) and the rest.
      when: cadence, whether to pay for g_s at this step: `every`, `from_step`,
        `with_probability`, `when_large`, a function of the step count to a
        boolean, or a transformation whose update returns one. By default always.
        A step that does not pay does not compute g_s; the ascent still sees its
        gradient, so that averages and schedules go on.
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
      another precision, than the ascent's), and with a cadence pay, a boolean
      known when the step is traced, which decides in its place (see
      `sam_optax.pays`). All other extra arguments reach ascent and descent and
      stay available to the rest of a chain. The result has the structure of the
      gradient.

    Raises:
      ValueError: at the call, if params, both of grad_fn and value_fn, or an
        argument that a rule requires are missing, if pay is no boolean, or if
        grad_fn takes more than params, returns another structure than the
        updates, or fails where optax.masked hides parameters.

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
      With a cadence and without pay, convolutions on a CPU are slow: inside of
      `jax.lax.cond` XLA compiles their gradients some ten times slower there.
    """
    ascent = rule(ascent)
    descent = rule(descent or optax.identity())
    otherwise = rule(otherwise or optax.identity())
    cadence = None if when is None else cadence_of(when)

    def init(params: optax.Params) -> SharpnessAwareState:
        return SharpnessAwareState(
            cadence=cadence.init(params) if cadence else None,
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
        ascent_grad_fn, perturbed_grad_fn = gradient_functions(
            updates, params, grad_fn, value_fn, descent_grad_fn
        )
        to_ascent = extra_args | {
            "grad_fn": ascent_grad_fn,
            "value_fn": value_fn,
            "descent_state": state.descent,
        }
        # All that a descent rule computes with g_s comes from the function that gave g_s.
        to_descent = to_ascent | {
            "grad_fn": perturbed_grad_fn,
            "descent_grad_fn": perturbed_grad_fn if descent_grad_fn else None,
            "clean": updates,
        }

        def ascend(
            gradient: optax.Updates, params: optax.Params
        ) -> tuple[optax.Updates, optax.OptState]:
            return ascent.update(gradient, state.ascent, params, **to_ascent)

        def aware() -> tuple[optax.Updates, optax.OptState, optax.OptState]:
            if second_order:
                part, replaced = _numerics.perturbable_part(params)

                def ascend_from(part: list[Any]) -> Any:
                    w = replaced(part)
                    perturbation, memory = ascend(ascent_grad_fn(w), w)
                    return _numerics.perturbable_part(perturbation)[0], (perturbation, memory)

                moves, chain_rule, (perturbation, memory) = jax.vjp(ascend_from, part, has_aux=True)
                perturbed = perturbed_grad_fn(optax.apply_updates(params, perturbation))
                ends, completed = _numerics.perturbable_part(perturbed)
                along = [g.astype(e.dtype) for g, e in zip(ends, moves, strict=True)]
                (term,) = chain_rule(_numerics.conjugate(along))
                perturbed = completed(_numerics.map_wide(jnp.add, ends, _numerics.conjugate(term)))
            else:
                perturbation, memory = ascend(updates, params)
                perturbed = perturbed_grad_fn(optax.apply_updates(params, perturbation))
            result, descent_memory = descent.update(
                perturbed, state.descent, params, **to_descent, perturbation=perturbation
            )
            return result, memory, descent_memory

        def plain() -> tuple[optax.Updates, optax.OptState, optax.OptState]:
            # The perturbation is unused, so the compiler drops its cost.
            _, memory = ascend(updates, params)
            result, descent_memory = otherwise.update(updates, state.descent, params, **to_descent)
            return result, memory, descent_memory

        if cadence is None:
            result, memory, descent_memory = aware()
            return result, SharpnessAwareState(state.cadence, memory, descent_memory)
        pay, cadence_memory = cadence.update(updates, state.cadence, params, **to_ascent)
        result, memory, descent_memory = choose(pay, aware, plain, updates, params, descent_grad_fn)
        return result, SharpnessAwareState(cadence_memory, memory, descent_memory)

    return transformation(init, update)
