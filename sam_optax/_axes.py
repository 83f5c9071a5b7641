"""Mapped axes: averaging over them, and what differs between kinds of map.

All code here that depends on the version of JAX is in `vary`.
"""

import contextlib
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

AxisName: TypeAlias = str | tuple[str, ...]


def pmean(axis_name: AxisName) -> optax.GradientTransformationExtraArgs:
    """Averages updates over a mapped axis, as a link of a chain.

    Its place says what the perturbation sees. After `sam` it gives per-device
    m-sharpness: each device perturbs with its own gradient and the results are
    averaged, one all-reduce, as for plain SGD. Inside the ascent, before
    `dual_ascent`, it gives all devices one shared perturbation; with an inner
    axis name of a 2-D mesh, one per group of devices.

        out = (1/n) sum over the axis of the updates

    Args:
      axis_name: name of an axis of pmap, shard_map or vmap, or a tuple of them.

    Returns:
      A stateless transformation; its result is the same on every device.

    Raises:
      NameError: at the call, outside a map with that axis.

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
        return mean(updates, axis_name)

    return optax.with_extra_args_support(optax.stateless(update))


def mean(tree: Any, axis_name: AxisName) -> Any:
    """Mean over a mapped axis of the floating and complex leaves; others pass."""

    def leaf_mean(x: Any) -> Any:
        return jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return jax.tree.map(leaf_mean, tree)


def vary(tree: Any, axis_name: AxisName) -> Any:
    """Marks replicated values as varying over the axes, where JAX keeps such marks.

    Under shard_map with replication checking, the gradient with respect to a
    replicated value is summed over the devices by JAX itself. Each device's
    own gradient needs the value marked as varying first.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    # Axes of vmap are not in the mesh and carry no marks.
    manual = jax.sharding.get_abstract_mesh().manual_axes

    def leaf_vary(x: Any) -> Any:
        for name in (name for name in names if name in manual):
            # A value that varies already refuses; how to ask differs between JAX versions.
            with contextlib.suppress(ValueError):
                x = jax.lax.pcast(x, name, to="varying")
        return x

    return jax.tree.map(leaf_vary, tree)
