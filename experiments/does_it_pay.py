"""Does SAM pay for me? Methods at equal tuning and equal compute, on your task or on five others.

    python experiments/does_it_pay.py                        # all tasks: two hours on two cores
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

from _harness import Study, markdown
from _paying import cells, compare, curves_of, report
from _paying_figures import draw, overview
from _tasks.suite import TASKS, Source, load
from _tasks.task import Task
from _training import BASE, METHODS, Method
from _trials import SEEDS, Trials

WRONG = (0.0, 0.4)  # shares of wrong training labels
QUICK = ("mlp",)  # with --quick and no tasks


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
    lines = cells(results, ahead[0].trials)
    study.page("Does it pay?", [line[:6] + line[7:] for line in lines])
    study.page("Does it pay, all", lines)
    text, name = markdown(lines), f"does_it_pay{quick}.md"
    (study.out / name).write_text(text)
    print(f"\n{text}\nTable: {study.out / name}")
    return study.finish(overview(results))


if __name__ == "__main__":
    main()
