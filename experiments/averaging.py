"""Claims 15, 16: stochastic weight averaging (SWA) against SGD and SAM, on SAM, and against FGE.

    python experiments/averaging.py

Published (Izmailov et al., 1803.05407), accuracy on CIFAR-100 at one budget of epochs: VGG-16 SGD
72.55, SWA 73.91; WRN-28-10 80.82 and 81.46; on CIFAR-10 WRN-28-10 96.18 and 96.45; the ensemble of
fast geometric ensembling (FGE), with as many networks to store as snapshots, about the same
(WRN-28-10 at 1.5 budgets: SWA 82.15, FGE 82.27). Along random rays test error and training loss of
SWA rise more slowly than SGD's (figure 4). Here: an MLP on 1500 MNIST digits, clean and with 40 %
wrong labels, all with the same number of epochs (SAM pays two gradients in each). SWA warms up,
keeps a constant rate for half of them, then averages the end of every epoch at a constant or, in
cycles of an epoch, cyclical rate. FGE and the SWA beside it are of the same run: one keeps the
minima of its cycles, the other their mean.
"""

import functools

import jax
import numpy as np
import optax
from _figures import band, dots, panels
from _harness import Arm, Row, Study, grid
from _networks import LANES, MLP, WARMUP, decayed_sgd, fit, lane, loss, sam
from _report import spread, welch

from sam_optax import averaging, landscape

NOISE = (0.0, 0.4)
EPOCHS = 40
START = 0.5  # of the training: from here on weights are averaged
FLOOR = 0.1  # lowest rate of a cycle, over its highest
MEMBERS = 5  # of the FGE ensemble, one every MEMBER_EPOCHS
MEMBER_EPOCHS = 4
SGD_DECAYS = (0.003, 0.01, 0.03, 0.06)
SGD_GRID = grid(lr=(0.1, 0.2), weight_decay=SGD_DECAYS)
SAM_GRID = grid(lr=(0.05,), weight_decay=(0.01, 0.02), rho=(0.1, 0.2, 0.3, 0.4))
SWA_GRID = grid(lr=(0.1,), weight_decay=SGD_DECAYS, swa_lr=(0.05, 0.2))
SWA_SAM_GRID = grid(lr=(0.05,), weight_decay=(0.01,), swa_lr=(0.05, 0.2), rho=(0.1, 0.2, 0.3, 0.4))
SWA = "SWA, constant rate"  # the one whose surroundings are measured
RAY_LENGTH, RAY_POINTS, RAYS, RAY_SEEDS = 30.0, 13, 6, 4  # RAY_LENGTH in units of the parameters


def before(hyper, steps):
    """Warm-up to a constant rate."""
    ramp = optax.linear_schedule(0, 1, int(WARMUP * steps))
    return lambda count: hyper["lr"] * ramp(count)


def swa_constant(hyper, epochs, per_epoch):
    steps = epochs * per_epoch
    start, a = int(START * steps), hyper["swa_lr"]
    rate = averaging.cyclical_schedule(a, a, c=1, start=start, before=before(hyper, steps))
    tx = decayed_sgd(rate, hyper["weight_decay"])
    return averaging.swa(tx, start=start + per_epoch, every=per_epoch)


def swa_cyclical(hyper, epochs, per_epoch):
    steps = epochs * per_epoch
    start, a = int(START * epochs) * per_epoch, hyper["swa_lr"]
    rate = averaging.cyclical_schedule(
        a, FLOOR * a, c=per_epoch, start=start, before=before(hyper, steps)
    )
    tx = decayed_sgd(rate, hyper["weight_decay"])
    return averaging.swa(tx, start=start + per_epoch, every=per_epoch)


def fge(hyper, epochs, per_epoch):
    """Snapshots at the minima of the triangular cycle, and beside them their mean."""
    steps, c = epochs * per_epoch, max(2, MEMBER_EPOCHS * per_epoch // 2 * 2)
    start, a = max(0, steps - MEMBERS * c), hyper["swa_lr"]
    rate = averaging.triangular_schedule(
        a, FLOOR * a, c=c, start=start, before=before(hyper, steps)
    )
    tx = decayed_sgd(rate, hyper["weight_decay"])
    options = {"start": start + c // 2, "every": c}
    return averaging.swa(averaging.snapshots(tx, size=MEMBERS, **options), **options)


@jax.jit
def average(networks):
    return jax.vmap(averaging.swa_params)(networks.state, networks.params)


def arms_for(study):
    base = study.recipe("mnist", epochs=EPOCHS)
    swa = base._replace(solution=average)
    arms = [
        Arm("SGD", base, SGD_GRID),
        Arm("SAM", base._replace(method=sam), SAM_GRID),
        Arm(SWA, swa._replace(optimizer=swa_constant), SWA_GRID),
        Arm("SWA, cycles", swa._replace(optimizer=swa_cyclical), SWA_GRID),
        Arm("SWA on SAM", swa._replace(optimizer=swa_constant, method=sam), SWA_SAM_GRID),
        Arm("SWA of FGE", swa._replace(optimizer=fge), SWA_GRID),
    ]
    return arms[:1] + arms[2:3] + arms[5:] if study.quick else arms


def predict(params, x):
    hidden = tuple(layer["bias"].size for layer in params["params"].values())[:-1]
    return jax.nn.softmax(MLP(hidden).apply(params, x))


def ensemble(networks, seeds, test):
    """Error of the averaged predictions of each lane's snapshots."""
    x, y = test
    errors = []
    for i in range(len(seeds)):
        members, weights = averaging.snapshot_params(*lane((networks.state, networks.params), i))
        probabilities = averaging.ensemble_predictions(predict, members, x, weights=weights)
        errors.append(100 * float(np.mean(np.argmax(probabilities, -1) != np.asarray(y))))
    return {"ensemble": errors}


def rise(widths, params, batch):
    return loss(widths, params, *batch)


def error(widths, params, batch):
    x, y = batch
    return 100 * (MLP(widths).apply(params, x).argmax(-1) != y).mean()


def rays(study, arm, setting, split):
    """(seeds, points) mean over directions of the training loss and test error along rays."""
    distances = np.linspace(0, RAY_LENGTH, RAY_POINTS)
    widths = arm.recipe.widths
    figures = {"loss": (functools.partial(rise, widths), split.train)}
    figures["error"] = functools.partial(error, widths), split.test

    def compute(keys):
        seeds = [key["seed"] for key in keys]
        *_, networks = fit(arm.recipe, [setting] * len(seeds), seeds, split.train)
        solutions = arm.recipe.solution(networks)
        for i in range(len(seeds)):
            found = {
                name: landscape.rays(
                    of, lane(solutions, i), data, key=jax.random.key(0),
                    distances=distances, directions=RAYS,
                ).values
                for name, (of, data) in figures.items()
            }  # fmt: skip
            yield {name: np.mean(values, 0).round(5).tolist() for name, values in found.items()}

    seeds = range(min(RAY_SEEDS, study.seeds))
    key = {"rays": arm.name, "data": split.name, "setting": setting, "epochs": arm.recipe.epochs}
    runs = study.collect([key | {"seed": seed} for seed in seeds], compute, LANES)
    return {name: np.array([run[name] for run in runs]) for name in figures}


def main(argv=None):
    study = Study(__file__, __doc__, argv, tuning_seeds=4)
    results, along = {}, {}
    for noise in NOISE[1:] if study.quick else NOISE:
        split = study.load("mnist", noise)
        arms = arms_for(study)
        rows = study.compare(arms[:-1], split)
        extra = functools.partial(ensemble, test=split.test)
        rows["SWA of FGE"] = study.tune_and_test(arms[-1], split, extra=extra)
        runs = [{"error": run["ensemble"]} for run in rows["SWA of FGE"].runs]
        rows["FGE ensemble"] = Row("FGE ensemble", rows["SWA of FGE"].setting, runs, [])
        results[noise] = rows
        study.compared(f"{noise:.0%} of labels redrawn", rows, rows["SGD"])
        along[noise] = {
            arm.name: rays(study, arm, rows[arm.name].setting, split)
            for arm in arms
            if arm.name in ("SGD", "SAM", SWA, "SWA on SAM")
        }
    report(study, results, along)
    return draw(study, results, along)


def chosen_swa(rows):
    """Of constant rate and cycles, the one with the lower validation error."""
    variants = [row for name, row in rows.items() if name.startswith("SWA, ")]
    return min(variants, key=lambda row: min(np.mean(errors) for _, errors in row.tuning))


def report(study, results, along):
    def held(answers):
        return "held" if all(answers) else "held in part" if any(answers) else "did not hold here"

    better = [chosen_swa(rows).beats(rows["SGD"]) for rows in results.values()]
    measured = []
    for noise, rows in results.items():
        both = [rows["SGD"], chosen_swa(rows)]
        names = [row.name for row in both]
        others = (f"{r.name} {spread(r.errors, 1)} %" for r in rows.values() if r.name not in names)
        measured.append(f"{noise:.0%} noise: {both[1].against(both[0])}, {', '.join(others)}")
    study.claim(
        "15: SWA beats SGD at an equal budget",
        published="CIFAR-100 72.55 to 73.91 (VGG-16), 80.82 to 81.46 (WRN-28-10), accuracy",
        verdict=held(better),
        measured="; ".join(measured),
    )
    close = {n: abs(r["SWA of FGE"].mean - r["FGE ensemble"].mean) for n, r in results.items()}
    study.claim(
        "15: one averaged network is about as good as the FGE ensemble",
        published="CIFAR-100, WRN-28-10, 1.5 budgets: SWA 82.15, FGE 82.27, accuracy",
        verdict=held([gap < 0.5 for gap in close.values()]) + " (within half a point)",
        measured="; ".join(
            f"{n:.0%} noise: {r['SWA of FGE'].against(r['FGE ensemble'])}"
            for n, r in results.items()
        ),
    )
    if "SWA on SAM" in results[NOISE[1]]:
        study.claim(
            "SWA on top of SAM",
            published="-",
            verdict=held([rows["SWA on SAM"].beats(rows["SAM"]) for rows in results.values()]),
            measured="; ".join(
                f"{n:.0%} noise: {rows['SWA on SAM'].against(rows['SAM'])}"
                for n, rows in results.items()
            ),
        )
    answers, words = [], []
    for noise, found in along.items():
        for name in ("loss", "error"):
            values = (found[arm][name] for arm in ("SGD", SWA))
            rises = [np.mean(v - v[:, :1], 1) for v in values]
            answers.append(rises[1].mean() < rises[0].mean() and welch(*rises) < 0.05)
            words.append(
                f"{noise:.0%} noise, {name}: SGD {spread(rises[0])}, SWA {spread(rises[1])}"
            )
    study.claim(
        "16: along random rays loss and error of SWA rise more slowly than SGD's",
        published="figure 4",
        verdict=held(answers),
        measured=f"Mean rise up to distance {RAY_LENGTH:g}: " + "; ".join(words),
    )


def draw(study, results, along):
    noise = NOISE[1]
    figure, axes = panels(2 + len(results), "Weight averaging (MNIST 14x14)", 4.4, 4)
    for axis, (level, rows) in zip(axes, results.items(), strict=False):
        dots(axis, rows.values())
        axis.tick_params("x", labelsize=8, rotation=40)
        axis.set_title(f"test error, {level:.0%} of labels redrawn")
    distances = np.linspace(0, RAY_LENGTH, RAY_POINTS)
    for axis, name in zip(axes[-2:], ("loss", "error"), strict=True):
        for i, (arm, found) in enumerate(along[noise].items()):
            band(axis, distances, found[name], i, arm)
        axis.set_xlabel("distance along random rays")
        axis.legend(frameon=False)
    axes[-2].set(title=f"around the solutions, {noise:.0%} noise", ylabel="training loss")
    axes[-1].set(title=f"around the solutions, {noise:.0%} noise", ylabel="test error (%)")
    return study.finish(figure)


if __name__ == "__main__":
    main()
