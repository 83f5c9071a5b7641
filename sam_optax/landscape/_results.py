"""What a landscape is once computed: plain arrays with their grid, saved and loaded."""

import dataclasses
import json
import os
from typing import Any, Self

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class _Result:
    """A frozen record of arrays, numbers and strings that can be saved."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz file, readable by NumPy alone."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        arrays: Any = {name: value for name, value in fields.items() if hasattr(value, "shape")}
        others = {name: value for name, value in fields.items() if name not in arrays}
        arrays["header"] = json.dumps({"kind": type(self).__name__, "fields": others})
        with open(path, "wb") as file:  # np.savez would add a suffix to a bare path
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote.

        Raises:
          ValueError: if the file holds a result of another kind.
        """
        with np.load(path, allow_pickle=False) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files if name != "header"}
            header = json.loads(str(file["header"]))
        if header["kind"] != cls.__name__:
            raise ValueError(f"path must hold a {cls.__name__}, got a {header['kind']} in {path}")
        others = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in header["fields"].items()
        }
        return cls(**arrays, **others)


@dataclasses.dataclass(frozen=True, eq=False)
class Rays(_Result):
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
class Interpolation(_Result):
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
class Plane(_Result):
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
