"""What a task is made of."""

from typing import NamedTuple

import flax.linen as nn
import jax

Examples = tuple[jax.Array, jax.Array]


class Problem(NamedTuple):
    """Data, network, and where a search for its optimizer begins.

    Attributes:
      title: what it is, for figures.
      model: of inputs to logits, with parameters alone.
      train: examples; labels may be wrong in these alone.
      validation: examples by which settings are chosen.
      test: examples for the figures.
      batch: examples a step.
      epochs: of a method that takes two gradients a step.
      optimizer: "sgd", with Nesterov momentum, or "adamw".
      lr: peak learning rate of a sharpness-aware method.
      decays: weight decays for it: L2 on matrices for sgd, decoupled for adamw.
      plain_lrs: peak learning rates for the optimizer alone.
      plain_decays: weight decays for it.
      rho: the largest radius for SAM.
    """

    title: str
    model: nn.Module
    train: Examples
    validation: Examples
    test: Examples
    batch: int
    epochs: int
    optimizer: str
    lr: float
    decays: tuple[float, ...]
    plain_lrs: tuple[float, ...]
    plain_decays: tuple[float, ...]
    rho: float
