"""Does SAM pay for me? Methods at equal tuning and equal compute, on your task or on five others.

    python experiments/does_it_pay.py                        # all tasks: about an hour on two cores
    python experiments/does_it_pay.py --task mlp text       # some
    python experiments/does_it_pay.py --task my_module:task # your own, about twenty lines
    python experiments/does_it_pay.py --plan                 # what would run, and how long

Every method (the base optimizer, SAM, ASAM, momentum_sam, SAM in the last quarter) draws the same
number of settings at random from ranges of its own: learning rate, weight decay, rho, length
(short training included), and label smoothing or dropout where the task names them. The i-th trial
of every method costs the same number of gradient evaluations. The best few by validation are
trained again, and the best of those is tested over fresh seeds on six other splits. What is fixed
before any run stands in PREREGISTERED.md. An interrupted run, started again, goes on where it
stopped; OUT/does_it_pay.json has every trial.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.ticker
import numpy as np
import scipy.stats
from _figures import panels
from _harness import SIGNIFICANT, Result, Study
from _inference import Curve, expected_best, expected_gain, from_trial, holm, paired
from _report import COLORS, MARKERS, spread, welch
from _tasks.suite import TASKS, Source, load
from _tasks.task import Task
from _training import BASE, METHODS, Method
from _trials import SEEDS, Search, Trials, by_split

WRONG = (0.0, 0.4)  # shares of wrong training labels
QUICK = ("mlp",)  # with --quick and no tasks
AFTER = {"error": "as trained", "bits4": "4 bits", "bits3": "3 bits", "noisy": "noisy\ninput"}
LEADS = {  # seen in small trials before this comparison was fixed; one split, not corrected
    ("mlp", 0.0): "8.5 % SGD, 7.7 % SAM",
    ("mlp", 0.4): "12.6 % SGD, 10.2 % SAM",
    ("text", 0.0): "38.2 % AdamW, 37.5 % SAM, p 4e-4 (WordNet)",
    ("text", 0.4): "52.1 % AdamW, 51.8 % SAM, p .6 (WordNet)",
    ("vit", 0.0): "20.4 % AdamW, 21.1 % SAM (Fashion-MNIST)",
    ("vit", 0.4): "32.1 % AdamW, 32.1 % SAM (Fashion-MNIST)",
    ("resnet", 0.4): "25.2 % SGD, 25.7 % SAM (Fashion-MNIST)",
    ("fine_tuning", 0.0): "14.7 % SGD, 13.9 % SAM (an MLP)",
    ("fine_tuning", 0.4): "34.2 % SGD, 29.3 % SAM (an MLP)",
}


class Row(NamedTuple):
    """A method on a task. p-values are against the base, corrected for the methods of the task."""

    method: Method
    search: Search
    runs: list[Result]
    gain: Curve | None = None  # over the base's best of k trials
    p_welch: float = float("nan")
    p_paired: float = float("nan")
    raw_p: tuple[float, float] = (float("nan"), float("nan"))

    @property
    def errors(self) -> np.ndarray:
        return np.array([run["error"] for run in self.runs])

    @property
    def mean(self) -> float:
        return float(self.errors.mean())


def base_name(task: Task) -> str:
    return {"sgd": "SGD", "adamw": "AdamW"}[task.optimizer]


def compare(trials: Trials, methods: Sequence[Method]) -> dict[str, Row]:
    """Every method, searched and tested, the base first."""
    found = {}
    for method in methods:
        search = trials.search(method)
        found[method.name] = Row(method, search, trials.test(method, search.best))
    return judge(found)


def judge(rows: dict[str, Row]) -> dict[str, Row]:
    """Adds the tests against the base."""
    base, *others = rows.values()
    curve = lambda row: (row.search.validation, row.search.test)
    raw = [
        (welch(r.errors, base.errors), paired(by_split(r.runs), by_split(base.runs)))
        for r in others
    ]
    corrected = [holm([p[kind] for p in raw]) for kind in (0, 1)]
    judged = {base.method.name: base}
    for row, p, of_welch, of_paired in zip(others, raw, *corrected, strict=True):
        gain = expected_gain(curve(base), curve(row))
        judged[row.method.name] = row._replace(
            gain=gain, p_welch=of_welch, p_paired=of_paired, raw_p=p
        )
    return judged


def verdict(row: Row, base: Row, name: str) -> str:
    """One sentence: whether a method pays."""
    method, errors = row.method.name, f"{row.mean:.1f} % instead of {base.mean:.1f} %"
    if not max(row.p_welch, row.p_paired) < SIGNIFICANT:
        return f"{method} is not told apart from {name} ({errors})"
    if row.mean > base.mean:
        return f"{method} is worse than {name} ({errors})"
    first = from_trial(row.gain) if row.gain else None
    if first is None:
        return f"{method} pays once tuned ({errors}); from how many trials on, these do not tell"
    return f"{method} pays from {first} trial{'s' * (first > 1)} on ({errors})"


def setting_in_words(row: Row) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in row.search.best.items())


def report(study: Study, trials: Trials, rows: dict[str, Row]) -> None:
    base, name = rows[BASE.name], base_name(trials.task)
    lines = []
    for row in rows.values():
        tested = row is not base
        lines.append(
            (
                row.method.name if tested else name,
                spread(row.errors),
                f"{row.p_welch:.1g}" if tested else "",
                f"{row.p_paired:.1g}" if tested else "",
                *(f"{np.mean([r[key] for r in row.runs]):.1f}" for key in list(AFTER)[1:]),
                f"{np.mean([r.get('calibration', np.nan) for r in row.runs]):.1f}",
                setting_in_words(row),
            )
        )
    header = ["", "test error %", "p Welch", "p paired", "4 bits", "3 bits", "noisy", "ECE"]
    study.table(trials.name, [*header, "chosen setting"], lines)
    print("p-values: against the base, Holm's correction for the methods of this task.")
    sentences = [verdict(row, base, name) for row in rows.values() if row is not base]
    print(". ".join(sentences) + ".")
    kind = next((k for k in TASKS if trials.task.name.startswith(f"{k},")), trials.task.name)
    first = next(row for row in rows.values() if row is not base)  # SAM, unless left out
    study.claim(
        f"Does it pay: {trials.name}",
        published=f"lead: {LEADS.get((kind, trials.share), 'none')}",
        verdict=verdict(first, base, name),
        measured=f"{name} {spread(base.errors, 1)} %; "
        + "; ".join(
            f"{r.method.name} {spread(r.errors, 1)} % "
            f"(p = {r.p_welch:.1g} Welch, {r.p_paired:.1g} paired)"
            for r in rows.values()
            if r is not base
        ),
    )


def plain_log(axis: Any) -> None:
    """A logarithmic axis of errors with plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(1.5, 2, 3, 5, 7)))
    axis.tick_params(axis="y", which="minor", labelsize=7)


def draw(study: Study, trials: Trials, rows: dict[str, Row]) -> Path:
    """The best of k trials, the test runs, and what is left after training."""
    names = [base_name(trials.task) if row.method is BASE else n for n, row in rows.items()]
    title = f"{trials.name}: {base_name(trials.task)} and sharpness-aware training, equal compute"
    figure, (curves, dots, after) = panels(3, title, 4.6, 4.0)
    largest = max(run["error"] for row in rows.values() for run in row.runs)
    least = min(run["error"] for row in rows.values() for run in row.runs)
    height = 0.08 * (largest - least) + 0.05
    for i, (name, row) in enumerate(zip(names, rows.values(), strict=True)):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        curve = expected_best(row.search.validation, row.search.test)
        k = np.arange(1, len(curve.mean) + 1)
        curves.plot(k, curve.mean, color=color, marker=marker, ms=3, label=name)
        if i < 2:  # of all, they would hide each other
            curves.fill_between(k, curve.low, curve.high, color=color, alpha=0.15, lw=0)
        places = i + np.linspace(-0.2, 0.2, len(row.runs))
        dots.plot(places, row.errors, marker, color=color, alpha=0.6, ms=5, mew=0)
        dots.hlines(row.mean, i - 0.3, i + 0.3, color=color, lw=2)
        dots.text(i, largest + height, f"{row.mean:.1f}", color=color, ha="center")
        means = [np.mean([run[key] for run in row.runs]) for key in AFTER]
        after.plot(range(len(AFTER)), means, marker, color=color, ls="-", lw=1, label=name)
    curves.set(xlabel="trials", ylabel="expected test error of the best (%)", xscale="log")
    trial_ticks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= trials.trials]
    curves.set_xticks(trial_ticks, map(str, trial_ticks), minor=False)
    curves.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    plain_log(curves)
    curves.set_title("At your tuning budget (bands: 95 %)", size=10)
    curves.legend(frameon=False)
    dots.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names], size=8)
    dots.set(ylabel="test error (%)", ylim=(least - height, largest + 3 * height))
    dots.set_title(f"Tuned: every run, {trials.study.seeds} seeds", size=10)
    after.set_xticks(range(len(AFTER)), list(AFTER.values()))
    after.set(ylabel="mean test error (%)")
    plain_log(after)
    after.set_title("After training", size=10)
    return study.save(figure, trials.name.replace(", ", "_").replace(" ", "_").replace("%", ""))


def interval(row: Row, base: Row) -> tuple[float, float]:
    """Mean gain over the base on the splits, and half its 95 % interval."""
    gains = by_split(base.runs) - by_split(row.runs)
    half = scipy.stats.t.ppf(0.975, len(gains) - 1) * scipy.stats.sem(gains)
    return float(gains.mean()), float(half)


def overview(results: dict[str, tuple[Trials, dict[str, Row]]]) -> Any:
    """A forest of gains: every method on every task."""
    figure, (axis,) = panels(
        1, "Gain over the tuned base at equal compute", 7.5, 1.5 + len(results)
    )
    for place, (_, rows) in enumerate(results.values()):
        others = [row for row in rows.values() if row.method is not BASE]
        for i, row in enumerate(others):
            gain, half = interval(row, rows[BASE.name])
            y = place + (i - (len(others) - 1) / 2) * 0.16
            told = max(row.p_welch, row.p_paired) < SIGNIFICANT
            axis.errorbar(
                gain, y, xerr=half, fmt=MARKERS[i + 1], color=COLORS[i + 1], ms=5, lw=1,
                mfc=COLORS[i + 1] if told else "white", label=None if place else row.method.name,
            )  # fmt: skip
    axis.axvline(0, color="0.4", lw=1)
    axis.set_yticks(
        range(len(results)), [t.name.replace(", ", "\n", 1) for t, _ in results.values()]
    )
    axis.set(ylim=(len(results) - 0.5, -0.5), xlabel="points of test error (95 % over splits)")
    axis.set_title("Right of the line: better. Filled: told apart (Holm, within the task).", size=9)
    axis.set_xscale("symlog", linthresh=2)
    axis.xaxis.set_major_formatter("{x:g}")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def curves_of(results: dict[str, tuple[Trials, dict[str, Row]]]) -> dict[str, Any]:
    """Expected errors of the best of 1, 2, ... trials, with their intervals, for JSON."""
    plain = lambda curve: {
        name: np.round(values, 4).tolist() for name, values in curve._asdict().items()
    }
    return {
        name: {
            row.method.name: {
                on: plain(expected_best(row.search.validation, errors))
                for on, errors in (("test", row.search.test), ("validation", row.search.validation))
            }
            for row in rows.values()
        }
        for name, (_, rows) in results.items()
    }


def table(results: dict[str, tuple[Trials, dict[str, Row]]], budget: int) -> str:
    """Markdown, one row a task: what a user asks, and the answer.

    The p-values of SAM are corrected once for all tasks of the table: the primary comparison.
    """
    compared = {name: next(r for r in rows.values() if r.method is not BASE)
                for name, (_, rows) in results.items()}  # fmt: skip
    p_welch, p_paired = (holm([row.raw_p[kind] for row in compared.values()]) for kind in (0, 1))
    name_of_first = next(iter(compared.values())).method.name
    lines = []
    for (name, (trials, rows)), welch_p, paired_p in zip(
        results.items(), p_welch, p_paired, strict=True
    ):
        base, row = rows[BASE.name], compared[name]
        of_table = row._replace(p_welch=welch_p, p_paired=paired_p)
        others = [r for r in rows.values() if r.method is not BASE and r is not row]
        known = trials.task.name.split(",")[0]
        argument = known if known in TASKS else trials.task.name
        lines.append(
            (
                trials.task.name,
                trials.labels,
                f"{base_name(trials.task)} {spread(base.errors, 1)}",
                f"{row.method.name} {spread(row.errors, 1)}",
                f"{welch_p:.1g}, {paired_p:.1g}",
                verdict(of_table, base, base_name(trials.task)),
                "; ".join(verdict(r, base, base_name(trials.task)) for r in others),
                f"`python experiments/does_it_pay.py --task {argument} --wrong {trials.share:g}`",
            )
        )
    header = [
        *("network, data", "labels", "base, test error %", f"{name_of_first}, test error %"),
        *(
            "p (Welch, paired)",
            f"does {name_of_first} pay, with up to {budget} trials?",
            "others",
            "command",
        ),
    ]
    cells = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Options that say where examples come from."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--images", default="mnist", help="an idx folder, a name on the Hub")
    parser.add_argument("--text", default="cities", help="or a folder with WordNet's data.noun")
    return parser


def options() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    names = [method.name for method in METHODS[1:]]
    parser.add_argument("--task", nargs="+", help=f"of {', '.join(TASKS)}, or module:name")
    parser.add_argument("--wrong", nargs="+", type=float, help="shares of wrong training labels")
    parser.add_argument("--methods", nargs="+", choices=names, help="beside the base optimizer")
    parser.add_argument("--trials", type=int, help="settings drawn for every method")
    parser.add_argument("--plan", action="store_true", help="print what would run, and stop")
    return parser


def instances(study: Study, tasks: Sequence[str], wrong: Sequence[float]) -> list[Trials]:
    """Trials of tasks, with each share of wrong labels."""
    args = study.args
    cache = Path() if study.quick else study.out  # digits need none
    source = Source(args.images, args.text, cache, study.quick)
    loaded = [loaded_once(name, source) for name in tasks]
    found = [Trials(study, task, share) for task in loaded for share in wrong]
    for trials in found:
        trials.trials = getattr(args, "trials", None) or trials.trials
    return found


@functools.cache
def loaded_once(name: str, source: Source) -> Task:
    """The same object every time, as programs are kept for it."""
    return load(name, source)


def plan(study: Study, ahead: Sequence[Trials], methods: Sequence[Method]) -> None:
    lines, total = [], 0.0
    for trials in ahead:
        seconds = [sum(trials.plan(method)) for method in methods]
        total += sum(seconds)
        lines.append((trials.name, *(f"{s:.0f}" for s in seconds), f"{sum(seconds) / 60:.1f}"))
    header = ["", *(method.name for method in methods), "minutes"]
    study.table("Seconds expected on a quiet machine", header, lines)
    print(f"{total / 60:.0f} minutes in all; {ahead[0].trials} trials, {study.seeds} test runs.")


def main(argv=None):
    sys.path.append(os.getcwd())  # for a module of the user's
    study = Study(__file__, __doc__, argv, seeds=SEEDS, parser=options())
    args = study.args
    for share in args.wrong or ():
        if not 0 <= share < 1:
            sys.exit(f"--wrong must be at least 0 and below 1, got {share:g}")
    if args.trials is not None and args.trials < 2:
        sys.exit(f"--trials must be at least 2, got {args.trials}")
    tasks = args.task or (QUICK if study.quick else list(TASKS))
    wrong = args.wrong if args.wrong is not None else (WRONG[1:] if study.quick else WRONG)
    chosen = [m for m in METHODS[1:] if args.methods is None or m.name in args.methods]
    methods = [BASE, *chosen]
    ahead = instances(study, tasks, wrong)
    if args.plan:
        return plan(study, ahead, methods)
    for trials in ahead:
        for method in methods:
            trials.expect(method)
    results = {}
    for trials in ahead:
        rows = compare(trials, methods)
        results[trials.name] = trials, rows
        report(study, trials, rows)
        draw(study, trials, rows)
    quick = "_quick" * study.quick
    (study.out / f"does_it_pay_curves{quick}.json").write_text(json.dumps(curves_of(results)))
    text = table(results, ahead[0].trials)
    name = f"does_it_pay{quick}.md"
    (study.out / name).write_text(text)
    print(f"\n{text}\nTable: {study.out / name}")
    return study.finish(overview(results))


if __name__ == "__main__":
    main()
