"""After training: rounding of the weights, noise of the input, calibration, forgetting.

    python experiments/after_training.py

Papers of 2026 (2605.02105) find SAM's gain here. The networks are those that does_it_pay.py tests,
shared through its log: base optimizer, SAM and ASAM with each one's chosen setting; and SAM and
ASAM once more with the learning rate of the base and everything else of their own, because a larger
learning rate alone makes a network easier to round. Rounding is symmetric and per tensor, to 4 and
3 bits; what is tested is the rise of the error on the same examples. Forgetting: trained on half of
the classes by each method, then fine-tuned on the others by the base optimizer, the same for all,
until the others are learned equally well, and the rise of the error on the first half.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from _figures import panels
from _harness import SIGNIFICANT, Result, Study
from _inference import holm, paired
from _paying import BROKEN, base_name
from _report import BLUE, COLORS, GREEN, ORANGE, spread, welch
from _tasks.suite import TASKS
from _tasks.task import Split
from _training import BASE, METHODS, Method, Trained, error, fit, length, outputs
from _trials import SEEDS, SPLITS, WORKERS, Trials, by_split
from does_it_pay import QUICK, WRONG, instances, parser_of

COMPARED = METHODS[:3]  # base, SAM, ASAM
EQUAL = ", the base's rate"  # after the name of a method
FORGETTING = ("mlp", "text", "vit")  # clean labels
AGAIN, SLOWER = 0.5, 0.3  # length and learning rate of fine-tuning, over those of training
FINE_TUNED = 1.5  # time of a training and fine-tuning with its checks, over that of a training
CHECKED = 1000  # examples by which it is seen how well the classes are known
MEASURES = {  # what is tested -> (words, how from the results of a run)
    "bits4": ("rise with weights of 4 bits", lambda run: run["bits4"] - run["error"]),
    "bits3": ("rise with weights of 3 bits", lambda run: run["bits3"] - run["error"]),
    "noisy": ("rise with noisy input", lambda run: run["noisy"] - run["error"]),
    "calibration": ("calibration error", lambda run: run["calibration"]),
}


def arms(trials: Trials) -> dict[str, list[Result]]:
    """Test runs of the methods at their own settings, and at the base's learning rate."""
    settings = {method: trials.search(method).best for method in COMPARED}
    found = {method.name: trials.test(method, setting) for method, setting in settings.items()}
    for method in COMPARED[1:]:
        equal = settings[method] | {"lr": settings[BASE]["lr"]}
        found[method.name + EQUAL] = trials.test(method, equal)
    return found


# Forgetting ---------------------------------------------------------------------


def halves(split: Split) -> tuple[Split, Split, int]:
    """The split of the lower classes, that of the others, and the first class of these."""
    middle = (int(np.max(split.train[1])) + 1) // 2

    def part(upper: bool) -> Split:
        sets = []
        for x, y in split:
            rows = (np.asarray(y) >= middle) == upper
            sets.append((x[rows], y[rows]))
        return Split(*sets)

    return part(False), part(True), middle


def course(trials: Trials, method: Method, setting: Any, again: Any, seed: int) -> Result:
    """Errors on both halves of the classes, each told apart from its own half only."""
    task, split = trials.task, trials.split(seed % SPLITS)
    old, new, middle = halves(split)

    def of(trained: Trained, part: Split, classes: slice) -> float:
        x, y = (a[:CHECKED] for a in part.test)
        return error(task, outputs(task, trained, x)[:, classes], y - (classes.start or 0))

    steps = length(task, method, setting["length"])
    first = fit(task, method, setting, seed, old.train, steps)
    found: dict[str, list[float]] = {"new": [], "old": [of(first, old, slice(middle))]}

    def watch(step: int, carry: Any) -> None:
        trained = Trained(carry.params, carry.state)
        found["new"].append(of(trained, new, slice(middle, None)))
        found["old"].append(of(trained, old, slice(middle)))

    steps = length(task, BASE, AGAIN)
    fit(task, BASE, again, seed, new.train, steps, start=first, watch=watch)
    return {name: np.round(values, 3).tolist() for name, values in found.items()}


def forgetting(study: Study, trials: Trials) -> dict[str, list[Result]]:
    """Courses of fine-tuning, one for each seed."""
    settings = {method: trials.search(method).best for method in COMPARED}
    again = settings[BASE] | {"lr": SLOWER * settings[BASE]["lr"]}

    def courses(method: Method) -> list[Result]:
        setting = settings[method]
        fixed = {"forgetting": trials.task.name, "method": method.name}
        keys = [{**fixed, "setting": setting, "seed": s} for s in range(study.seeds)]

        def compute(group: list[Any]) -> Iterable[Result]:
            one = lambda key: course(trials, method, setting, again, key["seed"])
            with ThreadPoolExecutor(WORKERS) as pool:
                return list(pool.map(one, group))

        weight = lambda key: FINE_TUNED * trials.seconds(method, setting)
        return study.collect(keys, compute, WORKERS, weight)

    return {method.name: courses(method) for method in COMPARED}


def forgotten(runs: dict[str, list[Result]]) -> tuple[dict[str, list[float]], float]:
    """The rise of the first half's error when all know the other half equally well, and how well.

    That is the least error that every run reaches; runs that broke down are left out.
    """
    least = lambda run: min(run["new"])
    middle = np.median([least(run) for of in runs.values() for run in of])
    whole = {
        name: [run for run in of if least(run) <= BROKEN * middle] for name, of in runs.items()
    }
    level = max(least(run) for of in whole.values() for run in of)

    def rise(run: Result) -> float:
        reached = int(np.argmax(np.array(run["new"]) <= level))
        return run["old"][1 + reached] - run["old"][0]

    return {name: [rise(run) for run in of] for name, of in whole.items()}, level


# What comes of it ---------------------------------------------------------------


def values_of(found: dict[str, list[Result]], measure: str, name: str) -> np.ndarray:
    return np.array([MEASURES[measure][1](run) for run in found[name]])


def tested(found: dict[str, list[Result]], measure: str, name: str) -> tuple[float, float]:
    """p of Welch's and of the paired test of an arm against the base."""
    both = {n: values_of(found, measure, n) for n in (name, BASE.name)}
    runs = {
        n: [run | {measure: value} for run, value in zip(found[n], values, strict=True)]
        for n, values in both.items()
    }
    return welch(*both.values()), paired(*(by_split(of, measure) for of in runs.values()))


def answers(results: dict[str, dict[str, list[Result]]], measure: str, name: str) -> list[str]:
    """For every task "better", "worse" or "", both tests corrected for the tasks.

    "broke down" where the networks are good for nothing: they have nothing to lose.
    """
    p = [tested(found, measure, name) for found in results.values()]
    corrected = zip(*(holm(side) for side in zip(*p, strict=True)), strict=True)
    told = []
    for found, both in zip(results.values(), corrected, strict=True):
        own, base = (np.median([run["error"] for run in found[n]]) for n in (name, BASE.name))
        if own > BROKEN * base:
            told.append("broke down")
            continue
        rise = values_of(found, measure, name).mean() - values_of(found, measure, BASE.name).mean()
        told.append(("better" if rise < 0 else "worse") if max(both) < SIGNIFICANT else "")
    return told


def rounded(results: dict[str, dict[str, list[Result]]]) -> list[list[str]]:
    """Mean errors as trained, with 4 and with 3 bits, side by side."""
    mean = lambda runs, key: f"{np.mean([run[key] for run in runs]):.1f}"
    cell = lambda runs: " / ".join(mean(runs, key) for key in ("error", "bits4", "bits3"))
    header = ["error %: as trained / 4 bits / 3 bits", *next(iter(results.values()))]
    return [header, *([task, *map(cell, found.values())] for task, found in results.items())]


def claims(study: Study, results: dict[str, dict[str, list[Result]]]) -> None:
    """A claim and a table for each measure, and one table that counts the answers."""
    base, *names = next(iter(results.values()))
    whole = [["better and worse than the base", *names]]
    for measure, (words, _) in MEASURES.items():
        told = {name: answers(results, measure, name) for name in names}
        counts = {n: f"{of.count('better')} and {of.count('worse')}" for n, of in told.items()}
        whole.append([f"{words}, of {len(results)} tasks", *counts.values()])
        lines = [["", base, *names]]
        for place, (task, found) in enumerate(results.items()):
            cells = [spread(values_of(found, measure, name), 1) for name in found]
            marks = ["", *(f" ({of[place]})" if of[place] else "" for of in told.values())]
            lines.append([task, *map(str.__add__, cells, marks)])
        study.page(f"After training: {words}", lines)
        middle = lambda name, measure=measure: np.median(
            [values_of(found, measure, name).mean() for found in results.values()]
        )
        study.claim(
            f"After training, {words}",
            published="SAM is more robust (2605.02105); leads: always in SAM's favour",
            verdict=f"better and worse, of {len(results)} tasks: "
            + "; ".join(f"{name} {count}" for name, count in counts.items()),
            measured="median over the tasks: "
            + ", ".join(f"{name} {middle(name):.1f}" for name in (base, *names)),
        )
    study.page("After training", whole)


def claim_forgetting(study: Study, forgot: dict[str, Any]) -> None:
    lines, told = [["", "others learned to", *(method.name for method in COMPARED)]], []
    for task, (rises, level) in forgot.items():
        base, *others = rises
        p = holm([welch(rises[name], rises[base]) for name in others])
        cells = [spread(rises[base], 1)]
        for name, value in zip(others, p, strict=True):
            less = np.mean(rises[name]) < np.mean(rises[base])
            told.append(("less" if less else "more") if value < SIGNIFICANT else "as much")
            cells.append(f"{spread(rises[name], 1)} ({told[-1]}, p = {value:.1g})")
        lines.append([task, f"{level:.1f} %", *cells])
    study.page("Forgetting", lines)
    study.claim(
        "After training, forgetting: the rise of the error on the first classes",
        published="SAM forgets less (2605.02105)",
        verdict=f"less in {told.count('less')}, more in {told.count('more')} "
        f"of {len(told)} comparisons",
        measured="; ".join(
            f"{task} (others at {level}): "
            + ", ".join(map(" ".join, zip(lines[0][2:], cells, strict=True)))
            for task, level, *cells in lines[1:]
        ),
    )


def draw(results: dict[str, dict[str, list[Result]]], forgot: Any) -> Any:
    """Each measure in a panel: an arm's mean on every task."""
    looks = {"": "o", EQUAL: "s"}
    figure, axes = panels(6, "After training: how much is left", 4.6, 1.2 + 0.28 * len(results))
    for axis, (words, value) in zip(axes, MEASURES.values(), strict=False):
        for place, found in enumerate(results.values()):
            for name, runs in found.items():
                values = np.array([value(run) for run in runs])
                equal = name.endswith(EQUAL)
                color = {"base": ORANGE, "SAM": BLUE, "ASAM": GREEN}[name.removesuffix(EQUAL)]
                error = values.std(ddof=1) / len(values) ** 0.5
                axis.errorbar(
                    values.mean(), place + 0.14 * (1 if equal else -1), xerr=error,
                    fmt=looks[EQUAL if equal else ""], color=color, ms=5, lw=1,
                    mfc="white" if equal else color, label=None if place else name,
                )  # fmt: skip
        axis.set_yticks(range(len(results)), list(results), size=7)
        axis.set(ylim=(len(results) - 0.5, -0.5), xlabel=f"{words} (points)")
        axis.axvline(0, color="0.7", lw=0.8, zorder=0)
    axes[0].set_title("mean and standard error; hollow: the base's rate", size=8)
    for place, (rises, _) in enumerate(forgot.values()):
        for i, values in enumerate(rises.values()):
            y, color = place + 0.2 * (i - 1), COLORS[i]
            axes[4].plot(values, [y] * len(values), ".", color=color)
            axes[4].plot(np.mean(values), y, "|", color=color, ms=14, mew=2)
    axes[4].set_yticks(range(len(forgot)), list(forgot), size=7)
    axes[4].set(ylim=(len(forgot) - 0.5, -0.5), xlabel="forgetting: rise on the first classes")
    axes[5].axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    axes[5].legend(handles, labels, loc="center", frameon=False)
    return figure


def main(argv=None):
    study = Study(
        __file__, __doc__, argv, seeds=SEEDS, parser=parser_of(__doc__), log="does_it_pay"
    )
    tasks, wrong = (QUICK, WRONG[1:]) if study.quick else (list(TASKS), WRONG)
    ahead = instances(study, tasks, wrong)
    halved = instances(study, QUICK if study.quick else FORGETTING, WRONG[:1])
    for trials in ahead:
        for method in COMPARED:
            trials.expect(method)
        study.expect(sum(trials.plan(method)[1] for method in COMPARED[1:]))
    for trials in halved:
        study.expect(FINE_TUNED * sum(trials.plan(method)[1] for method in COMPARED))
    results = {trials.name: arms(trials) for trials in ahead}
    forgot = {trials.name: forgotten(forgetting(study, trials)) for trials in halved}
    for name, found in results.items():
        lines = [
            (
                base_name(ahead[0].task) if arm == BASE.name and len(results) == 1 else arm,
                *(f"{np.mean([r[k] for r in runs]):.1f}" for k in ("error", "bits4", "bits3")),
                *(f"{np.mean([r[k] for r in runs]):.1f}" for k in ("noisy", "calibration")),
            )
            for arm, runs in found.items()
        ]
        study.table(name, ["", "error %", "4 bits", "3 bits", "noisy", "ECE"], lines)
    study.page("After training: errors", rounded(results))
    claims(study, results)
    claim_forgetting(study, forgot)
    return study.finish(draw(results, forgot))


if __name__ == "__main__":
    main()
