"""How sharp are the solutions of SGD, SAM and ASAM? A table of measures and five figures.

    python examples/landscape.py           # about a minute on two cores
    python examples/landscape.py --quick   # a few seconds of everything, for CI

The three train on the job of label_noise.py, with its settings: 1500 MNIST digits, 40 % of the
labels redrawn. Noise matters here. Networks that fit clean labels perfectly have almost no
Hessian left, whatever trained them: it vanishes with the loss and says nothing about them.
All measures are of the training loss, without weight decay, on all training examples.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import label_noise
import matplotlib.pyplot as plt
import numpy as np
import optax

import sam_optax
from sam_optax import draw, landscape, sharpness

METHODS = ("SGD", "SAM", "ASAM")
RHO = 0.4  # radius of the worst cases: that of SAM in this job
ADAPTIVE_RHO = 4.0  # the same relative to |w| + 0.01, half of ASAM's in this job
NOISE = 0.01  # standard deviation of the noise in the average case, for each parameter
GROUP = 100  # examples a group of m-sharpness: the batch that training used
RAY_LENGTH = 30.0  # distance walked to either side, in units of the parameters
SIGMA = 0.03  # width of a peak in the spectral density, in units of the Hessian
GRID = 25  # points along an axis of a plane
KEY = jax.random.key(0)  # of all measures, so that all solutions see the same directions


@functools.partial(jax.jit, static_argnames=("model", "method", "epochs", "batch"))
def train(model, method, epochs, batch, seed, lr, weight_decay, rho, data):
    """Initial parameters and those after every epoch, stacked; as in label_noise.py."""
    init_key, order_key = jax.random.split(jax.random.key(seed))
    steps = len(data[0]) // batch  # an epoch
    warmup = int(label_noise.WARMUP * epochs * steps)
    shape = optax.warmup_cosine_decay_schedule(0, 1, warmup, epochs * steps)
    kernels = functools.partial(jax.tree.map, lambda w: w.ndim > 1)
    tx = optax.chain(
        optax.add_decayed_weights(weight_decay, kernels),
        optax.sgd(lambda count: lr * shape(count), label_noise.MOMENTUM, nesterov=True),
    )
    loss = functools.partial(label_noise.loss, model)
    grad = sam_optax.grad(loss, label_noise.METHODS[method](rho))

    def step(carry, rows):
        params, state = carry
        grads = grad(params, jax.tree.map(lambda a: a[rows], data))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, len(data[0]))[: steps * batch]
        carry, _ = jax.lax.scan(step, carry, order.reshape(steps, batch))
        return carry, carry[0]

    first = model.init(init_key, data[0][:1])
    keys = jax.random.split(order_key, epochs)
    _, path = jax.lax.scan(epoch, (first, tx.init(first)), keys)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, path)


def measure(loss: Any, params: Any, data: Any) -> tuple[dict[str, float], sharpness.Eigenvalues]:
    """The row of the table, and the eigenvalues to draw."""
    adaptive = sam_optax.elementwise(normalize_bias=True)
    one = sharpness.one_step(loss, params, data, rho=RHO)
    worst = sharpness.worst_case(loss, params, data, key=KEY, rho=RHO, steps=10)
    relative = sharpness.worst_case(
        loss, params, data, key=KEY, rho=ADAPTIVE_RHO, steps=10, normalization=adaptive
    )
    groups = sharpness.m_sharpness(loss, params, data, m=GROUP, rho=RHO)
    average = sharpness.average_case(loss, params, data, key=KEY, rho=NOISE, samples=20)
    eigenvalues = sharpness.hessian_eigenvalues(loss, params, data, key=KEY, steps=40)
    trace = sharpness.hessian_trace(loss, params, data, key=KEY, probes=20)
    row = {
        "training loss": one.loss,
        "one step": one.value,
        "worst case": worst.value,
        "worst case, adaptive": relative.value,
        f"m-sharpness, m = {GROUP}": groups.value,
        "average case": average.value,
        "largest eigenvalue": float(eigenvalues.top[0]),
        "lambda_max / lambda_5": eigenvalues.ratio,
        "smallest eigenvalue": float(eigenvalues.bottom[0]),
        "trace": trace.value,
    }
    return row, eigenvalues


def report(rows: dict[str, list[dict[str, float]]]) -> None:
    """Prints mean and standard deviation over seeds, a line for each measure."""
    print(f"\n{'mean ± std over seeds':26}" + "".join(f"{name:>16}" for name in rows))
    for measured in next(iter(rows.values()))[0]:
        cells = []
        for runs in rows.values():
            values = np.array([run[measured] for run in runs])
            cells.append(f"{values.mean():9.4g} ± {values.std(ddof=1):.2g}".rjust(16))
        print(f"{measured:26}" + "".join(cells))
    print(
        f"Worst cases, one step and m-sharpness: rho = {RHO} (adaptive: {ADAPTIVE_RHO}); average "
        f"case: noise of {NOISE} a parameter."
    )


def figures(loss: Any, paths: dict[str, Any], eigenvalues: Any, data: Any, out: Path) -> None:
    """Computes and draws what there is to see of one seed's solutions."""
    ends = {name: jax.tree.map(lambda a: a[-1], path) for name, path in paths.items()}
    n = len(jax.tree.leaves(paths["SGD"])[0])  # points of a path
    t = np.linspace(-RAY_LENGTH, RAY_LENGTH, 21)
    rays = {name: landscape.rays(loss, w, data, key=KEY, distances=t) for name, w in ends.items()}
    densities = {
        name: sharpness.spectral_density(loss, w, data, key=KEY, steps=60, probes=3, sigma=SIGMA)
        for name, w in ends.items()
    }
    through = landscape.plane_through(loss, list(ends.values()), data)
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.8), layout="constrained")
    draw.rays(rays, axes[0, 0]).set_title("Loss along random rays (mean ± std of 10)")
    draw.eigenvalues(eigenvalues, axes[0, 1]).set_title("Largest eigenvalues")
    draw.density(densities, axes[1, 0]).set_title("Spectral density of the Hessian")
    draw.contours(through, axes[1, 1], names=list(ends)).set_title("Plane through the solutions")
    figure.savefig(out / "overview.png", dpi=150)

    side = np.linspace(-1, 1, GRID)
    planes = {
        name: landscape.random_plane(loss, w, data, key=KEY, x=side) for name, w in ends.items()
    }
    for name, plane in planes.items():
        plane.save(out / f"plane_{name}.npz")
    draw.planes(planes).savefig(out / "planes.png", dpi=150)
    figure, axes = plt.subplots(
        1, 2, figsize=(9, 4.2), subplot_kw={"projection": "3d"}, layout="constrained"
    )
    floor = min(float(planes[name].values.min()) for name in ("SGD", "SAM"))
    ceiling = float(planes["SGD"].values.max())
    for ax, name in zip(axes, ("SGD", "SAM"), strict=True):
        draw.surface(planes[name], ax, limits=(floor, ceiling)).set_title(name, y=0.95)
    figure.savefig(out / "surfaces.png", dpi=150)

    figure, axes = plt.subplots(2, 1, figsize=(9, 5.4), layout="constrained")  # long and thin
    for ax, name in zip(axes, ("SGD", "SAM"), strict=True):
        points = [jax.tree.map(lambda a, i=i: a[i], paths[name]) for i in range(n)]
        plane = landscape.trajectory_plane(loss, points, data)
        draw.contours(plane, ax).set_title(f"{name}: a dot each epoch")
    figure.savefig(out / "trajectories.png", dpi=150)

    lines = {
        f"{a} to {b}": landscape.interpolate(loss, ends[a], ends[b], data)
        for a, b in (("SGD", "SAM"), ("SGD", "ASAM"), ("SAM", "ASAM"))
    }
    ax = draw.interpolation(lines)
    ax.figure.savefig(out / "interpolation.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs a method, at least 2")
    parser.add_argument("--out", type=Path, default=Path("results/landscape"))
    parser.add_argument("--quick", action="store_true", help="digits, few epochs, 2 seeds")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2, for a standard deviation, got {args.seeds}")
    begin = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    name, seeds = ("digits", 2) if args.quick else ("mnist", args.seeds)
    task = label_noise.TASKS[name]._replace(**(label_noise.QUICK if args.quick else {}))
    data, (x_test, y_test) = label_noise.load(name, task, "test", args.out / "mnist_14x14.npz")
    model = label_noise.MLP(task.widths)
    loss = functools.partial(label_noise.loss, model)
    settings = {s.method: s for s in reversed(task.tuned)}  # of SGD, the shorter
    rows: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    paths, eigenvalues = {}, {}
    for seed in range(seeds):
        for method in METHODS:
            setting = settings[method]
            path = train(
                model, method, task.epochs, task.batch, seed, setting.lr, setting.weight_decay,
                setting.rho, data,
            )  # fmt: skip
            params = jax.tree.map(lambda a: a[-1], path)
            row, found = measure(loss, params, data)
            error = 100 * float(jnp.mean(model.apply(params, x_test).argmax(-1) != y_test))
            rows[method].append({"test error (%)": error} | row)
            if seed == 0:
                paths[method], eigenvalues[method] = path, found
            print(
                f"seed {seed}, {method}: {error:.1f} % error, {time.perf_counter() - begin:.0f} s"
            )
    report(rows)
    (args.out / "sharpness.json").write_text(json.dumps(rows, indent=1))
    figures(loss, paths, eigenvalues, data, args.out)
    if args.quick:
        print("\n--quick only shows that everything runs: too few epochs to compare methods.")
    print(f"\n{time.perf_counter() - begin:.0f} s in all. Figures and table: {args.out}")


if __name__ == "__main__":
    main()
