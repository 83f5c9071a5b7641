"""What the examples for several devices share: a network, its data, the definition, a figure.

The network is an ordinary Flax one with BatchNorm and dropout; nothing in it knows of
devices. `loop_over_groups` says in plain Python what every route over devices has to compute.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax.training import train_state
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import sam_optax

N_TRAIN = 1024  # of scikit-learn's 1797 images; the rest is for testing
QUICK_N_TRAIN = 256  # where it only has to run
WIDTH = 16  # channels of the first convolution, half of those of the second
DROPOUT = 0.2  # fraction of the features dropped before the last layer


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        for features, stride in ((WIDTH, 1), (2 * WIDTH, 2)):
            x = nn.Conv(features, (3, 3), strides=stride, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(DROPOUT, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any  # BatchNorm's running mean and variance


def load(n_train: int = N_TRAIN) -> Any:
    """Training images, test images, training labels, test labels; pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    return train_test_split(images, labels, train_size=n_train, stratify=labels, random_state=0)


def new_state(seed: jax.typing.ArrayLike, tx: optax.GradientTransformation) -> TrainState:
    network = Network()
    variables = network.init(jax.random.key(seed), jnp.zeros((1, 8, 8, 1)), train=False)
    variables = jax.tree.map(lambda v: v.astype(float), variables)  # float64 where that is enabled
    state = TrainState.create(apply_fn=network.apply, tx=tx, **variables)
    return state.replace(step=jnp.zeros([], jnp.int32))  # a Python 0 would compile twice


def loss_fn(params, batch_stats, x, y, key):
    logits, updated = Network().apply(
        {"params": params, "batch_stats": batch_stats},
        x,
        train=True,
        rngs={"dropout": key},
        mutable="batch_stats",
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, (updated["batch_stats"], logits)


@jax.jit
def test_error(params, batch_stats, x, y) -> jax.Array:
    """In %, of the whole test set."""
    variables = {"params": params, "batch_stats": batch_stats}
    return 100 * (Network().apply(variables, x, train=False).argmax(-1) != y).mean()


@functools.partial(jax.jit, static_argnames=("method", "shared"))
def _group_gradient(method, shared, state, x, y, key, index):
    """Of one group of `shared` sub-batches, which have BatchNorm and dropout of their own."""

    def group_loss(params):
        outs = []
        for i, (xs, ys) in enumerate(zip(jnp.split(x, shared), jnp.split(y, shared), strict=True)):
            own_key = jax.random.fold_in(key, shared * index + i)
            loss, (stats, _) = loss_fn(params, state.batch_stats, xs, ys, own_key)
            outs.append((loss, stats))
        return jax.tree.map(lambda *leaves: sum(leaves) / shared, *outs)

    return sam_optax.value_and_grad(group_loss, method, has_aux=True)(state.params)


def loop_over_groups(
    method: optax.GradientTransformation,
    state: TrainState,
    batch: tuple[Any, Any],
    key: jax.Array,
    devices: int,
    shared: int = 1,
) -> tuple[TrainState, jax.Array]:
    """One step as m-sharpness defines it, in a plain Python loop on one device.

    Every group perturbs with its own gradient; then one mean. A group is one sub-batch of
    the batch, or `shared` consecutive ones if these share their perturbation.
    """
    groups = devices // shared
    key = jax.random.fold_in(key, state.step)
    outs = [  # NumPy arrays, so that the mean is taken by nothing but Python
        jax.device_get(_group_gradient(method, shared, state, x, y, key, i))
        for i, (x, y) in enumerate(zip(*(np.split(part, groups) for part in batch), strict=True))
    ]
    (loss, stats), grads = jax.tree.map(lambda *leaves: sum(leaves) / groups, *outs)
    update = jax.jit(lambda state: state.apply_gradients(grads=grads, batch_stats=stats))
    return update(state), loss


def largest_difference(a: Any, b: Any) -> float:
    """Over all entries of two trees, params, statistics and optimizer state alike."""
    differences = jax.tree.map(
        lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(initial=0), a, b
    )
    return float(max(jax.tree.leaves(differences)))


def elements(compiled: jax.stages.Compiled, kind: str) -> int:
    """Numbers that collectives of a kind yield; not operations, as the compiler may merge these."""
    shapes = [
        shape
        for result in re.findall(rf"= (.*?) {kind}(?:-start)?\(", compiled.as_text())
        for shape in re.findall(r"[a-z]\d+\[([\d,]*)\]", result)
    ]
    return sum(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)


def all_reduced_elements(compiled: jax.stages.Compiled) -> int:
    """Numbers that a step sums over devices."""
    return elements(compiled, "all-reduce")


def size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def per_device(global_batch: int, devices: int) -> int:
    """Examples on each device."""
    if global_batch % devices:
        raise SystemExit(f"{devices} devices must divide the batch, got {global_batch} examples")
    return global_batch // devices


def batches(x: Any, y: Any, batch: int, epoch: int) -> Iterator[Any]:
    """The batches of one epoch; a function of its number, so that a resumed run sees the same."""
    order = np.random.default_rng(epoch).permutation(len(x))
    order = order[: len(x) // batch * batch].reshape(-1, batch)
    return ((x[rows], y[rows]) for rows in order)


def draw(histories: dict[str, np.ndarray], title: str, path: Path) -> None:
    """Loss and test error by epoch, the first two columns of the histories."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    # Okabe and Ito's palette, told apart by all kinds of colour vision.
    styles = zip(("#D55E00", "#0072B2", "#009E73"), "os^", strict=True)
    for (name, history), (color, marker) in zip(histories.items(), styles, strict=False):
        for axis, values in zip(axes, np.asarray(history).T, strict=False):
            epochs = np.arange(1, len(values) + 1)
            axis.plot(epochs, values, marker=marker, ms=3, color=color, label=name)
    axes[0].set(title="Training loss", xlabel="epoch", ylabel="cross-entropy", yscale="log")
    axes[1].set(title="Test error", xlabel="epoch", ylabel="test error (%)", ylim=(0, None))
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=200)
    plt.close(figure)
