"""Disjoint groups of examples: split the batch over devices or time, average the results.

`optax.microbatching` does the same for any function but deals examples out to
groups in strides, which is not how devices share a batch; groups here are
contiguous, so that micro-batches and devices give the same numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sam_optax import _axes, _checks, _mesh, _numerics

# ((loss, aux, carried), grads): carried is the state of objects among the arguments, which is
# never split, whose floats are averaged over groups and whose keys are folded with their index.
Result: TypeAlias = tuple[tuple[Any, Any, Any], Any]
Evaluate: TypeAlias = Callable[[Any, Any, Any], Result]  # of (carried, args, kwargs)
EvaluateAt: TypeAlias = Callable[[Any, Any, Any, Any], Result]  # of params as well


@dataclasses.dataclass(frozen=True)
class Groups:
    """How a call shares its examples out: the options of all doors, checked when built."""

    axis_name: _axes.AxisName | None = None
    microbatch_size: int | None = None
    batch_argnums: int | str | Sequence[int | str] | None = None
    unroll: int | bool | None = None
    vectorize: int | bool = 1
    average_aux: Any = True
    mesh: _mesh.AnyMesh | None = None
    first: int = 1  # position in loss_fn of the first of args

    def __post_init__(self) -> None:
        if self.microbatch_size is not None:
            _checks.integer_at_least("microbatch_size", self.microbatch_size, 1)
        if not isinstance(self.vectorize, bool):
            _checks.integer_at_least("vectorize", self.vectorize, 1)
        if self.mesh is not None:
            _mesh.require_axes(self.mesh, self.axis_name)

    def over_mesh(self, evaluate: EvaluateAt) -> EvaluateAt:
        """As a function of whole arrays what `evaluate` does with a device's part of them."""
        mesh, names = self.mesh, self.axis_name
        if mesh is None or names is None:
            return evaluate

        def whole(params: Any, carried: Any, args: Any, kwargs: Any) -> Result:
            _mesh.require_whole("params", params, names)
            leaves, treedef = jax.tree.flatten((carried, args, kwargs))
            _refuse_legacy_keys(leaves)
            is_batch = self._is_batch(carried, args, kwargs, leaves)
            marked = list(zip(is_batch, leaves, strict=True))
            batch = [x if b else None for b, x in marked]
            _mesh.require_divides(mesh, names, _length([x for b, x in marked if b]))
            # What is no array (flags, names) is known now and stays so.
            static = [None if _is_array(x) else x for x in leaves]
            others = [x if _is_array(x) and not b else None for b, x in marked]

            def of_part(params: Any, batch: Any, others: Any) -> Any:
                index = _axes.index(names)
                # None is no leaf, so it stands for what is elsewhere.
                parts = [
                    next((x for x in found if x is not None), known)
                    for *found, known in zip(batch, others, static, strict=True)
                ]
                carried, args, kwargs = jax.tree.unflatten(treedef, parts)
                args, kwargs = jax.tree.map(lambda x: _own_key(x, index), (args, kwargs))
                (loss, aux, carried), grads = evaluate(params, carried, args, kwargs)
                averaged, own = _parted(aux, self._averaged(aux))
                own = jax.tree.map(lambda x: x if jnp.ndim(x) else jnp.reshape(x, 1), own)
                # What is no float (counts, keys) may differ between devices: one of them decides.
                alike = lambda x: x if _is_inexact(x) else _axes.first(x, names)
                return (loss, averaged, jax.tree.map(alike, carried), grads), own

            mapped = _mesh.mapped(of_part, mesh, names)
            (loss, averaged, carried, grads), own = mapped(params, batch, others)
            return (loss, _joined(averaged, own), carried), grads

        return whole

    def over_microbatches(self, evaluate: Evaluate, carried: Any, args: Any, kwargs: Any) -> Result:
        """Mean of evaluate(carried, args, kwargs) over groups, in the memory of those together."""
        if self.microbatch_size is None:
            return evaluate(carried, args, kwargs)
        leaves, treedef = jax.tree.flatten((carried, args, kwargs))
        _refuse_legacy_keys(leaves)
        is_batch = self._is_batch(carried, args, kwargs, leaves)
        batch = [x for b, x in zip(is_batch, leaves, strict=True) if b]
        groups = _number_of_groups(self.microbatch_size, batch)
        together = _number_together(self.vectorize, groups)
        one_by_one = together == 1
        sizes = (groups,) if one_by_one else (groups // together, together)
        split = [_split(x, *sizes, self.microbatch_size) for x in batch]
        indices = jnp.arange(groups).reshape(sizes)

        @jax.jit
        def of_group(index: jax.Array, group: list[jax.Array]) -> Any:
            parts = iter(group)
            merged = [
                next(parts) if b else _own_key(x, index)
                for b, x in zip(is_batch, leaves, strict=True)
            ]
            (loss, aux, carried), grads = evaluate(*jax.tree.unflatten(treedef, merged))
            averaged, own = _parted(aux, self._averaged(aux))
            averageable, rest = _parted(carried, jax.tree.map(_is_inexact, carried))
            return (loss, averaged, averageable, grads), (own, rest)

        # Abstract evaluation fills the cache of the jitted function: one trace in all.
        first = jax.tree.map(lambda x: x[0] if one_by_one else x[0, 0], (indices, split))
        like, _ = jax.eval_shape(of_group, *first)
        unroll = self.unroll
        if unroll is None:
            # XLA compiles the gradient of a convolution badly inside of loops on a CPU.
            on_cpu = jax.default_backend() == "cpu"
            unroll = on_cpu and _convolves(jax.make_jaxpr(of_group)(*first))

        def body(total: Any, part: Any) -> Any:
            if unroll is True or unroll > 1:  # True == 1 in Python
                part = _after(total, part)
            if one_by_one:
                averaged, stacked = of_group(*part)
            else:
                averaged, stacked = jax.vmap(of_group)(*part)
                averaged = jax.tree.map(_sum_over_first_axis, averaged)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, averaged), stacked

        # The arguments bring the mesh along where none is in context.
        zeros_like = lambda *_: jax.tree.map(_wide_zeros, like)
        zeros = jax.jit(zeros_like, keep_unused=True)(*first)
        total, stacked = jax.lax.scan(body, zeros, (indices, split), unroll=unroll)
        mean = jax.tree.map(lambda t, x: (t / groups).astype(x.dtype), total, like)
        loss, averaged, averageable, grads = mean
        own, rest = jax.tree.map(lambda x: x.reshape(groups, *x.shape[len(sizes) :]), stacked)
        # What is no float among the carried (counts, keys) is alike in all groups.
        rest = jax.tree.map(lambda x: x[0], rest)
        return (loss, _joined(averaged, own), _joined(averageable, rest)), grads

    def part(self, count: Callable[[int], int], args: Any, kwargs: Any) -> tuple[Any, Any]:
        """(args, kwargs) of the first count(number) of the examples of one group."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        marked = list(zip(self._is_batch((), args, kwargs, leaves), leaves, strict=True))
        batch = [x for b, x in marked if b]
        _refuse_legacy_keys(batch)  # which look like a batch
        taken = count(_length(batch))
        return jax.tree.unflatten(treedef, [x[:taken] if b else x for b, x in marked])

    def of_device(self, carried: Any) -> Any:
        """The carried as a device starts from it: with keys of its own, and floats marked as such.

        Equinox refuses a new value of a state that varies where the old one did not.
        """
        if self.axis_name is None:
            return carried
        floats, rest = _parted(carried, jax.tree.map(_is_inexact, carried))
        carried = _joined(_axes.vary(floats, self.axis_name), rest)
        index = _axes.index(self.axis_name)
        return jax.tree.map(lambda x: _own_key(x, index), carried)

    def over_devices(self, tree: Any) -> Any:
        """Mean over the mapped axis, if there is one."""
        return tree if self.axis_name is None else _axes.mean(tree, self.axis_name)

    def aux_over_devices(self, aux: Any) -> Any:
        if self.axis_name is None:
            return aux
        averaged, own = _parted(aux, self._averaged(aux))
        return _joined(_axes.mean(averaged, self.axis_name), own)

    def _averaged(self, aux: Any) -> Any:
        """Booleans like aux: which leaves are averaged, all of which can be."""
        chosen = _checks.booleans_like("average_aux", self.average_aux, aux)
        for (path, leaf), average in zip(
            jax.tree_util.tree_leaves_with_path(aux), jax.tree.leaves(chosen), strict=True
        ):
            if average and not _is_inexact(leaf):
                raise TypeError(
                    "aux must be floating or complex to be averaged over groups: cast it, or set "
                    "average_aux to False or to a tree like aux with False there, "
                    f"got {jnp.result_type(leaf)} at aux{jax.tree_util.keystr(path)}"
                )
        return chosen

    def _is_batch(self, carried: Any, args: Any, kwargs: Any, leaves: list[Any]) -> list[bool]:
        argnums = self.batch_argnums
        if argnums is None:
            argnums = range(self.first, len(args) + self.first)
        elif isinstance(argnums, int | str):
            argnums = (argnums,)
        never = jax.tree.map(lambda _: False, carried)
        named = jax.tree.leaves((never, *_named(args, kwargs, argnums, self.first)))
        # A scalar or a key among the batch arguments belongs to every group.
        return [b and not is_key(x) and np.ndim(x) > 0 for b, x in zip(named, leaves, strict=True)]


def _wide_zeros(x: Any) -> jax.Array:
    zeros = _numerics.widened(jnp.zeros_like(x))
    # Gradients of parameters sharded over explicit axes are so by type.
    sharded = isinstance(x.sharding, NamedSharding) and any(x.sharding.spec)
    return jax.sharding.reshard(zeros, x.sharding) if sharded else zeros


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _is_inexact(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.inexact))


def _parted(tree: Any, chosen: Any) -> tuple[Any, Any]:
    """The leaves that are chosen and the others, None in place of what is missing."""
    return (
        jax.tree.map(lambda c, x: x if c else None, chosen, tree),
        jax.tree.map(lambda c, x: None if c else x, chosen, tree),
    )


def _joined(some: Any, others: Any) -> Any:
    return jax.tree.map(
        lambda a, b: b if a is None else a, some, others, is_leaf=lambda x: x is None
    )


def _split(x: Any, *sizes: int) -> jax.Array:
    """The first axis cut into axes of these sizes, the last of which stays spread over devices."""
    x = jnp.asarray(x)
    shape = (*sizes, *x.shape[1:])
    # Only a mesh of explicit axes tells the sharding here, and only there it is asked for.
    first, *rest = (*jax.typeof(x).sharding.spec, None)[: x.ndim]
    if first is None:
        return jnp.reshape(x, shape)
    mesh = jax.typeof(x).sharding.mesh
    shards = math.prod(mesh.shape[name] for name in ([first] if isinstance(first, str) else first))
    spread = first if sizes[-1] % shards == 0 else None
    spec = PartitionSpec(*[None] * (len(sizes) - 1), spread, *rest)
    # With its mesh: outside of jit there may be no mesh in context.
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(mesh, spec))


def _sum_over_first_axis(x: jax.Array) -> jax.Array:
    """As a product, because XLA sums over a leading axis some fifty times slower on a CPU."""
    wide = _numerics.widened(x)
    ones = jnp.ones(len(x), wide.dtype)
    return jnp.tensordot(ones, wide, 1, precision=jax.lax.Precision.HIGHEST)


def _after(done: Any, part: Any) -> Any:
    """The part, tied to a result so that nothing is done with it until that is there.

    Groups written out would otherwise all be evaluated at once, in the memory
    of all. XLA drops `jax.lax.optimization_barrier` on a CPU before it decides
    on the order, but keeps a condition that it cannot see is never met.
    """
    probe = sum(jnp.sum(jnp.real(x)).astype(jnp.float32) for x in jax.tree.leaves(done))
    never = jax.lax.bitcast_convert_type(probe, jnp.int32) | 1 == 0
    return jax.tree.map(lambda x: jnp.where(never, jnp.zeros_like(x), x), part)


def _convolves(program: Any) -> bool:
    """Whether a program, or one inside of it, holds a convolution."""
    return any(
        eqn.primitive.name == "conv_general_dilated"
        or any(_convolves(p) for p in jax.tree.leaves(eqn.params) if hasattr(p, "eqns"))
        for eqn in program.eqns
    )


def _named(args: Any, kwargs: Any, argnums: Sequence[int | str], first: int) -> Any:
    """Booleans like (args, kwargs): which leaves are in the arguments named."""
    end = len(args) + first
    for name in argnums:
        known = name in kwargs if isinstance(name, str) else first <= name < end
        if not known:
            raise ValueError(
                "batch_argnums must be positions of arguments as in loss_fn (params is 0 and no "
                f"batch) or names of keyword arguments, got {name!r} with positions "
                f"{list(range(first, end))} and keywords {sorted(kwargs)}"
            )
    chosen_args = [jax.tree.map(lambda _, n=n: n in argnums, a) for n, a in enumerate(args, first)]
    chosen_kwargs = {n: jax.tree.map(lambda _, n=n: n in argnums, a) for n, a in kwargs.items()}
    return tuple(chosen_args), chosen_kwargs


def _length(batch: list[Any]) -> int:
    """The number of examples."""
    if not batch:
        raise ValueError("batch_argnums must name at least one array to split, got none")
    lengths = [jnp.shape(x)[0] for x in batch]
    if len(set(lengths)) > 1:
        raise ValueError(
            "batch_argnums must name arrays with one common first axis to split, "
            f"got lengths {lengths}"
        )
    return lengths[0]


def _number_of_groups(size: int, batch: list[Any]) -> int:
    length = _length(batch)
    if length == 0 or length % size:
        raise ValueError(
            f"microbatch_size must divide the batch, got microbatch_size {size} "
            f"and a batch of {length}"
        )
    return length // size


def _number_together(vectorize: int | bool, groups: int) -> int:
    together = groups if vectorize is True else int(vectorize) or 1  # False: one by one
    if groups % together:
        raise ValueError(
            "vectorize must divide the number of groups, "
            f"got vectorize {vectorize} and {groups} groups"
        )
    return together


def is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_legacy_key(x: Any) -> bool:
    """Whether an array looks like the data of a key, of which JAX's own have 2 or 4 words."""
    return getattr(x, "dtype", None) == np.uint32 and np.shape(x) in ((2,), (4,))


def _refuse_legacy_keys(leaves: list[Any]) -> None:
    for x in leaves:
        if _is_legacy_key(x):
            raise ValueError(
                "random keys must be typed, so that each group gets its own: "
                "jax.random.key(seed), or jax.random.wrap_key_data(key) (integers that are "
                f"no key: cast them to int32), got {jnp.result_type(x)}{list(x.shape)}"
            )


def _own_key(x: Any, index: jax.Array) -> Any:
    """Groups share all that is not split, but not their randomness."""
    if not is_key(x):
        return x
    fold = jax.random.fold_in
    for _ in range(x.ndim):
        fold = jax.vmap(fold, in_axes=(0, None))
    return fold(x, index)
