"""Claim 6: SAM costs twice the time of SGD. Error at equal epochs and at equal wall-clock.

    python experiments/cost.py

Published, seconds of a training without and with SAM: 245 and 406, 365 and 601, 669 and 1197, 1134
and 1999, ratios of 1.65 to 1.79; ASAM about the time of SAM on a TPU. Here: two MLPs, timed in
turns in one process, so that a busy machine slows all methods alike; the cost is the median over
turns of the ratio. Then SGD gets as many epochs as fit into SAM's time, its schedule stretched over
them and its settings tuned for that length, on 1500 MNIST digits, clean and with 40 % wrong labels.
Run it on a quiet machine.
"""

import functools
import time

import jax
import numpy as np
from _figures import panels
from _harness import Arm, Study, grid
from _networks import LANES, asam, fit, no_ascent, sam
from _report import COLORS, MARKERS, spread

METHODS = {"SGD": no_ascent, "SAM": sam, "ASAM": asam}
WIDTHS = {"MLP 256-256": (256, 256), "MLP 512-512": (512, 512)}
TURNS, EPOCHS = 7, 5  # a turn trains so many epochs with every method
NOISE = (0.0, 0.4)
GRIDS = {
    "SGD": grid(lr=(0.1, 0.2), weight_decay=(0.003, 0.01, 0.03, 0.06)),
    "SAM": grid(lr=(0.05, 0.2), weight_decay=(0.01,), rho=(0.1, 0.2, 0.3, 0.4)),
    "ASAM": grid(lr=(0.05, 0.2), weight_decay=(0.01,), rho=(1, 2, 4, 8)),
}


def seconds(recipe, train):
    """Time of a network's epoch."""
    setting = {"lr": 0.05, "weight_decay": 0.01, "rho": 0.1}
    begin = time.perf_counter()
    *_, networks = fit(recipe, [setting] * LANES, range(LANES), train)
    jax.block_until_ready(networks)
    return (time.perf_counter() - begin) / recipe.epochs / LANES


def main(argv=None):
    study = Study(__file__, __doc__, argv)
    split, base = study.load("mnist"), study.recipe("mnist")
    ratios = {}
    for size, widths in list(WIDTHS.items())[: 1 if study.quick else 2]:
        recipes = {
            name: study.recipe("mnist", widths=widths, epochs=EPOCHS)._replace(method=method)
            for name, method in METHODS.items()
        }
        warm = functools.cache(lambda recipe: seconds(recipe, split.train))  # compiles

        def turn(keys, recipes=recipes, warm=warm):
            for recipe in recipes.values():
                warm(recipe)
            yield {name: seconds(recipe, split.train) for name, recipe in recipes.items()}

        turns = study.collect([{"timed": size, "turn": i} for i in range(TURNS)], turn)
        for name in METHODS:
            ratios[size, name] = [t[name] / t["SGD"] for t in turns]
    lines = [(*key, f"{np.median(r):.2f}", spread(r)) for key, r in ratios.items()]
    study.table("Time over SGD's", ["network", "method", "median", "mean ± std"], lines)
    cost = {name: float(np.median(ratios["MLP 256-256", name])) for name in METHODS}
    study.claim(
        "6: SAM costs about twice the time, ASAM about the same as SAM",
        published="ratios of 1.65 to 1.79",
        verdict="held" if 1.5 < cost["SAM"] < 2.3 and abs(cost["ASAM"] / cost["SAM"] - 1) < 0.15
        else "did not hold here",
        measured="Time over SGD's, median: "
        + ", ".join(f"{s}, {n} {np.median(r):.2f}" for (s, n), r in ratios.items() if n != "SGD"),
    )  # fmt: skip

    noises = NOISE[1:] if study.quick else NOISE
    figure, axes = panels(1 + len(noises), "Cost of SAM and ASAM (MNIST)")
    for i, (key, values) in enumerate((k, r) for k, r in ratios.items() if k[1] != "SGD"):
        axes[0].plot([i] * len(values), values, MARKERS[i], color=COLORS[i], alpha=0.6, mew=0)
        axes[0].text(i + 0.12, np.median(values), f"{np.median(values):.2f}", va="center")
        axes[0].text(i, 0.1, f"{key[1]}\n{key[0]}", ha="center", size=7)
    axes[0].axhline(1, color="0.4", ls="--", lw=1)
    axes[0].set(title="time over SGD's, equal epochs", ylim=(0, None), xticks=[])
    axes[0].set_xlim(-0.5, 2 * len(ratios) / 3 - 0.3)

    sentences, wins = [], []
    for axis, noise in zip(axes[1:], noises, strict=True):
        split = study.load("mnist", noise)
        equal_time = base._replace(epochs=round(base.epochs * cost["SAM"]))
        arms = [
            Arm("SGD", base, GRIDS["SGD"]),
            Arm("SGD, SAM's time", equal_time, GRIDS["SGD"]),
            Arm("SAM", base._replace(method=sam), GRIDS["SAM"]),
            Arm("ASAM", base._replace(method=asam), GRIDS["ASAM"]),
        ]
        rows = study.compare(arms, split, curve=True)
        rival = min((rows["SGD"], rows["SGD, SAM's time"]), key=lambda row: row.mean)
        study.compared(f"{noise:.0%} of labels redrawn, at most SAM's time", rows, rival)
        wins.append(rows["SAM"].beats(rival))
        sentences.append(f"{noise:.0%} noise: {rows['SAM'].against(rival)}")
        for i, (name, row) in enumerate(rows.items()):
            curves = np.mean([run["errors"] for run in row.runs], 0)
            times = np.arange(1, len(curves) + 1) * cost.get(name, 1) / base.epochs
            axis.plot(times, curves, color=COLORS[i], label=name, ls=("-", "--", "-", ":")[i])
        low = min(row.mean for row in rows.values())
        axis.set(title=f"{noise:.0%} of labels redrawn", ylim=(0.85 * low, 2.5 * low))
        axis.set(xlabel="time, in trainings of SGD", ylabel="mean test error (%)")
        axis.legend(frameon=False)
    study.claim(
        "6, error at equal wall-clock: SAM against an SGD with as much time",
        published="-",
        verdict="SAM is better" if all(wins) else "SAM is better in part" if any(wins)
        else "SAM is not better",
        measured="; ".join(sentences),
    )  # fmt: skip
    return study.finish(figure)


if __name__ == "__main__":
    main()
