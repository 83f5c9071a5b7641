"""The pass that the ascent gradient comes from: a part of the examples, in lower precision.

The descent's pass is always of all examples and in the precision of the
parameters; only the direction of e comes from here.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from sam_optax import _checks

if TYPE_CHECKING:
    from sam_optax._doors import Loss


@dataclasses.dataclass(frozen=True)
class AscentPass:
    """How the first door computes the ascent gradient; checked when built."""

    fraction: float = 1.0
    dtype: Any = None

    def __post_init__(self) -> None:
        if _checks.is_traced(self.fraction) or callable(self.fraction):
            raise ValueError(
                f"ascent_fraction must be a number known when building, got {self.fraction!r}"
            )
        _checks.in_interval("ascent_fraction", float_of(self.fraction), "(0, 1]")
        if self.dtype is not None and not _is_floating(self.dtype):
            raise ValueError(
                "ascent_dtype must be a real floating dtype, such as jnp.bfloat16, or None, "
                f"got {self.dtype!r}"
            )

    @property
    def is_apart(self) -> bool:
        """Whether it differs from the pass of the descent."""
        return self.fraction != 1 or self.dtype is not None

    def count(self, length: int) -> int:
        """How many of so many examples of a group."""
        exact = float_of(self.fraction) * length
        count = round(exact)
        if count < 1 or abs(exact - count) > 1e-6 * length:
            raise ValueError(
                "ascent_fraction must make a whole number of the examples of each group, at least "
                f"1, got {self.fraction} and a group of {length}"
            )
        return count

    def of(self, loss: "Loss") -> "Loss":
        """The loss with parameters and arguments rounded to the dtype."""
        if self.dtype is None:
            return loss

        def lower(x: Any) -> Any:
            is_floating = hasattr(x, "dtype") and _is_floating(x.dtype)  # not Python's own floats
            return jnp.asarray(x, self.dtype) if is_floating else x

        def lowered(params: Any, carried: Any, args: Any, kwargs: Any) -> Any:
            params, args, kwargs = jax.tree.map(lower, (params, args, kwargs))
            return loss(params, carried, args, kwargs)

        return lowered


def float_of(number: Any) -> Any:
    """A float of what is a number (a `fractions.Fraction`, say); the rest is left for the check."""
    try:
        return float(number)
    except (TypeError, ValueError):
        return number


def in_dtypes_of(like: Any, tree: Any) -> Any:
    """The tree with the dtypes of another one of its structure, whose shapes may differ."""

    def cast(like: Any, x: Any) -> Any:
        dtype = jnp.result_type(like)
        return jnp.asarray(x, dtype) if _is_floating(dtype) else x

    return jax.tree.map(cast, like, tree)


def _is_floating(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False
