"""Friendly SAM (Li et al., 2024): ascent along what the average does not have."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import dual_ascent
from sam_optax._memory import blended, zero_memory
from sam_optax._rules import transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


class WithoutAverageState(NamedTuple):
    """Memory of `without_average`.

    Attributes:
      count: steps seen.
      average: the average, of the shapes and dtypes of params.
    """

    count: jax.typing.ArrayLike
    average: optax.Updates


def without_average(
    sigma: jax.typing.ArrayLike = 1.0, decay: jax.typing.ArrayLike = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""A filter that takes the running average of gradients out of a gradient.

    What is left is the noise of the batch, along which Friendly SAM ascends.

        out = g - sigma m, g in the first step;  then m <- decay m + (1 - decay) g

    Args:
      sigma: how much of the average is taken out, at least 0; 0 passes
        gradients on.
      decay: of the average, in [0, 1). It starts at the first gradient.

    Returns:
      A filter with state, for a chain before an ascent.

    Raises:
      ValueError: if sigma is negative or decay outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> noise = sam_optax.without_average()
      >>> state = noise.init(jnp.zeros(2))
      >>> for g in (jnp.array([2.0, 0.0]), jnp.array([2.0, 1.0])):
      ...     out, state = noise.update(g, state)
      ...     print(out)
      [2. 0.]
      [0. 1.]

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024; the order of the authors' code.

    Note:
      No gradient evaluation; one copy of the parameters in the state.
    """
    _checks.at_least("sigma", sigma, 0.0)
    _checks.in_interval("decay", decay, "[0, 1)")

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, WithoutAverageState]:
        del params, extra_args
        first = state.count == 0
        direction = _numerics.map_wide(
            lambda g, m: jnp.where(first, g, g - sigma * m), updates, state.average
        )
        new = WithoutAverageState(*blended(updates, state, 1 - decay))
        return direction, _numerics.keep_if_nonfinite(updates, new, state)

    return transformation(lambda params: WithoutAverageState(*zero_memory(params)), update)


def friendly_sam(
    rho: optax.ScalarOrSchedule = 0.05,
    sigma: jax.typing.ArrayLike = 1.0,
    lmbda: jax.typing.ArrayLike = 0.9,
    *,
    p: jax.typing.ArrayLike | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    descent: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly SAM: ascends along the batch's noise, not the full gradient.

    Takes the running average of gradients, an estimate of the full gradient,
    out of the ascent direction, at no extra gradient.

        e = rho d/||d||,  d = g - sigma m;  then m <- lmbda m + (1 - lmbda) g

    Args:
      rho: radius, at least 0: a number, a traced scalar or a schedule. The
        authors use 0.1 to 0.2.
      sigma: how much of the average is taken out, at least 0; 0 is SAM.
      lmbda: decay of the average, in [0, 1). Published: 0.6 to 0.95.
      p: order of the norm of e, from 1 to infinity, see `dual_ascent`.
      normalization: operator T that measures e, such as `elementwise()` for
        ASAM's, see `dual_ascent`.
      mask: leaves that are perturbed, see `dual_ascent`.
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if rho or sigma is negative or lmbda outside [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> loss_fn = lambda w, x: jnp.sum((w - x) ** 2)
      >>> tx, w = sam_optax.friendly_sam(rho=0.1), jnp.zeros(2)
      >>> state = tx.init(w)
      >>> for x in (jnp.array([-1.0, 0.0]), jnp.array([-1.0, -0.5])):
      ...     grad_fn = lambda w: jax.grad(loss_fn)(w, x)
      ...     out, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn)
      ...     print(out)  # at [0.1, 0], then at [0, 0.1]: only what is new
      [2.2 0. ]
      [2.  1.2]

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024; the order of the authors'
      code, which subtracts the average of before this step (for sigma = 1 the
      paper's order gives the same direction) and starts it at the first
      gradient.

    Note:
      Two gradient evaluations; one copy of the parameters in the state. Twice
      the same batch in the first two steps gives e = 0 in the second.
    """
    _checks.in_interval("lmbda", lmbda, "[0, 1)")
    ascent = dual_ascent(rho, p=p, normalization=normalization, mask=mask)
    return sharpness_aware(optax.chain(without_average(sigma, lmbda), ascent), descent)
