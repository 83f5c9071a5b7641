"""SAM in a jitted Equinox training step, with BatchNorm and dropout, on scikit-learn's digits.

    python examples/train_equinox.py                     # some ten seconds
    python examples/train_equinox.py --method look_sam   # the second door, for methods with memory
    python examples/train_equinox.py --epochs 60
    python examples/train_equinox.py --quick             # two epochs, for CI

What changes against plain SGD is one line: sam_optax.equinox.value_and_grad in place of
eqx.filter_value_and_grad. A method with memory, such as look_sam, goes into the chain of the
optimizer instead and gets grad_fn. One run a method shows that both train, not which is
better: for that see label_noise.py.
"""

import argparse
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

import sam_optax.equinox

RHO = 0.05  # length of SAM's ascent step, in units of the parameters
LEARNING_RATE = 0.1  # peak; a cosine takes it to 0 at the end
MOMENTUM = 0.9
BATCH = 50  # examples a step
N_TRAIN = 1000  # of 1797 images; the rest is for testing
WIDTH = 128  # of the two hidden layers
DROPOUT = 0.2  # fraction of the hidden units dropped
REUSED = 5  # look_sam pays for a second gradient at every fifth step


class Network(eqx.Module):
    layers: list[Any]

    def __init__(self, key):
        keys = jax.random.split(key, 3)

        def hidden(inputs: int, key) -> list[Any]:
            norm = eqx.nn.BatchNorm(WIDTH, axis_name="batch", momentum=0.9, mode="batch")
            return [eqx.nn.Linear(inputs, WIDTH, key=key), norm, jax.nn.relu]

        self.layers = [
            *hidden(64, keys[0]), eqx.nn.Dropout(DROPOUT),
            *hidden(WIDTH, keys[1]), eqx.nn.Dropout(DROPOUT),
            eqx.nn.Linear(WIDTH, 10, key=keys[2]),
        ]
