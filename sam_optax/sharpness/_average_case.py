"""Average-case sharpness: the mean rise of the loss under Gaussian noise."""

import dataclasses
import functools
from typing import Any

import jax
import optax

from sam_optax import _checks, _numerics
from sam_optax._measures import chart, estimates, streams
from sam_optax._measures.results import Result
from sam_optax._types import Mask, Normalization


@dataclasses.dataclass(frozen=True)
class AverageCase(Result):
    """Mean rise of the loss under noise, from `average_case`.

    Attributes:
      value: the mean over samples.
      standard_error: standard deviation over samples / sqrt(samples).
      loss: L(w).
      rho: standard deviation of the noise, in units of T.
      samples: number of antithetic pairs.
      examples: number of examples in the data.
      seed: the random key's data.
    """

    value: float
    standard_error: float
    loss: float
    rho: float
    samples: int
    examples: int
    seed: tuple[int, ...]


def average_case(
    loss_fn: chart.LossFn,
    params: optax.Params,
    data: Any,
    *,
    key: int | jax.Array,
    rho: float = 0.05,
    samples: int = 100,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    progress: bool = False,
) -> AverageCase:
    r"""Mean rise of the loss under Gaussian noise on the parameters.

    Flatness in all directions at once, where the worst case sees the steepest.
    The noise has standard deviation rho in every coordinate, so its length is
    about rho sqrt(P): the rho of SAM is far too large here for a big network.

        E L(w + d) - L(w),   d ~ N(0, rho^2 T^2) for each coordinate

    Args:
      loss_fn: loss_fn(params, batch) returns the scalar mean loss over a batch.
      params: w, a tree of arrays.
      data: one batch or a re-iterable of batches, see `one_step`.
      key: random key, or a seed. The same key and shapes give the same noise, scaled by T,
        for every solution compared.
      rho: standard deviation, at least 0.
      samples: antithetic pairs +d and -d, at least 1; two losses each. The pair
        cancels the odd terms, the gradient's among them.
      normalization: the operator T, see `one_step`.
      mask: leaves that are perturbed.
      progress: show a progress bar (needs tqdm).

    Returns:
      An `AverageCase`.

    Raises:
      ValueError: if rho is negative or samples below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> loss_fn = lambda w, x: jnp.mean(x @ w**2) / 2
      >>> w, x = jnp.ones(1000), jnp.ones((4, 1000))
      >>> result = sharpness.average_case(loss_fn, w, x, key=jax.random.key(0), rho=0.1)
      >>> print(round(result.value, 1), result.standard_error < 0.05)  # rho^2 P / 2
      5.0 True

    References:
      Andriushchenko et al., `A Modern Look at the Relationship between
      Sharpness and Generalization <https://arxiv.org/abs/2302.07011>`_, 2023,
      equation 1.

    Note:
      2 * samples + 1 losses in one pass over the data; memory of three copies
      of the parameters whatever the number of samples. The rise is a
      difference of two losses: in float32 one below 1e-6 of the loss is lost.
    """
    key = _numerics.as_key(key)
    _checks.at_least("rho", rho, 0.0)
    _checks.integer_at_least("samples", samples, 1)
    place = chart.chart(params, normalization, mask)
    origin = place.zeros()

    def loss(i: int, batch: Any) -> jax.Array:
        if i == 0:
            return chart.loss(loss_fn, place, origin, batch)
        return _pair(loss_fn, place, key, i, rho, batch)

    with streams.bar(progress, samples + 1, "average case") as tick:
        losses, examples = streams.means(streams.batches(data), samples + 1, loss, tick)
    value, error = estimates.mean_and_error(losses[1:] - losses[0])
    return AverageCase(
        value, error, float(losses[0]), rho, samples, examples, estimates.seed_of(key)
    )


@functools.partial(jax.jit, static_argnames="loss_fn")
def _pair(
    loss_fn: chart.LossFn, place: chart.Chart, key: jax.Array, i: int, rho: float, batch: Any
) -> jax.Array:
    """Mean loss at +d and -d."""
    noise = chart.random(jax.random.fold_in(key, i), place, jax.random.normal)
    plus = chart.scalar_loss(loss_fn, place.at([rho * a for a in noise]), batch)
    minus = chart.scalar_loss(loss_fn, place.at([-rho * a for a in noise]), batch)
    return (plus + minus) / 2
