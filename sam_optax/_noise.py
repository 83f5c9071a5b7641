"""Random perturbations in place of an ascent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _numerics
from sam_optax._ascent import count_for, scheduled
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Radius, transformation


class RandomState(NamedTuple):
    """Memory of `random_perturbation`: data of the key of the next step."""

    key: jax.Array


def random_perturbation(
    std: Radius = 0.01, samples: int = 1, key: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Random weight perturbation: the gradient of the loss smoothed by Gaussian noise.

    A flat minimum on average rather than in the worst case, at the price of
    one gradient per sample and with no ascent.

        out = mean over samples of grad L(w + n),  n ~ N(0, (std ||w_f||)^2)

    where w_f is the filter of an entry (one index of the last axis), or the
    whole leaf if it has fewer than two dimensions.

    Args:
      std: standard deviation relative to the norm of the filter, at least 0: a
        number, a traced scalar or a schedule. Published: 0.01 and 0.001.
      samples: number of gradients that are averaged, at least 1.
      key: seed or key; the state keeps the next one.

    Returns:
      A transformation with state: chain it. The gradients given are unused.

    Raises:
      ValueError: if std is negative or samples below 1.

    Example:
      >>> import jax, jax.numpy as jnp, sam_optax
      >>> loss_fn, w = lambda w: jnp.sum(jnp.abs(w)), jnp.ones(2)
      >>> tx = sam_optax.random_perturbation(std=0.5, samples=50)
      >>> out, _ = tx.update(jnp.ones(2), tx.init(w), w, value_fn=loss_fn)
      >>> print(jnp.all(out < 1))  # the kink at 0 is smoothed
      True

    References:
      Bisla et al., `Low-Pass Filtering SGD <https://arxiv.org/abs/2201.08025>`_,
      2022, algorithm 1; Li et al., `Revisiting Random Weight Perturbation
      <https://arxiv.org/abs/2404.00357>`_, 2024, who mix in the clean gradient
      of another batch.

    Note:
      One gradient evaluation per sample, and a normal variable per parameter,
      which on a CPU takes longer for a small dense network; inside jit the
      gradients given are never computed. Low-pass filtering SGD differs: it
      splits the batch into M parts with one draw of noise each, so that a step
      costs one gradient of the batch, and raises std along a cosine. For that,
      give std a schedule of calls and update once per part with the grad_fn of
      the part, in `optax.chain(random_perturbation(std),
      optax.MultiSteps(optimizer, M).gradient_transformation())`; the
      micro-batches of `value_and_grad` do not take a method with state.
    """
    _checks.at_least("std", std, 0.0)
    samples = _checks.integer_at_least("samples", samples, 1)

    first, draw = _numerics.key_stream(key)

    def init(params: optax.Params) -> tuple[RandomState, optax.OptState]:
        del params
        return RandomState(first), count_for(std)

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        deviation, std_state = scheduled(std, state[1])
        next_key, keys = draw(state[0].key, samples)
        shares = []
        for sample_key in keys:
            noise = _filter_noise(sample_key, params, deviation)
            method = sharpness_aware(optax.stateless(lambda updates, params, n=noise: n))
            perturbed, _ = method.update(updates, method.init(params), params, **extra_args)
            shares.append(_numerics.map_wide(lambda g: g / samples, perturbed))
        mean = _numerics.map_wide(lambda *gradients: sum(gradients), *shares)
        return mean, (RandomState(next_key), std_state)

    return transformation(init, update)


def _filter_noise(key: jax.Array, params: optax.Params, deviation: Any) -> optax.Updates:
    """Gaussian noise in proportion to the norm of each filter."""

    def scale(w: jax.Array, n: jax.Array) -> jax.Array:
        axes = tuple(range(w.ndim - 1)) if w.ndim > 1 else None
        return deviation * _numerics.safe_norm(w, axis=axes, keepdims=w.ndim > 1) * n

    noise = _numerics.map_wide(scale, params, _numerics.random_normal(key, params))
    return jax.tree.map(
        lambda w, n: n if _numerics.is_perturbable(w) else jnp.zeros_like(w), params, noise
    )
