"""Flax NNX modules in place of parameter trees."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import optax

from sam_optax import _doors, _groups
from sam_optax._family.sam import sam
from sam_optax._groups import Groups

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("sam_optax.nnx needs Flax: pip install 'sam-optax[flax]'") from error


def value_and_grad(
    loss_fn: Callable[..., Any],
    transform: optax.GradientTransformation = sam(),
    *,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    **options: Unpack[_doors.Options],
) -> Callable[..., Any]:
    """Like `nnx.value_and_grad`, with the sharpness-aware gradient.

    Modules, random streams (`nnx.Rngs`) and other NNX objects may stand
    anywhere among the arguments. Their state (BatchNorm statistics, dropout
    keys) moves once a call, as in the clean pass, however many passes the
    transform makes; all passes see the same dropout mask.

        loss = L(w);  grads = transform(grad L(w)), by default grad L(w + e)

    Args:
      loss_fn: loss_fn(module, *args, **kwargs) returns a scalar, or a pair of
        it and aux.
      transform: a method without state, as in `sam_optax.value_and_grad`.
      has_aux: whether loss_fn returns (loss, aux).
      wrt: filter of the variables to differentiate, the same as that of
        `nnx.Optimizer`.
      argnums: the arguments to differentiate, as in `nnx.value_and_grad`: a
        position, an `nnx.DiffState` with a filter of its own, or several. One
        perturbation of length rho moves all of them.
      **options: the other options of `sam_optax.value_and_grad`. aux_from
        decides for the state of objects as well as for aux. Over groups of
        examples floating state is averaged, and the rest (counts, alike in all
        groups) is kept once; each micro-batch and each device of axis_name
        draws from keys of its own, folded with its index, which stay as they
        were in the objects. With mesh the arguments that are split (by default
        all positional arrays) are those beside the objects, whose state is
        never split.

    Returns:
      A function of the arguments of loss_fn that updates the state of NNX
      objects in place and returns (loss, grads), or ((loss, aux), grads); grads
      is an `nnx.State` for the update of a stock `nnx.Optimizer`, or a tuple
      for a sequence of argnums.

    Raises:
      ValueError, TypeError, NameError: as `sam_optax.value_and_grad`; also for
        an `nnx.Metric` among the arguments over micro-batches or with mesh, which
        is no average: update metrics after the call, from aux.

    Example:
      >>> import jax.numpy as jnp, optax, sam_optax.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
      >>> @nnx.jit
      ... def step(model, optimizer, x, y):
      ...     loss_fn = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
      ...     loss, grads = sam_optax.nnx.value_and_grad(loss_fn)(model, x, y)
      ...     optimizer.update(model, grads)
      ...     return loss
      >>> losses = [step(model, optimizer, jnp.eye(2), jnp.ones((2, 1))) for _ in range(50)]
      >>> print(losses[0] > 0.5 > 0.1 > losses[-1])
      True

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.

    Note:
      Costs what the transform costs, two gradients for `sam`.
    """
    groups, rest = _doors.split_options(options, _doors.Options, first=0)
    _doors.check(transform, **rest)

    @functools.wraps(loss_fn)
    def sharp_value_and_grad(*args: Any, **kwargs: Any) -> Any:
        call = _Call(args, kwargs, argnums, wrt, groups)
        own = call.own_args(rest.get("extra_args"))
        sharp = _doors.value_and_grad(
            call.pure(loss_fn, has_aux), transform, groups, **{**rest, "extra_args": own}
        )
        (loss, aux, state), grads = sharp(call.params, call.state, call.args, call.kwargs)
        call.advance(state)
        return ((loss, aux) if has_aux else loss), call.of_argnums(grads)

    return sharp_value_and_grad


def grad(
    loss_fn: Callable[..., Any],
    transform: optax.GradientTransformation = sam(),
    *,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    argnums: int | nnx.DiffState | Sequence[int | nnx.DiffState] = 0,
    **options: Unpack[_doors.Options],
) -> Callable[..., Any]:
    """Like `nnx.grad`, with the sharpness-aware gradient.

    `value_and_grad` without the value; use it where the loss is not logged.

    Args:
      loss_fn: as in `value_and_grad`.
      transform: as in `value_and_grad`.
      has_aux: whether loss_fn returns (loss, aux).
      wrt: as in `value_and_grad`.
      argnums: as in `value_and_grad`.
      **options: as in `value_and_grad`.

    Returns:
      A function of the arguments of loss_fn that returns grads, or (grads, aux)
      with has_aux.

    Raises:
      ValueError, TypeError, NameError: as `value_and_grad`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> from flax import nnx
      >>> model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> model.kernel[...] = jnp.full((1, 1), 2.0)
      >>> loss_fn = lambda model, x: jnp.sum(model(x) ** 2)
      >>> grads = sam_optax.nnx.grad(loss_fn, sam_optax.sam(0.5))(model, jnp.ones((1, 1)))
      >>> print(grads["kernel"][...])  # nnx.grad would give 4
      [[5.]]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.
    """
    sharp = value_and_grad(loss_fn, transform, has_aux=has_aux, wrt=wrt, argnums=argnums, **options)

    @functools.wraps(loss_fn)
    def sharp_grad(*args: Any, **kwargs: Any) -> Any:
        value, grads = sharp(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return sharp_grad


def value_and_grad_fn(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    argnums: int | nnx.DiffState = 0,
    **options: Unpack[_doors.GroupOptions],
) -> Callable[..., Any]:
    """The clean value and gradient, and the function that gives the gradient elsewhere.

    For methods with memory, in the chain of a stock `nnx.Optimizer`. The state
    of modules moves in this call, once; all later passes start from the state
    before it and draw the same dropout masks.

        value = L(w),  grads = grad L(w),  grad_fn(v) = grad L(v)

    Args:
      loss_fn: as in `value_and_grad`.
      has_aux: whether loss_fn returns (loss, aux).
      wrt: filter of the variables to differentiate, that of the optimizer.
      argnums: the argument to differentiate, a position or an `nnx.DiffState`.
      **options: the other options of `sam_optax.value_and_grad_fn`, over groups
        as in `value_and_grad`. With mesh grads and grad_fn are means over the
        groups: no `pmean` in the chain.

    Returns:
      A function of the arguments of loss_fn that updates the state of NNX
      objects in place and returns (value, grads, grad_fn), or ((value, aux),
      grads, grad_fn), for `optimizer.update(model, grads, grad_fn=grad_fn)`.

    Raises:
      ValueError, TypeError, NameError: as `value_and_grad`.

    Example:
      >>> import jax.numpy as jnp, optax, sam_optax.nnx
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = optax.chain(sam_optax.look_sam(rho=0.05, k=5), optax.sgd(0.1))
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> loss_fn = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
      >>> @nnx.jit
      ... def step(model, optimizer, x, y):
      ...     value, grads, grad_fn = sam_optax.nnx.value_and_grad_fn(loss_fn)(model, x, y)
      ...     optimizer.update(model, grads, grad_fn=grad_fn)
      ...     return value
      >>> losses = [step(model, optimizer, jnp.eye(2), jnp.ones((2, 1))) for _ in range(50)]
      >>> print(losses[0] > 0.5 > 0.1 > losses[-1])
      True

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.

    Note:
      One gradient, and one more for each call of grad_fn.
    """
    groups, rest = _doors.split_options(options, _doors.GroupOptions, first=0)

    @functools.wraps(loss_fn)
    def clean_value_and_grad_fn(*args: Any, **kwargs: Any) -> Any:
        call = _Call(args, kwargs, argnums, wrt, groups)
        start = _doors.value_and_grad_fn(call.pure(loss_fn, has_aux), groups, **rest)
        (value, aux, state), grads, grad_at = start(call.params, call.state, call.args, call.kwargs)
        call.advance(state)
        structure = jax.tree.structure(call.params)

        def grad_fn(params: Any) -> Any:
            # nnx.Optimizer hands out parameters without their variables, and wants such gradients.
            leaves, like = jax.tree.flatten(params)
            if len(leaves) != structure.num_leaves:
                raise ValueError(
                    "grad_fn must be given the variables that wrt selects (the optimizer's wrt "
                    f"must be the same), {structure.num_leaves} arrays, got {len(leaves)}"
                )
            own = jax.tree.unflatten(structure, leaves)
            return jax.tree.unflatten(like, jax.tree.leaves(grad_at(own)))

        return ((value, aux) if has_aux else value), call.of_argnums(grads), grad_fn

    return clean_value_and_grad_fn


class _Call:
    """The arguments of one call, taken apart: params, state of objects, and arrays.

    All objects are split together, so that what they share stays shared.
    """

    def __init__(self, args: Any, kwargs: Any, argnums: Any, wrt: Any, groups: Groups):
        chosen = {}
        for wanted in argnums if isinstance(argnums, tuple | list) else [argnums]:
            diff = wanted if isinstance(wanted, nnx.DiffState) else nnx.DiffState(wanted, wrt)
            if not 0 <= diff.argnum < len(args):
                raise ValueError(
                    "argnums must be positions of arguments given without a keyword, 0 to "
                    f"{len(args) - 1}, got {diff.argnum}"
                )
            chosen[diff.argnum] = nnx.filterlib.to_predicate(diff.filter)
        self._single = not isinstance(argnums, tuple | list)
        self._grouped = groups.microbatch_size is not None or groups.axis_name is not None
        self._objects: list[Any] = []
        hold = lambda tree: _doors.without(tree, _is_object, self._objects)
        filters = {}
        self._entries = {}
        for position, predicate in chosen.items():  # first, so that what is shared is theirs
            start = len(self._objects)
            self._entries[position] = hold(args[position])
            filters |= dict.fromkeys(range(start, len(self._objects)), predicate)
        self.args = tuple(None if n in chosen else hold(a) for n, a in enumerate(args))
        self.kwargs = {name: hold(a) for name, a in kwargs.items()}
        if groups.microbatch_size is not None or groups.mesh is not None:
            _refuse_metrics(self._objects)

        def differentiated(path: Any, value: Any) -> bool:
            return path[0] in filters and filters[path[0]](path[1:], value)

        self._split = lambda objects: nnx.split(objects, differentiated, ...)
        self._graph, params, state = self._split(tuple(self._objects))
        # Of its own: later passes start from it, after the objects have moved on.
        self.state = jax.tree.map(lambda x: x, state)
        own = lambda x: params.get(x.index, nnx.State({})) if isinstance(x, _doors.Hole) else x
        self.params = tuple(_doors.map_holes(own, entry) for entry in self._entries.values())

    def pure(self, loss_fn: Callable[..., Any], has_aux: bool) -> _doors.Loss:
        def loss(params: Any, state: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
            objects, args, kwargs = self.filled(params, state, args, kwargs)
            out = loss_fn(*args, **kwargs)
            return *_doors.pair(out, has_aux), self._split(objects)[2]

        return loss

    def own_args(self, extra_args: Any) -> Any:
        """The further arguments of the transform; a function gets objects of its own."""
        if not callable(extra_args):
            return extra_args

        def given(*parts: Any) -> Any:
            _, args, kwargs = self.filled(*parts)
            return extra_args(*args, **kwargs)

        return given

    def filled(self, params: Any, state: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        """Objects of these parameters and this state, and the arguments with them in place."""
        found = {}

        def take(entry: Any, own: Any) -> Any:
            if not isinstance(entry, _doors.Hole):
                return own
            found[entry.index] = own
            return entry

        entries = [
            _doors.map_holes(take, entry, own)
            for entry, own in zip(self._entries.values(), params, strict=True)
        ]
        # Variables may only be changed by the trace that made them: make new ones.
        state = jax.tree.map(lambda x: x, state)
        objects = nnx.merge(self._graph, nnx.State(found), state)
        args = list(args)
        for position, entry in zip(self._entries, entries, strict=True):
            args[position] = entry
        return objects, *_doors.filled((tuple(args), kwargs), objects)

    def advance(self, state: Any) -> None:
        """Gives the objects their state after the call."""
        if self._grouped:  # each group has drawn from keys of its own
            keep = lambda old, new: old if _groups.is_key(old) else new
            state = jax.tree.map(keep, self.state, state)
        nnx.update(tuple(self._objects), state)

    def of_argnums(self, grads: Any) -> Any:
        return grads[0] if self._single else grads


def _is_object(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _refuse_metrics(objects: list[Any]) -> None:
    for _, x in nnx.iter_graph(objects):
        if isinstance(x, nnx.Metric):
            raise ValueError(
                "metrics must be updated after the call over groups of examples, from aux, because "
                f"their sums and counts are no averages, got {type(x).__name__} among the arguments"
            )
