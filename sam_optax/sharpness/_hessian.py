"""Eigenvalues, trace and spectral density of the Hessian, by its products with vectors."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from sam_optax import _checks, _numerics
from sam_optax._measures import chart, estimates, streams
from sam_optax._measures.results import Result
from sam_optax._types import Mask, Normalization
from sam_optax.sharpness import _lanczos


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenvalues(Result):
    """Both ends of the Hessian's spectrum, from `hessian_eigenvalues`.

    Its methods save(path) and load(path) write and read an .npz file.

    Attributes:
      top: the largest eigenvalues, in descending order; fewer than asked for
        where Lanczos found fewer.
      bottom: the smallest, in ascending order.
      top_residuals: ||H x - value x|| for each, with ||x|| = 1: an eigenvalue
        lies within this distance.
      bottom_residuals: the same for bottom.
      steps: Lanczos steps taken.
      broke_down: whether they ended because the start vector had seen every
        distinct eigenvalue it could.
      examples: number of examples in the data.
      seed: the random key's data.
    """

    top: np.ndarray
    bottom: np.ndarray
    top_residuals: np.ndarray
    bottom_residuals: np.ndarray
    steps: int
    broke_down: bool
    examples: int
    seed: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """lambda_max / lambda_5, the fifth largest; NaN where fewer than five were found."""
        return float(self.top[0] / self.top[4]) if len(self.top) > 4 else float("nan")


@dataclasses.dataclass(frozen=True, eq=False)
class Trace(Result):
    """The Hessian's trace by random probes, from `hessian_trace`.

    Attributes:
      value: the mean over probes.
      standard_error: standard deviation over probes / sqrt(probes).
      probes: v^T H v for each probe.
      examples: number of examples in the data.
      seed: the random key's data.
    """

    value: float
    standard_error: float
    probes: np.ndarray
    examples: int
    seed: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Density(Result):
    """The Hessian's spectral density, from `spectral_density`; call it to evaluate it.

    Its methods save(path) and load(path) write and read an .npz file.

    Attributes:
      nodes: (probes, steps) Ritz values, ascending; a probe that broke down
        repeats its last with weight 0.
      weights: (probes, steps) their quadrature weights; each row sums to 1.
      sigma: width of the Gaussian put on every node.
      size: number of parameters.
      examples: number of examples in the data.
      seed: the random key's data.
    """

    nodes: np.ndarray
    weights: np.ndarray
    sigma: float
    size: int
    examples: int
    seed: tuple[int, ...]

    def __call__(self, t: Any) -> np.ndarray:
        """The density at points t of any shape; it integrates to 1."""
        z = (np.asarray(t, np.float64)[..., None] - self.nodes.ravel()) / self.sigma
        bumps = np.exp(-(z**2) / 2) / (self.sigma * np.sqrt(2 * np.pi))
        return bumps @ self.weights.ravel() / len(self.weights)

    def grid(self, points: int = 1000) -> np.ndarray:
        """Points that cover the spectrum, five sigma beyond its ends."""
        margin = 5 * self.sigma
        return np.linspace(self.nodes.min() - margin, self.nodes.max() + margin, points)


def hessian_eigenvalues(
    loss_fn: chart.LossFn,
    params: optax.Params,
    data: Any,
    *,
    key: int | jax.Array,
    count: int = 5,
    steps: int = 50,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    tolerance: float = 1e-5,
    progress: bool = False,
) -> Eigenvalues:
    r"""Largest and smallest eigenvalues of the Hessian.

    The figure that papers on SAM quote, lambda_max, and its spread over
    lambda_5. At a solution that fits its labels the Hessian vanishes with the
    loss and says nothing; compare on held-out data or with noisy labels.

        H x = lambda x,   H = d^2 L / dw^2  (T H T under a normalization)

    Args:
      loss_fn: loss_fn(params, batch) returns the scalar mean loss over a batch;
        of a `gauss_newton` loss, the Gauss-Newton matrix takes the Hessian's place.
      params: w, a tree of real arrays.
      data: one batch or a re-iterable of batches, see `one_step`.
      key: random key, or a seed, of the start vector.
      count: eigenvalues wanted from each end, at least 1.
      steps: most steps, at least 1: 50 bring the first few of a network to a
        relative 1e-3 or better. The residuals tell.
      normalization: the operator T, for the eigenvalues of T H T, which
        rescaling the weights does not change.
      mask: leaves whose block of the Hessian is taken.
      tolerance: stop at breakdown, an off-diagonal entry below this times the
        largest entry. Lower it in float64 only.
      progress: show a progress bar (needs tqdm).

    Returns:
      An `Eigenvalues`. One start vector meets an eigenvalue once, whatever
      its multiplicity.

    Raises:
      ValueError: if count or steps is below 1 or a parameter is complex.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> loss_fn = lambda w, x: jnp.mean(x @ w**2) / 2  # the Hessian is diag(x)
      >>> w, x = jnp.ones(4), jnp.array([[7.2, 7.2, 1.0, -3.0]])
      >>> result = sharpness.hessian_eigenvalues(loss_fn, w, x, key=jax.random.key(0), count=2)
      >>> print(result.top.round(3), result.bottom.round(3), result.steps)
      [7.2 1. ] [-3.  1.] 3

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, figure 3; Parlett, `The
      Symmetric Eigenvalue Problem
      <https://doi.org/10.1137/1.9781611971163>`_, 1998, chapter 13.

    Note:
      One Hessian-vector product over the data a step, about three gradients;
      memory of `steps` copies of the parameters for the basis.
    """
    key = _numerics.as_key(key)
    _checks.integer_at_least("count", count, 1)
    _checks.integer_at_least("steps", steps, 1)
    _checks.at_least("tolerance", tolerance, 0.0)
    place = chart.chart(params, normalization, mask, real=True)
    product = _Product(loss_fn, place, data)
    start = chart.random(key, place, jax.random.normal)
    with streams.bar(progress, steps, "Lanczos") as tick:
        found = _lanczos.lanczos(product, start, steps, tolerance, tick)
    values, _, residuals = found.ritz()
    return Eigenvalues(
        top=values[::-1][:count],
        bottom=values[:count],
        top_residuals=residuals[::-1][:count],
        bottom_residuals=residuals[:count],
        steps=len(values),
        broke_down=found.broke_down,
        examples=product.examples,
        seed=estimates.seed_of(key),
    )


def hessian_trace(
    loss_fn: chart.LossFn,
    params: optax.Params,
    data: Any,
    *,
    key: int | jax.Array,
    probes: int = 100,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    progress: bool = False,
) -> Trace:
    r"""Trace of the Hessian, by Hutchinson's estimator.

    The sum of all curvatures, of which the average-case sharpness for small
    rho is rho^2 / 2 times; without its float32 trouble.

        tr H = E v^T H v,   v = +-1 with equal odds (T H T under a normalization)

    Args:
      loss_fn: loss_fn(params, batch) returns the scalar mean loss over a batch;
        of a `gauss_newton` loss, the Gauss-Newton matrix takes the Hessian's place.
      params: w, a tree of real arrays.
      data: one batch or a re-iterable of batches, see `one_step`.
      key: random key, or a seed, of the probes.
      probes: number of them, at least 1; the error falls with its root.
      normalization: the operator T.
      mask: leaves whose block of the Hessian is taken.
      progress: show a progress bar (needs tqdm).

    Returns:
      A `Trace`.

    Raises:
      ValueError: if probes is below 1 or a parameter is complex.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> loss_fn = lambda w, x: jnp.mean(x @ w) ** 2 / 2  # the Hessian is x x^T
      >>> w, x = jnp.ones(3), jnp.array([[1.0, 2.0, 3.0]])
      >>> result = sharpness.hessian_trace(loss_fn, w, x, key=jax.random.key(0), probes=500)
      >>> print(abs(result.value - 14) < 3 * result.standard_error)
      True

    References:
      Hutchinson, `A Stochastic Estimator of the Trace of the Influence Matrix
      <https://doi.org/10.1080/03610919008812866>`_, 1990.

    Note:
      A probe costs about two losses and a gradient, without storing
      activations: v^T H v is taken as a second derivative along v. Memory does
      not grow with the number of probes, which run one after another.
    """
    key = _numerics.as_key(key)
    _checks.integer_at_least("probes", probes, 1)
    place = chart.chart(params, normalization, mask, real=True)

    def probe(i: int, batch: Any) -> jax.Array:
        return _probe(loss_fn, place, key, i, batch)

    with streams.bar(progress, probes, "trace") as tick:
        values, examples = streams.means(streams.batches(data), probes, probe, tick)
    return Trace(*estimates.mean_and_error(values), values, examples, estimates.seed_of(key))


def spectral_density(
    loss_fn: chart.LossFn,
    params: optax.Params,
    data: Any,
    *,
    key: int | jax.Array,
    steps: int = 80,
    probes: int = 10,
    sigma: float | None = None,
    normalization: Normalization | None = None,
    mask: Mask | None = None,
    tolerance: float = 1e-5,
    progress: bool = False,
) -> Density:
    r"""Density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    Shows the bulk and the outliers at once; draw it on a log axis. For the
    outliers alone `hessian_eigenvalues` is cheaper.

        density(t) = mean over probes of sum_i weight_i N(t; node_i, sigma^2)

    Args:
      loss_fn: loss_fn(params, batch) returns the scalar mean loss over a batch;
        of a `gauss_newton` loss, the Gauss-Newton matrix takes the Hessian's place.
      params: w, a tree of real arrays.
      data: one batch or a re-iterable of batches, see `one_step`.
      key: random key, or a seed, of the start vectors, +-1 with equal odds.
      steps: Lanczos steps for each probe, at least 1.
      probes: number of start vectors, at least 1.
      sigma: width of the Gaussians, above 0; by default the range of the nodes
        divided by steps.
      normalization: the operator T, for the spectrum of T H T.
      mask: leaves whose block of the Hessian is taken.
      tolerance: of the breakdown, see `hessian_eigenvalues`.
      progress: show a progress bar (needs tqdm).

    Returns:
      A `Density`, a function of t that keeps the raw nodes and weights.

    Raises:
      ValueError: if steps or probes is below 1, sigma is not above 0, or a
        parameter is complex.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> loss_fn = lambda w, x: jnp.mean(x @ w**2) / 2
      >>> w, x = jnp.ones(4), jnp.array([[9.0, 1.0, 1.0, 1.0]])
      >>> density = sharpness.spectral_density(loss_fn, w, x, key=jax.random.key(0), probes=1)
      >>> print(density.nodes[0, :2].round(3), density.weights[0, :2].round(3))
      [1. 9.] [0.75 0.25]

    References:
      Ghorbani et al., `An Investigation into Neural Net Optimization via
      Hessian Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019.

    Note:
      probes * steps Hessian-vector products over the data; memory of `steps`
      copies of the parameters, whatever the number of probes.
    """
    key = _numerics.as_key(key)
    _checks.integer_at_least("steps", steps, 1)
    _checks.integer_at_least("probes", probes, 1)
    _checks.at_least("tolerance", tolerance, 0.0)
    if sigma is not None and not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    place = chart.chart(params, normalization, mask, real=True)
    product = _Product(loss_fn, place, data)
    nodes, weights = [], []
    with streams.bar(progress, probes * steps, "spectral density") as tick:
        for i in range(probes):
            start = chart.random(jax.random.fold_in(key, i), place, jax.random.rademacher)
            found = _lanczos.lanczos(product, start, steps, tolerance, tick)
            values, parts, _ = found.ritz()
            nodes.append(values)
            weights.append(parts)
    longest = max(len(row) for row in nodes)
    rows = np.stack([np.pad(row, (0, longest - len(row)), "edge") for row in nodes])
    parts = np.stack([np.pad(row, (0, longest - len(row))) for row in weights])
    if sigma is None:
        # One node alone has no range; any narrow width will do for it.
        sigma = float(rows.max() - rows.min()) / steps or 1e-3 * max(1.0, float(abs(rows).max()))
    return Density(rows, parts, sigma, place.size, product.examples, estimates.seed_of(key))


@functools.partial(jax.jit, static_argnames="loss_fn")
def _probe(
    loss_fn: chart.LossFn, place: chart.Chart, key: jax.Array, i: int, batch: Any
) -> jax.Array:
    vector = chart.random(jax.random.fold_in(key, i), place, jax.random.rademacher)
    return chart.curvature(loss_fn, place, vector, batch)


class _Product:
    """The Hessian of the loss over a data set, as a function from vectors to vectors."""

    def __init__(self, loss_fn: chart.LossFn, place: chart.Chart, data: Any) -> None:
        self._loss_fn, self._place, self._data = loss_fn, place, streams.batches(data)
        self.examples = 0

    def __call__(self, vector: chart.Vector) -> chart.Vector:
        result, self.examples = streams.mean(
            self._data,
            lambda batch: chart.hessian_product(self._loss_fn, self._place, vector, batch),
        )
        return result
