"""Names for the types of arguments, and the one cast that Optax's types ask for."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

GradFn: TypeAlias = Callable[[optax.Params], optax.Updates]
Mask: TypeAlias = Any | Callable[[optax.Params], Any]
Normalization: TypeAlias = Callable[[optax.Params], optax.Params]
Radius: TypeAlias = jax.typing.ArrayLike | optax.Schedule
When: TypeAlias = Callable[[jax.Array], jax.typing.ArrayLike] | optax.GradientTransformation


def transformation(
    init: Callable[..., Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose update may require extra arguments, which Optax's type forbids."""
    return optax.GradientTransformationExtraArgs(init, update)
