"""The gradient functions that `update` is given, checked: the one prologue of all methods."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from sam_optax import _checks, _numerics
from sam_optax._types import GradFn


def gradient_functions(
    updates: optax.Updates,
    params: Any,
    grad_fn: GradFn | None,
    value_fn: Callable[[optax.Params], jax.Array] | None = None,
    descent_grad_fn: GradFn | None = None,
) -> tuple[GradFn, GradFn]:
    """The gradient functions of the ascent and of the descent: one and the same unless given apart.

    Their results are checked against the gradients given to update.
    """
    _checks.given("params", params, "gradients are taken at perturbed copies of them")
    if jax.tree.structure(params) != jax.tree.structure(updates):
        try:
            _checks.same_structure("params", params, updates)
        except ValueError as error:
            raise ValueError(
                f"{error} (of an Equinox model give eqx.filter(model, eqx.is_inexact_array))"
            ) from None
    if grad_fn is not None:
        ascent = checked("grad_fn", grad_fn, updates)
    elif value_fn is not None:
        ascent = checked("value_fn", value_fn, updates, _gradient_of)
    else:
        raise ValueError(
            "grad_fn or value_fn must be given to update (it evaluates the perturbed gradient), "
            "got None: flax's TrainState.apply_gradients, for one, does not hand it on, so call "
            "tx.update(grads, opt_state, params, grad_fn=...) yourself, or use "
            "sam_optax.value_and_grad, which needs none"
        )
    if descent_grad_fn is None:
        return ascent, ascent
    return ascent, checked("descent_grad_fn", descent_grad_fn, updates)


def checked(
    name: str,
    fn: Callable[..., Any] | None,
    updates: optax.Updates,
    gradient: Callable[[Any], GradFn] = lambda fn: fn,
) -> GradFn:
    """The gradient function, if it takes params alone, and gradients alone are its result."""
    _checks.given(name, fn, "gradients are taken at perturbed copies of params")
    assert fn is not None
    evaluate, structure, masked = gradient(fn), jax.tree.structure(updates), _masked(updates)
    hidden = (
        f"{name} must fill in for parameters that optax.masked or optax.partition hide: put the "
        "method before them and choose what it perturbs by mask=, "
        f"got optax.MaskedNode at {masked}"
    )

    def checked_gradient(params: optax.Params) -> optax.Updates:
        try:
            result: Any = evaluate(params)
        except Exception as error:
            if masked is not None:
                raise ValueError(hidden) from error
            if isinstance(error, TypeError):
                _check_takes_params_alone(name, fn)
            raise
        found = jax.tree.structure(result)
        if masked is not None and found != structure:
            raise ValueError(hidden)
        parts = [jax.tree.structure(part) for part in result] if type(result) is tuple else []
        if structure in parts and found != structure:
            raise ValueError(
                f"{name} must return the gradients alone, without a value or aux, got {found}"
            )
        _checks.same_structure(f"the result of {name}", result, updates)
        return result

    return checked_gradient


def _gradient_of(value_fn: Callable[[optax.Params], jax.Array]) -> GradFn:
    # Integer leaves get a gradient of type float0, as from the caller.
    gradient = jax.grad(value_fn, allow_int=True)
    return lambda params: _numerics.conjugate(gradient(params))


def _check_takes_params_alone(name: str, fn: Callable[..., Any]) -> None:
    # Asked only after a failed call: a decorated function may tell a signature it does not have.
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # some callables tell nothing
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            f"{name} must take params alone: give lambda params: ... with the batch, the step and "
            f"the rest filled in, got a function of {signature}"
        ) from error


def _masked(tree: Any) -> str | None:
    """The first place that Optax has hidden."""
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
    places = [jax.tree_util.keystr(path) or "the root" for path, leaf in nodes if is_masked(leaf)]
    return places[0] if places else None
