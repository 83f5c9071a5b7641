"""Every method of the library: what a step costs, and what is left of SAM's gain.

    python experiments/compare_methods.py                   # MNIST 14x14 with wrong labels
    python experiments/compare_methods.py --task glosses    # a transformer, clean labels
    python experiments/compare_methods.py --task rare       # and adam, adapters: for a few methods
    python experiments/compare_methods.py --phase times     # on a quiet machine; others may share
    python experiments/compare_methods.py --methods asam "look_sam, k = 5"
    python experiments/compare_methods.py --quick           # few methods, few epochs, for CI

Three pictures. At equal steps every method trains as long as SAM does: with the times of steps this
says what a step costs and how much of SAM's gain it keeps. At equal gradients every method gets as
many as the plain optimizer in twice those steps, its learning rate stretched over them; at equal
time as many steps as fit into the time of those, by the times measured in phase `times`.

Every method chooses among nine settings (`_methods.py`) by validation errors over two seeds, anew
for each number of steps but for equal time, which keeps the settings of equal gradients. Figures
are test errors over fresh seeds. Intervals (95 %, bootstrap over the seeds of all three) and
p-values (Welch, Holm for many comparisons) are about seeds: for one split, one set of wrong labels.

Phases leave what they have in --out, run by run: started again, they do what is missing.
"""

import argparse
import json
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _compare_report as report
import _methods
import _paths  # noqa: F401
import _tasks
import jax
import numpy as np
from _compare_training import Run, fit, step_times
from _harness import Study

PHASES = ("times", "steps", "gradients", "time", "report")
QUICK = ("plain", "sam", "look_sam, k = 5")
TURNS = 40  # of the timing; the median of 40 is known to about a fifth of the spread
GROUP = 4  # runs between two lines of the log
WORKERS = min(2, os.cpu_count() or 1)  # programs at a time
ALWAYS = ("plain", "sam")  # what the others are compared with


class Comparison:
    """One task: its methods, its log and its phases."""

    def __init__(self, args: argparse.Namespace, study: Study):
        cache = study.out / "data"
        cache.mkdir(exist_ok=True)
        self.task = _tasks.load(args.task, cache, study.quick)
        known = _methods.names(self.task)
        usual = self.task.methods or known
        wanted = QUICK if study.quick else args.methods or usual
        wanted = known if wanted == ["all"] else wanted
        if unknown := set(wanted) - set(known):
            raise SystemExit(f"--methods must be among {known}, got {sorted(unknown)}")
        self.names = [name for name in known if name in (*ALWAYS, *wanted)]
        suffix = "_quick" if study.quick else ""
        chosen = f" --methods {shlex.join(args.methods)}" if args.methods else ""
        self.command = f"python experiments/compare_methods.py --task {args.task}{chosen}"
        self.study, self.stem = study, study.out / f"{study.name}{suffix}"
        self.times_file = study.out / f"{study.name}_times{suffix}.json"
        self.steps = self.task.epochs * (len(self.task.train[1]) // self.task.batch)

    # Phases ------------------------------------------------------------------

    def times(self) -> None:
        """Measures the steps of all methods, in turns, and keeps what it found."""
        load = os.getloadavg()[0]
        found = step_times(self.task, self.names, 3 if self.study.quick else TURNS)
        entry = {**self.study.circumstances, "load": [load, os.getloadavg()[0]], "steps": found}
        self.times_file.write_text(json.dumps(entry, indent=1))

    def ratios(self) -> dict[str, Any]:
        """Name -> quartiles of the time of a step over that of the plain one."""
        if not self.times_file.exists():
            return {}
        steps = json.loads(self.times_file.read_text())["steps"]
        return {name: steps[name]["over plain"] for name in self.names if name in steps}

    def length(self, picture: str, name: str) -> int:
        """Steps that a method may take."""
        if picture == "steps":
            return self.steps
        if picture == "gradients":
            return round(2 * self.steps / _methods.METHODS[name].gradients)
        return round(2 * self.steps / self.ratios()[name][1])

    def tuned(self, name: str, steps: int) -> _methods.Setting:
        """The setting with the lowest mean validation error; the runs are in the log."""
        points = _methods.grid(name, self.task)[: 2 if self.study.quick else None]
        seeds = range(1000, 1000 + self.study.tuning_seeds)
        errors = self.runs(name, steps, [(p, s) for p in points for s in seeds], "validation")
        means = np.reshape(errors, (len(points), len(seeds))).mean(1)
        return points[int(np.argmin(means))]

    def tested(self, name: str, steps: int, setting: _methods.Setting) -> list[float]:
        return self.runs(name, steps, [(setting, s) for s in range(self.study.seeds)], "test")

    def runs(self, name: str, steps: int, points: Any, on: str) -> list[float]:
        """Errors after training, of which those that are not in the log are computed."""
        keys = [
            {"method": name, "steps": steps, "setting": [*setting], "seed": seed, "on": on}
            for setting, seed in points
        ]

        lanes = self.task.lanes

        def one(runs: list[Run]) -> list[float]:
            return list(fit(self.task, name, steps, runs, lanes, on))

        def compute(group: list[dict[str, Any]]):
            runs = [Run(_methods.Setting(*key["setting"]), key["seed"]) for key in group]
            programs = [runs[i : i + lanes] for i in range(0, len(runs), lanes)]
            with ThreadPoolExecutor(WORKERS) as pool:
                for errors in pool.map(one, programs):
                    yield from ({"error": round(float(error), 4)} for error in errors)

        return [result["error"] for result in self.study.collect(keys, compute, GROUP)]

    def picture(self, picture: str) -> list[dict[str, Any]]:
        """A row for each method; SAM's and the plain one's first, for the others to be compared."""
        names = [n for n in self.names if picture != "time" or n in self.ratios()]
        jobs = [(name, self.length(picture, name)) for name in names]
        if picture != "steps":  # longer is not always better
            jobs.insert(1, ("plain", self.steps))
        rows = []
        for name, steps in jobs:
            tuned_at = steps
            if picture == "time" and steps != self.steps:
                tuned_at = self.length("gradients", name)
            setting = self.tuned(name, tuned_at)
            errors = self.tested(name, steps, setting)
            rows.append(
                {"method": name, "steps": steps, **setting._asdict(), "errors": errors}
                | {"gradients": round(_methods.METHODS[name].gradients, 3)}
            )
        return report.judged(rows)

    def finish(self, phases: tuple[str, ...]) -> None:
        """Tables, JSON and figure of the pictures that can be had."""
        ratios = self.ratios()
        pictures = [p for p in ("steps", "gradients", "time") if p in phases]
        rows = {p: self.picture(p) for p in pictures if p != "time" or ratios}
        times = json.loads(self.times_file.read_text()) if ratios else None
        record = {
            "name": self.study.name,
            "title": self.task.title,
            "command": self.command,
            **{"seeds": self.study.seeds, **self.study.circumstances},
            **{"times": times, "pictures": rows, "pages": report.pages(rows, ratios)},
        }
        for title, table in record["pages"].items():
            self.study.table(title, table[0], table[1:])
        if "steps" in rows:
            print("\n" + report.advice(rows["steps"], ratios))
            report.draw(self.task.title, rows["steps"], ratios, f"{self.stem}.png")
        Path(f"{self.stem}.json").write_text(json.dumps(record, indent=1))
        print(f"\nTables, figure: {self.stem}.json, .png")


def main(argv: Any = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=_tasks.TASKS, default="mnist")
    parser.add_argument(
        "--methods", nargs="+", help="some, by name, or all; a task may have some by default"
    )
    parser.add_argument("--phase", choices=PHASES, nargs="+", default=PHASES)
    args, _ = parser.parse_known_args(argv)
    if "--quick" in (argv or sys.argv):
        args.task = "digits"
    study = Study(f"compare_{args.task}.py", __doc__, argv, parser=parser)
    comparison = Comparison(args, study)
    if "times" in args.phase:
        comparison.times()
    for phase in ("steps", "gradients", "time"):
        if phase in args.phase:
            comparison.picture(phase)
    if "report" in args.phase:
        comparison.finish(PHASES if args.phase == ["report"] else tuple(args.phase))
    study.close()


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
