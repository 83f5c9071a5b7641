"""Masks: which leaves are perturbed."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax import _checks, _numerics
from sam_optax._types import Mask


def name_mask(pattern: str, *, invert: bool = False) -> Callable[[Any], Any]:
    """A mask of the parameters whose names match: which are perturbed, measured or moved.

    For a head alone, everything but the embeddings, adapters. It is a function
    of the parameters, so it goes wherever a mask does: `sam(mask=...)`, the
    measures, `optax.masked`, `optax.freeze`.

        mask = True where the pattern is found in "outer/inner/leaf"

    Args:
      pattern: a regular expression, looked for anywhere in the names on the path
        to a leaf, joined by "/": "kernel$", "^head/", "layers_[01]/".
      invert: whether to mark what does not match instead.

    Returns:
      A function from a tree of parameters to a tree of booleans like it.

    Raises:
      ValueError: if pattern is no regular expression; at the call, if it matches
        nothing or everything, which is a slip of the pen.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> params = {"body": {"kernel": jnp.ones(2)}, "head": {"kernel": jnp.ones(2)}}
      >>> print(sam_optax.name_mask("^head/")(params))
      {'body': {'kernel': False}, 'head': {'kernel': True}}
      >>> method = sam_optax.sam(rho=0.05, mask=sam_optax.name_mask("^head/"))

    References:
      None; the names are those of `jax.tree_util.tree_flatten_with_path`.
    """
    try:
        search = re.compile(pattern).search
    except re.error as error:
        raise ValueError(
            f"pattern must be a regular expression, got {pattern!r}: {error}"
        ) from None

    def mask(params: Any) -> Any:
        flat, treedef = jax.tree_util.tree_flatten_with_path(params)
        paths = ["/".join(names(path)) for path, _ in flat]
        marks = [bool(search(path)) for path in paths]
        if all(marks) or not any(marks):
            which = "every" if any(marks) else "no"
            raise ValueError(
                f"pattern must match some of the parameters and not all, got {pattern!r}, which "
                f"matches {which} name of {', '.join(paths[:5])}{', ...' * (len(paths) > 5)}"
            )
        return jax.tree.unflatten(treedef, [mark != invert for mark in marks])

    return mask


def names(path: Any) -> list[str]:
    """The names on a path of `jax.tree_util`: keys, attributes, indices."""
    return [str(getattr(e, "key", getattr(e, "name", getattr(e, "idx", e)))) for e in path]


def moved(
    mask: Mask | None, move: Callable[..., list[Any]], tree: Any, params: Any, *beside: list[Any]
) -> Any:
    """A tree whose leaves under the mask are what move makes of them, the others 0.

    move takes a list of the leaves, and one for each list of things beside all
    leaves (scales, say); what it returns is cast to the dtypes of the leaves.
    """
    leaves, treedef = jax.tree.flatten(tree)
    index = [i for i, use in enumerate(chosen(mask, tree, params)) if use]
    result = [jnp.zeros_like(_numerics.movable(x)) for x in leaves]
    new = move(*([column[i] for i in index] for column in (leaves, *beside)))
    for i, e in zip(index, new, strict=True):
        result[i] = e.astype(jnp.result_type(leaves[i]))
    return jax.tree.unflatten(treedef, result)


def chosen(mask: Mask | None, tree: Any, params: Any, name: str = "mask") -> list[bool]:
    """Which leaves are perturbed, or chosen by another mask of this name."""
    leaves = jax.tree.leaves(tree)
    if mask is None:
        masks: list[Any] = [True] * len(leaves)
    else:
        if callable(mask):
            _checks.given("params", params, f"the {name} is a function of them")
            mask = mask(params)
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
    return [bool(m) and _numerics.is_perturbable(x) for m, x in zip(masks, leaves, strict=True)]
