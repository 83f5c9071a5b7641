"""Masks: which leaves are perturbed."""

from typing import Any

import jax
import numpy as np

from sam_optax import _checks, _numerics
from sam_optax._types import Mask


def chosen(
    mask: Mask | None, treedef: Any, grads: list[Any], params: Any, name: str = "mask"
) -> list[bool]:
    """Which leaves are perturbed, or chosen by another mask of this name."""
    if mask is None:
        masks: list[Any] = [True] * len(grads)
    else:
        if callable(mask):
            _checks.given("params", params, f"the {name} is a function of them")
            mask = mask(params)
        tree = jax.tree.unflatten(treedef, grads)
        try:
            full = jax.tree.map(lambda m, part: jax.tree.map(lambda _: m, part), mask, tree)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{name} must have the structure of params or a prefix of it: {error}"
            ) from error
        masks = jax.tree.leaves(full)
        for entry in masks:
            if not isinstance(entry, bool | np.bool_ | jax.Array):
                raise ValueError(f"{name} must hold booleans, got {entry!r}")
    return [bool(m) and _numerics.is_perturbable(g) for m, g in zip(masks, grads, strict=True)]
