"""SAM with model and loss apart: the Jacobian moves, the loss's own gradient stays."""

from collections.abc import Callable
from typing import Any, Unpack

import jax
import optax

from sam_optax import _doors, _numerics
from sam_optax._family.sam import sam
from sam_optax._functional import value_and_grad
from sam_optax._types import GradFn


def jacobian_grad_fn(
    model_fn: Callable[..., Any], loss_fn: Callable[..., jax.Array]
) -> Callable[..., GradFn]:
    r"""A gradient whose Jacobian is taken elsewhere, and whose loss gradient stays at params.

    What `jacobian_sam` descends along. Give it to the update of any method in
    a chain as descent_grad_fn; the door does so for methods without memory.

        v -> J_F(v)^T grad_F L(F(w)),  F(v) = model_fn(v, x)

    Args:
      model_fn: model_fn(params, x) returns outputs (logits, say), any tree.
      loss_fn: loss_fn(outputs, *rest) returns a scalar.

    Returns:
      A function (params, x, *rest) -> descent_grad_fn, a function from params
      to gradients in Optax's convention.

    Raises:
      TypeError: at the call, of JAX, for a loss that is no scalar.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> model_fn, loss_fn = lambda w, x: x @ w**2, lambda f, y: jnp.sum((f - y) ** 2)
      >>> whole = lambda w, x, y: loss_fn(model_fn(w, x), y)
      >>> evaluate = sam_optax.value_and_grad_fn(whole)
      >>> of_function = sam_optax.jacobian_grad_fn(model_fn, loss_fn)
      >>> tx = optax.chain(sam_optax.vasso(rho=0.5), optax.sgd(0.1))
      >>> w, batch = jnp.array([1.0, 2.0]), (jnp.eye(2), jnp.zeros(2))
      >>> loss, grads, grad_fn = evaluate(w, *batch)
      >>> updates, _ = tx.update(
      ...     grads, tx.init(w), w, grad_fn=grad_fn, descent_grad_fn=of_function(w, *batch))
      >>> print(updates.round(2))  # SAM's would be [-0.48 -6.18]
      [-0.42 -3.99]

    References:
      As for `jacobian_sam`.

    Note:
      A gradient evaluation at each point, beside the clean one.
    """

    def at(params: optax.Params, x: Any, *rest: Any) -> GradFn:
        cotangent = jax.grad(loss_fn)(model_fn(params, x), *rest)

        def gradient(elsewhere: optax.Params) -> optax.Updates:
            _, backward = jax.vjp(lambda w: model_fn(w, x), elsewhere)
            return _numerics.conjugate(backward(cotangent)[0])

        return gradient

    return at


def jacobian_sam(
    model_fn: Callable[..., Any],
    loss_fn: Callable[..., jax.Array],
    transform: optax.GradientTransformation = sam(),
    **options: Unpack[_doors.GroupOptions],
) -> Callable[..., Any]:
    r"""SAM's perturbation of the Jacobian alone: like `value_and_grad`, model and loss apart.

    Regularises the function that the network is, and not the logits, which SAM
    can flatten without any gain. For study, of language models above all.

        e = transform's ascent, by default rho g/||g||;
        grads = J_F(w + e)^T grad_F L(F(w)),  F(w) = model_fn(w, x)

    Args:
      model_fn: model_fn(params, x) returns outputs (logits, say), any tree.
      loss_fn: loss_fn(outputs, *rest) returns a scalar.
      transform: a method without state, `sam()` by default; what it calls the
        perturbed gradient is the one above. `asam(0.5)` and `gsam(0.05)` have
        functional forms likewise. In a chain use `jacobian_grad_fn`.
      **options: axis_name, microbatch_size and the other options of
        `value_and_grad` about groups, and allow_int.

    Returns:
      A function (params, x, *rest) -> (loss, grads).

    Raises:
      ValueError: as `value_and_grad`.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> model_fn, loss_fn = lambda w, x: x @ w**2, lambda f, y: jnp.sum((f - y) ** 2)
      >>> sharp = sam_optax.jacobian_sam(model_fn, loss_fn, sam_optax.sam(rho=0.5))
      >>> loss, grads = sharp(jnp.array([1.0, 2.0]), jnp.eye(2), jnp.zeros(2))
      >>> print(loss, grads.round(2))  # jax.grad would give [4. 32.], SAM [4.77 61.83]
      17.0 [ 4.25 39.94]

    References:
      None of its own. Two descriptions and two reimplementations by others call
      this Functional-SAM, after Singh et al., `Avoiding spurious sharpness
      minimization broadens applicability of SAM <https://arxiv.org/abs/2502.02407>`_,
      2025. Of that paper only abstract and introduction could be read here and no
      code of the authors was found, so it does not carry the paper's name.

    Note:
      Two gradient evaluations and one copy of the parameters. The loss is
      differentiated with respect to outputs once more, which costs little.
    """
    of_function = jacobian_grad_fn(model_fn, loss_fn)

    def loss(params: optax.Params, x: Any, *rest: Any) -> jax.Array:
        return loss_fn(model_fn(params, x), *rest)

    def descent(params: optax.Params, x: Any, *rest: Any) -> dict[str, Any]:
        return {"descent_grad_fn": of_function(params, x, *rest)}

    return value_and_grad(loss, transform, extra_args=descent, **options)
