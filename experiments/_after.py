"""What is measured of a network after training: rounding, calibration, noise of the input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _tasks.task import Examples, Task, wrong
from _training import Trained, error, kernels, outputs

BITS = (4, 3)  # of the rounded weights
BINS = 15  # of confidence, for the calibration error
NOISE = 0.5  # standard deviation of the noise of real inputs, over that of the inputs
REPLACED = 0.1  # share of tokens replaced by others of the batch, for texts


def rounded(params: Any, bits: int) -> Any:
    """Kernels to 2^bits - 1 values, symmetric around 0, the largest of each tensor kept."""
    if bits < 2:
        raise ValueError(f"bits must be at least 2, got {bits}")
    levels = 2 ** (bits - 1) - 1

    def of(w: jax.Array, kernel: bool) -> jax.Array:
        largest = jnp.max(jnp.abs(w)) if kernel else 0.0
        scale = jnp.where(largest > 0, largest / levels, 1.0)
        return jnp.round(w / scale) * scale if kernel else w

    return jax.tree.map(of, params, kernels(params))


def calibration_error(logits: np.ndarray, y: np.ndarray) -> float:
    """Expected calibration error in %: the gap of confidence and accuracy, over equal bins."""
    right = logits.argmax(-1) == y
    told = np.isfinite(logits).all(-1)  # not by a diverged network, which is sure of nonsense
    confidence = np.where(told, jax.nn.softmax(logits).max(-1), 1.0)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, confidence - right, BINS)
    return 100 * float(np.abs(gaps).sum() / len(y))


def noisy(x: np.ndarray, seed: int) -> np.ndarray:
    """Inputs with noise: Gaussian where they are real, other tokens where they are integers."""
    rng = np.random.default_rng(seed)
    if np.issubdtype(x.dtype, np.integer):
        there = np.flatnonzero(x)
        chosen = there[rng.random(len(there)) < REPLACED]
        result = x.copy()
        result.flat[chosen] = x.flat[rng.choice(there, len(chosen))]
        return result
    return (x + NOISE * x.std() * rng.normal(size=x.shape)).astype(x.dtype)


def measures(task: Task, trained: Trained, test: Examples, seed: int) -> dict[str, float]:
    """The test error and what becomes of it, all on the same examples."""
    x, y = (np.asarray(part) for part in test)
    said = outputs(task, trained, x)
    found = {"error": error(task, said, y)}
    for bits in BITS:
        less = trained._replace(params=_rounded(trained.params, bits))
        found[f"bits{bits}"] = error(task, outputs(task, less, x), y)
    found["noisy"] = error(task, outputs(task, trained, noisy(x, seed)), y)
    if task.error is wrong:  # a classifier
        found["calibration"] = calibration_error(said, y)
    return found


_rounded = jax.jit(rounded, static_argnums=1)
