"""What a task is made of."""

from typing import Any, NamedTuple

import jax

Examples = tuple[jax.Array, jax.Array]


class Problem(NamedTuple):
    """Data, network, and where a search for its optimizer begins.

    Attributes:
      title: what it is, for figures.
      model: of inputs to logits, with init and apply as of a Flax module; parameters alone.
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
      methods: compared by default beside the plain optimizer and SAM; None for those that suit.
      rare: classes with few training examples.
      frozen: which parameters stay as they are: a tree of booleans, a prefix of theirs, or None.
      lanes: networks that train in one program; 1 where products of batches of matrices are slow
        on a CPU: then two programs run at a time.
    """

    title: str
    model: Any
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
    methods: tuple[str, ...] | None = None
    rare: tuple[int, ...] = ()
    frozen: Any = None
    lanes: int = 4
