"""Random weight perturbation (Bisla et al., 2022): noise in place of an ascent."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks, _masks, _normalization, _numerics
from sam_optax._hyperparameters import count_for, scheduled
from sam_optax._rules import transformation
from sam_optax._sharpness_aware import sharpness_aware
from sam_optax._types import Mask, Normalization


class GaussianAscentState(NamedTuple):
    """Memory of `gaussian_ascent`.

    Attributes:
      key: data of the key of the next step (`jax.random.key_data`).
      std: count of steps if std is a schedule.
    """

    key: jax.Array
    std: optax.OptState


def gaussian_ascent(
    std: optax.ScalarOrSchedule = 0.01,
    key: int | jax.Array = 0,
    *,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""An ascent that is Gaussian noise in proportion to the norm of each filter.

    For flatness on average rather than in the worst case. The gradient given is
    not looked at.

        e ~ N(0, (std T)^2),  T = ||w_f|| by default

    where w_f is the filter of an entry (one index of the last axis), or the
    whole leaf if it has fewer than two dimensions.

    Args:
      std: standard deviation relative to T, at least 0: a number, a traced
        scalar or a schedule.
      key: seed or key; the state keeps the next one.
      normalization: operator T, a function from params to a tree like params
        whose leaves broadcast against them; by default the norms of filters.
      mask: leaves that are perturbed, see `dual_ascent`.

    Returns:
      An ascent rule with state. Of several `draws` in a step each has its own
      noise.

    Raises:
      ValueError: if std is negative.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> ascent, w = sam_optax.gaussian_ascent(std=0.5), jnp.ones(10_000)
      >>> e, _ = ascent.update(w, ascent.init(w), w)
      >>> print((jnp.std(e) / jnp.linalg.norm(w)).round(1))
      0.5

    References:
      Bisla et al., `Low-Pass Filtering SGD <https://arxiv.org/abs/2201.08025>`_,
      2022, algorithm 1.

    Note:
      No gradient evaluation; a normal variable per parameter.
    """
    _checks.at_least("std", std, 0.0)
    first, draw = _numerics.key_stream(key)

    def init(params: optax.Params) -> GaussianAscentState:
        del params
        return GaussianAscentState(first(), count_for(std))

    def update(
        updates: optax.Updates,
        state: Any,
        params: Any = None,
        *,
        draw_index: tuple[int, int] = (0, 1),
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaussianAscentState]:
        del updates, extra_args
        deviation, std_state = scheduled(std, state.std)
        index, count = draw_index
        next_key, keys = draw(state.key, count)
        noise = _numerics.random_normal(keys[index], params)
        scales = _normalization.scales(normalization or _filter_norms, params, params)
        move = lambda noise, scales: [
            deviation * t * _numerics.widened(n) for n, t in zip(noise, scales, strict=True)
        ]
        moves = _masks.moved(mask, move, noise, params, scales)
        return moves, GaussianAscentState(next_key, std_state)

    return transformation(init, update)


def draws(
    method: optax.GradientTransformation, count: int
) -> optax.GradientTransformationExtraArgs:
    r"""The mean of several random draws of a method, as one step of it.

    Smooths what a random ascent gives: each draw starts from the same memory
    and has its own noise; the memory moves on once.

        out = 1/count sum over draws of method(g)

    Args:
      method: a method with a random ascent, such as `gaussian_ascent`.
      count: number of draws, at least 1.

    Returns:
      A transformation with the state of the method.

    Raises:
      ValueError: if count is below 1.

    Example:
      >>> import jax.numpy as jnp, sam_optax
      >>> one = sam_optax.sharpness_aware(sam_optax.gaussian_ascent(std=0.5))
      >>> tx, w = sam_optax.draws(one, 50), jnp.ones(2)
      >>> out, _ = tx.update(w, tx.init(w), w, value_fn=lambda w: jnp.sum(jnp.abs(w)))
      >>> print(jnp.all(out < 1))  # the kink at 0 is smoothed
      True

    References:
      Bisla et al., `Low-Pass Filtering SGD <https://arxiv.org/abs/2201.08025>`_,
      2022, algorithm 1.

    Note:
      The gradients of the method, count times.
    """
    count = _checks.integer_at_least("count", count, 1)
    method = optax.with_extra_args_support(method)

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        outs, memories = each_draw(method, count, updates, state, params, **extra_args)
        shares = [_numerics.map_wide(lambda g: g / count, out) for out in outs]
        return _numerics.map_wide(lambda *gradients: sum(gradients), *shares), memories[-1]

    return transformation(method.init, update)


def each_draw(
    method: optax.GradientTransformationExtraArgs,
    count: int,
    updates: optax.Updates,
    state: Any,
    params: Any,
    **extra_args: Any,
) -> tuple[list[optax.Updates], list[Any]]:
    """The results and the memories of so many draws of a step, all from the same memory."""
    drawn = [
        method.update(updates, state, params, draw_index=(i, count), **extra_args)
        for i in range(count)
    ]
    return [out for out, _ in drawn], [memory for _, memory in drawn]


def random_perturbation(
    std: optax.ScalarOrSchedule = 0.01,
    samples: int = 1,
    key: int | jax.Array = 0,
    *,
    descent: optax.GradientTransformation | None = None,
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
      descent: rule from g_s to the result, such as `surrogate_gap(0.4)`; the
        identity by default.

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
    samples = _checks.integer_at_least("samples", samples, 1)
    return draws(sharpness_aware(gaussian_ascent(std, key), descent), samples)


def _filter_norms(params: optax.Params) -> optax.Params:
    """The norm of each filter, or of a whole leaf with fewer than two dimensions."""

    def norm(w: jax.Array) -> jax.Array:
        axes = tuple(range(w.ndim - 1)) if w.ndim > 1 else None
        return _numerics.safe_norm(w, axis=axes, keepdims=w.ndim > 1)

    of = lambda w: norm(_numerics.widened(w)) if _numerics.is_perturbable(w) else jnp.ones(())
    return jax.tree.map(of, params)
