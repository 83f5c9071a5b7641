"""Claim 9: p = 2 is the best norm of the perturbation.

    python experiments/p_norm.py

Published (Foret et al., 2010.01412, appendix): among p = 1, 2 and infinity p = 2 is the best on
CIFAR-10, with rho tuned for each. Here p = 1.5 and 4 as well, and eight radii for each p, on MNIST
with 40 % wrong labels. The same radius is a far larger perturbation for a larger p (at p = infinity
every weight moves by rho), so the grids lie apart by the ratios of the norms of a perturbation of a
given length in the 2-norm.
"""

import numpy as np
from _figures import dots, panels
from _harness import Arm, Study, grid
from _report import COLORS, MARKERS

import sam_optax

NOISE = 0.4
SGD_GRID = grid(lr=(0.05, 0.1), weight_decay=(0.01, 0.02, 0.03, 0.06))
LARGEST = {1.0: 8.0, 1.5: 4.5, 2.0: 0.8, 4.0: 0.06, np.inf: 0.009}  # dead or nearly so
RADII = 8  # of a grid, by factors of the square root of two
RATIOS = (0.25, 0.5, 1, 2, 4)  # ticks of the figure


def sam_with_norm(p):
    def sam(hyper):
        return sam_optax.sam(hyper["rho"], p=p)

    return sam


def name(p):
    return "p = inf" if np.isinf(p) else f"p = {p:g}"


def main(argv=None):
    study = Study(__file__, __doc__, argv)
    split, recipe = study.load("mnist", NOISE), study.recipe("mnist")
    arms = [Arm("SGD", recipe, SGD_GRID)]
    for p, largest in list(LARGEST.items())[:: 2 if study.quick else 1]:
        radii = [round(largest / 2 ** (k / 2), 5) for k in range(RADII)]
        method = recipe._replace(method=sam_with_norm(p))
        arms.append(Arm(name(p), method, grid(lr=(0.05,), weight_decay=(0.01,), rho=radii)))
    rows = study.compare(arms, split)
    two, others = rows["p = 2"], [row for row in rows.values() if row.name not in ("SGD", "p = 2")]
    study.compared("rho tuned for each p", rows, two)
    better = [row.name for row in others if row.beats(two)]
    worse = [row.name for row in others if two.beats(row)]
    verdict = "held" if len(worse) == len(others) else "not contradicted: none is better"
    study.claim(
        "9: p = 2 is the best norm",
        published="p = 2 better than 1 and infinity (figure)",
        verdict=f"did not hold here ({', '.join(better)} better)" if better else verdict,
        measured="; ".join(row.against(two) for row in (*others, rows["SGD"])),
    )

    figure, axes = panels(2, "SAM in the p-norm (MNIST, 40 % noise)", 5)
    dots(axes[0], rows.values())
    axes[0].set_title("test error, rho tuned for each p")
    for i, row in enumerate(list(rows.values())[1:], 1):
        radii = np.array([setting["rho"] for setting, _ in row.tuning])
        errors = np.transpose([errors for _, errors in row.tuning])
        axes[1].plot(
            radii / row.setting["rho"], errors.mean(0), MARKERS[i], color=COLORS[i], ls="-",
            label=f"{row.name}, best at rho {row.setting['rho']:.2g}",
        )  # fmt: skip
    low = min(row.mean for row in rows.values())
    axes[1].set(
        xscale="log", xlabel="rho over the best rho (log scale)", ylim=(0.85 * low, 2 * low)
    )
    axes[1].set(title="over rho", ylabel="validation error (%)")
    axes[1].set_xticks(RATIOS, map(str, RATIOS))
    axes[1].minorticks_off()
    axes[1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return study.finish(figure)


if __name__ == "__main__":
    main()
