"""Mapped axes: averaging over them, and what differs between kinds of map.

All code here that depends on the version of JAX is in `_marked`.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from sam_optax import _numerics

AxisName: TypeAlias = str | Sequence[str]


def pmean(axis_name: AxisName) -> optax.GradientTransformationExtraArgs:
    """Averages updates over a mapped axis, as a link of a chain.

    Its place says what the perturbation sees. After `sam` it gives per-device
    m-sharpness: each device perturbs with its own gradient and the results are
    averaged, one all-reduce, as for plain SGD. Inside the ascent, before
    `dual_ascent`, it gives all devices one shared perturbation; with an inner
    axis name of a 2-D mesh, one per group of devices.

        out = (1/n) sum over the axis of the updates

    Args:
      axis_name: name of an axis of pmap, shard_map or vmap, or a tuple or list
        of them.

    Returns:
      A stateless transformation; its result is the same on every device.

    Raises:
      NameError: at the call, outside a map with that axis.
      ValueError: at the call, under shard_map with replication checking, if
        the updates do not vary over the axis: JAX has then summed them over
        the devices already, and their mean would be n times too large. Cast
        params with `jax.lax.pcast(params, axis_name, to="varying")` before
        the gradient is taken, or use `value_and_grad` with axis_name. Without
        replication checking, and under pmap, nothing is summed.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.sam(rho=0.05), sam_optax.pmean("batch"), optax.sgd(0.1))
      >>> loss_fn = lambda w, x: jnp.sum((w - x) ** 2)
      >>> def step(w, x):
      ...     grad_fn = lambda w: jax.grad(loss_fn)(w, x)
      ...     return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]
      >>> w, batch = jnp.zeros(1), jnp.array([[1.0], [-2.0]])
      >>> print(jax.vmap(step, in_axes=(None, 0), axis_name="batch")(w, batch))
      [[-0.1]
       [-0.1]]

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, section 4.1 (m-sharpness).
    """

    def update(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        del params
        names = names_of(axis_name)
        _require_mapped(names)
        _require_varying(updates, names)
        return mean(updates, names)

    return optax.with_extra_args_support(optax.stateless(update))


def mean(tree: Any, axis_name: AxisName) -> Any:
    """Mean over a mapped axis of the floating and complex leaves; others pass."""
    names = names_of(axis_name)
    _require_mapped(names)

    def leaf_mean(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        # XLA ends the process over half precision in a map over some axes of a mesh on a CPU,
        # where it sums in float32 anyway.
        wide = _numerics.widened(x) if jax.default_backend() == "cpu" else x
        return jax.lax.pmean(wide, names).astype(x.dtype)

    return jax.tree.map(leaf_mean, tree)


def index(axis_name: AxisName) -> jax.Array:
    """Index of this device, or group, along the axes together."""
    names = names_of(axis_name)
    _require_mapped(names)
    return jax.lax.axis_index(names)


def first(x: Any, axis_name: AxisName) -> jax.Array:
    """The value on the first device along the axes, on all of them."""
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
        data = first(jax.random.key_data(x), axis_name)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    picked = jnp.where(index(axis_name) == 0, x, jnp.zeros_like(x))
    return jax.lax.psum(picked, names_of(axis_name)).astype(jnp.result_type(x))


def vary(tree: Any, axis_name: AxisName) -> Any:
    """Marks replicated values as varying over the axes, where JAX keeps such marks.

    Under shard_map with replication checking, the gradient with respect to a
    replicated value is summed over the devices by JAX itself. Each device's
    own gradient needs the value marked as varying first.
    """
    names = names_of(axis_name)
    _require_mapped(names)
    manual = _manual_axes()

    def leaf_vary(x: Any) -> Any:
        for name in (name for name in names if name in manual):
            x, _ = _marked(x, name)
        return x

    return jax.tree.map(leaf_vary, tree)


def names_of(axis_name: Any) -> tuple[Any, ...]:
    """The axes as a tuple."""
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def are_mapped(axis_name: AxisName | None) -> bool:
    """Whether devices may differ here: in a map whose axis is named, or in a shard_map."""
    return axis_name is not None or bool(_manual_axes())


def _require_mapped(names: tuple[Any, ...]) -> None:
    for name in names:
        try:
            jax.lax.axis_size(name)
        except NameError as error:
            raise NameError(
                "axis_name must be an axis of the pmap, shard_map or vmap that this runs in "
                f"(with value_and_grad_fn(mesh=...) a chain needs no pmean), got {name!r}"
            ) from error


def _manual_axes() -> tuple[Any, ...]:
    # Axes of vmap are not in the mesh and carry no marks.
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def _marked(x: Any, name: Any) -> tuple[Any, bool]:
    """The value marked as varying, and whether it was not so before."""
    # A value that varies already refuses; how to ask differs between JAX versions.
    with contextlib.suppress(ValueError):
        return jax.lax.pcast(x, name, to="varying"), True
    return x, False


def _require_varying(updates: Any, names: tuple[Any, ...]) -> None:
    """Refuses what JAX has summed; without replication checking nothing ever carries marks."""
    for name in (name for name in names if name in _manual_axes()):
        for path, x in jax.tree_util.tree_leaves_with_path(updates):
            if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
                continue
            marked, was_whole = _marked(x, name)
            if was_whole and not _marked(marked, name)[1]:
                raise ValueError(
                    f"updates must vary over the axis {name!r} that pmean averages over: JAX has "
                    "summed the gradient over the devices, because params do not vary. Cast them "
                    f"before you take it, params = jax.lax.pcast(params, {name!r}, to='varying'), "
                    "or use sam_optax.value_and_grad(..., axis_name=...), got an update that does "
                    f"not vary at {jax.tree_util.keystr(path) or 'the root'}"
                )
