"""Equinox modules in place of parameter trees."""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import optax

from sam_optax import _doors
from sam_optax._family.sam import sam

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        "sam_optax.equinox needs Equinox: pip install 'sam-optax[equinox]'"
    ) from error


def value_and_grad(
    loss_fn: Callable[..., Any],
    transform: optax.GradientTransformation = sam(),
    *,
    has_aux: bool = False,
    filter_spec: Any = eqx.is_inexact_array,
    **options: Unpack[_doors.Options],
) -> Callable[..., Any]:
    """Like `equinox.filter_value_and_grad`, with the sharpness-aware gradient.

    Differentiates the floating arrays of the model, the first argument of the
    loss; all else in it, functions included, stays as it is. `eqx.nn.State`
    may stand among the arguments and in aux: every pass starts from the one
    given, and aux has that of the clean pass.

        loss = L(w);  grads = transform(grad L(w)), by default grad L(w + e)

    Args:
      loss_fn: loss_fn(model, *args, **kwargs) returns a scalar, or a pair of it
        and aux.
      transform: a method without state, as in `sam_optax.value_and_grad`.
      has_aux: whether loss_fn returns (loss, aux).
      filter_spec: which leaves of the model to differentiate, as in
        `eqx.partition`: a function of a leaf or a tree of booleans.
      **options: the other options of `sam_optax.value_and_grad`. Over groups of
        examples the floats of an `eqx.nn.State` in aux are averaged, and the
        rest of it (counts, alike in all groups) is kept once. A state, and a
        module among the arguments, is never split by microbatch_size. Keys in
        them are folded with the index of the group; over devices a state should
        hold none, because each device would return another one (with mesh all
        return that of the first group). With mesh the arguments that are split
        are those beside the model, states and modules.

    Returns:
      A function of the arguments of loss_fn that returns (loss, grads), or
      ((loss, aux), grads) with has_aux; grads is like the model, with None
      where nothing is differentiated, for `tx.update` and `eqx.apply_updates`.

    Raises:
      ValueError, TypeError, NameError: as `sam_optax.value_and_grad`.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax, sam_optax.equinox
      >>> model = eqx.nn.Linear(2, 1, key=jax.random.key(0))
      >>> tx = optax.sgd(0.1)
      >>> @eqx.filter_jit
      ... def step(model, opt_state, x, y):
      ...     loss_fn = lambda model, x, y: jnp.mean((jax.vmap(model)(x) - y) ** 2)
      ...     loss, grads = sam_optax.equinox.value_and_grad(loss_fn)(model, x, y)
      ...     params = eqx.filter(model, eqx.is_inexact_array)
      ...     updates, opt_state = tx.update(grads, opt_state, params)
      ...     return eqx.apply_updates(model, updates), opt_state, loss
      >>> opt_state, losses = tx.init(eqx.filter(model, eqx.is_inexact_array)), []
      >>> for _ in range(50):
      ...     model, opt_state, loss = step(model, opt_state, jnp.eye(2), jnp.ones((2, 1)))
      ...     losses.append(loss)
      >>> print(losses[0] > 0.5 > 0.1 > losses[-1])
      True

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.

    Note:
      Costs what the transform costs, two gradients for `sam`. With or without
      this door, `eqx.nn.BatchNorm` of Equinox 0.13 does not run under shard_map
      with replication checking, nor, with mode="ema", in any shard_map or pmap
      since jax 0.10: take mode="batch" and check_vma=False, or mesh, whose
      map is without replication checking.
    """
    groups, rest = _doors.split_options(options, _doors.Options, first=1)
    _doors.check(transform, **rest)

    @functools.wraps(loss_fn)
    def sharp_value_and_grad(model: Any, *args: Any, **kwargs: Any) -> Any:
        call = _Call(model, args, kwargs, filter_spec)
        own = call.own_args(rest.get("extra_args"))
        sharp = _doors.value_and_grad(
            call.pure(loss_fn, has_aux), transform, groups, **{**rest, "extra_args": own}
        )
        (loss, aux, states), grads = sharp(call.params, call.carried, call.args, call.kwargs)
        return ((loss, call.whole_aux(aux, states)) if has_aux else loss), grads

    return sharp_value_and_grad


def grad(
    loss_fn: Callable[..., Any],
    transform: optax.GradientTransformation = sam(),
    *,
    has_aux: bool = False,
    filter_spec: Any = eqx.is_inexact_array,
    **options: Unpack[_doors.Options],
) -> Callable[..., Any]:
    """Like `equinox.filter_grad`, with the sharpness-aware gradient.

    `value_and_grad` without the value; use it where the loss is not logged.

    Args:
      loss_fn: as in `value_and_grad`.
      transform: as in `value_and_grad`.
      has_aux: whether loss_fn returns (loss, aux).
      filter_spec: as in `value_and_grad`.
      **options: as in `value_and_grad`.

    Returns:
      A function of the arguments of loss_fn that returns grads, or (grads, aux)
      with has_aux.

    Raises:
      ValueError, TypeError, NameError: as `value_and_grad`.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, sam_optax.equinox
      >>> model = eqx.nn.Linear(1, 1, use_bias=False, key=jax.random.key(0))
      >>> model = eqx.tree_at(lambda m: m.weight, model, jnp.full((1, 1), 2.0))
      >>> loss_fn = lambda model, x: jnp.sum(model(x) ** 2)
      >>> grads = sam_optax.equinox.grad(loss_fn, sam_optax.sam(0.5))(model, jnp.ones(1))
      >>> print(grads.weight)  # eqx.filter_grad would give 4
      [[5.]]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.
    """
    sharp = value_and_grad(loss_fn, transform, has_aux=has_aux, filter_spec=filter_spec, **options)

    @functools.wraps(loss_fn)
    def sharp_grad(*args: Any, **kwargs: Any) -> Any:
        value, grads = sharp(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return sharp_grad


def value_and_grad_fn(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    filter_spec: Any = eqx.is_inexact_array,
    **options: Unpack[_doors.GroupOptions],
) -> Callable[..., Any]:
    """The clean value and gradient, and the function that gives the gradient elsewhere.

    For methods with memory, in a chain. All passes start from the
    `eqx.nn.State` given and share the keys given; aux has the clean pass's.

        value = L(w),  grads = grad L(w),  grad_fn(v) = grad L(v)

    Args:
      loss_fn: as in `value_and_grad`.
      has_aux: whether loss_fn returns (loss, aux).
      filter_spec: as in `value_and_grad`.
      **options: the other options of `sam_optax.value_and_grad_fn`, over groups
        as in `value_and_grad`. With mesh grads and grad_fn are means over the
        groups: no `pmean` in the chain.

    Returns:
      A function of the arguments of loss_fn that returns (value, grads,
      grad_fn), or ((value, aux), grads, grad_fn), for `tx.update(grads, state,
      eqx.filter(model, eqx.is_inexact_array), grad_fn=grad_fn)`.

    Raises:
      ValueError, TypeError, NameError: as `value_and_grad`.

    Example:
      >>> import equinox as eqx, jax, jax.numpy as jnp, optax, sam_optax.equinox
      >>> model = eqx.nn.Linear(2, 1, key=jax.random.key(0))
      >>> tx = optax.chain(sam_optax.look_sam(rho=0.05, k=5), optax.sgd(0.1))
      >>> loss_fn = lambda model, x, y: jnp.mean((jax.vmap(model)(x) - y) ** 2)
      >>> @eqx.filter_jit
      ... def step(model, opt_state, x, y):
      ...     value, grads, grad_fn = sam_optax.equinox.value_and_grad_fn(loss_fn)(model, x, y)
      ...     params = eqx.filter(model, eqx.is_inexact_array)
      ...     updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
      ...     return eqx.apply_updates(model, updates), opt_state, value
      >>> opt_state, losses = tx.init(eqx.filter(model, eqx.is_inexact_array)), []
      >>> for _ in range(50):
      ...     model, opt_state, value = step(model, opt_state, jnp.eye(2), jnp.ones((2, 1)))
      ...     losses.append(value)
      >>> print(losses[0] > 0.5 > 0.1 > losses[-1])
      True

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.

    Note:
      One gradient, and one more for each call of grad_fn.
    """
    groups, rest = _doors.split_options(options, _doors.GroupOptions, first=1)

    @functools.wraps(loss_fn)
    def clean_value_and_grad_fn(model: Any, *args: Any, **kwargs: Any) -> Any:
        call = _Call(model, args, kwargs, filter_spec)
        start = _doors.value_and_grad_fn(call.pure(loss_fn, has_aux), groups, **rest)
        (value, aux, states), grads, grad_fn = start(
            call.params, call.carried, call.args, call.kwargs
        )
        return ((value, call.whole_aux(aux, states)) if has_aux else value), grads, grad_fn

    return clean_value_and_grad_fn


class _Call:
    """The arguments of one call, taken apart: params, states and modules, and arrays."""

    def __init__(self, model: Any, args: Any, kwargs: Any, filter_spec: Any):
        self.params, rest = eqx.partition(model, filter_spec)
        objects = [rest]  # the first; those of the arguments follow
        self.args, self.kwargs = _doors.without((args, kwargs), _is_object, objects)
        # Only arrays go through JAX; the rest of an object is known now.
        self.carried, self._rest = eqx.partition(objects, eqx.is_array)
        self._aux_rest: Any = None

    def pure(self, loss_fn: Callable[..., Any], has_aux: bool) -> _doors.Loss:
        def loss(params: Any, carried: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
            model, args, kwargs = self._filled(params, carried, args, kwargs)
            value, aux = _doors.pair(loss_fn(model, *args, **kwargs), has_aux)
            states: list[Any] = []
            aux = _doors.without(aux, lambda x: isinstance(x, eqx.nn.State), states)
            aux, self._aux_rest = eqx.partition(aux, eqx.is_array)
            return value, aux, states

        return loss

    def own_args(self, extra_args: Any) -> Any:
        """The further arguments of the transform; a function gets the model and its group."""
        if not callable(extra_args):
            return extra_args

        def given(*parts: Any) -> Any:
            model, args, kwargs = self._filled(*parts)
            return extra_args(model, *args, **kwargs)

        return given

    def whole_aux(self, aux: Any, states: Any) -> Any:
        """aux as loss_fn returned it, its states in place."""
        return _doors.filled(eqx.combine(aux, self._aux_rest), states)

    def _filled(self, params: Any, carried: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        objects = eqx.combine(carried, self._rest)  # a state may be used once: make new ones
        return eqx.combine(params, objects[0]), *_doors.filled((args, kwargs), objects)


def _is_object(x: Any) -> bool:
    return isinstance(x, eqx.Module | eqx.nn.State)
