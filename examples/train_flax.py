"""SAM in a jitted Flax Linen training step, with BatchNorm and dropout, on scikit-learn's digits.

    python examples/train_flax.py               # some ten seconds
    python examples/train_flax.py --epochs 60
    python examples/train_flax.py --quick       # two epochs, for CI

What changes against plain SGD is one line: sam_optax.value_and_grad in place of
jax.value_and_grad. The state is a stock TrainState with BatchNorm's statistics added. One
run a method shows that both train, not which is better: for that see label_noise.py.
"""

import argparse
import functools
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

RHO = 0.05  # length of SAM's ascent step, in units of the parameters
LEARNING_RATE = 0.1  # peak; a cosine takes it to 0 at the end
MOMENTUM = 0.9
BATCH = 50  # examples a step
N_TRAIN = 1000  # of 1797 images; the rest is for testing
WIDTH = 128  # of the two hidden layers
DROPOUT = 0.2  # fraction of the hidden units dropped


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        for _ in range(2):
            x = nn.Dense(WIDTH)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.Dropout(DROPOUT, deterministic=not train)(x)
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any


@functools.partial(jax.jit, static_argnames="method", donate_argnames="state")
def train_step(state: TrainState, x, y, key, method) -> tuple[TrainState, jax.Array]:
    def loss_fn(params, x, y, key):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = state.apply_fn(
            variables, x, train=True, rngs={"dropout": key}, mutable="batch_stats"
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, updated["batch_stats"]

    # aux, here the statistics, is that of the clean pass.
    value_and_grad = sam_optax.value_and_grad(loss_fn, method, has_aux=True)
    # Both passes of SAM get the same arguments, so the same key and the same dropout mask; of a
    # key that loss_fn closes over, micro-batches and devices could not make keys of their own.
    key = jax.random.fold_in(key, state.step)
    (loss, batch_stats), grads = value_and_grad(state.params, x, y, key)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


@jax.jit
def test_error(state: TrainState, x, y) -> jax.Array:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return 100 * (state.apply_fn(variables, x, train=False).argmax(-1) != y).mean()


def train(method: optax.GradientTransformation, epochs: int, data: Any) -> np.ndarray:
    """Mean training loss and test error in % of every epoch, an array (epochs, 2)."""
    x, x_test, y, y_test = data
    network = Network()
    variables = network.init(jax.random.key(0), x[:1], train=False)
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, epochs * (len(x) // BATCH))
    state = TrainState.create(
        apply_fn=network.apply, tx=optax.sgd(schedule, MOMENTUM, nesterov=True), **variables
    )
    rng, history = np.random.default_rng(0), []
    for _ in range(epochs):
        losses = []
        for rows in rng.permutation(len(x)).reshape(-1, BATCH):
            state, loss = train_step(state, x[rows], y[rows], jax.random.key(1), method)
            losses.append(loss)
        history.append((jnp.stack(losses).mean(), test_error(state, x_test, y_test)))
    return np.array(history)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="two epochs")
    args = parser.parse_args()
    epochs = 2 if args.quick else args.epochs
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    data = train_test_split(images, labels, train_size=N_TRAIN, stratify=labels, random_state=0)

    methods = {"SGD": optax.identity(), "SAM": sam_optax.sam(RHO)}
    histories = {name: train(method, epochs, data) for name, method in methods.items()}
    print("epoch" + "".join(f"   {name}: loss  test error" for name in methods))
    for epoch in sorted({*range(0, epochs, 5), epochs - 1}):
        cells = (history[epoch] for history in histories.values())
        print(f"{epoch + 1:5}" + "".join(f"{loss:12.4f}{error:10.1f} %" for loss, error in cells))

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for (name, history), color in zip(histories.items(), ("#D55E00", "#0072B2"), strict=True):
        for axis, values in zip(axes, history.T, strict=True):
            axis.plot(np.arange(1, epochs + 1), values, color=color, label=name)
    axes[0].set(title="Training loss", xlabel="epoch", ylabel="cross-entropy", yscale="log")
    axes[1].set(title="Test error", xlabel="epoch", ylabel="test error (%)", ylim=(0, 8))
    axes[0].legend(frameon=False)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "train_flax.png", dpi=200)
    print(f"Figure: {args.out / 'train_flax.png'}")


if __name__ == "__main__":
    main()
