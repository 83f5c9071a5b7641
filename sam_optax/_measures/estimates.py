"""What a result keeps of many values and of its random key."""

import math

import jax
import numpy as np


def mean_and_error(values: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """Mean and its standard error, NaN where one value gives none."""
    n = len(values)
    if n == 1:
        return float(values[0]), math.nan
    shares = np.full(n, 1 / n) if weights is None else weights / weights.sum()
    with np.errstate(invalid="ignore"):  # infinite values pass through without a warning
        mean = shares @ values
        return float(mean), float(np.linalg.norm(shares * (values - mean)) * math.sqrt(n / (n - 1)))


def seed_of(key: jax.Array) -> tuple[int, ...]:
    """What a result keeps of its random key."""
    return tuple(int(word) for word in np.ravel(jax.random.key_data(key)))
