"""What a result keeps of many values and of its random key."""

import math

import jax
import numpy as np


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error, NaN where one value gives none."""
    if len(values) == 1:
        return float(values[0]), math.nan
    with np.errstate(invalid="ignore"):  # infinite values pass through without a warning
        return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def seed_of(key: jax.Array) -> tuple[int, ...]:
    """What a result keeps of its random key."""
    return tuple(int(word) for word in np.ravel(jax.random.key_data(key)))
