"""Coordinates around a solution, in which every measure of sharpness is taken.

With w(u) = w + T u the loss is a function of u around 0: a ball in u is the
set that the method searches, the gradient in u is T g, and the Hessian in u is
T H T. Normalization and mask are settled here, once, and nowhere else.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import _ascent, _numerics
from sam_optax._types import Normalization

LossFn: TypeAlias = Callable[[Any, Any], Any]
Vector: TypeAlias = list[jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chart:
    """The map u -> w + T u, where u has an entry for every chosen leaf of w.

    Attributes:
      params: w.
      scales: T for the chosen leaves, None for 1.
      chosen: positions of those leaves.
    """

    params: Any
    scales: list[Any]
    chosen: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def at(self, u: Vector) -> Any:
        """The parameters w + T u, in the dtypes of w."""
        leaves, treedef = jax.tree.flatten(self.params)
        for i, part in zip(self.chosen, self.displacement(u), strict=True):
            leaves[i] = leaves[i] + part.astype(jnp.result_type(leaves[i]))
        return jax.tree.unflatten(treedef, leaves)

    def displacement(self, u: Vector) -> Vector:
        """T u on the chosen leaves."""
        return [a if t is None else t * a for t, a in zip(self.scales, u, strict=True)]

    def perturbation(self, u: Vector) -> Any:
        """T u as a tree like params, zero where nothing was chosen."""
        leaves, treedef = jax.tree.flatten(self.params)
        result = [jnp.zeros_like(leaf) for leaf in leaves]
        for i, part in zip(self.chosen, self.displacement(u), strict=True):
            result[i] = part.astype(result[i].dtype)
        return jax.tree.unflatten(treedef, result)

    def zeros(self) -> Vector:
        """u = 0, in float32 or wider."""
        leaves = jax.tree.leaves(self.params)
        return [jnp.zeros_like(_numerics.widened(leaves[i])) for i in self.chosen]

    @property
    def size(self) -> int:
        """The dimension of u."""
        leaves = jax.tree.leaves(self.params)
        return sum(jnp.size(leaves[i]) for i in self.chosen)


def chart(
    params: optax.Params,
    normalization: Normalization | None = None,
    mask: _ascent.Mask | None = None,
    *,
    real: bool = False,
) -> Chart:
    """The chart of a normalization and a mask, as `dual_ascent` reads them."""
    leaves, treedef = jax.tree.flatten(params)
    chosen = _ascent._chosen(mask, treedef, leaves, params)
    index = tuple(i for i, use in enumerate(chosen) if use)
    if not index:
        raise ValueError(f"params must hold a floating leaf that the mask chooses, got {treedef}")
    if real and any(jnp.iscomplexobj(leaves[i]) for i in index):
        raise ValueError(
            "params must be real for a measure of the Hessian (keep complex leaves out by mask), "
            f"got {[jnp.result_type(leaves[i]).name for i in index]}"
        )
    scales = _ascent._scales(normalization, treedef, leaves, params)
    return Chart(params, [scales[i] for i in index], index)


def dot(a: Vector, b: Vector) -> jax.Array:
    """Real inner product."""
    return sum((jnp.real(jnp.vdot(x, y)) for x, y in zip(a, b, strict=True)), start=jnp.float32(0))


@functools.partial(jax.jit, static_argnames="draw")
def random(key: jax.Array, place: Chart, draw: Callable[..., jax.Array]) -> Vector:
    """Independent draws (`jax.random.normal` or `rademacher`) for all entries of u.

    One draw for each dtype, cut into leaves: a draw for each leaf would take
    seconds to compile.
    """
    parts = place.zeros()
    result = list(parts)
    for i, dtype in enumerate(sorted({part.dtype.name for part in parts})):
        own = [j for j, part in enumerate(parts) if part.dtype == dtype]
        ends = np.cumsum([parts[j].size for j in own])
        values = draw(jax.random.fold_in(key, i), (int(ends[-1]),), dtype)
        for j, piece in zip(own, jnp.split(values, ends[:-1]), strict=True):
            result[j] = piece.reshape(parts[j].shape)
    return result


@jax.jit
def perturbation(place: Chart, u: Vector) -> Any:
    """T u as a tree like params, as one program."""
    return place.perturbation(u)


@functools.partial(jax.jit, static_argnames="loss_fn")
def loss(loss_fn: LossFn, place: Chart, u: Vector, batch: Any) -> jax.Array:
    """Loss of a batch at w + T u."""
    return loss_fn(place.at(u), batch)


@functools.partial(jax.jit, static_argnames="loss_fn")
def loss_and_gradient(
    loss_fn: LossFn, place: Chart, u: Vector, batch: Any
) -> tuple[jax.Array, Vector]:
    """Loss at w + T u and its gradient in u, a direction of ascent."""
    value, gradient = jax.value_and_grad(lambda u: loss_fn(place.at(u), batch))(u)
    return value, _numerics.conjugate(gradient)


@functools.partial(jax.jit, static_argnames="loss_fn")
def hessian_product(loss_fn: LossFn, place: Chart, vector: Vector, batch: Any) -> Vector:
    """T H T vector."""
    gradient = jax.grad(lambda u: loss_fn(place.at(u), batch))
    return jax.jvp(gradient, (place.zeros(),), (vector,))[1]


@functools.partial(jax.jit, static_argnames="loss_fn")
def curvature(loss_fn: LossFn, place: Chart, vector: Vector, batch: Any) -> jax.Array:
    """vector^T T H T vector, the second derivative of the loss along T vector.

    Forward over forward needs about half the products of a Hessian-vector
    product and none of its stored activations.
    """

    def along(t: jax.Array) -> jax.Array:
        return loss_fn(place.at([t * part for part in vector]), batch)

    def slope(t: jax.Array) -> jax.Array:
        return jax.jvp(along, (t,), (jnp.ones_like(t),))[1]

    zero = jnp.zeros((), vector[0].dtype)
    try:
        return jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]
    except (TypeError, NotImplementedError):
        # A custom_vjp in the loss has no forward rule of its own.
        return dot(vector, hessian_product(loss_fn, place, vector, batch))
