"""Rules as Optax transformations: what they need beside a gradient, and how to write one."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics

_GIVEN = (
    "this rule needs it; sharpness_aware gives clean, perturbation and grad_fn to its descent, "
    "grad_fn to its ascent, and both what its own update is given"
)


def stateless(fn: Callable[..., optax.Updates]) -> optax.GradientTransformationExtraArgs:
    """A rule without memory from a function of the updates and of what else it names.

    `optax.stateless` with extra arguments: the shortest way to a filter, an
    ascent or a descent of your own.

        out = fn(updates, name=..., ...)

    Args:
      fn: a function whose first argument is the updates; every other one is
        given by its name: params, what `sharpness_aware` gives its rules (to
        all grad_fn, value_fn, descent_state; to a descent also clean and
        perturbation), and what its own update is given.

    Returns:
      A transformation with empty state.

    Raises:
      ValueError: at the call, if an argument without a default is missing.

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> between = sam_optax.stateless(
      ...     lambda g_s, clean: jax.tree.map(lambda a, b: (a + b) / 2, g_s, clean))
      >>> method = sam_optax.sam(rho=0.5, descent=between)
      >>> print(sam_optax.grad(lambda w: jnp.sum(w**2), method)(jnp.array([3.0, 4.0])).round(1))
      [6.3 8.4]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.
    """
    parameters = list(inspect.signature(fn).parameters.values())[1:]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        given = extra_args | {"params": params}
        for p in named:
            if p.default is p.empty:
                _checks.given(p.name, given.get(p.name), _GIVEN)
        if not takes_all:
            given = {p.name: given[p.name] for p in named if p.name in given}
        return fn(updates, **given), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def transformation(
    init: Callable[..., Any],
    update: Callable[..., Any],
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose update may require extra arguments, which Optax's type forbids.

    Required are the keyword-only arguments without a default; an error names
    the one that is missing.
    """
    required = _required(update)
    if not required:
        return optax.GradientTransformationExtraArgs(init, update)

    @functools.wraps(update)
    def complete(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        for name in required:
            _checks.given(name, extra_args.get(name), _GIVEN)
        return update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, complete)


def rule(given: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A rule that takes extra arguments, and names the one that it needs and does not get."""
    given = optax.with_extra_args_support(given)
    return transformation(given.init, given.update)


def turned(given: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A rule whose result has the other sign."""
    given = optax.with_extra_args_support(given)

    def update(*args: Any, **extra_args: Any) -> tuple[optax.Updates, optax.OptState]:
        result, state = given.update(*args, **extra_args)
        return _numerics.map_wide(jnp.negative, result), state

    return optax.GradientTransformationExtraArgs(given.init, update)


def _required(fn: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # some callables tell nothing
        return []
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
