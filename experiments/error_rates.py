"""Claims 1, 7, 11: SGD, SAM and ASAM on real digits, clean and with wrong labels.

    python experiments/error_rates.py

Published (Foret et al., 2010.01412), test error in % without and with SAM: WRN-28-10 on CIFAR-10
3.5 and 2.7, on CIFAR-100 18.8 and 16.5; PyramidNet on CIFAR-10 4.0 and 2.7; with label noise on par
with methods made for it. Here: small MLPs on 1500 MNIST and 600 scikit-learn digits. SGD also
trains for twice the epochs, which costs what SAM costs, and the better of the two is the rival. A
last comparison takes weight decay away from all: what shows there alone is owed to a weak baseline.
"""

from _figures import band, panels
from _harness import Arm, Study, grid
from _networks import asam, sam
from _report import COLORS, spread, welch

NOISE = (0.0, 0.2, 0.4, 0.6)  # chance of a training label to be redrawn
WEAK = 1e-3  # weight decay of the last comparison; tuned SGD takes more where labels are wrong
SGD_DECAYS = (0.003, 0.01, 0.03, 0.06)
GRIDS = {  # eight settings for every method
    "mnist": {
        "SGD": grid(lr=(0.1, 0.2), weight_decay=SGD_DECAYS),
        "SAM": grid(lr=(0.05, 0.2), weight_decay=(0.01,), rho=(0.1, 0.2, 0.3, 0.4)),
        "ASAM": grid(lr=(0.05, 0.2), weight_decay=(0.01,), rho=(1, 2, 4, 8)),
    },
    "digits": {
        "SGD": grid(lr=(0.05, 0.1), weight_decay=SGD_DECAYS),
        "SAM": grid(lr=(0.02, 0.1), weight_decay=(0.01,), rho=(0.1, 0.2, 0.3, 0.4)),
        "ASAM": grid(lr=(0.02, 0.1), weight_decay=(0.003,), rho=(1, 2, 4, 6)),
    },
}


def arms_for(study, data):
    recipe, grids = study.recipe(data), GRIDS[data]
    longer = recipe._replace(epochs=2 * recipe.epochs)
    return [
        Arm("SGD", recipe, grids["SGD"]),
        Arm("SGD, twice the epochs", longer, grids["SGD"]),
        Arm("SAM", recipe._replace(method=sam), grids["SAM"]),
        Arm("ASAM", recipe._replace(method=asam), grids["ASAM"]),
    ]


def better_sgd(rows):
    return min((rows["SGD"], rows["SGD, twice the epochs"]), key=lambda row: row.mean)


def wins(conditions, names=("SAM", "ASAM")):
    """How often each method beats the better SGD, in words, and whether all do always."""
    counts = [sum(rows[n].beats(better_sgd(rows)) for rows in conditions) for n in names]
    words = ", ".join(
        f"{n} in {k} of {len(conditions)}" for n, k in zip(names, counts, strict=True)
    )
    if min(counts) == len(conditions):
        return "held", words
    return ("held in part" if max(counts) else "did not hold here"), words


def main(argv=None):
    study = Study(__file__, __doc__, argv)
    sets, noises = (("digits",), (0.4,)) if study.quick else (GRIDS, NOISE)
    results = {}
    for data in sets:
        for noise in noises:
            split, arms = study.load(data, noise), arms_for(study, data)
            results[data, noise] = rows = study.compare(arms, split, curve=True)
            study.compared(f"{data}, {noise:.0%} of labels redrawn", rows, better_sgd(rows))
    data, noise = next(key for key in results if key[1] == 0.4)
    rows, split = results[data, noise], study.load(data, noise)
    weak = {}
    for arm in arms_for(study, data):
        setting = rows[arm.name].setting | {"weight_decay": WEAK}
        weak[arm.name] = study.test(arm, setting, split, curve=True)
    study.compared(f"{data}, {noise:.0%}, weight decay {WEAK} for all", weak, better_sgd(weak))

    clean = [r for (_, noise), r in results.items() if noise == 0] or [rows]
    noisy = [r for (_, noise), r in results.items() if noise > 0]
    for claim, published, conditions in (
        ("1: SAM lowers test error", "CIFAR-10 3.5 to 2.7, CIFAR-100 18.8 to 16.5 (WRN)", clean),
        ("11: SAM resists label noise", "on par with methods made for it", noisy),
    ):
        verdict, words = wins(conditions)
        numbers = "; ".join(
            f"{r['SAM'].against(better_sgd(r))}, ASAM {spread(r['ASAM'].errors, 1)} %"
            for r in conditions
        )
        measured = f"Beat the better tuned SGD (p < .05): {words} conditions. {numbers}"
        study.claim(claim, published=published, verdict=verdict, measured=measured)
    gaps = {
        name: [better_sgd(r).mean - r[name].mean for r in (weak, rows)] for name in ("SAM", "ASAM")
    }
    study.claim(
        f"11, weakly regularised: the gain at weight decay {WEAK}",
        published="-",
        verdict="larger, an effect of a weakly regularised baseline"
        if all(gap[0] > gap[1] for gap in gaps.values()) else "not larger for all",
        measured=f"{data}, {noise:.0%} noise, gain in points over the better SGD: "
        + ", ".join(f"{name} {gap[0]:.1f}, tuned {gap[1]:.1f}" for name, gap in gaps.items()),
    )  # fmt: skip
    early = max(1, len(rows["SGD"].runs[0]["errors"]) // 20) - 1
    first = {n: [run["errors"][early] for run in clean[0][n].runs] for n in ("SGD", "SAM")}
    slower = welch(*first.values()) < 0.05 and sum(first["SAM"]) > sum(first["SGD"])
    ends = clean[0]["SAM"].beats(clean[0]["SGD"])
    study.claim(
        "7: SAM is slower at first and better at the end",
        published="learning curves",
        verdict="held" if slower and ends else "held in part" if slower or ends else "did not hold",
        measured=f"Clean labels, error after epoch {early + 1}: SGD {spread(first['SGD'], 1)} %, "
        f"SAM {spread(first['SAM'], 1)} %; at the end {clean[0]['SAM'].against(clean[0]['SGD'])}",
    )

    figure, axes = panels(len(sets) + 1, "Test error of tuned SGD, SAM and ASAM (mean ± std)")
    for axis, name in zip(axes, sets, strict=False):
        for i, arm in enumerate(results[name, noises[0]]):
            errors = [results[name, noise][arm].errors for noise in noises]
            x = [100 * noise + 0.8 * (i - 1.5) for noise in noises]
            means, stds = [e.mean() for e in errors], [e.std(ddof=1) for e in errors]
            looks = {"marker": "osD^"[i], "color": COLORS[i], "capsize": 2, "ms": 5}
            axis.errorbar(x, means, stds, label=arm, **looks)
        axis.set(title=name, xlabel="labels redrawn (%)", ylabel="test error (%)", ylim=(0, None))
    axes[0].legend(frameon=False)
    for i, name in enumerate(("SGD", "SAM")):
        curves = [run["errors"] for run in clean[0][name].runs]
        band(axes[-1], range(1, len(curves[0]) + 1), curves, i, name)
    axes[-1].set(title="while training, clean labels", xlabel="epoch", ylim=(0, 30))
    axes[-1].legend(frameon=False)
    return study.finish(figure)


if __name__ == "__main__":
    main()
