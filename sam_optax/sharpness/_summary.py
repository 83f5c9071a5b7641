"""All figures of one solution, in one line."""

import dataclasses
from typing import Any

import jax
import optax

from sam_optax import _chart, _numerics
from sam_optax._types import Normalization
from sam_optax.sharpness._hessian import Eigenvalues, Trace, hessian_eigenvalues, hessian_trace
from sam_optax.sharpness._worst_case import WorstCase, one_step, worst_case


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summary` measured; print it for a table.

    Attributes:
      one_step: rise of the loss at the perturbation of SAM.
      worst_case: the same by projected ascent.
      eigenvalues: both ends of the spectrum.
      trace: of the Hessian.
    """

    one_step: WorstCase
    worst_case: WorstCase
    eigenvalues: Eigenvalues
    trace: Trace

    def __str__(self) -> str:
        eigenvalues, rho = self.eigenvalues, self.one_step.rho
        lines = [
            ("loss", f"{self.one_step.loss:.4g}", f"{self.one_step.examples} examples"),
            (f"one step, rho {rho:g}", f"{self.one_step.value:.4g}", ""),
            (f"worst case, rho {rho:g}", f"{self.worst_case.value:.4g}", ""),
            (
                "largest eigenvalue",
                f"{eigenvalues.top[0]:.4g}",
                f"residual {eigenvalues.top_residuals[0]:.1g}",
            ),
            (
                "smallest eigenvalue",
                f"{eigenvalues.bottom[0]:.4g}",
                f"residual {eigenvalues.bottom_residuals[0]:.1g}",
            ),
            ("lambda_max / lambda_5", f"{eigenvalues.ratio:.4g}", ""),
            ("trace", f"{self.trace.value:.4g}", f"+- {self.trace.standard_error:.2g}"),
        ]
        return "\n".join(f"{a:<22}{b:>10}  {c}".rstrip() for a, b, c in lines)


def summary(
    loss_fn: _chart.LossFn,
    params: optax.Params,
    data: Any,
    *,
    key: int | jax.Array,
    rho: float = 0.05,
    normalization: Normalization | None = None,
    progress: bool = False,
) -> Summary:
    """Measures a solution in all the usual ways.

    The first thing to run on a trained network; the single functions take the
    options. Compare solutions at one rho and on the same data.

        one_step, worst_case, hessian_eigenvalues, hessian_trace

    Args:
      loss_fn: loss_fn(params, batch) returns the scalar mean loss over a batch.
      params: w, a tree of real arrays.
      data: one batch or a re-iterable of batches, see `one_step`.
      key: random key, or a seed.
      rho: radius of the first two, at least 0.
      normalization: the operator T, for all four.
      progress: show progress bars (needs tqdm).

    Returns:
      A `Summary`.

    Raises:
      ValueError: as the single functions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> loss_fn = lambda w, x: jnp.mean(x @ w**2) / 2
      >>> w, x = jnp.zeros(5), jnp.array([[8.0, 5.0, 4.0, 3.0, 2.0]])
      >>> print(sharpness.summary(loss_fn, w, x, key=jax.random.key(0), rho=0.1))
      loss                           0  1 examples
      one step, rho 0.1              0
      worst case, rho 0.1         0.04
      largest eigenvalue             8  residual ...
      smallest eigenvalue            2  residual ...
      lambda_max / lambda_5          4
      trace                         22  +- ...

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, figure 3.

    Note:
      About 50 Hessian-vector products, 100 trace probes and 40 gradients over
      the data.
    """
    options: Any = {"normalization": normalization}
    first, second, third = jax.random.split(_numerics.as_key(key), 3)
    options_bar: Any = options | {"progress": progress}
    return Summary(
        one_step(loss_fn, params, data, rho=rho, **options),
        worst_case(loss_fn, params, data, key=first, rho=rho, **options_bar),
        hessian_eigenvalues(loss_fn, params, data, key=second, **options_bar),
        hessian_trace(loss_fn, params, data, key=third, **options_bar),
    )
