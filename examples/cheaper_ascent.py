"""SAM with a cheaper ascent: its gradient from a part of the batch, or in bfloat16.

    python examples/cheaper_ascent.py            # MNIST 14x14, 40 % label noise; three minutes
    python examples/cheaper_ascent.py --quick    # scikit-learn's digits, few epochs, for CI

`ascent_fraction` and `ascent_dtype` of the first door choose what the ascent gradient comes from;
the descent sees all of the batch in float32. Here the loss is not logged: one of the clean pass
over all of the batch would cost a forward pass more (`aux_from="ascent"` gives that of the part).
The data, the network and the settings of SGD and SAM are those of label_noise.py, and rho stays
that of SAM: nothing was tuned for the cheaper ascents. p-values (Welch) are against SAM with the
full ascent and are about seeds.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import label_noise
import matplotlib.pyplot as plt
import numpy as np
import optax
import tqdm
from _report import BLACK, BLUE, GREEN, MARKERS, ORANGE, PURPLE, RED, SKY, STYLE, spread, welch

import sam_optax

SEEDS = 6  # runs a variant
TURNS = 200  # timed steps of each variant, taken in turns so that all meet the same machine


class Variant(NamedTuple):
    name: str
    part: float  # of the batch, which it must divide, for the ascent gradient; 0 is SGD
    dtype: str = "float32"  # of the ascent's forward and backward pass


VARIANTS = (
    Variant("SGD", 0.0),
    Variant("SAM", 1.0),
    Variant("1/2 of the batch", 1 / 2),
    Variant("1/4 of the batch", 1 / 4),
    Variant("1/10 of the batch", 1 / 10),
    Variant("bfloat16", 1.0, "bfloat16"),
    Variant("1/10, bfloat16", 1 / 10, "bfloat16"),
)


def setting_of(variant: Variant, task: label_noise.Task) -> label_noise.Setting:
    method = "SAM" if variant.part else "SGD"
    return next(s for s in task.tuned if s.method == method)


def make_step(variant: Variant, task: label_noise.Task, tx: optax.GradientTransformation):
    loss = functools.partial(label_noise.loss, label_noise.MLP(task.widths))
    gradient = jax.grad(loss)
    if variant.part:
        gradient = sam_optax.grad(
            loss,
            sam_optax.sam(setting_of(variant, task).rho),
            ascent_fraction=variant.part,
            ascent_dtype=None if variant.dtype == "float32" else variant.dtype,
        )

    def step(params, state, x, y):
        updates, state = tx.update(gradient(params, (x, y)), state, params)
        return optax.apply_updates(params, updates), state

    return step


def make_tx(variant: Variant, task: label_noise.Task) -> optax.GradientTransformation:
    """The optimizer of label_noise.py."""
    setting, steps = setting_of(variant, task), task.epochs * (task.n_train // task.batch)
    schedule = optax.warmup_cosine_decay_schedule(
        0, setting.lr, int(label_noise.WARMUP * steps), steps
    )
    return optax.chain(
        optax.add_decayed_weights(
            setting.weight_decay, lambda p: jax.tree.map(lambda w: w.ndim > 1, p)
        ),
        optax.sgd(schedule, label_noise.MOMENTUM, nesterov=True),
    )


@functools.partial(jax.jit, static_argnames=("variant", "task"))
def test_error(variant, task, seed, data):
    """In %, after training."""
    (x, y), (x_test, y_test) = data
    model, tx = label_noise.MLP(task.widths), make_tx(variant, task)
    step = make_step(variant, task, tx)
    init_key, order_key = jax.random.split(jax.random.key(seed))
    steps = len(x) // task.batch

    def epoch(carry, key):
        order = jax.random.permutation(key, len(x))[: steps * task.batch]
        rows = order.reshape(steps, task.batch)
        return jax.lax.scan(lambda c, r: (step(*c, x[r], y[r]), None), carry, rows)

    params = model.init(init_key, x[:1])
    carry = params, tx.init(params)
    (params, _), _ = jax.lax.scan(epoch, carry, jax.random.split(order_key, task.epochs))
    return 100 * (model.apply(params, x_test).argmax(-1) != y_test).mean()


def step_times(variants, task: label_noise.Task, data, turns: int) -> dict[str, list[float]]:
    """Milliseconds of single steps; in each turn every variant takes one."""
    model, batch = label_noise.MLP(task.widths), [part[: task.batch] for part in data[0]]
    steps, carries, times = {}, {}, {variant.name: [] for variant in variants}
    for variant in variants:
        tx = make_tx(variant, task)
        params = model.init(jax.random.key(0), batch[0][:1])
        steps[variant.name] = jax.jit(make_step(variant, task, tx), donate_argnums=(0, 1))
        carries[variant.name] = steps[variant.name](params, tx.init(params), *batch)  # compiles
    rng = np.random.default_rng(0)
    for _ in tqdm.trange(turns, desc="step times", dynamic_ncols=True):
        for name in rng.permutation(list(times)):  # no variant always follows the same one
            begin = time.perf_counter()
            carries[name] = jax.block_until_ready(steps[name](*carries[name], *batch))
            times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def draw(title: str, rows: list[dict], path: Path) -> None:
    """Test error of every run against the time of a step."""
    plt.rcParams.update(STYLE)
    colors = (BLACK, BLUE, SKY, GREEN, ORANGE, RED, PURPLE)
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for row, color, marker in zip(rows, colors, MARKERS, strict=False):
        x = row["over_sgd"]
        axis.plot([x] * len(row["errors"]), row["errors"], marker, color=color, alpha=0.35, mew=0)
        label = f"{row['name']}: {row['mean']:.1f} %"
        looks = {"fmt": marker, "color": color, "capsize": 4, "label": label}
        axis.errorbar(x, row["mean"], np.std(row["errors"], ddof=1), **looks)
    axis.set(title=title, xlabel="time of a step over SGD's (median)", ylabel="test error (%)")
    axis.legend(
        frameon=False, title="ascent gradient from", loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.savefig(path, dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs a variant, at least 2")
    parser.add_argument("--out", type=Path, default=Path("results/cheaper_ascent"))
    parser.add_argument("--quick", action="store_true", help="digits, little of all")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2, for a standard deviation, got {args.seeds}")
    args.out.mkdir(parents=True, exist_ok=True)
    name, seeds = ("digits", 2) if args.quick else ("mnist", args.seeds)
    task = label_noise.TASKS[name]._replace(**(label_noise.QUICK if args.quick else {}))
    data = label_noise.load(name, task, "test", args.out / "mnist_14x14.npz")

    quick = [v for v in VARIANTS if v.name in ("SGD", "SAM", "1/10, bfloat16")]
    variants = quick if args.quick else VARIANTS
    times = step_times(variants, task, data, 20 if args.quick else TURNS)
    work = [(variant, seed) for variant in variants for seed in range(seeds)]
    errors = {variant.name: [] for variant in variants}
    for variant, seed in tqdm.tqdm(work, unit="run", dynamic_ncols=True):
        errors[variant.name].append(float(test_error(variant, task, seed, data)))

    rows = []
    for variant in variants:
        key = variant.name
        row = variant._asdict() | {"errors": errors[key], "mean": np.mean(errors[key])}
        # Paired: each turn gives one ratio.
        for rival in ("SGD", "SAM"):
            ratios = np.divide(times[key], times[rival])
            row[f"over_{rival.lower()}"] = statistics.median(ratios)
        row["milliseconds"] = statistics.median(times[key])
        row["p"] = None if key == "SAM" else welch(errors[key], errors["SAM"])
        rows.append(row)

    title = f"{task.images}, {label_noise.NOISE:.0%} label noise, {seeds} seeds"
    print(f"\n{title}; times: medians of {len(times['SGD'])} turns")
    print("                     step  over  over   test error %   p against")
    print("ascent gradient        ms   SGD   SAM     mean ± std   full SAM")
    for row in rows:
        p = "-" if row["p"] is None else f"{row['p']:.2g}"
        print(
            f"{row['name']:18} {row['milliseconds']:6.2f} {row['over_sgd']:5.2f} "
            f"{row['over_sam']:5.2f}  {spread(row['errors']):>13}  {p:>9}"
        )
    if args.quick:
        print("\n--quick only shows that everything runs: too few epochs to compare.")
    figure, log = args.out / "cheaper_ascent.png", args.out / "cheaper_ascent.json"
    draw(title, rows, figure)
    log.write_text(json.dumps({"title": title, "rows": rows, "times_ms": times}))
    print(f"Figure: {figure}; all runs: {log}")


if __name__ == "__main__":
    main()
