"""SAM in a jitted Flax NNX training step, with BatchNorm and dropout, on scikit-learn's digits.

    python examples/train_nnx.py               # some ten seconds
    python examples/train_nnx.py --epochs 60
    python examples/train_nnx.py --quick       # two epochs, for CI

What changes against plain SGD is one line: sam_optax.nnx.value_and_grad in place of
nnx.value_and_grad. The optimizer is a stock nnx.Optimizer. One run a method shows that
both train, not which is better: for that see label_noise.py.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import sam_optax.nnx

RHO = 0.05  # length of SAM's ascent step, in units of the parameters
LEARNING_RATE = 0.1  # peak; a cosine takes it to 0 at the end
MOMENTUM = 0.9
BATCH = 50  # examples a step
N_TRAIN = 1000  # of 1797 images; the rest is for testing
WIDTH = 128  # of the two hidden layers
DROPOUT = 0.2  # fraction of the hidden units dropped


def network(rngs: nnx.Rngs) -> nnx.Module:
    def hidden(inputs: int) -> list[Any]:
        linear, norm = (
            nnx.Linear(inputs, WIDTH, rngs=rngs),
            nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs),
        )
        return [linear, norm, nnx.relu, nnx.Dropout(DROPOUT, rngs=rngs)]

    return nnx.Sequential(*hidden(64), *hidden(WIDTH), nnx.Linear(WIDTH, 10, rngs=rngs))


def loss_fn(model: nnx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@functools.partial(nnx.jit, static_argnames="method")
def train_step(model, optimizer, x, y, method) -> jax.Array:
    # BatchNorm's statistics and dropout's keys move once, as in the clean pass of SAM, and both
    # passes see the same dropout mask.
    loss, grads = sam_optax.nnx.value_and_grad(loss_fn, method)(model, x, y)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def test_error(model, x, y) -> jax.Array:
    return 100 * (model(x).argmax(-1) != y).mean()


def train(method: optax.GradientTransformation, epochs: int, data: Any) -> np.ndarray:
    """Mean training loss and test error in % of every epoch, an array (epochs, 2)."""
    x, x_test, y, y_test = data
    model = network(nnx.Rngs(0))
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, epochs * (len(x) // BATCH))
    tx = optax.sgd(schedule, MOMENTUM, nesterov=True)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    rng, history = np.random.default_rng(0), []
    for _ in range(epochs):
        losses = []
        model.train()
        for rows in rng.permutation(len(x)).reshape(-1, BATCH):
            losses.append(train_step(model, optimizer, x[rows], y[rows], method))
        model.eval()  # running statistics, no dropout
        history.append((jnp.stack(losses).mean(), test_error(model, x_test, y_test)))
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
    figure.savefig(args.out / "train_nnx.png", dpi=200)
    print(f"Figure: {args.out / 'train_nnx.png'}")


if __name__ == "__main__":
    main()
