"""Tasks for methods that make sense on some alone: Adam, rare classes, adapters. MNIST, 14x14."""

import dataclasses
from pathlib import Path
from typing import Any

import _splits
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _networks import MLP

from _tasks import images
from _tasks.problem import Examples, Problem

WIDTHS = (256, 256)
RARE = (5, 6, 7, 8, 9)  # classes of which few examples are kept, or that adapters have to learn
KEPT = 10  # examples of a rare class
FEW = 20  # examples of a class that adapters learn from
PRETRAINING = 300  # steps of Adam, on the other classes


def adam(cache: Path, quick: bool) -> Problem:
    """The noisy digits with AdamW, for methods that read its second moment."""
    problem = images.noisy_digits("digits" if quick else "mnist", cache, quick)
    return problem._replace(
        title=f"{problem.title}, AdamW",
        **{"optimizer": "adamw", "lr": 0.002, "decays": (2.0, 4.0, 8.0)},
        **{"plain_lrs": (0.001, 0.002, 0.004), "plain_decays": (4.0, 8.0, 16.0), "rho": 0.6},
        methods=("asam", "preconditioned_sam", "shared_preconditioned_sam"),
    )


def rare(cache: Path, quick: bool) -> Problem:
    """Half of the classes with few training examples; the test set has as many of each."""
    split = _splits.load("digits" if quick else "mnist", cache=cache)
    x, y = map(np.asarray, split.train)
    train = _at_most(x, y, {label: KEPT for label in RARE})
    return Problem(
        f"{_splits.IMAGES['digits' if quick else 'mnist']}, {KEPT} examples of half of the classes",
        *(MLP((16,) if quick else WIDTHS), train, *split[2:], 50, 2 if quick else 60, "sgd"),
        **{"lr": 0.05, "decays": (0.0003, 0.001, 0.003), "rho": 0.4},
        **{"plain_lrs": (0.1, 0.2, 0.4), "plain_decays": (0.0003, 0.001, 0.003)},
        **{"methods": ("asam", "imb_sam"), "rare": RARE},
    )


def adapters(cache: Path, quick: bool) -> Problem:
    """Adapters of rank 4 on a frozen network, which knows five classes, learn the other five."""
    split = _splits.load("digits" if quick else "mnist", cache=cache)
    network, others = MLP((16,) if quick else WIDTHS), [i for i in range(10) if i not in RARE]
    x, y = map(np.asarray, split.train)
    known = _at_most(x, y, dict.fromkeys(RARE, 0))
    model = Adapted(network, _pretrained(network, known), rank=4)
    few = _at_most(x, y, dict.fromkeys(RARE, FEW) | dict.fromkeys(others, 0))
    of = lambda part: jax.device_put(
        tuple(a[np.isin(part[1], RARE)] for a in map(np.asarray, part))
    )
    return Problem(
        f"MNIST 14x14, adapters of rank {model.rank} learn five new classes",
        *(model, few, *map(of, split[2:]), 20, 2 if quick else 120, "adamw"),
        **{"lr": 0.005, "decays": (0.01, 0.1, 1.0), "rho": 0.2},
        **{"plain_lrs": (0.003, 0.01, 0.03), "plain_decays": (0.1, 1.0, 10.0)},
        methods=("sam, adapters alone", "flat_lora"),
        frozen={"frozen": True, "a": False, "b": False},
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A network whose matrices W are frozen and have W + a b in their place, b = 0 at first."""

    network: nn.Module
    weights: Any
    rank: int

    def init(self, key: jax.Array, x: jax.Array) -> Any:
        del x
        leaves, treedef = jax.tree.flatten(self.weights)
        keys = jax.tree.unflatten(treedef, jax.random.split(key, len(leaves)))

        def left(w: jax.Array, key: jax.Array) -> jax.Array | None:
            shape = len(w), self.rank
            return jax.random.normal(key, shape) / np.sqrt(len(w)) if w.ndim > 1 else None

        right = lambda w: jnp.zeros((self.rank, w.shape[1])) if w.ndim > 1 else None
        a, b = jax.tree.map(left, self.weights, keys), jax.tree.map(right, self.weights)
        return {"frozen": self.weights, "a": a, "b": b}

    def merged(self, params: Any) -> Any:
        """The same tree with W + a b in place of W."""
        add = lambda w, a, b: w if a is None else w + a @ b
        none = lambda x: x is None
        parts = (jax.tree.leaves(params[name], is_leaf=none) for name in ("frozen", "a", "b"))
        whole = [add(*leaf) for leaf in zip(*parts, strict=True)]
        return {**params, "frozen": jax.tree.unflatten(jax.tree.structure(self.weights), whole)}

    def apply(self, params: Any, x: jax.Array) -> jax.Array:
        return self.network.apply(self.merged(params)["frozen"], x)


def _at_most(x: np.ndarray, y: np.ndarray, kept: dict[int, int]) -> Examples:
    """The first so many examples of the classes named, all of the others."""
    place = np.zeros(len(y), int)  # of an example within its class
    for label in np.unique(y):
        place[y == label] = np.arange(np.sum(y == label))
    limit = np.array([kept.get(int(label), len(y)) for label in y])
    return jax.device_put((x[place < limit], y[place < limit]))


def _pretrained(network: nn.Module, examples: Examples) -> Any:
    x, y = examples
    tx = optax.adam(0.001)

    def loss(params: Any) -> jax.Array:
        logits = network.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def trained(params: Any) -> Any:
        def step(_: int, carry: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, PRETRAINING, step, (params, tx.init(params)))[0]

    return trained(jax.jit(network.init)(jax.random.key(0), x[:1]))
