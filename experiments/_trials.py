"""Random search and test of methods on a task, at equal compute; PREREGISTERED.md says what for.

Every method gets the same number of trials, and the i-th trial of every method the same length,
counted in gradient evaluations, and the same random numbers for what it draws. Successive halving
is over seeds and splits: all trials run once, the best KEPT of them MORE times again. The setting
with the least mean validation error is tested over fresh seeds and splits.
"""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from _after import measures
from _harness import Result, Setting, Study
from _tasks.task import Choice, Split, Task, wrong_labels
from _training import Method, error, fit, length, outputs

TRIALS = 20  # settings drawn for a method
KEPT, MORE = 4, 3  # of the trials, the best by validation, and their further runs
LENGTHS = Choice((0.3, 1.0, 2.0))  # in trainings of task.gradients gradient evaluations
SPLITS = 6  # of the test
SEEDS = 12  # runs of the test: two on each split
SEARCH = 1000  # first of the seeds and splits of the search; those of the test begin at 0
WORKERS = min(2, os.cpu_count() or 1)  # trainings at a time; their programs are too small for more

Point = tuple[Setting, int, int]  # hyper-parameters, seed, split


class Search(NamedTuple):
    """What a random search found; lists have one entry a trial, of its first run."""

    settings: list[Setting]
    validation: list[float]
    test: list[float]
    best: Setting


class Trials:
    """Runs of one task with a share of wrong labels."""

    def __init__(self, study: Study, task: Task, share: float):
        self.study, self.task, self.share = study, task, share
        self.trials = 3 if study.quick else TRIALS
        self.kept, self.more = (2, 1) if study.quick else (KEPT, MORE)
        self._assumed: dict[str, float] = {}

    @property
    def name(self) -> str:
        return f"{self.task.name}, {self.labels}"

    @property
    def labels(self) -> str:
        return f"{self.share:.0%} wrong labels" if self.share else "clean labels"

    def split(self, number: int) -> Split:
        split = self.task.data(number)
        return wrong_labels(split, self.share, number) if self.share else split

    # Runs ---------------------------------------------------------------------

    def draw(self, method: Method, trial: int) -> Setting:
        """The hyper-parameters of a trial."""
        own = dict(dict(self.task.own).get(method.name, ()))
        ranges = {"length": LENGTHS, **self.task.searched}
        ranges |= {"rho": self.task.rho} if method.rho else {}
        rng = np.random.default_rng((SEARCH, trial))
        drawn = {name: of.at(rng.random()) for name, of in (ranges | own).items()}
        if method.rho and "rho" not in own:
            drawn["rho"] *= method.rho
        return {name: float(f"{value:.4g}") for name, value in drawn.items()}

    def seconds(self, method: Method, setting: Setting) -> float:
        """Expected of a training."""
        steps = length(self.task, method, setting["length"])
        return steps * method.cost * self.task.seconds / self.task.gradients / WORKERS

    def run(self, method: Method, points: Sequence[Point], stage: str) -> list[Result]:
        """A training for each of the points; stage is "search" or "test"."""
        fixed = {"task": self.task.name, "wrong": self.share, "method": method.name}
        keys = []
        for setting, seed, split in points:
            steps = length(self.task, method, setting["length"])
            more = {"setting": setting, "seed": seed, "split": split, "steps": steps}
            keys.append({**fixed, "stage": stage, "batch": self.task.batch, **more})

        def one(key: dict[str, Any]) -> Result:
            split, setting = self.split(key["split"]), dict(key["setting"])
            if method.probe:
                setting |= method.probe(self.task, setting, key["seed"], split.train)
            trained = fit(self.task, method, setting, key["seed"], split.train, key["steps"])
            said = outputs(self.task, trained, split.validation[0])
            found = {"validation": error(self.task, said, split.validation[1])}
            if stage == "search":
                said = outputs(self.task, trained, split.test[0])
                found["error"] = error(self.task, said, split.test[1])
            else:
                found |= measures(self.task, trained, split.test, key["seed"])
            probed = {name: setting[name] for name in setting.keys() - key["setting"].keys()}
            return {name: round(float(value), 4) for name, value in (found | probed).items()}

        def compute(group: list[dict[str, Any]]) -> Iterable[Result]:
            with ThreadPoolExecutor(WORKERS) as pool:
                return list(pool.map(one, group))

        weight = lambda key: self.seconds(method, key["setting"])
        order = sorted(range(len(keys)), key=lambda i: keys[i]["steps"])  # alike go together
        results = self.study.collect([keys[i] for i in order], compute, WORKERS, weight)
        back = np.argsort(order)
        return [results[i] for i in back]

    # What is ahead ------------------------------------------------------------

    def plan(self, method: Method) -> tuple[float, float]:
        """Expected seconds of search and test; the test's length is not known yet: the mean."""
        drawn = [self.seconds(method, self.draw(method, i)) for i in range(self.trials)]
        mean = float(np.mean(drawn))
        return sum(drawn) + self.kept * self.more * mean, self.study.seeds * mean

    def expect(self, method: Method) -> None:
        search, test = self.plan(method)
        self._assumed[method.name] = test
        self.study.expect(search + test)

    # Search and test ------------------------------------------------------------

    def search(self, method: Method) -> Search:
        settings = [self.draw(method, i) for i in range(self.trials)]
        first = self.run(method, [(s, SEARCH, SEARCH) for s in settings], "search")
        validation = [run["validation"] for run in first]
        kept = np.argsort(validation, kind="stable")[: self.kept].tolist()
        again = range(SEARCH + 1, SEARCH + 1 + self.more)
        planned = self.kept * self.more * np.mean([self.seconds(method, s) for s in settings])
        actual = self.more * sum(self.seconds(method, settings[i]) for i in kept)
        if self._assumed:
            self.study.expect(actual - planned)
        points = [(settings[i], seed, seed) for i in kept for seed in again]
        runs = self.run(method, points, "search")
        errors = np.reshape([run["validation"] for run in runs], (len(kept), self.more))
        means = [np.mean([validation[i], *row]) for i, row in zip(kept, errors, strict=True)]
        best = settings[kept[int(np.argmin(means))]]
        return Search(settings, validation, [run["error"] for run in first], best)

    def test(self, method: Method, setting: Setting) -> list[Result]:
        """Test runs over fresh seeds and splits, with what is measured after training."""
        seeds = range(self.study.seeds)
        if method.name in self._assumed:
            actual = len(seeds) * self.seconds(method, setting)
            self.study.expect(actual - self._assumed.pop(method.name))
        points = [(setting, seed, seed % SPLITS) for seed in seeds]
        runs = self.run(method, points, "test")
        return [run | {"split": split} for run, (_, _, split) in zip(runs, points, strict=True)]


def by_split(runs: Sequence[Result], name: str = "error") -> np.ndarray:
    """The mean on each split."""
    splits = sorted({run["split"] for run in runs})
    return np.array([np.mean([r[name] for r in runs if r["split"] == s]) for s in splits])
