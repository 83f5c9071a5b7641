"""What all doors share: passes over a loss, a method over the passes, groups of examples.

A door makes of its arguments a pure loss(params, carried, args, kwargs) that
returns (loss, aux, carried). carried is the state of objects among the
arguments (BatchNorm statistics, random streams), empty for plain functions:
every pass of a step starts from the same one, and the clean pass's result is
kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

import jax
import optax

from sam_optax import _axes, _checks, _mesh, _numerics
from sam_optax._ascent_pass import AscentPass, in_dtypes_of
from sam_optax._groups import Groups, Result

Loss: TypeAlias = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]
AuxFrom: TypeAlias = Literal["clean", "ascent", "perturbed"]
ExtraArgs: TypeAlias = Mapping[str, Any] | Callable[..., Mapping[str, Any]]


class GroupOptions(TypedDict, total=False):
    """Options of `sam_optax.value_and_grad_fn`, for the doors of modules."""

    axis_name: _axes.AxisName | None
    microbatch_size: int | None
    batch_argnums: int | str | Sequence[int | str] | None
    unroll: int | bool | None
    vectorize: int | bool
    average_aux: Any
    mesh: _mesh.AnyMesh | None
    allow_int: bool


class Options(GroupOptions, total=False):
    """Options of `sam_optax.value_and_grad`, for the doors of modules."""

    aux_from: AuxFrom
    ascent_fraction: float
    ascent_dtype: jax.typing.DTypeLike | None
    extra_args: ExtraArgs


def split_options(options: Any, known: Any, first: int) -> tuple[Groups, dict[str, Any]]:
    """The options about groups, checked, and the others."""
    unknown = set(options) - known.__optional_keys__
    if unknown:
        raise TypeError(
            f"options must be among {sorted(known.__optional_keys__)}, got {sorted(unknown)}"
        )
    names = Groups.__dataclass_fields__
    groups = Groups(first=first, **{n: v for n, v in options.items() if n in names})
    return groups, {n: v for n, v in options.items() if n not in names}


def check(
    transform: Any,
    aux_from: str = "clean",
    ascent_fraction: float = 1.0,
    ascent_dtype: Any = None,
    **_: Any,
) -> AscentPass:
    """What can be said of the arguments of `value_and_grad` before the call."""
    _checks.one_of("aux_from", aux_from, ("clean", "ascent", "perturbed"))
    _checks.is_transform("transform", transform)
    return AscentPass(ascent_fraction, ascent_dtype)


def value_and_grad(
    loss: Loss,
    transform: Any,
    groups: Groups,
    *,
    aux_from: str = "clean",
    ascent_fraction: float = 1.0,
    ascent_dtype: Any = None,
    extra_args: ExtraArgs | None = None,
    allow_int: bool = False,
) -> Callable[[Any, Any, Any, Any], Result]:
    """((loss, aux, carried), the method's gradient) as a function of the arguments of the loss."""
    ascent = check(transform, aux_from, ascent_fraction, ascent_dtype)
    method = optax.with_extra_args_support(transform)

    def of_group(params: Any, carried: Any, args: Any, kwargs: Any) -> Result:
        state = method.init(params)
        if jax.tree.leaves(state):
            raise ValueError(
                "transform must be without state, which value_and_grad has nowhere to keep: put "
                "the method into optax.chain(method, optimizer) and call update with grad_fn= "
                "(value_and_grad_fn gives it); an optimizer is no transform, it comes after, "
                f"got state {jax.tree.structure(state)}"
            )
        _checks.ascends("transform", transform)
        one_pass = functools.partial(_pass, allow_int=allow_int, traced=params)
        whole = ascend = one_pass(loss, carried, args, kwargs)
        if ascent.is_apart:
            part = (
                groups.part(ascent.count, args, kwargs) if ascent.fraction != 1 else (args, kwargs)
            )
            ascend = one_pass(ascent.of(loss), carried, *part)
        at_w, grads = ascend(params)
        given = extra_args(params, carried, args, kwargs) if callable(extra_args) else extra_args
        given = dict(given or {})
        given |= {
            "grad_fn": lambda params: ascend(params)[1],
            "value_fn": lambda params: loss(params, carried, args, kwargs)[0],
        }
        if aux_from != "perturbed" and not ascent.is_apart:
            grads, _ = method.update(grads, state, params, **given)
            return at_w, _numerics.conjugate(grads)

        if "descent_grad_fn" in given:
            if aux_from != "clean":
                raise ValueError(
                    'aux_from must be "clean" where extra_args gives descent_grad_fn, whose passes '
                    f"tell no aux, got {aux_from!r}"
                )
            grads, _ = method.update(grads, state, params, **given)
            return whole(params)[0], _numerics.conjugate(grads)
        options = "ascent_fraction and ascent_dtype must be left out"
        perturbed = _Perturbed(whole, options if ascent.is_apart else 'aux_from must be "clean"')
        grads, _ = method.update(grads, state, params, descent_grad_fn=perturbed, **given)
        grads = _numerics.conjugate(grads)
        if perturbed.first is None:
            raise ValueError(
                f"{perturbed.rule} for a transform that evaluates no perturbed gradient, got "
                f"aux_from {aux_from!r}, ascent_fraction {ascent_fraction}, "
                f"ascent_dtype {ascent_dtype}"
            )
        if aux_from == "ascent":
            return in_dtypes_of(perturbed.first, at_w), grads
        # A forward pass more where the ascent has not made it, if loss or aux are used.
        clean = whole(params)[0] if ascent.is_apart else at_w
        return (clean if aux_from == "clean" else (clean[0], *perturbed.first[1:])), grads

    def sharp(params: Any, carried: Any, args: Any, kwargs: Any) -> Result:
        if groups.axis_name is not None:
            params = _axes.vary(params, groups.axis_name)
        carried = groups.of_device(carried)
        (loss, aux, carried), grads = groups.over_microbatches(
            lambda *rest: of_group(params, *rest), carried, args, kwargs
        )
        loss, carried, grads = groups.over_devices((loss, carried, grads))
        return (loss, groups.aux_over_devices(aux), carried), grads

    return groups.over_mesh(sharp)


class _Perturbed:
    """A gradient function that keeps what its first pass gave beside the gradient.

    Attributes:
      rule: what an option must be for a method without such a pass at every
        step; cadences refuse it so, because nothing kept leaves their branches.
      first: (loss, aux, carried) of that pass.
    """

    def __init__(self, evaluate: Callable[[Any], Result], rule: str):
        self._evaluate = evaluate
        self.rule = rule
        self.first: Any = None

    def __call__(self, params: Any) -> Any:
        out, grads = self._evaluate(params)
        self.first = self.first or out
        return grads


def value_and_grad_fn(
    loss: Loss, groups: Groups, *, allow_int: bool = False
) -> Callable[[Any, Any, Any, Any], tuple[tuple[Any, Any, Any], Any, Callable[[Any], Any]]]:
    """((loss, aux, carried), gradient, grad_fn): the clean pass, and the gradient elsewhere."""

    def start(params: Any, carried: Any, args: Any, kwargs: Any) -> Any:
        traced = _checks.has_traced(params, carried, args, kwargs)
        if groups.mesh is not None:
            shared = lambda params: over_mesh(params, carried, args, kwargs)
            shared = jax.jit(shared) if traced else shared  # one trace for all passes
            out, grads = shared(params)
            return out, grads, lambda params: shared(params)[1]

        carried = groups.of_device(carried)
        evaluate = lambda params: over_microbatches(params, carried, args, kwargs)
        if traced:
            evaluate = jax.jit(evaluate)

        def everywhere(params: Any) -> Result:
            if groups.axis_name is not None:
                params = _axes.vary(params, groups.axis_name)
            return evaluate(params)

        out, grads = everywhere(params)
        return means(out), grads, lambda params: everywhere(params)[1]

    def over_microbatches(params: Any, *parts: Any) -> Result:
        at = lambda *parts: _pass(loss, *parts, allow_int=allow_int)(params)
        return groups.over_microbatches(at, *parts)

    def means(out: Any) -> Any:
        value, aux, carried = out
        value, carried = groups.over_devices((value, carried))
        return value, groups.aux_over_devices(aux), carried

    def of_device(params: Any, carried: Any, args: Any, kwargs: Any) -> Result:
        out, grads = over_microbatches(params, groups.of_device(carried), args, kwargs)
        return means(out), groups.over_devices(grads)

    over_mesh = groups.over_mesh(of_device)
    return start


def pair(out: Any, has_aux: bool) -> tuple[Any, Any]:
    """(loss, aux) from what a loss returned."""
    if has_aux:
        if not isinstance(out, tuple | list) or len(out) != 2:
            raise TypeError(
                f"loss_fn must return (loss, aux) with has_aux=True, got {type(out).__name__}"
            )
        return out[0], out[1]
    if isinstance(out, tuple | list):
        raise TypeError(
            "loss_fn must return a scalar, or has_aux must be True for one that returns "
            f"(loss, aux), got a {type(out).__name__} of {len(out)}"
        )
    return out, None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Hole:
    """Stands in a tree where an object was; no leaf of it."""

    index: int


def without(tree: Any, is_object: Callable[[Any], bool], objects: list[Any]) -> Any:
    """The tree with holes in place of its objects, which are added to the list."""

    def hole(x: Any) -> Any:
        if not is_object(x):
            return x
        objects.append(x)
        return Hole(len(objects) - 1)

    return jax.tree.map(hole, tree, is_leaf=is_object)


def filled(tree: Any, objects: Any) -> Any:
    """The tree with the objects in place of its holes."""
    return map_holes(lambda x: objects[x.index] if isinstance(x, Hole) else x, tree)


def map_holes(fn: Callable[..., Any], *trees: Any) -> Any:
    """`jax.tree.map` that sees holes as leaves."""
    return jax.tree.map(fn, *trees, is_leaf=lambda x: isinstance(x, Hole))


def _pass(
    loss: Loss, carried: Any, args: Any, kwargs: Any, *, allow_int: bool, traced: Any = None
) -> Callable[[Any], Result]:
    """One forward and backward pass as a function of params, traced once for all."""

    def evaluate(params: Any) -> Result:
        def loss_of(params: Any) -> Any:
            value, *rest = loss(params, carried, args, kwargs)
            return value, tuple(rest)

        (value, rest), grads = jax.value_and_grad(loss_of, has_aux=True, allow_int=allow_int)(
            params
        )
        return (value, *rest), _numerics.conjugate(grads)

    # Called at w and at w + e: under jit, a jitted function is traced once
    # for both. Outside, stay with what jax.value_and_grad does there.
    return jax.jit(evaluate) if _checks.has_traced(traced, carried, args, kwargs) else evaluate
