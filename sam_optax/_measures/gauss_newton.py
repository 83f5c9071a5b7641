"""A loss whose model and criterion are known apart: its Hessian without the model's curvature."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    """A loss function with its parts, from `gauss_newton`.

    Attributes:
      model_fn: model_fn(params, batch) returns outputs.
      criterion: criterion(outputs, batch) returns the scalar mean loss.
    """

    model_fn: Callable[[Any, Any], Any]
    criterion: Callable[[Any, Any], Any]

    def __call__(self, params: Any, batch: Any) -> Any:
        return self.criterion(self.model_fn(params, batch), batch)


def gauss_newton(
    model_fn: Callable[[Any, Any], Any], criterion: Callable[[Any, Any], Any]
) -> GaussNewton:
    r"""A loss for whose Hessian the measures take the Gauss-Newton matrix.

    The Hessian without the curvature of the model itself: positive semidefinite
    for a convex criterion such as cross-entropy or squared error, of which it is
    the Fisher matrix, and smoother in the course of training. Give it as loss_fn
    to `hessian_eigenvalues`, `hessian_trace` or `spectral_density`; elsewhere it
    is a loss like any other.

        G = J^T (d^2 criterion / d outputs^2) J,   J = d outputs / dw

    Args:
      model_fn: model_fn(params, batch) returns the outputs for a batch, a tree
        of real arrays, such as logits.
      criterion: criterion(outputs, batch) returns the scalar mean loss.

    Returns:
      A loss function loss_fn(params, batch).

    Raises:
      Nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> loss_fn = sharpness.gauss_newton(
      ...     lambda w, batch: batch[0] * w**2, lambda z, batch: jnp.mean((z - batch[1]) ** 2) / 2)
      >>> at = jnp.ones(1), (jnp.ones(4), jnp.full(4, 3.0))  # one weight
      >>> for loss in (loss_fn, lambda w, batch: loss_fn(w, batch)):  # 4 w^2, and 2 (w^2 - 3) more
      ...     print(sharpness.hessian_eigenvalues(loss, *at, key=0).top)
      [4.]
      [0.]

    References:
      Schraudolph, `Fast Curvature Matrix-Vector Products for Second-Order
      Gradient Descent <https://doi.org/10.1162/08997660260028683>`_, 2002;
      Martens, `New Insights and Perspectives on the Natural Gradient Method
      <https://arxiv.org/abs/1412.1193>`_, 2014, section 8.

    Note:
      A product with a vector costs about two thirds of one with the Hessian.
    """
    return GaussNewton(model_fn, criterion)


def product(outputs: Callable[[Any], Any], criterion: Callable[[Any], Any], at: Any, v: Any) -> Any:
    """J^T H J v for outputs as a function of `at`."""
    z, pull_back = jax.vjp(outputs, at)
    _, moved = jax.jvp(outputs, (at,), (v,))
    _, curved = jax.jvp(jax.grad(criterion), (z,), (moved,))
    return pull_back(curved)[0]


def along(
    outputs: Callable[[Any], Any], criterion: Callable[[Any], Any], at: Any, v: Any
) -> Callable[[jax.Array], Any]:
    """criterion(outputs + t J v) as a function of t: its second derivative is v^T J^T H J v."""
    z, moved = jax.jvp(outputs, (at,), (v,))
    return lambda t: criterion(jax.tree.map(lambda a, b: a + t.astype(a.dtype) * b, z, moved))
