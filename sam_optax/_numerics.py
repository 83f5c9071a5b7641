"""Arithmetic on pytrees of parameters: float32 or wider, any leaf types.

Leaves that are integers or booleans (and the float0 gradients JAX gives them)
or that have no elements are never perturbed and count in no norm.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_perturbable(leaf: Any) -> bool:
    """Whether a leaf is a non-empty array of floating or complex numbers."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) and np.size(leaf) > 0


def widened(x: jax.typing.ArrayLike) -> jax.Array:
    """The array in float32, or in its own dtype where that is wider."""
    x = jnp.asarray(x)
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype: Any) -> Any:
    """float32, or the dtype itself where that is wider; without a promotion, which may be off."""
    is_wide = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32
    return dtype if is_wide else jnp.float32


def abs_square(x: jax.Array) -> jax.Array:
    """|x|^2, real also for complex x."""
    return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)


def map_wide(fn: Callable[..., Any], first: Any, *rest: Any) -> Any:
    """`jax.tree.map` in float32 or wider; dtypes, and leaves that are not perturbed, of `first`."""

    def leaf_map(leaf: Any, *others: Any) -> Any:
        if not is_perturbable(leaf):
            return leaf
        return fn(widened(leaf), *map(widened, others)).astype(jnp.result_type(leaf))

    return jax.tree.map(leaf_map, first, *rest)


def movable(gradients: Any) -> Any:
    """The gradients as something to add to params: float0, of integer leaves, becomes 0."""

    def leaf(g: Any) -> Any:
        is_float0 = jnp.result_type(g) == jax.dtypes.float0
        return jnp.zeros(jnp.shape(g), jnp.int32) if is_float0 else g

    return jax.tree.map(leaf, gradients)


def perturbable_part(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a tree that are perturbed, and a function that puts others in their place.

    What is differentiated is these: integers have no gradients to speak of.
    """
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if is_perturbable(leaf)]

    def replaced(part: list[Any]) -> Any:
        new = list(leaves)
        for i, leaf in zip(places, part, strict=True):
            new[i] = leaf
        return jax.tree.unflatten(treedef, new)

    return [leaves[i] for i in places], replaced


def as_key(key: int | jax.Array) -> jax.Array:
    """A typed key, from a seed, which may be traced, or a key."""
    if isinstance(key, int | np.integer):
        return jax.random.key(int(key))
    is_seed = jnp.issubdtype(jnp.result_type(key), jnp.integer) and jnp.ndim(key) == 0
    return jax.random.key(key) if is_seed else jnp.asarray(key)


def key_stream(key: int | jax.Array) -> tuple[Callable[[], jax.Array], Callable[..., Any]]:
    """A key as plain data, which any checkpoint can hold, and how to draw from it.

    The first function returned gives the data; the second takes the data and a
    number n, and gives the data of the next step and n keys for this one. Both
    wait until they are called, so that building a method runs nothing on a device.
    """

    def first() -> jax.Array:
        return jax.random.key_data(as_key(key))

    def draw(data: jax.Array, n: int = 1) -> tuple[jax.Array, jax.Array]:
        kind = jax.random.key_impl(as_key(key))
        keys = jax.random.split(jax.random.wrap_key_data(data, impl=kind), n + 1)
        return jax.random.key_data(keys[0]), keys[1:]

    return first, draw


def keep_if_nonfinite(gradient: Any, new: Any, old: Any, by_norm: bool = False) -> Any:
    """The new memory, or the old one if the gradient is not finite.

    A guard that skips a non-finite step leaves what stands before it in the
    chain as it is; an average would never forget the step.
    """
    finite = all_finite(gradient, by_norm)
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def all_finite(tree: Any, by_norm: bool = False) -> Any:
    """Whether all entries that are perturbed are finite.

    By their norm a CPU is quicker, but keeps the tree until it has that. Not by the
    largest entry: of a sharded array the maximum over devices may leave a NaN out.
    """
    leaves = [x for x in jax.tree.leaves(tree) if is_perturbable(x)]
    if not leaves:
        return True
    if by_norm:
        return jnp.isfinite(factor_and_norm(leaves)[1])
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def random_normal(key: jax.Array, tree: Any) -> Any:
    """Standard normal noise like the tree; zero where it is not perturbed."""
    leaves, treedef = jax.tree.flatten(tree)
    noise = [
        # The zeros lend it the sharding of the leaf.
        jax.random.normal(k, x.shape, x.dtype) + jnp.zeros_like(x)
        if is_perturbable(x)
        else jnp.zeros_like(x)
        for k, x in zip(jax.random.split(key, max(len(leaves), 1)), leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, noise)


def largest(leaves: list[Any]) -> jax.Array:
    """The largest modulus of any entry, in float32 or wider.

    A NaN shows in it on one device; the maximum over devices may leave it out.
    """
    return jnp.max(jnp.stack([jnp.max(jnp.abs(widened(x))) for x in leaves]))


def to_one(size: jax.Array) -> jax.Array:
    """A power of two that brings a size near 1: exact, and as good as constant to a derivative.

    It is 1 for 0 and for what is not finite, and a normal number throughout.
    """
    size = jax.lax.stop_gradient(size)
    limits = jnp.finfo(size.dtype)
    bits = jax.lax.bitcast_convert_type(size, jnp.int64 if limits.bits == 64 else jnp.int32)
    # The exponent of a float is stored with a bias, and opposite exponents add up to twice that.
    opposite = jnp.maximum(2 * (limits.maxexp - 1) - (bits >> limits.nmant), 1)
    power = jax.lax.bitcast_convert_type(opposite << limits.nmant, size.dtype)
    return jnp.where(jnp.isfinite(size) & (size > 0), power, 1)


# Jitted, because a cond outside of jit is compiled anew at every call.
@jax.jit
def factor_and_norm(leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
    """(f, |f v|) with f = 1 for ordinary v, else a power of two that brings v into range.

    One pass over memory for ordinary v: a sum of squares that is finite has
    not overflowed, and one well above the smallest float has lost nothing that
    counts. Only the others pay for two more. Leaves of low precision are
    widened inside, so that no wide copy is kept.
    """

    def square(leaves: list[Any], factor: Any = 1) -> jax.Array:
        # Stacked, because XLA takes long to compile a chain of thousands of additions.
        return jnp.sum(jnp.stack([jnp.sum(abs_square(widened(x) * factor)) for x in leaves]))

    total = square(leaves)
    limits = jnp.finfo(total.dtype)
    usual = jnp.isfinite(total) & (total > limits.tiny / limits.eps**3)

    def plain(leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
        del leaves
        # Not a constant 1: both branches have to vary over the same devices.
        return jnp.where(usual, 1, total), jnp.sqrt(jnp.where(usual, total, 1))

    def careful(leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
        factor = to_one(largest(leaves)).astype(total.dtype)
        small = square(leaves, factor)
        zero = small == 0
        return factor, jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, small)))

    return jax.lax.cond(usual, plain, careful, leaves)


def nonzero(x: jax.Array) -> jax.Array:
    """The number as a divisor: 1 in place of 0."""
    return jnp.where(x == 0, 1, x)


def norm_and_unit(tree: Any) -> tuple[jax.Array, Any]:
    """The global norm |v| and the direction v/|v| (0 for v = 0), in float32 or wider."""
    leaves, treedef = jax.tree.flatten(tree)
    perturbable = [x for x in leaves if is_perturbable(x)]
    if not perturbable:
        return jnp.zeros([], jnp.float32), tree
    factor, norm = factor_and_norm(perturbable)
    units = [widened(x) * factor / nonzero(norm) if is_perturbable(x) else x for x in leaves]
    return norm / factor, jax.tree.unflatten(treedef, units)


def inner(a: Any, b: Any) -> jax.Array:
    """The real inner product over all leaves, in float32 or wider."""
    products = [
        jnp.sum((jnp.conj(widened(x)) * widened(y)).real)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        if is_perturbable(x)
    ]
    return jnp.sum(jnp.stack(products)) if products else jnp.zeros([], jnp.float32)


def orthogonal_part(tree: Any, of: Any) -> Any:
    """The tree less its part along another, in float32 or wider."""
    trees = (jax.tree.leaves(tree), jax.tree.leaves(of))
    pairs = [(x, y) for x, y in zip(*trees, strict=True) if is_perturbable(y)]
    along = _along([x for x, _ in pairs], [y for _, y in pairs]) if pairs else 0
    _, unit = norm_and_unit(of)
    return map_wide(lambda u, x: x - along * u, unit, tree)


@jax.jit  # as `factor_and_norm`
def _along(tree: list[Any], of: list[Any]) -> jax.Array:
    """<v, b/|b|>: of the vectors themselves where they are ordinary, so that no unit is kept."""
    (f_v, _), (f_b, norm) = factor_and_norm(tree), factor_and_norm(of)

    def plain(tree: list[Any], of: list[Any]) -> jax.Array:
        return inner(tree, of)

    def careful(tree: list[Any], of: list[Any]) -> jax.Array:
        scaled = lambda leaves, factor: [widened(x) * factor for x in leaves]
        return inner(scaled(tree, f_v), scaled(of, f_b)) / f_v

    product = jax.lax.cond((f_v == 1) & (f_b == 1), plain, careful, tree, of)
    return product / nonzero(norm)


def into_ball(tree: Any, radius: Any, p: float = 2) -> Any:
    """The nearest point of the ball around 0, of the 2-norm or for p = inf the largest entry."""
    if p == 2:
        norm, _ = norm_and_unit(tree)
        shrink = jnp.where(norm > radius, radius / nonzero(norm), 1)
        return map_wide(lambda x: shrink * x, tree)
    # abs and division, not clip: it serves complex entries as well.
    return map_wide(
        lambda x: x * jnp.where(jnp.abs(x) > radius, radius / nonzero(jnp.abs(x)), 1), tree
    )


def safe_norm(x: jax.Array, axis: Any = None, keepdims: bool = False) -> jax.Array:
    """Euclidean norm with a gradient of zero, not NaN, at x = 0."""
    square = jnp.sum(abs_square(x), axis=axis, keepdims=keepdims)
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def conjugate(tree: Any) -> Any:
    """Turns gradients of jax.grad into directions of steepest ascent, and back.

    For a complex leaf jax.grad returns the conjugate of that direction, and
    Optax expects the direction; real leaves are the same in both.
    """

    def conj(x: Any) -> Any:
        return jnp.conj(x) if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating) else x

    return jax.tree.map(conj, tree)
