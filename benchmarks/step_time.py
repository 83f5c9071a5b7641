"""Step time of SAM beside plain SGD and optax.contrib.sam, in one run.

    python benchmarks/step_time.py              # a minute on two cores
    python benchmarks/step_time.py --quick

Compiled training steps of one small convolutional network and one MLP, SGD with momentum. The
subjects take turns within each repeat, so that a busy machine slows all of them; ratios are medians
of the ratios to SGD within a repeat.
"""

import argparse
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import optax.contrib

import sam_optax

RHO = 0.05
REPEATS = 60  # turns of every subject
BATCH = 64  # examples a step


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for width in (512, 512):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def subjects(model, x, y, traces):
    """Name -> a jitted step (params, state) and its first state."""

    def loss_fn(params):
        traces.append(1)
        logits = model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    params = model.init(jax.random.key(0), x)
    base = optax.sgd(0.01, momentum=0.9)
    opaque = optax.contrib.sam(
        base, optax.chain(optax.contrib.normalize(), optax.sgd(RHO)), opaque_mode=True
    )
    chain = optax.chain(sam_optax.sam(RHO), base)

    def functional(method):
        def step(params, state):
            grads = sam_optax.grad(loss_fn, method)(params)
            updates, state = base.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step, base

    def with_grad_fn(tx):
        def step(params, state):
            grad_fn = lambda params, _=None: jax.grad(loss_fn)(params)
            updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), state

        return step, tx

    def by_hand(params, state):
        grads = jax.grad(loss_fn)(params)
        scale = RHO / optax.tree.norm(grads)
        perturbed = jax.tree.map(lambda w, g: w + scale * g, params, grads)
        updates, state = base.update(jax.grad(loss_fn)(perturbed), state, params)
        return optax.apply_updates(params, updates), state

    steps = {
        "SGD": functional(optax.identity()),
        "two gradients, by hand": (by_hand, base),
        "sam, functional": functional(sam_optax.sam(RHO)),
        "sam, in a chain": with_grad_fn(chain),
        "asam, functional": functional(sam_optax.asam(0.5)),
        "optax.contrib.sam, opaque": with_grad_fn(opaque),
    }
    return {name: (jax.jit(step), params, tx.init(params)) for name, (step, tx) in steps.items()}


def measure(model, x, y, repeats):
    """Rows of (name, milliseconds, ratio to SGD, its quartiles, traces of the loss, temp MB)."""
    traces: list[int] = []
    running, facts = {}, {}
    for name, (step, params, state) in subjects(model, x, y, traces).items():
        traces.clear()
        compiled = step.lower(params, state).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes / 1e6
        facts[name] = (len(traces), memory)
        running[name] = (compiled, params, state)
    times = {name: [] for name in running}
    for turn in range(repeats + 3):
        for name, (step, params, state) in running.items():
            begin = time.perf_counter()
            jax.block_until_ready(step(params, state))
            if turn >= 3:  # the first turns warm up
                times[name].append(1e3 * (time.perf_counter() - begin))
    rows = []
    for name, values in times.items():
        ratios = np.array(values) / np.array(times["SGD"])
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        rows.append((name, np.median(values), middle, low, high, *facts[name]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="few repeats")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    repeats = 5 if args.quick else REPEATS
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, 28, 28, 1)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, BATCH))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for axis, model in zip(axes, (ConvNet(), MLP()), strict=True):
        rows = measure(model, x, y, repeats)
        title = type(model).__name__
        print(f"\n{title}, batch {BATCH}, {jax.devices()[0].device_kind}, jax {jax.__version__}")
        print(f"{'':28}  ms/step  over SGD  (quartiles)  traces  temp MB")
        for name, ms, ratio, low, high, count, memory in rows:
            spread = f"({low:.2f}-{high:.2f})"
            print(f"{name:28} {ms:8.2f} {ratio:9.2f}  {spread:>11} {count:7d} {memory:8.1f}")
        names = [row[0] for row in rows][::-1]
        ratios = np.array([row[2:5] for row in rows])[::-1]
        errors = np.abs(ratios[:, 1:].T - ratios[:, 0])
        axis.barh(names, ratios[:, 0], xerr=errors, color="#0072B2", ecolor="0.3", height=0.6)
        axis.set(title=title, xlabel="step time over SGD's (median, quartiles)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.out / "step_time.png", dpi=150)
    print(f"\nFigure: {args.out / 'step_time.png'}")


if __name__ == "__main__":
    main()
