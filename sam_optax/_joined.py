"""Two ascents as one: their sum, or one after the other."""

from typing import Any

import jax
import optax

from sam_optax import _checks, _numerics
from sam_optax._rules import rule, transformation
from sam_optax._types import GradFn, Result


def sum_of(
    first: optax.GradientTransformation,
    second: optax.GradientTransformation,
    weight: jax.typing.ArrayLike = 1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""The sum of two perturbations of one direction.

    Use it between two ascents: `unified_sam` is a sum of `proportional_ascent`
    and `dual_ascent`, `sagm` a difference of them.

        e = first(d) + weight second(d)

    Args:
      first: an ascent rule.
      second: an ascent rule.
      weight: of the second, any number; -1 takes it away.

    Returns:
      An ascent rule whose state is that of both.

    Raises:
      ValueError: if weight is no number; at the call, as the rules.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> between = sam_optax.sum_of(
      ...     sam_optax.dual_ascent(rho=0.5), sam_optax.proportional_ascent(rho=0.1))
      >>> d = jnp.array([3.0, 4.0])
      >>> print(between.update(d, between.init(d))[0])
      [0.6 0.8]

    References:
      Oikonomou and Loizou, `Sharpness-Aware Minimization: General Analysis and
      Improved Rates <https://arxiv.org/abs/2503.02225>`_, 2025.

    Note:
      The gradient evaluations of both, none for rules that take none.
    """
    first, second = rule(first), rule(second)
    _checks.in_interval("weight", weight, "(-inf, inf)")

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        one, first_state = first.update(updates, state[0], params, **extra_args)
        other, second_state = second.update(updates, state[1], params, **extra_args)
        both = _numerics.map_wide(lambda a, b: a + weight * b, one, other)
        return both, (first_state, second_state)

    return transformation(lambda params: (first.init(params), second.init(params)), update)


def in_turn(
    first: optax.GradientTransformation, second: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Two ascents one after the other: the second along the gradient where the first ended.

    Use it to ascend from a random point nearby, as `tilted_sam` and R-SAM do;
    `multi_step` repeats one ascent.

        e = e1 + second(grad L(w + e1)),  e1 = first(d)

    Args:
      first: an ascent rule.
      second: an ascent rule; params, for its normalization, are those at w + e1.

    Returns:
      An ascent rule whose state is that of both.

    Raises:
      ValueError: at the call, without grad_fn.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> climb = sam_optax.in_turn(
      ...     sam_optax.proportional_ascent(rho=0.5), sam_optax.dual_ascent(rho=1.0))
      >>> w = jnp.array([3.0, 4.0])
      >>> print(climb.update(w, climb.init(w), w, grad_fn=lambda w: 2 * w)[0])
      [2.1 2.8]

    References:
      Li et al., `Tilted Sharpness-Aware Minimization
      <https://arxiv.org/abs/2410.22656>`_, 2024; Liu et al., `Random
      Sharpness-Aware Minimization` (R-SAM), NeurIPS 2022.

    Note:
      One gradient evaluation, and those of the rules.
    """
    first, second = rule(first), rule(second)

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_fn: GradFn, **given: Any
    ) -> Result:
        given["grad_fn"] = grad_fn
        start, first_state = first.update(updates, state[0], params, **given)
        here = optax.apply_updates(params, start)
        move, second_state = second.update(grad_fn(here), state[1], here, **given)
        return optax.apply_updates(start, move), (first_state, second_state)

    return transformation(lambda params: (first.init(params), second.init(params)), update)
