"""Names for the types of arguments, and the one cast that Optax's types ask for."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

from sam_optax import _checks

GradFn: TypeAlias = Callable[[optax.Params], optax.Updates]
Mask: TypeAlias = Any | Callable[[optax.Params], Any]
Normalization: TypeAlias = Callable[[optax.Params], optax.Params]
Radius: TypeAlias = jax.typing.ArrayLike | optax.Schedule
When: TypeAlias = Callable[[jax.Array], jax.typing.ArrayLike] | optax.GradientTransformation


def transformation(
    init: Callable[..., Any],
    update: Callable[..., Any],
    needs: Callable[..., Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose update may require extra arguments, which Optax's type forbids.

    Required are the keyword-only arguments without a default of update, or of
    the function `needs`; an error names the one that is missing.
    """
    required = _required(needs or update)
    if not required:
        return optax.GradientTransformationExtraArgs(init, update)

    @functools.wraps(update)
    def complete(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        for name in required:
            _checks.given(
                name,
                extra_args.get(name),
                "this rule needs it; sharpness_aware gives clean, perturbation and grad_fn to its "
                "descent, grad_fn to its ascent, and both what its own update is given",
            )
        return update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, complete)


def _required(fn: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # some callables tell nothing
        return []
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
