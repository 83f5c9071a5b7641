"""What a landscape is once computed: plain arrays with their grid, saved and loaded."""

import dataclasses

import numpy as np

from sam_optax._measures.results import Result


@dataclasses.dataclass(frozen=True, eq=False)
class Rays(Result):
    """Loss along random directions, from `rays`.

    Attributes:
      distances: (n,) positions t.
      values: (directions, n) losses L(w + t d).
      batch_norm: what was done with BatchNorm statistics.
      examples: number of examples in the data.
      seed: the random key's data.
    """

    distances: np.ndarray
    values: np.ndarray
    batch_norm: str
    examples: int
    seed: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Interpolation(Result):
    """Loss on the line through two solutions, from `interpolate`.

    Attributes:
      positions: (n,) the a of (1 - a) w1 + a w2.
      values: (n,) losses.
      distance: ||w2 - w1||.
      batch_norm: what was done with BatchNorm statistics.
      examples: number of examples in the data.
    """

    positions: np.ndarray
    values: np.ndarray
    distance: float
    batch_norm: str
    examples: int


@dataclasses.dataclass(frozen=True, eq=False)
class Plane(Result):
    """Loss on a plane through weight space.

    Attributes:
      x: (nx,) coordinates along the first direction.
      y: (ny,) coordinates along the second.
      values: (ny, nx) losses, values[j, i] at (x[i], y[j]).
      points: (k, 2) coordinates of the solutions, or of the trajectory; the
        centre alone for a random plane.
      cosine: between the two directions.
      explained: (2,) shares of the trajectory's squared length along the axes,
        whose sum says how much of it the plane shows; empty for other planes.
      kind: "random", "solutions" or "trajectory".
      batch_norm: what was done with BatchNorm statistics.
      examples: number of examples in the data.
      seed: the random key's data, empty where none was used.
    """

    x: np.ndarray
    y: np.ndarray
    values: np.ndarray
    points: np.ndarray
    cosine: float
    explained: np.ndarray
    kind: str
    batch_norm: str
    examples: int
    seed: tuple[int, ...]
