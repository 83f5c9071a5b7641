"""Directions in weight space: unit rays and filter-normalised Gaussians."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import _chart, _numerics

FilterAxes: TypeAlias = Callable[[Any, jax.Array], tuple[int, ...] | None]


def flax_filters(path: Any, leaf: jax.Array) -> tuple[int, ...] | None:
    """The axes within a filter, in the layout of Flax.

    The default of `random_plane`: a filter is one index of the last axis, a
    column of a Dense kernel or an output channel of a convolution. Write your
    own for other layouts, and pass it as filter_axes.

        (in, out): (0,);  (height, width, in, out): (0, 1, 2);  (out,): None

    Args:
      path: the leaf's path in the tree of parameters, as
        `jax.tree_util.tree_map_with_path` gives it.
      leaf: the parameter.

    Returns:
      The axes over which a filter's norm runs, () for a filter of its own in
      each entry; None for a leaf that stays in place, here those with fewer
      than two axes: biases and the scales of normalization layers.

    Raises:
      Nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import landscape
      >>> def embeddings_too(path, leaf):  # an embedding's filters are its rows
      ...     if "embedding" in str(path[-1]):
      ...         return (1,)
      ...     return landscape.flax_filters(path, leaf)
      >>> print(embeddings_too(("embedding",), jnp.ones((100, 8))))
      (1,)
      >>> print(embeddings_too(("kernel",), jnp.ones((3, 3, 8, 16))))
      (0, 1, 2)

    References:
      Li et al., `Visualizing the Loss Landscape of Neural Nets
      <https://arxiv.org/abs/1712.09913>`_, 2018, section 4.
    """
    del path
    return tuple(range(leaf.ndim - 1)) if leaf.ndim > 1 else None


def unit_direction(key: jax.Array, params: optax.Params, mask: Any) -> optax.Params:
    """Uniform on the unit sphere over the chosen leaves; zero elsewhere."""
    place = _chart.chart(params, mask=mask, real=True)
    draw = _chart.random(key, place, jax.random.normal)
    norm = jnp.sqrt(_chart.dot(draw, draw))
    return _as_tree(place, [part / norm for part in draw])


def filter_direction(key: jax.Array, params: optax.Params, filter_axes: FilterAxes) -> optax.Params:
    """Gaussian, each filter scaled to the norm of the parameters' own."""
    place = _chart.chart(params, real=True)
    draw = _chart.random(key, place, jax.random.normal)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    parts = []
    for part, i in zip(draw, place.chosen, strict=True):
        path, leaf = leaves[i]
        axes = filter_axes(path, jnp.asarray(leaf))
        if axes is None:
            parts.append(jnp.zeros_like(part))
            continue
        own = _numerics.safe_norm(_numerics.widened(leaf), axis=axes, keepdims=True)
        parts.append(part * own / _numerics.safe_norm(part, axis=axes, keepdims=True))
    return _as_tree(place, parts)


def require_alike(name: str, solutions: Sequence[optax.Params]) -> None:
    """Requires trees that have a chart, of one structure and shapes.

    Shapes that only broadcast would be mixed without a word.
    """

    def layout(tree: Any) -> list[tuple[str, Any]]:
        flat = jax.tree_util.tree_leaves_with_path(tree)
        return [(jax.tree_util.keystr(path), np.shape(leaf)) for path, leaf in flat]

    for tree in solutions:
        _chart.chart(tree)
        first, own = layout(solutions[0]), layout(tree)
        if first != own:
            missing = ("no further leaf", ())
            pairs = zip([*first, missing], [*own, missing], strict=False)
            raise ValueError(
                f"{name} must have the same structure and shapes, got %s and %s"
                % next((a, b) for a, b in pairs if a != b)
            )
        if jax.tree.structure(solutions[0]) != jax.tree.structure(tree):
            raise ValueError(
                f"{name} must have the same structure, got trees of the same leaves that differ "
                "in their containers (dict and FrozenDict) or static fields (for NNX modules "
                "give the params of graph, params, rest = nnx.split(model, nnx.Param, ...))"
            )


def difference(a: optax.Params, b: optax.Params) -> optax.Params:
    """a - b on the floating leaves, in float32 or wider; zero elsewhere."""

    def leaf_difference(x: Any, y: Any) -> jax.Array:
        if not _numerics.is_perturbable(x):
            return jnp.zeros((), jnp.float32)
        return _numerics.widened(x) - _numerics.widened(y)

    return jax.tree.map(leaf_difference, a, b)


def dot(a: optax.Params, b: optax.Params) -> float:
    """Inner product of two directions."""
    return float(_chart.dot(jax.tree.leaves(a), jax.tree.leaves(b)))


def scaled(direction: optax.Params, factor: float) -> optax.Params:
    """A direction times a number."""
    return jax.tree.map(lambda d: d * factor, direction)


def cosine(a: optax.Params, b: optax.Params) -> float:
    """Of the angle between two directions; 0 if one of them is zero."""
    lengths = (dot(a, a) * dot(b, b)) ** 0.5
    return dot(a, b) / lengths if lengths else 0.0


def _as_tree(place: _chart.Chart, parts: list[jax.Array]) -> optax.Params:
    """Parts in the structure of the parameters, but in their own wider dtype."""
    leaves, treedef = jax.tree.flatten(place.params)
    result: list[Any] = [jnp.zeros((), jnp.float32) for _ in leaves]
    for i, part in zip(place.chosen, parts, strict=True):
        result[i] = part
    return jax.tree.unflatten(treedef, result)
