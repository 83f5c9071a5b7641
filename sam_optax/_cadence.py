"""Cadences: which steps pay for the perturbed gradient.

A cadence is an Optax transformation from a gradient to a boolean. It stands in
`sharpness_aware(when=...)`, where the ascent's memory runs on at the steps that
are not paid for, or in `cadenced` around a whole method, which then stands
still. Both decide by one `jax.lax.cond`, or by the host's word: update takes
`pay=`, True or False, and then the program has one of the two branches and no
cond (None, the default, is the cond).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks
from sam_optax._rules import rule, transformation
from sam_optax._types import When


class StepCountState(NamedTuple):
    """Memory of a cadence that is a function of the step.

    Attributes:
      count: the steps seen.
      pays: whether the coming step pays, for the host to read.
    """

    count: jax.typing.ArrayLike
    pays: jax.Array


class CadencedState(NamedTuple):
    """State of `cadenced`.

    Attributes:
      cadence: memory of the cadence.
      method: memory of the method, which stands still at steps not paid for.
    """

    cadence: optax.OptState
    method: optax.OptState


def every(k: int) -> optax.GradientTransformationExtraArgs:
    """A cadence that pays at every k-th step, the first included.

    Use it to spread SAM's cost; `look_sam` reuses what was paid for in between.

        pay at step t if t mod k = 0

    Args:
      k: steps from one payment to the next, at least 1.

    Returns:
      A cadence, for `sharpness_aware(when=...)` or `cadenced`; its state counts
      the steps.

    Raises:
      ValueError: if k is below 1.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> cadence = sam_optax.every(3)
      >>> state = cadence.init(None)
      >>> for _ in range(4):
      ...     pay, state = cadence.update(jnp.zeros(2), state)
      ...     print(pay)
      True
      False
      False
      True

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022, algorithm 1.

    Note:
      1/k of the extra gradients of the method.
    """
    k = _checks.integer_at_least("k", k, 1)
    return cadence_of(lambda count: count % k == 0)


def from_step(start: jax.typing.ArrayLike) -> optax.GradientTransformationExtraArgs:
    """A cadence that pays from one step on.

    Use it for the late phase of training, which gains most from SAM.

        pay at step t if t >= start

    Args:
      start: first step that is paid for, at least 0; may be traced.

    Returns:
      A cadence, for `sharpness_aware(when=...)` or `cadenced`; its state counts
      the steps.

    Raises:
      ValueError: if start is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> cadence = sam_optax.from_step(1)
      >>> state = cadence.init(None)
      >>> for _ in range(2):
      ...     pay, state = cadence.update(jnp.zeros(2), state)
      ...     print(pay)
      False
      True

    References:
      Zhou et al., `Sharpness-Aware Minimization Efficiently Selects Flatter
      Minima Late in Training <https://arxiv.org/abs/2410.10373>`_, 2024.

    Note:
      The extra gradients of the method from `start` on, none before.
    """
    start = _checks.integer_at_least("start", start, 0, traced=True)
    return cadence_of(lambda count: count >= start)


def cadenced(
    method: optax.GradientTransformation, when: When
) -> optax.GradientTransformationExtraArgs:
    """A whole method at the steps of a cadence, the clean gradient at the others.

    Makes any method cheaper. At a step that is not paid for the method's memory
    stands still; give the cadence to `sharpness_aware(when=...)` where averages
    in the ascent should run on.

        out = method(g) at the steps of `when`, else g

    Args:
      method: any method.
      when: a cadence (`every`, `from_step`, `with_probability`, `when_large`),
        a function of the step count to a boolean, or a transformation whose
        update returns a boolean.

    Returns:
      A transformation with state: chain it. With pay, a boolean known when the
      step is traced, its update leaves the decision to the caller, see `pays`.

    Raises:
      ValueError: at the call, as the method, and if pay is no boolean.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> tx = sam_optax.cadenced(sam_optax.sam(0.5), sam_optax.every(2))
      >>> w, loss_fn = jnp.array([3.0, 4.0]), lambda w: jnp.sum(w**2) / 2
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     out, state = tx.update(w, state, w, value_fn=loss_fn)
      ...     print(out)
      [3.3 4.4]
      [3. 4.]

    References:
      Zhao et al., `Randomized Sharpness-Aware Training for Boosting
      Computational Efficiency in Deep Learning
      <https://arxiv.org/abs/2203.09962>`_, 2022.

    Note:
      The gradients of the method at the steps paid for, one at the others.
    """
    method = optax.with_extra_args_support(method)
    cadence = cadence_of(when)

    def init(params: optax.Params) -> CadencedState:
        return CadencedState(cadence.init(params), method.init(params))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, CadencedState]:
        _checks.given("params", params, "the gradient is taken at a perturbed copy of them")
        pay, cadence_state = cadence.update(updates, state.cadence, params, **extra_args)
        result, method_state = choose(
            pay,
            lambda: method.update(updates, state.method, params, **extra_args),
            lambda: (updates, state.method),
            updates,
            params,
            extra_args.get("descent_grad_fn"),
        )
        return result, CadencedState(cadence_state, method_state)

    return transformation(init, update)


def cadence_of(when: When) -> optax.GradientTransformationExtraArgs:
    """A cadence as a transformation from a gradient to a boolean, or to the host's word pay."""
    cadence = rule(when) if isinstance(when, optax.GradientTransformation) else _of_step(when)

    def update(
        updates: optax.Updates, state: Any, params: Any = None, *, pay: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        # The memory goes on alike, whoever decides.
        decided, state = cadence.update(updates, state, params, **extra)
        return decided if pay is None else _checks.boolean("pay", pay), state

    return transformation(cadence.init, update)


def _of_step(when: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """A cadence that is a function of the step."""

    def decision(count: Any) -> jax.Array:
        return jnp.asarray(when(count), bool)

    def init(params: optax.Params) -> StepCountState:
        del params
        count = jnp.zeros([], jnp.int32)
        return StepCountState(count, decision(count))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, StepCountState]:
        del updates, params, extra_args
        count = optax.safe_increment(state.count)
        # Not state.pays, which a schedule or hyperparameter of before may have decided.
        return decision(state.count), StepCountState(count, decision(count))

    return transformation(init, update)


def choose(
    pay: Any,
    paid: Callable[[], tuple[Any, ...]],
    plain: Callable[[], tuple[Any, ...]],
    updates: optax.Updates,
    params: optax.Params,
    descent_grad_fn: Any = None,
) -> tuple[Any, ...]:
    """(result, memories...) of one of two branches, of which only that one is computed.

    A decision that is known now leaves nothing of the other branch in the program.
    """
    if rule := getattr(descent_grad_fn, "rule", None):
        raise ValueError(
            f"{rule} for a method that takes the perturbed gradient at some steps only (a "
            "cadence): the first door must know what its pass gave, and what a branch has seen "
            "does not come out of it"
        )

    def leaf_cast(result: Any, update: Any, param: Any) -> Any:
        if not jnp.issubdtype(jnp.result_type(update), jnp.inexact):
            return update  # of an integer leaf, 0 or float0, as it came
        # Both branches must agree, though the clean gradient may be of lower precision.
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(update.dtype, param.dtype)
        return jnp.asarray(result, dtype)

    def in_one_dtype(branch: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[Any, ...]]:
        def cast() -> tuple[Any, ...]:
            result, *memories = branch()
            return jax.tree.map(leaf_cast, result, updates, params), *memories

        return cast

    if isinstance(pay, bool):
        return in_one_dtype(paid if pay else plain)()
    return jax.lax.cond(pay, in_one_dtype(paid), in_one_dtype(plain))
