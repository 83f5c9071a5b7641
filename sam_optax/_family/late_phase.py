"""Late-phase SAM (Zhou et al., 2024): paid for from one step on."""

import jax
import optax

from sam_optax._cadence import cadenced, from_step


def late_phase(
    method: optax.GradientTransformation, start: jax.typing.ArrayLike
) -> optax.GradientTransformationExtraArgs:
    r"""The method from one step on, the clean gradient before it.

    The paper finds that SAM in the last few epochs reaches minima about as
    flat as SAM throughout, at a fraction of the cost.

        out = g before step `start`, method(g) from then on

    Args:
      method: any method.
      start: first step that is paid for, at least 0; may be traced.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if start is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> tx = sam_optax.late_phase(sam_optax.sam(0.5), start=1)
      >>> w, loss_fn = jnp.array([3.0, 4.0]), lambda w: jnp.sum(w**2) / 2
      >>> state = tx.init(w)
      >>> for _ in range(2):
      ...     out, state = tx.update(w, state, w, value_fn=loss_fn)
      ...     print(out)
      [3. 4.]
      [3.3 4.4]

    References:
      Zhou et al., `Sharpness-Aware Minimization Efficiently Selects Flatter
      Minima Late in Training <https://arxiv.org/abs/2410.10373>`_, 2024. The
      authors' code starts SAM with an empty momentum buffer; here the base
      optimizer goes on.

    Note:
      One gradient evaluation a step before `start`, then those of the method.
    """
    return cadenced(method, from_step(start))
