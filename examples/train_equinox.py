"""SAM in a jitted Equinox training step, with BatchNorm and dropout, on scikit-learn's digits.

    python examples/train_equinox.py                     # some ten seconds
    python examples/train_equinox.py --epochs 60
    python examples/train_equinox.py --method look_sam   # a method with memory in place of SAM
    python examples/train_equinox.py --quick             # two epochs, for CI

What changes against plain SGD is one line: sam_optax.equinox.value_and_grad in place of
eqx.filter_value_and_grad. Methods with memory stand in the chain of the optimizer instead, and
value_and_grad_fn gives what they need. One run a method shows that both train, not which is
better: for that see label_noise.py.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tqdm
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import sam_optax.equinox

RHO = 0.05  # length of SAM's ascent step, in units of the parameters
EVERY = 5  # steps between two second gradients of look_sam
LEARNING_RATE = 0.1  # peak; a cosine takes it to 0 at the end
MOMENTUM = 0.9
BATCH = 50  # examples a step
N_TRAIN = 1000  # of 1797 images; the rest is for testing
WIDTH = 128  # of the two hidden layers
DROPOUT = 0.2  # fraction of the hidden units dropped


def network(key: jax.Array) -> eqx.nn.Sequential:
    first, second, last = jax.random.split(key, 3)

    def hidden(inputs: int, key: jax.Array) -> list[Any]:
        linear = eqx.nn.Linear(inputs, WIDTH, key=key)
        norm = eqx.nn.BatchNorm(WIDTH, axis_name="batch", momentum=0.9, mode="batch")
        return [linear, norm, eqx.nn.Lambda(jax.nn.relu), eqx.nn.Dropout(DROPOUT)]

    layers = [*hidden(64, first), *hidden(WIDTH, second), eqx.nn.Linear(WIDTH, 10, key=last)]
    return eqx.nn.Sequential(layers)


def loss_fn(model, state, x, y, key) -> tuple[jax.Array, eqx.nn.State]:
    forward = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
    logits, state = forward(x, state, key=jax.random.split(key, len(x)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state


@eqx.filter_jit
def train_step(model, state, opt_state, x, y, key, *, method, tx):
    # Both passes of SAM get the same state and the same key, so the same dropout mask; the state
    # returned is that of the clean pass.
    value_and_grad = sam_optax.equinox.value_and_grad(loss_fn, method, has_aux=True)
    (loss, state), grads = value_and_grad(model, state, x, y, key)
    updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, opt_state, loss


@eqx.filter_jit
def train_step_with_memory(model, state, opt_state, x, y, key, *, tx):
    # The method is the first link of tx, and keeps its memory in opt_state.
    value_and_grad_fn = sam_optax.equinox.value_and_grad_fn(loss_fn, has_aux=True)
    (loss, state), grads, grad_fn = value_and_grad_fn(model, state, x, y, key)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return eqx.apply_updates(model, updates), state, opt_state, loss


@eqx.filter_jit
def test_error(model, state, x, y) -> jax.Array:
    model = eqx.nn.inference_mode(model)  # running statistics, no dropout
    logits, _ = jax.vmap(model, in_axes=(0, None), out_axes=(0, None))(x, state)
    return 100 * (logits.argmax(-1) != y).mean()


def optimizer_and_step(name: str, steps: int) -> tuple[optax.GradientTransformation, Callable]:
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
    sgd = optax.sgd(schedule, MOMENTUM, nesterov=True)
    if name == "look_sam":
        tx = optax.chain(sam_optax.look_sam(RHO, k=EVERY), sgd)
        return tx, functools.partial(train_step_with_memory, tx=tx)
    method = sam_optax.sam(RHO) if name == "sam" else optax.identity()
    return sgd, functools.partial(train_step, method=method, tx=sgd)


def train(name: str, epochs: int, data: Any) -> np.ndarray:
    """Mean training loss and test error in % of every epoch, an array (epochs, 2)."""
    x, x_test, y, y_test = data
    model, state = eqx.nn.make_with_state(network)(jax.random.key(0))
    tx, step = optimizer_and_step(name, epochs * (len(x) // BATCH))
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    rng, key, history = np.random.default_rng(0), jax.random.key(1), []
    for _ in tqdm.trange(epochs, desc=name, unit="epoch", dynamic_ncols=True):
        losses = []
        for rows in rng.permutation(len(x)).reshape(-1, BATCH):
            key, own = jax.random.split(key)
            model, state, opt_state, loss = step(model, state, opt_state, x[rows], y[rows], own)
            losses.append(loss)
        history.append((jnp.stack(losses).mean(), test_error(model, state, x_test, y_test)))
    return np.array(history)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("sam", "look_sam"), default="sam")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="two epochs")
    args = parser.parse_args()
    epochs = 2 if args.quick else args.epochs
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    data = train_test_split(images, labels, train_size=N_TRAIN, stratify=labels, random_state=0)

    methods = {"SGD": "sgd", {"sam": "SAM", "look_sam": "LookSAM"}[args.method]: args.method}
    histories = {label: train(name, epochs, data) for label, name in methods.items()}
    print("epoch" + "".join(f"   {label}: loss  test error" for label in methods))
    for epoch in sorted({*range(0, epochs, 5), epochs - 1}):
        cells = ((len(label), *history[epoch]) for label, history in histories.items())
        row = (f"{loss:{9 + width}.4f}{error:10.1f} %" for width, loss, error in cells)
        print(f"{epoch + 1:5}" + "".join(row))

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for (label, history), color in zip(histories.items(), ("#D55E00", "#0072B2"), strict=True):
        for axis, values in zip(axes, history.T, strict=True):
            axis.plot(np.arange(1, epochs + 1), values, color=color, label=label)
    axes[0].set(title="Training loss", xlabel="epoch", ylabel="cross-entropy", yscale="log")
    axes[1].set(title="Test error", xlabel="epoch", ylabel="test error (%)", ylim=(0, 8))
    axes[0].legend(frameon=False)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "train_equinox.png", dpi=200)
    print(f"Figure: {args.out / 'train_equinox.png'}")


if __name__ == "__main__":
    main()
