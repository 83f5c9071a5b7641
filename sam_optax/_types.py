"""Names for the types of arguments."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

GradFn: TypeAlias = Callable[[optax.Params], optax.Updates]
Mask: TypeAlias = Any | Callable[[optax.Params], Any]
Normalization: TypeAlias = Callable[[optax.Params], optax.Params]
When: TypeAlias = Callable[[jax.Array], jax.typing.ArrayLike] | optax.GradientTransformation
Result: TypeAlias = tuple[optax.Updates, optax.OptState]
