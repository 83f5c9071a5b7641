"""Coordinates around a solution, in which every measure of sharpness is taken.

With w(u) = w + T u the loss is a function of u around 0: a ball in u is the
set that the method searches, the gradient in u is T g, and the Hessian in u is
T H T. Normalization and mask are settled here, once, and nowhere else.
"""

import dataclasses
import functools
import numbers
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import _masks, _normalization, _numerics
from sam_optax._measures import gauss_newton
from sam_optax._types import Mask, Normalization

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
    mask: Mask | None = None,
    *,
    real: bool = False,
) -> Chart:
    """The chart of a normalization and a mask, as `dual_ascent` reads them.

    Every measure and landscape makes one of each solution it is given, so what
    params may be is settled here as well.
    """
    _require_arrays(params)
    leaves, treedef = jax.tree.flatten(params)
    chosen = _masks.chosen(mask, params, params)
    _require_trained(params, chosen)
    index = tuple(i for i, use in enumerate(chosen) if use)
    if not index:
        raise ValueError(f"params must hold a floating leaf that the mask chooses, got {treedef}")
    if real and any(jnp.iscomplexobj(leaves[i]) for i in index):
        raise ValueError(
            "params must be real for a measure of the Hessian (keep complex leaves out by mask), "
            f"got {[jnp.result_type(leaves[i]).name for i in index]}"
        )
    scales = _normalization.scales(normalization, params, params)
    return Chart(params, [scales[i] for i in index], index)


def _require_arrays(params: Any) -> None:
    """Raises where a leaf is a function or another thing with no coordinates."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not (hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)):
            raise ValueError(
                f"params must hold arrays alone, got {leaf!r} at {_name(path)}. "
                "Equinox: params, static = eqx.partition(model, eqx.is_inexact_array), with "
                "loss_fn = lambda params, batch: loss(eqx.combine(params, static), batch)"
            )


def _require_trained(params: Any, chosen: list[bool]) -> None:
    """Raises where a chosen leaf is a statistic of BatchNorm or a state of an optimizer.

    No step of training moves along them: their rows and columns would be
    eigenvalues, zeros for the latter, of nothing that was trained.
    """
    taken = iter(chosen)
    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_batch_stat)
    siblings: dict[Any, set[Any]] = {}
    for path, _ in nodes:
        siblings.setdefault(path[:-1], set()).update(map(_key, path[-1:]))
    for path, node in nodes:
        if not any([next(taken) for _ in jax.tree.leaves(node)]):
            continue
        names = [_key(part) for part in path]
        if "opt_state" in names:
            raise ValueError(
                f"params must not hold the state of an optimizer, got it at {_name(path)}: give "
                "the parameters alone, such as state.params"
            )
        # A state of NNX turned into plain arrays has names alone.
        layer = siblings[path[:-1]]
        pure = names[-1:] in (["mean"], ["var"]) and {"mean", "var"} < layer <= _BATCH_NORM
        nnx = pure or _is_batch_stat(node)
        if nnx or "batch_stats" in names:
            raise ValueError(
                "params must not hold BatchNorm statistics, which are not trained, got them at "
                f"{_name(path)}. {_SPLIT_NNX if nnx else _SPLIT_LINEN} "
                "(or leave them out by mask; landscapes take them as statistics)"
            )


def _key(part: Any) -> Any:
    """The name in an entry of a path, None for an index."""
    return getattr(part, "key", getattr(part, "name", None))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path) or "the root"


_BATCH_NORM = {"mean", "var", "scale", "bias"}
_SPLIT_LINEN = (
    'Give variables["params"], with loss_fn = lambda params, batch: loss(model.apply('
    '{"params": params, "batch_stats": stats}, x, train=False), y)'
)
_SPLIT_NNX = (
    "Give the params of graph, params, rest = nnx.split(model, nnx.Param, ...) after model.eval(), "
    "with loss_fn = lambda params, batch: loss(nnx.merge(graph, params, rest)(x), y)"
)


def _is_batch_stat(node: Any) -> bool:
    """Whether a node is a statistic of Flax NNX, which is not imported for the question."""
    nnx: Any = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.BatchStat)


def scalar_loss(loss_fn: Callable[..., Any], *args: Any) -> Any:
    """loss_fn(*args), which must be one number."""
    value = loss_fn(*args)
    if not jax.tree_util.all_leaves([value]) or np.shape(value):
        raise ValueError(
            "loss_fn must return one scalar, the mean over a batch (jnp.mean of the losses of "
            "examples; of a pair (loss, aux) the loss alone), got the shape "
            f"{jax.tree.map(jnp.shape, value)}"
        )
    return value


dot = _numerics.inner  # of vectors


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
    return scalar_loss(loss_fn, place.at(u), batch)


@functools.partial(jax.jit, static_argnames="loss_fn")
def loss_and_gradient(
    loss_fn: LossFn, place: Chart, u: Vector, batch: Any
) -> tuple[jax.Array, Vector]:
    """Loss at w + T u and its gradient in u, a direction of ascent."""
    value, gradient = jax.value_and_grad(lambda u: scalar_loss(loss_fn, place.at(u), batch))(u)
    return value, _numerics.conjugate(gradient)


@functools.partial(jax.jit, static_argnames="loss_fn")
def hessian_product(loss_fn: LossFn, place: Chart, vector: Vector, batch: Any) -> Vector:
    """T H T vector, or T G T vector of a `GaussNewton` loss."""
    if isinstance(loss_fn, gauss_newton.GaussNewton):
        return gauss_newton.product(*_parts(loss_fn, place, batch), place.zeros(), vector)
    gradient = jax.grad(lambda u: scalar_loss(loss_fn, place.at(u), batch))
    return jax.jvp(gradient, (place.zeros(),), (vector,))[1]


@functools.partial(jax.jit, static_argnames="loss_fn")
def curvature(loss_fn: LossFn, place: Chart, vector: Vector, batch: Any) -> jax.Array:
    """vector^T T H T vector, the second derivative of the loss along T vector.

    Forward over forward needs about half the products of a Hessian-vector
    product and none of its stored activations. Of a `GaussNewton` loss the
    outputs move on a straight line.
    """

    if isinstance(loss_fn, gauss_newton.GaussNewton):
        along = gauss_newton.along(*_parts(loss_fn, place, batch), place.zeros(), vector)
    else:
        along = lambda t: scalar_loss(loss_fn, place.at([t * part for part in vector]), batch)

    def slope(t: jax.Array) -> jax.Array:
        return jax.jvp(along, (t,), (jnp.ones_like(t),))[1]

    zero = jnp.zeros((), vector[0].dtype)
    try:
        return jax.jvp(slope, (zero,), (jnp.ones_like(zero),))[1]
    except (TypeError, NotImplementedError):
        # A custom_vjp in the loss has no forward rule of its own.
        return dot(vector, hessian_product(loss_fn, place, vector, batch))


def _parts(loss_fn: gauss_newton.GaussNewton, place: Chart, batch: Any) -> tuple[Any, Any]:
    """Outputs as a function of u, the loss as a function of outputs."""
    return (
        lambda u: loss_fn.model_fn(place.at(u), batch),
        lambda z: scalar_loss(loss_fn.criterion, z, batch),
    )
