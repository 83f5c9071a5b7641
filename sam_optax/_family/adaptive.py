"""AE-SAM (Jiang et al., 2023): paid for where the gradient is unusually large."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._cadence import cadenced
from sam_optax._rules import transformation


class WhenLargeState(NamedTuple):
    """Memory of `when_large`: steps seen, and running mean and variance of ||g||^2."""

    count: jax.typing.ArrayLike
    mean: jax.Array
    variance: jax.Array


def when_large(
    steps: jax.typing.ArrayLike,
    *,
    decay: jax.typing.ArrayLike = 0.9,
    c_start: float | jax.Array = 1.0,
    c_end: float | jax.Array = -1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""A cadence that pays where the gradient is large among those seen lately.

    A large gradient marks a sharp region. About half of the steps are paid for,
    more of them late.

        mu <- decay mu + (1 - decay) s,  var <- decay var + (1 - decay) (s - mu)^2,
        pay if s >= mu + c_t sqrt(var),  s = ||g||^2,
        c_t = c_start + (c_end - c_start) t/steps

    Args:
      steps: length of training, at least 1; may be traced.
      decay: of the running mean and variance, in [0, 1).
      c_start: threshold at step 0, in standard deviations.
      c_end: where the threshold goes; steps beyond stay at it.

    Returns:
      A cadence, for `sharpness_aware(when=...)` or `cadenced`. The first step
      is always paid for, and so is one that is not finite.

    Raises:
      ValueError: if steps is below 1 or decay outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> cadence = sam_optax.when_large(steps=10)
      >>> state = cadence.init(None)
      >>> for g in (1.0, 0.1, 2.0):
      ...     pay, state = cadence.update(jnp.array([g]), state)
      ...     print(pay)
      True
      False
      True

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, 2023. From secondary sources.

    Note:
      The extra gradients of the method at the steps paid for; three numbers of
      state. `sam_optax.pays` and `payments` cannot tell.
    """
    steps = _checks.integer_at_least("steps", steps, 1, traced=True)
    _checks.in_interval("decay", decay, "[0, 1)")

    def init(params: optax.Params) -> WhenLargeState:
        del params
        return WhenLargeState(*(jnp.zeros([], kind) for kind in ("int32", "float32", "float32")))

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[jax.Array, WhenLargeState]:
        del params, extra_args
        norm, _ = _numerics.norm_and_unit(updates)
        s = (norm**2).astype(jnp.float32)
        first = state.count == 0
        mean = jnp.where(first, s, decay * state.mean + (1 - decay) * s)
        spread = decay * state.variance + (1 - decay) * (s - mean) ** 2
        part = jnp.minimum(jnp.asarray(state.count) / steps, 1.0)
        threshold = mean + (c_start + (c_end - c_start) * part) * jnp.sqrt(spread)
        new = WhenLargeState(
            optax.safe_increment(state.count),
            mean.astype(jnp.float32),
            spread.astype(jnp.float32),
        )
        # A step that is not finite is paid for, so that guards see it, and forgotten.
        return ~(s < threshold), _numerics.keep_if_nonfinite(updates, new, state)

    return transformation(init, update)


def adaptive(
    method: optax.GradientTransformation,
    steps: jax.typing.ArrayLike,
    *,
    decay: jax.typing.ArrayLike = 0.9,
    c_start: float | jax.Array = 1.0,
    c_end: float | jax.Array = -1.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Pays for the perturbed gradient where the gradient is unusually large.

    AE-SAM: a large gradient marks a sharp region. About half of the steps are
    paid for, more of them late.

        mu <- decay mu + (1 - decay) s,  var <- decay var + (1 - decay) (s - mu)^2,
        pay if s >= mu + c_t sqrt(var),  s = ||g||^2,
        c_t = c_start + (c_end - c_start) t/steps

    Args:
      method: any method.
      steps: length of training, at least 1; may be traced.
      decay: of the running mean and variance, in [0, 1).
      c_start: threshold at step 0, in standard deviations.
      c_end: where the threshold goes; below c_start pays more often late. The
        last step, steps - 1, is at (steps - 1)/steps of the way, just short of
        it; steps beyond stay at c_end.

    Returns:
      A transformation with state: chain it. The first step is always paid for.

    Raises:
      ValueError: if steps is below 1 or decay outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> tx = sam_optax.adaptive(sam_optax.sam(0.5), steps=10)
      >>> loss_fn = lambda w: jnp.sum(w**2) / 2
      >>> state = tx.init(jnp.zeros(2))
      >>> for scale in (1.0, 0.1, 2.0):
      ...     w = scale * jnp.array([3.0, 4.0])
      ...     out, state = tx.update(w, state, w, value_fn=loss_fn)
      ...     print(jnp.linalg.norm(out).round(2))
      5.5
      0.5
      10.5

    References:
      Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware Minimization
      <https://arxiv.org/abs/2304.14647>`_, 2023. From secondary sources: no
      code of the authors was found; mean and variance start at the first value
      and 0, which is our choice.

    Note:
      One to two gradient evaluations a step.
    """
    large = when_large(steps, decay=decay, c_start=c_start, c_end=c_end)
    return cadenced(method, large)
