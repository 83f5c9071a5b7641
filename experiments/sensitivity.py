"""How wide is the good region? Test error over learning rate, rho and weight decay, for one task.

    python experiments/sensitivity.py

The MLP with 40 % wrong labels; every training has the same number of steps, one seed. A figure of
all errors, the shares of the settings within a point of the method's best and as good as the best
of the base, and the cliff: the least rho above the best one at which the error is twice the best.
"""

import itertools

import numpy as np
from _figures import panels
from _harness import Study
from _paying import base_name
from _tasks.task import LogUniform
from _training import BASE, METHODS, Method
from _trials import SEARCH, Trials
from does_it_pay import instances, parser_of

RATES, DECAYS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), (0.001, 0.003, 0.01, 0.03, 0.1)
RHO = LogUniform(0.025, 0.8)  # of SAM; ASAM's is ten times that
RADII = 6
GOOD = 1.0  # points above the best of the method
COMPARED = METHODS[:3]  # base, SAM, ASAM


def axes_of(study: Study, method: Method) -> tuple[tuple[float, ...], ...]:
    """Learning rates, values of rho (0 for the base), weight decays."""
    count = 2 if study.quick else RADII
    radii = [float(f"{method.rho * RHO.at(u):.3g}") for u in np.linspace(0, 1, count)] \
        if method.rho else [0.0]  # fmt: skip
    short = slice(0, None, 4) if study.quick else slice(None)
    return RATES[short], tuple(radii), DECAYS[short]


def errors(study: Study, trials: Trials, method: Method) -> np.ndarray:
    """Test errors, with axes as of `axes_of`."""
    grid = axes_of(study, method)
    points = []
    for lr, rho, decay in itertools.product(*grid):
        setting = {"length": method.cost, "lr": lr, "weight_decay": decay}
        setting |= {"rho": rho} if method.rho else {}
        points.append((setting, SEARCH, SEARCH))
    runs = trials.run(method, points, "search")
    return np.reshape([run["error"] for run in runs], [len(axis) for axis in grid])


def cliff(radii: tuple[float, ...], found: np.ndarray) -> float | None:
    """The least rho above the best at which the error is twice the best, at the best's rate."""
    lr, rho, decay = np.unravel_index(found.argmin(), found.shape)
    line = found[lr, :, decay]
    over = [r for r, e in zip(radii[rho:], line[rho:], strict=True) if e >= 2 * found.min()]
    return over[0] if over else None


def main(argv=None):
    study = Study(__file__, __doc__, argv, parser=parser_of(__doc__), log="does_it_pay")
    (trials,) = instances(study, ("mlp",), (0.4,))
    for method in COMPARED:
        count = np.prod([len(axis) for axis in axes_of(study, method)])
        study.expect(count * trials.seconds(method, {"length": method.cost}))
    found = {method: errors(study, trials, method) for method in COMPARED}
    words, lines = [], []
    for method, values in found.items():
        name = base_name(trials.task) if method is BASE else method.name
        _, radii, _ = axes_of(study, method)
        good, edge = np.mean(values <= values.min() + GOOD), cliff(radii, values)
        equal = np.mean(values <= found[BASE].min())
        at = np.unravel_index(values.argmin(), values.shape)
        best = [axis[i] for axis, i in zip(axes_of(study, method), at, strict=True)]
        lines.append((name, f"{values.min():.1f}", *(f"{b:g}" for b in best), f"{good:.0%}",
                      f"{equal:.0%}", "-" if edge is None else f"{edge:g}"))  # fmt: skip
        words.append(f"{name}: best {values.min():.1f} %, {good:.0%} of the settings within a point"
                     + (f", cliff at rho {edge:g}" if edge else ""))  # fmt: skip
    header = ["", "best %", "lr", "rho", "weight decay", "within a point"]
    header += [f"as good as {base_name(trials.task)}'s best", "cliff, rho"]
    study.table(f"{trials.name}: the good region", header, lines)
    study.page("Sensitivity", [header, *lines])
    widest = max(found, key=lambda m: np.mean(found[m] <= found[m].min() + GOOD))
    study.claim(
        "Sensitivity: how wide the good region of SAM and ASAM is",
        published="-",
        verdict=f"widest: {base_name(trials.task) if widest is BASE else widest.name}",
        measured="; ".join(words),
    )
    return study.finish(draw(study, trials, found))


def draw(study, trials, found):
    decays = axes_of(study, BASE)[2]
    figure, axes = panels(3 * len(decays), f"{trials.name}: test error (%), one seed", 3.4, 2.6)
    for axis in axes:
        axis.remove()
    figure.set_size_inches(2.6 * len(decays) + 1.4, 7)
    grid = figure.subplots(
        3, len(decays), squeeze=False, gridspec_kw={"height_ratios": [RADII, RADII, 1.4]}
    )
    low = min(values.min() for values in found.values())
    looks = {"vmin": low, "vmax": low + 12, "cmap": "cividis_r", "aspect": "auto"}
    order = [*list(found)[1:], BASE]
    for line, method in zip(grid, order, strict=True):
        rates, radii, _ = axes_of(study, method)
        name, values = (base_name(trials.task) if method is BASE else method.name), found[method]
        best = np.unravel_index(values.argmin(), values.shape)
        for k, axis in enumerate(line):
            image = axis.imshow(values[:, :, k].T, origin="lower", **looks)
            for i, j in np.ndindex(*values.shape[:2]):
                error = values[i, j, k]
                good = error <= values.min() + GOOD
                axis.text(
                    i, j, f"{error:.0f}" if error >= 99.5 else f"{error:.1f}", ha="center",
                    va="center", size=6, weight="bold" if good else "normal",
                    color="white" if error > low + 7 else "black",
                )  # fmt: skip
            if k == best[2]:
                axis.plot(*best[:2], "s", ms=18, mfc="none", mec="#D55E00", mew=1.6)
            axis.set_xticks(range(len(rates)), [f"{r:g}" for r in rates], size=7)
            marks = [f"{r:g}" if method.rho else "-" for r in radii]
            axis.set_yticks(range(len(radii)), marks, size=7)
            if k == 0:
                axis.set_ylabel(f"{name}: rho" if method.rho else name)
            if method is order[0]:
                axis.set_title(f"weight decay {decays[k]:g}", size=9)
            if method is BASE:
                axis.set_xlabel("learning rate")
    figure.colorbar(image, ax=grid, label="test error (%)", extend="max", shrink=0.6)
    note = "Bold: within a point of the method's best. Square: the best."
    figure.supxlabel(note, size=8)
    return figure


if __name__ == "__main__":
    main()
