"""Checks of arguments: every message names the argument, the rule and the value."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def is_traced(value: Any) -> bool:
    """Whether a value is known only when the compiled program runs."""
    return isinstance(value, Tracer)


def has_traced(*trees: Any) -> bool:
    """Whether any leaf of the trees is traced."""
    return any(is_traced(leaf) for leaf in jax.tree.leaves(trees))


def at_least(name: str, value: Any, bound: float) -> None:
    """Requires a number of at least `bound`; schedules and traced values pass."""
    number = _known(name, value)
    if number is not None and not number >= bound:  # catches NaN as well
        raise ValueError(f"{name} must be at least {bound}, got {value}")


def in_interval(name: str, value: Any, interval: str) -> Any:
    """The number, in an interval written as in "[0, 1)"; schedules and traced values pass."""
    number = _known(name, value)
    if number is None:
        return value
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"{name} must be in {interval}, got {value}")
    return number


def _known(name: str, value: Any) -> float | None:
    """The number, if it is known now, or None; what is known must be a single number."""
    if callable(value) or is_traced(value):
        return None
    # NumPy's copy, because inside of jit even a comparison of known JAX arrays is traced.
    number = np.asarray(value)
    is_real = any(jnp.issubdtype(number.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if number.shape != () or not is_real:
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(number)


def integer_at_least(name: str, value: Any, bound: int, traced: bool = False) -> Any:
    """The integer, of at least `bound`, and known now unless traced ones are allowed."""
    if traced and is_traced(value):
        return value
    is_integer = not is_traced(value) and jnp.issubdtype(np.asarray(value).dtype, jnp.integer)
    if not is_integer or np.ndim(value) > 0:
        hint = ": with optax.inject_hyperparams name it in static_args" if is_traced(value) else ""
        raise ValueError(f"{name} must be an integer known when building, got {value!r}{hint}")
    at_least(name, value, bound)
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """The boolean, known now."""
    if not isinstance(value, bool | np.bool_):
        hint = ": name it in static_argnames of jax.jit" if is_traced(value) else ""
        raise ValueError(f"{name} must be True, False or None, got {value!r}{hint}")
    return bool(value)


def one_of(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Requires one of a few names."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def given(name: str, value: Any, use: str) -> None:
    """Requires an argument of `update` that Optax leaves optional."""
    if value is None:
        raise ValueError(f"{name} must be given to update ({use}), got None")


def left_out(name: str, value: Any, use: str) -> None:
    """Requires that an argument of `update` is not given."""
    if value is not None:
        raise ValueError(f"{name} must be left out ({use}), got {value!r}")


def same_structure(name: str, tree: Any, reference: Any) -> None:
    """Requires the structure and shapes of `reference`; names the first path that differs."""

    def shapes(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        return [(jax.tree_util.keystr(path) or "the root", np.shape(leaf)) for path, leaf in flat]

    found, expected = shapes(tree), shapes(reference)
    if jax.tree.structure(tree) == jax.tree.structure(reference) and found == expected:
        return
    expected = [*expected, ("no further leaf", ())]
    found = [*found, ("no further leaf", ())]
    for (want, want_shape), (got, got_shape) in zip(expected, found, strict=False):
        if (want, want_shape) != (got, got_shape):
            raise ValueError(
                f"{name} must have the structure of the gradients given to update: "
                f"first difference at {want} of shape {want_shape}, "
                f"got {got} of shape {got_shape}"
            )
    raise ValueError(
        f"{name} must have the structure of the gradients given to update: "
        f"expected {jax.tree.structure(reference)}, got {jax.tree.structure(tree)}"
    )


def booleans_like(name: str, prefix: Any, tree: Any) -> Any:
    """A tree of booleans like the tree, from a prefix of one."""
    try:
        full = jax.tree.map(lambda m, part: jax.tree.map(lambda _: m, part), prefix, tree)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{name} must be a boolean or a tree of booleans that is a prefix of "
            f"{jax.tree.structure(tree)}, got {prefix!r}: {error}"
        ) from error
    for entry in jax.tree.leaves(full):
        if not isinstance(entry, bool | np.bool_):
            raise ValueError(f"{name} must hold booleans, got {entry!r}")
    return full


def is_transform(name: str, value: Any) -> None:
    """Requires an Optax transformation; the usual slips get a message of their own."""
    if isinstance(value, optax.GradientTransformation):
        return
    if callable(value):
        called = getattr(value, "__name__", "it")
        raise TypeError(f"{name} must be a GradientTransformation: call {called}(), got {value!r}")
    raise TypeError(
        f"{name} must be a GradientTransformation such as sam_optax.sam(rho=0.05), got {value!r}"
    )


def ascends(name: str, transform: Any) -> None:
    """Refuses what turns a gradient around, as every optimizer does.

    Tried on a single number whose gradient is 1 everywhere, which tells only
    of transforms that work there and are known now; the others are not judged.
    """
    one = np.ones((), np.float32)
    constant = lambda params: jnp.ones_like(params)
    try:
        host = jax.local_devices(backend="cpu")[0]
        with jax.ensure_compile_time_eval(), jax.default_device(host):
            out, _ = optax.with_extra_args_support(transform).update(
                jnp.asarray(one), transform.init(one), jnp.asarray(one), grad_fn=constant
            )
            descends = bool(np.asarray(out) < 0)
    except Exception:
        return
    if descends:
        raise ValueError(
            f"{name} must return a gradient, got one that turns it around, as an optimizer does: "
            "apply the optimizer to the result, or chain(method, optimizer) with "
            "value_and_grad_fn"
        )
