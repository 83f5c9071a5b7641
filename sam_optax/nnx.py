"""Flax NNX modules in place of parameter trees."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _axes, _functional
from sam_optax._methods import sam

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
    **options: Any,
) -> Callable[..., Any]:
    """Like `nnx.value_and_grad`, with the sharpness-aware gradient.

    The module is the first argument of the loss. Its other state (BatchNorm
    statistics, dropout keys) moves once a call, as in the clean pass, however
    many passes the transform makes; both passes see the same dropout mask.

        loss = L(w);  grads = transform(grad L(w)), by default grad L(w + e)

    Args:
      loss_fn: loss_fn(module, *args, **kwargs) returns a scalar, or a pair of
        it and aux.
      transform: a method without state, as in `sam_optax.value_and_grad`.
      has_aux: whether loss_fn returns (loss, aux).
      wrt: filter of the variables to differentiate, the same as that of
        `nnx.Optimizer`.
      **options: the other options of `sam_optax.value_and_grad`. aux_from
        decides for the module's state as well as for aux. Over groups of
        examples floating state is averaged, and the rest (counts and keys,
        alike in all groups) is kept once.

    Returns:
      A function of the arguments of loss_fn that updates the module's other
      state in place and returns (loss, grads), or ((loss, aux), grads); grads
      is an `nnx.State` for the update of a stock `nnx.Optimizer`.

    Raises:
      ValueError, TypeError: as `sam_optax.value_and_grad`.

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
    """
    average_aux = options.pop("average_aux", True)

    def sharp_value_and_grad(module: Any, *args: Any, **kwargs: Any) -> Any:
        graph, params, rest = nnx.split(module, wrt, ...)

        def pure_loss(params: Any, *args: Any, **kwargs: Any) -> Any:
            # Variables may only be changed by the trace that made them: make new ones.
            module = nnx.merge(graph, params, jax.tree.map(lambda x: x, rest))
            out = loss_fn(module, *args, **kwargs)
            loss, aux = out if has_aux else (out, None)
            return loss, (aux, nnx.split(module, wrt, ...)[2])

        sharp = _functional.value_and_grad(
            pure_loss, transform, has_aux=True, average_aux=False, **options
        )
        (loss, (aux, new_rest)), grads = sharp(params, *args, **kwargs)
        grouped = options.get("microbatch_size") is not None
        axis_name = options.get("axis_name")
        nnx.update(module, _over_groups(new_rest, grouped, axis_name))
        if average_aux:
            aux = _over_groups(aux, grouped, axis_name)
        return ((loss, aux) if has_aux else loss), grads

    return sharp_value_and_grad


def _over_groups(tree: Any, grouped: bool, axis_name: _axes.AxisName | None) -> Any:
    """Mean over micro-batches and devices of floating leaves; others are alike in all groups."""

    def over_microbatches(x: Any) -> Any:
        return jnp.mean(x, axis=0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]

    if grouped:
        tree = jax.tree.map(over_microbatches, tree)
    return tree if axis_name is None else _axes.mean(tree, axis_name)
