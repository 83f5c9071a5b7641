"""Door 1: a loss function and parameters in, the sharpness-aware gradient out."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import optax

from sam_optax import _axes, _checks, _groups, _numerics
from sam_optax._methods import sam


def value_and_grad(
    loss_fn: Callable[..., Any],
    transform: optax.GradientTransformation = sam(),
    *,
    has_aux: bool = False,
    aux_from: Literal["clean", "perturbed"] = "clean",
    axis_name: _axes.AxisName | None = None,
    microbatch_size: int | None = None,
    batch_argnums: int | str | Sequence[int | str] | None = None,
    unroll: int | bool | None = None,
    vectorize: int | bool = 1,
    average_aux: bool = True,
    allow_int: bool = False,
) -> Callable[..., Any]:
    r"""Like `jax.value_and_grad`, with the sharpness-aware gradient.

    The function returned gives the loss at params and the gradient that the
    transform makes of it. Use it wherever `jax.value_and_grad` stands in a
    training step; the rest of the step stays as it is.

        loss = L(w);  grads = transform(grad L(w)), by default grad L(w + e)

    With groups of examples (microbatch_size on one device, axis_name over
    devices, or both) each group has its own gradient, its own e and its own
    g_s, and the mean over groups is returned: m-sharpness.

    Args:
      loss_fn: loss_fn(params, *args, **kwargs) returns a scalar, or a pair of
        it and aux.
      transform: a method without state, such as `sam` or `asam` with constant
        or traced rho; `sam()` by default.
      has_aux: whether loss_fn returns (loss, aux).
      aux_from: which pass owns aux, "clean" (at w) or "perturbed" (at w + e).
        BatchNorm statistics belong to the clean one.
      axis_name: mapped axis (pmap, shard_map, vmap), or a tuple of them, over
        which loss, gradient and aux are averaged. Each device perturbs with
        its own gradient. Fold `jax.lax.axis_index` into keys yourself.
      microbatch_size: examples per group, at least 1; has to divide the batch.
        Groups are contiguous, run one after another in the memory of one, and
        each gets its own key, `jax.random.fold_in(key, index)`, of every typed
        key among the arguments. Use under jit. Of a batch sharded over a mesh
        of explicit axes each group stays spread over the devices; where the
        axes are automatic, prefer `jax.shard_map` with axis_name.
      batch_argnums: the arguments that microbatch_size splits along their first
        axis: positions as in loss_fn (params is 0) or names of keyword
        arguments. By default all positional ones; scalars and keys stay whole.
      unroll: of the loop over groups, as in `jax.lax.scan`; True writes it out.
        By default a loop, except on CPU where the loss holds a convolution,
        whose gradient XLA compiles badly inside of loops there. Compile time
        and program grow with the groups written out.
      vectorize: groups evaluated together by `jax.vmap`; has to divide their
        number, True for all of them. Memory grows with it. Worth it where one
        group cannot fill the device.
      average_aux: average aux over groups, which then has to be floating or
        complex; otherwise devices keep their own and micro-batches are stacked
        on a new first axis.
      allow_int: as in `jax.value_and_grad`.

    Returns:
      A function of the arguments of loss_fn that returns (loss, grads), or
      ((loss, aux), grads) with has_aux; grads is like params.

    Raises:
      ValueError: for unknown aux_from, or microbatch_size or vectorize below 1;
        at the call, for a transform with state, a batch that microbatch_size
        does not divide, or groups that vectorize does not divide.
      TypeError: at the call, for integer aux where an average is asked for.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w, x: jnp.sum((w - x) ** 2)
      >>> sharp = sam_optax.value_and_grad(loss_fn, sam_optax.sam(rho=0.1))
      >>> loss, grads = sharp(jnp.zeros(2), jnp.array([3.0, 4.0]))
      >>> print(loss, grads)  # jax.grad would give [-6. -8.]
      25.0 [-6.12 -8.16]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1 and section 4.1.

    Note:
      Costs what the transform costs, two gradients for `sam`. Inside jit the
      loss is traced once, however often it is evaluated.
    """
    transform = optax.with_extra_args_support(transform)
    _checks.one_of("aux_from", aux_from, ("clean", "perturbed"))
    if microbatch_size is not None:
        _checks.integer_at_least("microbatch_size", microbatch_size, 1)
    _checks.integer_at_least("vectorize", int(vectorize), 1)

    def group_value_and_grad(params: Any, args: Any, kwargs: Any) -> Any:
        """((loss, aux), grads) of one group of examples."""
        state = transform.init(params)
        if jax.tree.leaves(state):
            raise ValueError(
                "transform must be without state, which value_and_grad has nowhere to keep; "
                "put it into optax.chain(transform, optimizer) and call update with grad_fn=, "
                f"got state {jax.tree.structure(state)}"
            )

        def evaluate(params: Any) -> Any:
            out, grads = jax.value_and_grad(loss_fn, has_aux=has_aux, allow_int=allow_int)(
                params, *args, **kwargs
            )
            return out if has_aux else (out, None), _numerics.conjugate(grads)

        # Called at w and at w + e: under jit, a jitted function is traced once
        # for both. Outside, stay with what jax.value_and_grad does there.
        if _checks.has_traced(params, args, kwargs):
            evaluate = jax.jit(evaluate)
        (loss, aux), clean = evaluate(params)
        perturbed_aux = []

        def descent_grad_fn(params: Any) -> Any:
            (_, aux), grads = evaluate(params)
            perturbed_aux.append(aux)
            return grads

        grads, _ = transform.update(
            clean,
            state,
            params,
            grad_fn=lambda params: evaluate(params)[1],
            descent_grad_fn=descent_grad_fn,
        )
        if aux_from == "perturbed":
            if not perturbed_aux:
                raise ValueError(
                    'aux_from must be "clean" for a transform that evaluates no perturbed '
                    f"gradient, got {aux_from!r}"
                )
            aux = perturbed_aux[-1]
        return (loss, aux), _numerics.conjugate(grads)

    @functools.wraps(loss_fn)
    def sharp_value_and_grad(params: Any, *args: Any, **kwargs: Any) -> Any:
        if axis_name is not None:
            params = _axes.vary(params, axis_name)
        if microbatch_size is None:
            (loss, aux), grads = group_value_and_grad(params, args, kwargs)
        else:
            (loss, aux), grads = _groups.mean_over_groups(
                functools.partial(group_value_and_grad, params),
                args,
                kwargs,
                size=microbatch_size,
                argnums=batch_argnums,
                unroll=unroll,
                vectorize=vectorize,
                stack_aux=not average_aux,
            )
        if axis_name is not None:
            loss, grads = _axes.mean((loss, grads), axis_name)
            if average_aux:
                aux = _axes.mean(_groups.check_averageable(aux), axis_name)
        return ((loss, aux) if has_aux else loss), grads

    return sharp_value_and_grad


def grad(
    loss_fn: Callable[..., Any],
    transform: optax.GradientTransformation = sam(),
    *,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """Like `jax.grad`, with the sharpness-aware gradient.

    `value_and_grad` without the value; use it where the loss is not logged.

    Args:
      loss_fn: as in `value_and_grad`.
      transform: as in `value_and_grad`.
      has_aux: whether loss_fn returns (loss, aux).
      **options: the other options of `value_and_grad`.

    Returns:
      A function of the arguments of loss_fn that returns grads, or (grads, aux)
      with has_aux.

    Raises:
      ValueError, TypeError: as `value_and_grad`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> print(sam_optax.grad(loss_fn, sam_optax.sam(rho=0.1))(jnp.array([3.0, 4.0])))
      [6.12 8.16]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.
    """
    sharp = value_and_grad(loss_fn, transform, has_aux=has_aux, **options)

    @functools.wraps(loss_fn)
    def sharp_grad(*args: Any, **kwargs: Any) -> Any:
        value, grads = sharp(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return sharp_grad
