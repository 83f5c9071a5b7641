"""Groups of devices inside an ordinary jitted step: the library's own `jax.shard_map`.

It is manual over the axes that groups are made of. All other axes of the mesh
stay with the partitioner, or with the types of an explicit mesh.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sam_optax import _axes, _checks

AnyMesh: TypeAlias = Mesh | AbstractMesh


def require_axes(mesh: Any, axis_name: Any) -> None:
    """Requires a mesh, and axes of it."""
    if not isinstance(mesh, Mesh | AbstractMesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")
    if axis_name is None:
        raise ValueError(
            "axis_name must name the axes of mesh that groups are made of, one or more of "
            f"{mesh.axis_names}, got None"
        )
    for name in _axes.names_of(axis_name):
        if name not in mesh.axis_names:
            raise ValueError(
                f"axis_name must be an axis of mesh, one or more of {mesh.axis_names}, got {name!r}"
            )


def require_divides(mesh: AnyMesh, axis_name: _axes.AxisName, length: int) -> None:
    """Requires equal parts of the batch."""
    groups = math.prod(mesh.shape[name] for name in _axes.names_of(axis_name))
    if length == 0 or length % groups:
        raise ValueError(
            f"axis_name must divide the batch: {axis_name!r} of mesh makes {groups} groups, "
            f"got a batch of {length} (drop or pad examples, or take a smaller axis)"
        )


def require_whole(name: str, tree: Any, axis_name: _axes.AxisName) -> None:
    """Refuses what is sharded over axes that groups are made of, where that can be seen."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        spec = _spec(x)
        used = [name for entry in spec for name in _tuple(entry)]
        shared = [name for name in _axes.names_of(axis_name) if name in used]
        if shared:
            raise ValueError(
                f"{name} must be whole over the axis that groups are made of: give groups another "
                "axis than the one that shards parameters (axis_name, a mesh with one axis more), "
                "or gather the parameters first (jax.device_put, or out_shardings of the step "
                f"before), got {spec} over {shared[0]!r} at "
                f"{jax.tree_util.keystr(path) or 'the root'}"
            )


def mapped(f: Callable[..., Any], mesh: AnyMesh, axis_name: _axes.AxisName) -> Callable[..., Any]:
    """f(params, batch, others), which returns (alike, own), with the batch split over the axes.

    Without replication checking, which refuses ordinary losses: a scan that
    starts from zeros, for example. What f says is alike on all devices has to be.
    """
    names = tuple(_axes.names_of(axis_name))
    whole, split = PartitionSpec(), PartitionSpec(names)
    inside = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=(whole, split, whole),
        out_specs=(whole, split),
        axis_names=set(names),
        check_vma=False,
    )

    # Jitted, because outside of jit a map over some axes of a mesh is not there.
    @jax.jit
    def placed(params: Any, batch: Any, others: Any) -> Any:
        batch = jax.tree.map(lambda x: _placed(x, mesh, names, names), batch)
        params, others = jax.tree.map(lambda x: _placed(x, mesh, names), (params, others))
        return inside(params, batch, others)

    return placed


def _placed(x: Any, mesh: AnyMesh, names: tuple[Any, ...], first: tuple[Any, ...] = ()) -> Any:
    """Spread over `first`, whole over the rest of names: a map reshards no explicit axes itself."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = [name for name, kind in kinds.items() if kind == AxisType.Explicit]
    if not explicit:
        return x
    spec = [_tuple(entry) for entry in _spec(x)]
    spec += [()] * (jnp.ndim(x) - len(spec))
    kept = [[a for a in entry if a in explicit and a not in names] for entry in spec]
    if kept:
        kept[0] = [*(a for a in first if a in explicit), *kept[0]]
    spec = PartitionSpec(*(tuple(entry) or None for entry in kept))
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def _spec(x: Any) -> PartitionSpec:
    """How an array is sharded, where that can be seen: not of a traced one on automatic axes."""
    sharding = jax.typeof(x).sharding if _checks.is_traced(x) else getattr(x, "sharding", None)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()


def _tuple(entry: Any) -> tuple[Any, ...]:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)
