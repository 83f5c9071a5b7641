"""The named methods: each a configuration of the pieces, nothing more."""

from collections.abc import Callable

import jax
import optax

from sam_optax._ascent import dual_ascent
from sam_optax._normalization import elementwise
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization, Radius


def sam(
    rho: Radius = 0.05,
    *,
    p: jax.typing.ArrayLike | None = None,
    mask: Mask | None = None,
    second_order: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization: the gradient at the worst nearby point.

    Descends the loss at w + e, where e climbs the loss by a step of length
    rho, and so prefers flat minima. The first method to try; `asam` where the
    scales of layers differ much.

        e = rho g / ||g||_2 (for p = 2; see `dual_ascent`);  out = grad L(w + e)

    Args:
      rho: length of the ascent step, at least 0, in units of the parameters: a
        number, a traced scalar or a schedule of the step. Start at 0.05; small
        networks often take 0.1 to 0.4. Above the best value training
        collapses abruptly.
      p: order of the norm, from 1 to infinity, see `dual_ascent`; None is 2, which
        the paper finds the best.
      mask: leaves that are perturbed, see `dual_ascent`.
      second_order: keep the term that the paper drops, see `sharpness_aware`.

    Returns:
      A transformation from gradients to sharpness-aware gradients, for
      `value_and_grad` or `optax.chain`; in a chain its update needs params
      and grad_fn or value_fn. The state has no arrays for a constant rho.

    Raises:
      ValueError: if rho is negative or p below 1; at the call, if params or
        grad_fn are missing or grad_fn returns another structure.

    Example:
      >>> import jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.sam(rho=0.05), optax.sgd(0.1))
      >>> loss_fn = lambda w: jnp.sum(w**2)
      >>> w = jnp.array([3.0, 4.0])
      >>> updates, state = tx.update(
      ...     jax.grad(loss_fn)(w), tx.init(w), w, grad_fn=jax.grad(loss_fn))
      >>> print(updates)  # -0.1 times the gradient at [3.03, 4.04]
      [-0.606 -0.808]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1.

    Note:
      Two gradient evaluations a step and one copy of the parameters.
    """
    return sharpness_aware(dual_ascent(rho, p=p, mask=mask), second_order=second_order)


def asam(
    rho: Radius = 0.5,
    eta: jax.typing.ArrayLike = 0.01,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Callable[[jax.typing.ArrayLike, bool], Normalization] | None = None,
    normalize_bias: bool = False,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: the perturbation is measured relative to each weight.

    Sharpness in the sense of SAM changes when weights are rescaled though the
    function does not; with the normalization operator T it does not. Prefer
    it where layers differ in scale, or where SAM's best rho is hard to find.

        e = rho T^2 g / ||T g||_2 (for p = 2);  out = grad L(w + e)

    Args:
      rho: radius relative to the weights, at least 0: a number, a traced
        scalar or a schedule. Start at 0.5, or at 2 with normalize_bias.
      eta: added to T, at least 0; 0 makes the invariance exact.
      p: order of the norm, from 1 to infinity; None is 2.
      normalization: one of `elementwise`, which None is, `filterwise`,
        `layerwise`, or any function called with eta and normalize_bias that
        returns a function from params to T. With `optax.inject_hyperparams`
        name it in static_args if you give it: functions are schedules there.
      normalize_bias: whether biases (leaves with fewer than two dimensions)
        have T = |b| + eta too; by default T = 1. The authors' code has T = 1 on
        biases, but not on the scales of normalization layers.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      As for `sam`.

    Raises:
      ValueError: if rho or eta is negative or p below 1; at the call, if params
        or grad_fn are missing or grad_fn returns another structure.

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w: jnp.prod(w) ** 2  # w and its rescaling: one function
      >>> for method in (sam_optax.asam(0.1, eta=0.0), sam_optax.sam(0.1)):
      ...     for w in (jnp.array([[1.0, 1.0]]), jnp.array([[8.0, 0.125]])):
      ...         print((w * sam_optax.grad(loss_fn, method)(w)).round(2))
      [[2.45 2.45]]
      [[2.45 2.45]]
      [[2.45 2.45]]
      [[6.48 3.6 ]]

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization
      <https://arxiv.org/abs/2102.11600>`_, 2021, equation 9, algorithm 1.

    Note:
      Two gradient evaluations a step and one copy of the parameters.
    """
    operator = (normalization or elementwise)(eta, normalize_bias)
    return sharpness_aware(dual_ascent(rho, p=p, normalization=operator, mask=mask))
