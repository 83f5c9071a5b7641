"""Temperon (2026): SAM for the last part of training, with the decay of the learning rate."""

import jax
import optax

from sam_optax import _checks, _selection
from sam_optax._family.late_phase import late_phase


def late_tail(
    method: optax.GradientTransformation,
    steps: jax.typing.ArrayLike,
    fraction: jax.typing.ArrayLike = 0.57,
) -> optax.GradientTransformationExtraArgs:
    r"""The method for the last part of training, the clean gradient before it.

    `late_phase` counted from the end: let the method have the whole decay of the
    learning rate, which needs a schedule that starts to decay where the method
    does.

        out = g for the first (1 - fraction) steps, method(g) for the rest

    Args:
      method: any method.
      steps: length of training, at least 1; may be traced.
      fraction: of the steps that are paid for, in [0, 1]. Published: 0.57 on
        images, 0.3 in fine-tuning.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if steps is below 1 or fraction outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, optax, sam_optax
      >>> steps, tail = 10, 6
      >>> parts = [optax.constant_schedule(0.1), optax.cosine_decay_schedule(0.1, tail)]
      >>> rate = optax.join_schedules(parts, [steps - tail])
      >>> method = sam_optax.late_tail(sam_optax.sam(0.5), steps, tail / steps)
      >>> tx, w = optax.chain(method, optax.sgd(rate)), jnp.array([3.0, 4.0])
      >>> state, norms = tx.init(w), []
      >>> for _ in range(steps):
      ...     updates, state = tx.update(w, state, w, grad_fn=lambda w: w)
      ...     norms.append(round(float(jnp.linalg.norm(updates)), 2))
      >>> print(norms[3], norms[4], norms[9])
      0.5 0.55 0.04

    References:
      Mastromichalakis, `Temperon: Full-Time SAM Quality at a Third Less
      Wall-Clock <https://arxiv.org/abs/2609.17575>`_, 2026, a preprint of one
      author, who also changes to Muon where the tail begins, and owes the gain
      in accuracy to that; here the base optimizer goes on.

    Note:
      One gradient evaluation a step, and those of the method in the tail: 1.57
      of SGD's for SAM.
    """
    steps = _checks.integer_at_least("steps", steps, 1, traced=True)
    fraction = _checks.in_interval("fraction", fraction, "[0, 1]")
    return late_phase(method, steps - _selection.rounded("round", fraction * steps))
