"""Randomised sharpness-aware training (Zhao et al., 2022): paid for by chance."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._cadence import cadenced
from sam_optax._rules import transformation


class WithProbabilityState(NamedTuple):
    """Memory of `with_probability`.

    Attributes:
      count: the steps seen.
      key: data of the key of the next step.
      pays: whether the coming step pays, for the host to read.
    """

    count: jax.typing.ArrayLike
    key: jax.Array
    pays: jax.Array


def with_probability(
    probability: optax.ScalarOrSchedule = 0.5, key: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    r"""A cadence that pays with a probability.

    Trades a part of the gain for a part of the cost; a schedule of the
    probability moves the cost to the phase where it helps.

        pay if a draw from Bernoulli(probability) is true

    Args:
      probability: in [0, 1]: a number, a traced scalar or a schedule of the
        step.
      key: seed or key; the state keeps the next one. The same key everywhere
        makes all devices decide alike.

    Returns:
      A cadence, for `sharpness_aware(when=...)` or `cadenced`.

    Raises:
      ValueError: if probability is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> cadence = sam_optax.with_probability(0.5)
      >>> state, paid = cadence.init(None), 0
      >>> for _ in range(100):
      ...     pay, state = cadence.update(jnp.zeros(2), state)
      ...     paid += int(pay)
      >>> print(30 < paid < 70)
      True

    References:
      Zhao et al., `Randomized Sharpness-Aware Training for Boosting
      Computational Efficiency in Deep Learning
      <https://arxiv.org/abs/2203.09962>`_, 2022.

    Note:
      The extra gradients of the method, times the probability.
    """
    _checks.in_interval("probability", probability, "[0, 1]")
    first, draw = _numerics.key_stream(key)

    def decision(count: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        chance = probability(count) if callable(probability) else probability
        next_key, (own,) = draw(key)
        return jax.random.bernoulli(own, chance), next_key

    def init(params: optax.Params) -> WithProbabilityState:
        del params
        count, key = jnp.zeros([], jnp.int32), first()
        return WithProbabilityState(count, key, decision(count, key)[0])

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[jax.Array, WithProbabilityState]:
        del updates, params, extra_args
        pay, key = decision(state.count, state.key)
        count = optax.safe_increment(state.count)
        return pay, WithProbabilityState(count, key, decision(count, key)[0])

    return transformation(init, update)


def randomised(
    method: optax.GradientTransformation,
    probability: optax.ScalarOrSchedule = 0.5,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Pays for the perturbed gradient with a probability: randomised sharpness-aware training.

    Trades a part of the method's gain for a part of its cost; a schedule of
    the probability moves the cost to the phase where it helps.

        out = method(g) with probability p, else g

    Args:
      method: any method.
      probability: in [0, 1]: a number, a traced scalar or a schedule of the
        step.
      key: seed or key; the state keeps the next one. The same key everywhere
        makes all devices decide alike.

    Returns:
      A transformation with state: chain it.

    Raises:
      ValueError: if probability is outside [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> tx = sam_optax.randomised(sam_optax.sam(0.5), probability=0.5)
      >>> w, loss_fn = jnp.array([3.0, 4.0]), lambda w: jnp.sum(w**2) / 2
      >>> step = jax.jit(lambda state: tx.update(w, state, w, value_fn=loss_fn))
      >>> state, norms = tx.init(w), []
      >>> for _ in range(100):
      ...     out, state = step(state)
      ...     norms.append(round(float(jnp.linalg.norm(out)), 1))
      >>> print(30 < norms.count(5.5) < 70, set(norms) == {5.0, 5.5})
      True True

    References:
      Zhao et al., `Randomized Sharpness-Aware Training for Boosting
      Computational Efficiency in Deep Learning
      <https://arxiv.org/abs/2203.09962>`_, 2022. Their G-RST weighs sharpness
      freely in the steps paid for: `extrapolate` as the method's descent.

    Note:
      1 + p gradient evaluations a step.
    """
    return cadenced(method, with_probability(probability, key))
