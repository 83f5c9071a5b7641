"""Door 1: a loss function and parameters in, the sharpness-aware gradient out."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import optax

from sam_optax import _axes, _doors, _mesh
from sam_optax._family.sam import sam
from sam_optax._groups import Groups


def value_and_grad(
    loss_fn: Callable[..., Any],
    transform: optax.GradientTransformation = sam(),
    *,
    has_aux: bool = False,
    aux_from: _doors.AuxFrom = "clean",
    ascent_fraction: float = 1.0,
    ascent_dtype: jax.typing.DTypeLike | None = None,
    axis_name: _axes.AxisName | None = None,
    microbatch_size: int | None = None,
    batch_argnums: int | str | Sequence[int | str] | None = None,
    unroll: int | bool | None = None,
    vectorize: int | bool = 1,
    average_aux: Any = True,
    mesh: _mesh.AnyMesh | None = None,
    allow_int: bool = False,
    extra_args: _doors.ExtraArgs | None = None,
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
        or traced rho; `sam()` by default. It gets grad_fn and value_fn, the
        gradient and the loss elsewhere with the same arguments.
      has_aux: whether loss_fn returns (loss, aux).
      aux_from: which pass owns aux: "clean", at w, as the loss (BatchNorm
        statistics belong there); "perturbed", at w + e, the first such pass of
        methods with several; or "ascent", the pass that the ascent gradient
        comes from, which then gives the loss as well: the same as "clean" but
        for the next two options.
      ascent_fraction: the part of its examples, in (0, 1], from which each group
        takes its ascent gradient: the first ones of the group, so batches
        should be in random order. It has to make a whole number of each group.
        The descent is of all examples. What is split is what batch_argnums
        names. Loss and aux are still of all examples: where the step uses those
        at w, they cost a forward pass more, which "ascent" and "perturbed" save
        (see the note).
      ascent_dtype: to which parameters and floating arguments are rounded for
        the ascent gradient, such as jnp.bfloat16; None leaves them. Gradient,
        loss and aux keep the dtypes of the descent's pass. Layers that are told
        a dtype of their own (`nn.Dense(dtype=...)`) compute in that one.
      axis_name: mapped axis (pmap, shard_map, vmap), or a tuple or list of
        them, over which loss, gradient and aux are averaged. Each device
        perturbs with its own gradient. Fold `jax.lax.axis_index` into keys
        yourself. With mesh, an axis of it, or several, inside no map.
      microbatch_size: examples per group, at least 1; has to divide the batch.
        Groups are contiguous, run one after another in the memory of one, and
        each gets its own key, `jax.random.fold_in(key, index)`, of every typed
        key among the arguments. A key that loss_fn closes over cannot be seen:
        all groups would share it, and one dropout mask, so pass keys as
        arguments. Use under jit. Of a batch sharded over a mesh of explicit
        axes each group stays spread over the devices; where the axes are
        automatic, prefer `jax.shard_map` with axis_name.
      batch_argnums: the arguments that hold examples along their first axis, for
        microbatch_size, mesh and ascent_fraction: positions as in loss_fn
        (params is 0) or names of keyword arguments. By default all positional
        ones; scalars and keys stay whole.
      unroll: of the loop over groups, as in `jax.lax.scan`; True writes it out.
        By default a loop, except on CPU where the loss holds a convolution,
        whose gradient XLA compiles badly inside of loops there. Compile time
        and program grow with the groups written out.
      vectorize: groups evaluated together by `jax.vmap`; has to divide their
        number, True for all of them. Memory grows with it. Worth it where one
        group cannot fill the device. Of a batch that jit shards over devices
        groups may be moved between them; with mesh all stay where they are.
      average_aux: which parts of aux are averaged over groups: a boolean, or
        a tree of booleans that is a prefix of aux, such as (True, False) for
        (statistics, logits). What is averaged has to be floating or complex.
        Of the rest devices keep their own (logits leave shard_map with
        out_specs=P("batch")) and micro-batches are stacked on a new first axis;
        with mesh the parts of all devices are joined along their first axis.
      mesh: for an ordinary jitted step, without a map of yours: the mesh that
        axis_name is an axis of. The arguments that batch_argnums names, by
        default all positional ones, are split over that axis along their first
        axis, in order; each device along it, with its whole row of the other
        axes, is a group, with BatchNorm statistics of its own and keys folded
        with its index (typed keys among the arguments; here not by you).
        Parameters are whole over that axis, and keep whatever sharding they
        have over the others. loss_fn may name the axis in collectives, such as
        `BatchNorm(axis_name=...)`, but must not gather parameters over it:
        the gradient would be that of other groups as well, which is not seen.
        Where parameters are sharded over other axes (FSDP within groups, tensor
        parallel), make those axes automatic before jax 0.12: JAX 0.9 and 0.10
        gather what is sharded over explicit ones where the map begins. The
        numbers are right.
      allow_int: as in `jax.value_and_grad`.
      extra_args: further keyword arguments for a transform with inputs of its
        own: a mapping, or a function of the arguments of loss_fn, those of the
        group, that returns one.

    Returns:
      A function of the arguments of loss_fn that returns (loss, grads), or
      ((loss, aux), grads) with has_aux; grads is like params.

    Raises:
      ValueError: for unknown aux_from, an ascent_fraction outside of (0, 1] or
        an ascent_dtype that is not floating, or microbatch_size or vectorize
        below 1; at the call, for a transform with state or one that descends as
        an optimizer does, a batch that microbatch_size does not divide, a group
        of which ascent_fraction makes no whole number of examples, groups
        that vectorize does not divide, a mesh without the axis (or no
        axis_name), a batch that the axis of mesh does not divide, params
        sharded over it (seen on explicit meshes, and of arrays outside of jit;
        else they are gathered), keys of the old kind (uint32) where groups
        would share them, or aux_from="perturbed", ascent_fraction or
        ascent_dtype for a method that does not take the perturbed gradient at
        every step.
      TypeError: for a transform that is none, such as `sam` itself; at the
        call, for integer aux where an average is asked for, or a loss that
        returns aux without has_aux.
      NameError: at the call, outside a map with the axis named.

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
      loss is traced once, however often it is evaluated. With ascent_fraction f
      the ascent costs f gradients in place of one and the step 1 + f, and a
      forward pass (a third of a gradient) where loss or aux of the clean pass
      are used. Methods whose descent looks at the clean gradient (`gsam`,
      `wsam`, `stable_sam`) see that of the part; with the same rho the e of a
      small part has the same length, and a noisier direction.
    """
    groups = Groups(axis_name, microbatch_size, batch_argnums, unroll, vectorize, average_aux, mesh)

    given: Any = extra_args

    def own_args(params: Any, carried: Any, args: Any, kwargs: Any) -> Any:
        del carried
        return given(params, *args, **kwargs)

    sharp = _doors.value_and_grad(
        _pure(loss_fn, has_aux),
        transform,
        groups,
        aux_from=aux_from,
        ascent_fraction=ascent_fraction,
        ascent_dtype=ascent_dtype,
        extra_args=own_args if callable(extra_args) else extra_args,
        allow_int=allow_int,
    )

    @functools.wraps(loss_fn)
    def sharp_value_and_grad(params: Any, *args: Any, **kwargs: Any) -> Any:
        (loss, aux, _), grads = sharp(params, (), args, kwargs)
        return ((loss, aux) if has_aux else loss), grads

    return sharp_value_and_grad


def grad(
    loss_fn: Callable[..., Any],
    transform: optax.GradientTransformation = sam(),
    *,
    has_aux: bool = False,
    **options: Unpack[_doors.Options],
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


def value_and_grad_fn(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    axis_name: _axes.AxisName | None = None,
    microbatch_size: int | None = None,
    batch_argnums: int | str | Sequence[int | str] | None = None,
    unroll: int | bool | None = None,
    vectorize: int | bool = 1,
    average_aux: Any = True,
    mesh: _mesh.AnyMesh | None = None,
    allow_int: bool = False,
) -> Callable[..., Any]:
    r"""The clean value and gradient, and the function that gives the gradient elsewhere.

    What a method in `optax.chain` needs of a loss, in one call. For methods
    with memory (`look_sam`, a schedule of rho, an average); those without
    may use `value_and_grad`.

        value = L(w),  grads = grad L(w),  grad_fn(v) = grad L(v)

    Args:
      loss_fn: as in `value_and_grad`; the arguments of this call (batch, keys)
        serve grad_fn as well, so that all passes share one dropout mask.
      has_aux: whether loss_fn returns (loss, aux); aux is the clean pass's.
      axis_name: mapped axis over which value and aux are averaged. grads and
        grad_fn are each device's own, under shard_map with replication checking
        too: `pmean` after the method in the chain averages (m-sharpness), and
        inside the ascent as well gives one shared perturbation.
      microbatch_size: examples that fit in memory together. grads and grad_fn
        are means over the groups: gradient accumulation with one perturbation
        for all.
      batch_argnums: as in `value_and_grad`, and likewise unroll, vectorize and
        average_aux.
      unroll: see `value_and_grad`.
      vectorize: see `value_and_grad`.
      average_aux: see `value_and_grad`.
      mesh: as in `value_and_grad`, with axis_name an axis of it; but grads and
        grad_fn are means over the groups, as with microbatch_size: one
        perturbation for all. So the chain holds no `pmean`, which would find
        no axis to average over. For a perturbation of each group take
        `value_and_grad`, or `pmean` inside of your own `jax.shard_map`.
      allow_int: as in `jax.value_and_grad`.

    Returns:
      A function of the arguments of loss_fn that returns (value, grads,
      grad_fn), or ((value, aux), grads, grad_fn) with has_aux, for
      `tx.update(grads, state, params, grad_fn=grad_fn)`. For complex leaves
      the gradients are the conjugate of `jax.grad`'s, as Optax has them.

    Raises:
      ValueError, TypeError, NameError: as `value_and_grad`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.look_sam(rho=0.1, k=2), optax.sgd(0.1))
      >>> evaluate = sam_optax.value_and_grad_fn(lambda w, x: jnp.sum((w - x) ** 2))
      >>> @jax.jit
      ... def step(w, state, x):
      ...     value, grads, grad_fn = evaluate(w, x)
      ...     updates, state = tx.update(grads, state, w, grad_fn=grad_fn)
      ...     return optax.apply_updates(w, updates), state, value
      >>> w = jnp.array([3.0, 4.0])
      >>> w, state, value = step(w, tx.init(w), jnp.zeros(2))
      >>> print(w, value)  # 0.1 times the gradient at [3.06 4.08]
      [2.388 3.184] 25.0

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.

    Note:
      One gradient, and one more for each call of grad_fn. Inside jit the loss
      is traced once, and gradients that nothing uses cost nothing.
    """
    groups = Groups(axis_name, microbatch_size, batch_argnums, unroll, vectorize, average_aux, mesh)
    start = _doors.value_and_grad_fn(_pure(loss_fn, has_aux), groups, allow_int=allow_int)

    @functools.wraps(loss_fn)
    def clean_value_and_grad_fn(params: Any, *args: Any, **kwargs: Any) -> Any:
        (value, aux, _), grads, grad_fn = start(params, (), args, kwargs)
        return ((value, aux) if has_aux else value), grads, grad_fn

    return clean_value_and_grad_fn


def _pure(loss_fn: Callable[..., Any], has_aux: bool) -> _doors.Loss:
    def loss(params: Any, carried: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        return *_doors.pair(loss_fn(params, *args, **kwargs), has_aux), carried

    return loss
