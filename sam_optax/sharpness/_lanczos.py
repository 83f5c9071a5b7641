"""Lanczos with full reorthogonalisation, on lists of arrays.

The loop runs on the host, so that one product with the matrix may stream a
data set and the loop can stop. The basis is kept in blocks of rows: the
work of a step follows the number of vectors there are, and shapes stay fixed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax._measures import chart

_ROWS = 8


class Tridiagonal(NamedTuple):
    """A symmetric matrix seen from one start vector.

    Attributes:
      diagonal: (k,) entries alpha.
      off_diagonal: (k - 1,) entries beta.
      last: the beta that would come next: the residual's length.
      broke_down: whether the start vector's invariant subspace was exhausted.
    """

    diagonal: np.ndarray
    off_diagonal: np.ndarray
    last: float
    broke_down: bool

    def ritz(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ritz values in ascending order, quadrature weights, residuals ||A x - value x||."""
        matrix = np.diag(self.diagonal)
        matrix += np.diag(self.off_diagonal, 1) + np.diag(self.off_diagonal, -1)
        if not np.isfinite(matrix).all():
            unknown = np.full(len(matrix), np.nan)
            return unknown, unknown, unknown
        values, vectors = np.linalg.eigh(matrix)
        return values, vectors[0] ** 2, np.abs(self.last * vectors[-1])


def lanczos(
    product: Callable[[chart.Vector], chart.Vector],
    start: chart.Vector,
    steps: int,
    tolerance: float,
    tick: Callable[[], object],
) -> Tridiagonal:
    """At most `steps` steps from a start vector of any length.

    Stops once beta <= tolerance times the largest entry so far: from there on
    the residual is rounding, and going on would make up eigenvalues. Betas
    count as entries too, for a matrix may have a diagonal of zeros.
    """
    steps = min(steps, sum(part.size for part in start))
    blocks: list[chart.Vector] = []
    diagonal, off_diagonal = [], []
    vector, beta = _normalised(start)
    beta, largest = float(beta), 0.0
    for k in range(steps):
        if k % _ROWS == 0:
            blocks.append(_empty_block(vector))
        blocks[-1] = _store(blocks[-1], vector, k % _ROWS)
        vector = product(vector)
        # Twice is enough: the second pass removes the rounding of the first.
        along = []
        for _ in range(2):
            for block in blocks[:-1]:
                vector, _ = _project_out(block, vector)
            vector, components = _project_out(blocks[-1], vector)
            along.append(components)
        vector, beta = _normalised(vector)
        along, beta = jax.device_get((along, beta))
        alpha, beta = float(along[0][k % _ROWS] + along[1][k % _ROWS]), float(beta)
        diagonal.append(alpha)
        largest = max(largest, abs(alpha))
        tick()
        if not np.isfinite(alpha) or beta <= tolerance * largest:
            break
        off_diagonal.append(beta)
        largest = max(largest, beta)
    broke_down = beta <= tolerance * largest
    return Tridiagonal(
        np.asarray(diagonal), np.asarray(off_diagonal)[: len(diagonal) - 1], beta, broke_down
    )


@jax.jit
def _normalised(vector: chart.Vector) -> tuple[chart.Vector, jax.Array]:
    norm = jnp.sqrt(chart.dot(vector, vector))
    return [part / jnp.where(norm == 0, 1, norm) for part in vector], norm


@jax.jit
def _empty_block(vector: chart.Vector) -> chart.Vector:
    return [jnp.zeros((_ROWS, part.size), part.dtype) for part in vector]


@functools.partial(jax.jit, donate_argnums=0)
def _store(block: chart.Vector, vector: chart.Vector, row: int) -> chart.Vector:
    return [rows.at[row].set(part.reshape(-1)) for rows, part in zip(block, vector, strict=True)]


@jax.jit
def _project_out(block: chart.Vector, vector: chart.Vector) -> tuple[chart.Vector, jax.Array]:
    """The vector without its components along the rows of a block; empty rows have none."""
    flat = [part.reshape(-1) for part in vector]
    components = sum(rows @ part for rows, part in zip(block, flat, strict=True))
    rest = [
        (part - components @ rows).reshape(whole.shape)
        for rows, part, whole in zip(block, flat, vector, strict=True)
    ]
    return rest, components  # pyright: ignore[reportReturnType]
