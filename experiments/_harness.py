"""What all experiments share: options, a resumable log of runs, tuning, statistics, a record.

An experiment makes a `Study`, asks it for runs, and ends with `claim` and `finish`:

    study = Study(__file__, __doc__, argv)
    rows = study.compare([Arm("SGD", Recipe(), grid), Arm("SAM", Recipe(sam), other_grid)], split)
    study.claim("SAM is better", published="...", held="held", measured=rows["SAM"].against(...))
    study.finish(figure)

Every finished run is a line of OUT/NAME.jsonl, keyed by all that defines it: an interrupted
experiment, started again, does only the runs that are missing. Settings are chosen on validation
examples with seeds of their own, the figures are test errors over fresh seeds, and no method has a
larger grid than the baseline.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _paths  # noqa: F401
import _splits
import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
import tqdm
from _networks import LANES, Networks, Recipe, evaluate, fit
from _report import circumstances, spread, welch

TUNING_SEED = 1000  # first of the seeds that choose settings; those of the test figures begin at 0
SIGNIFICANT = 0.05  # p below it: told apart. Not corrected for the number of comparisons

Setting = dict[str, float]  # values of hyper-parameters
Result = dict[str, Any]  # what is kept of a run: numbers and lists of numbers


def grid(**values: Iterable[float]) -> list[Setting]:
    """All combinations of the values given."""
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


class Arm(NamedTuple):
    """A method in a comparison and the settings it may choose from."""

    name: str
    recipe: Recipe
    grid: Sequence[Setting]


Tuning = list[tuple[Setting, list[float]]]  # validation errors of the runs of each setting


class Row(NamedTuple):
    """A tuned method: its setting, and its test runs."""

    name: str
    setting: Setting
    runs: list[Result]
    tuning: Tuning

    @property
    def errors(self) -> np.ndarray:
        return np.array([run["error"] for run in self.runs])

    @property
    def mean(self) -> float:
        return float(self.errors.mean())

    def beats(self, rival: "Row") -> bool:
        return self.mean < rival.mean and welch(self.errors, rival.errors) < SIGNIFICANT

    def against(self, rival: "Row") -> str:
        """Both errors in words, with p."""
        p = welch(self.errors, rival.errors)
        return (
            f"{self.name} {spread(self.errors, 1)} %, {rival.name} {spread(rival.errors, 1)} % "
            f"(p = {p:.1g})"
        )


def check_budgets(arms: Sequence[Arm], baseline: str) -> None:
    """A comparison is worth nothing if the baseline had fewer settings to choose from."""
    (own,) = (len(arm.grid) for arm in arms if arm.name == baseline)
    for arm in arms:
        if len(arm.grid) > own:
            raise ValueError(
                f"the grid of the baseline {baseline!r} must be at least as large as that of every "
                f"other method, got {own} settings, and {len(arm.grid)} for {arm.name!r}"
            )


def markdown(lines: Sequence[Sequence[Any]]) -> str:
    """A table, its header first."""
    header, *rows = lines
    clean = lambda cell: str(cell).replace("|", "\\|").replace("\n", " ")
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(clean, line))} |\n" for line in lines)


class Study:
    """One experiment: its options, log, tables and claims."""

    def __init__(
        self,
        file: str,
        doc: str,
        argv: Sequence[str] | None = None,
        *,
        seeds: int = 8,
        tuning_seeds: int = 2,
        parser: argparse.ArgumentParser | None = None,
        log: str | None = None,
    ):
        """Reads the command line and the log.

        Args:
          file: of the script: its name is that of the log and of what is written.
          doc: of the script: its first line is the title.
          argv: the command line, None for that of the process.
          seeds: test runs of a method, unless the command line says otherwise.
          tuning_seeds: runs of a setting while it is chosen.
          parser: has options of the script's own, which are then in `args`.
          log: another script whose log, and thus runs, this one shares.
        """
        parser = parser or argparse.ArgumentParser(description=doc.splitlines()[0])
        parser.add_argument("--out", type=Path, default=Path("results/experiments"))
        parser.add_argument("--seeds", type=int, default=seeds, help="test runs of a method")
        parser.add_argument("--quick", action="store_true", help="digits, tiny grids, for CI")
        parser.add_argument("--fresh", action="store_true", help="forget the runs of before")
        self.args = args = parser.parse_args(argv)
        if args.seeds < 2:
            parser.error(f"--seeds must be at least 2, for a standard deviation, got {args.seeds}")
        self.name, self.out, self.quick = Path(file).stem, args.out, args.quick
        self.seeds = 2 if self.quick else args.seeds
        self.tuning_seeds = 1 if self.quick else tuning_seeds
        self._begin, self._before = time.perf_counter(), 0.0
        self.circumstances = circumstances()
        self._log = self.out / f"{log or self.name}{'_quick' if self.quick else ''}.jsonl"
        self._finished: dict[str, dict[str, Any]] = {}
        self._used: dict[str, dict[str, Any]] = {}
        self._inherited: set[str] = set()  # runs of before that nobody asked for yet
        self._claims: list[dict[str, str]] = []
        self._pages: dict[str, list[list[str]]] = {}
        self.out.mkdir(parents=True, exist_ok=True)
        if log or not args.fresh:  # --fresh is of the script that the log belongs to
            self._read_log()
        self._write_log()
        self._bar = tqdm.tqdm(desc=self.name, unit="run", total=0, position=0, dynamic_ncols=True)
        self._expected = False
        print(f"{doc.splitlines()[0]}\n")

    # The log ---------------------------------------------------------------

    def _read_log(self) -> None:
        """Runs of before, unless of other versions; a line cut short by a crash is dropped."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
        if entries and entries[0] != self.circumstances["versions"]:
            print(f"{self._log} is of other versions of packages: all runs start again.")
        elif entries:
            self._finished = {json.dumps(entry["key"]): entry for entry in entries[1:]}
            self._inherited = set(self._finished)

    def _write_log(self) -> None:
        lines = [self.circumstances["versions"], *self._finished.values()]
        draft = self._log.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(draft, self._log)  # a crash leaves the old log or the new one

    def expect(self, seconds: float) -> None:
        """Adds to the work ahead, in seconds as far as they are known, for the time left.

        From then on `collect` counts the weights of runs, not runs, and expects nothing by itself.
        """
        if not self._expected:
            self._bar.unit, self._expected = "s", True
            self._bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, left {remaining}"
        self._bar.total = max(self._bar.total + seconds, self._bar.n)
        self._bar.refresh()

    def collect(
        self,
        keys: Sequence[dict[str, Any]],
        compute: Callable[[list[dict[str, Any]]], Iterable[Result]],
        lanes: int = 1,
        weight: Callable[[dict[str, Any]], float] = lambda key: 1.0,
    ) -> list[Result]:
        """The results of runs, of which only those that are not in the log are computed.

        Args:
          keys: all that defines each run, for JSON.
          compute: from at most so many keys as lanes to their results, in order; results beyond
            the keys, of lanes that only fill up, are dropped.
          lanes: runs that are computed together.
          weight: of a run, its seconds as expected. Only what was not in the log is work done.
        """
        names = [json.dumps(key) for key in keys]
        missing = [key for name, key in zip(names, keys, strict=True) if name not in self._finished]
        for name in self._inherited & set(names):  # their time counts, once
            self._inherited.discard(name)
            self._before += self._finished[name]["seconds"]
        if self._expected:
            known = [key for name, key in zip(names, keys, strict=True) if name in self._finished]
            self.expect(-sum(map(weight, known)))
        else:
            self._bar.total += len(missing)
        for start in range(0, len(missing), lanes):
            group, begin = missing[start : start + lanes], time.perf_counter()
            results = list(itertools.islice(compute(group), len(group)))
            seconds = round((time.perf_counter() - begin) / len(group), 4)
            with self._log.open("a") as file:
                for key, result in zip(group, results, strict=True):
                    entry = {"key": key, "seconds": seconds, "result": result}
                    self._finished[json.dumps(key)] = entry
                    file.write(json.dumps(entry) + "\n")
            work = sum(map(weight, group))
            self._bar.total = max(self._bar.total, self._bar.n + work)
            self._bar.update(work)
        self._used |= {name: self._finished[name] for name in names}
        return [self._finished[name]["result"] for name in names]

    # Comparisons -----------------------------------------------------------

    def load(self, name: str, noise: float = 0.0) -> _splits.Split:
        """A data set; always the digits with --quick."""
        return _splits.load("digits" if self.quick else name, noise, cache=self.out)

    def recipe(self, data: str, **changes: Any) -> Recipe:
        """The recipe that suits a data set; tiny with --quick."""
        base = Recipe() if data == "mnist" else Recipe(widths=(128, 128), epochs=60, batch=50)
        tiny = {"widths": (16,), "epochs": 2, "batch": 50} if self.quick else {}
        return base._replace(**(changes | tiny))

    def train(
        self,
        arm: Arm,
        points: Sequence[tuple[Setting, int]],
        split: _splits.Split,
        *,
        on: str,
        extra: Callable[[Networks, list[int]], dict[str, Sequence[Any]]] | None = None,
        curve: bool = False,
        context: dict[str, Any] | None = None,
        start: Callable[[list[int]], Any] | None = None,
    ) -> list[Result]:
        """A run of an arm for each (setting, seed).

        Args:
          arm: its grid is not used.
          points: settings and seeds.
          split: trained on its train, evaluated on one of its other sets.
          on: "validation" or "test".
          extra: from the final networks and their seeds to further results, one a lane.
          curve: keep the errors after every epoch.
          context: what else defines the runs, to be part of their keys.
          start: from seeds to initial parameters, with an axis of lanes.
        """
        recipe, examples = arm.recipe, getattr(split, on)
        named = {"method": arm.name, "optimizer": recipe.optimizer.__name__}
        fixed = recipe._asdict() | named | {"on": on, "n_train": len(split.train[1])}
        fixed["data"] = split.name
        fixed |= context or {}
        del fixed["solution"]

        def compute(group: list[dict[str, Any]]) -> Iterable[Result]:
            settings, seeds = ([key[name] for key in group] for name in ("setting", "seed"))
            params = start(seeds) if start else None
            errors = []
            for networks in fit(recipe, settings, seeds, split.train, params):
                if curve:
                    solutions = recipe.solution(networks)
                    errors.append(evaluate(recipe.widths, solutions, examples)["error"])
            solutions = recipe.solution(networks)
            final = evaluate(recipe.widths, solutions, examples)
            train_loss = evaluate(recipe.widths, solutions, split.train)["loss"]
            columns = {**final, "train_loss": train_loss}
            columns |= {"errors": np.stack(errors, 1)} if curve else {}
            columns |= extra(networks, seeds) if extra else {}
            arrays = {name: np.asarray(values, float) for name, values in columns.items()}
            for lane in range(len(group)):
                yield {name: values[lane].round(5).tolist() for name, values in arrays.items()}

        keys = [{**fixed, "setting": setting, "seed": seed} for setting, seed in points]
        return self.collect(keys, compute, LANES)

    def tune(self, arm: Arm, split: _splits.Split, **options: Any) -> Tuning:
        """Validation errors of all settings of an arm."""
        options = {k: v for k, v in options.items() if k not in ("extra", "curve")}
        settings = list(arm.grid)[: 2 if self.quick else None]
        seeds = range(TUNING_SEED, TUNING_SEED + self.tuning_seeds)
        points = list(itertools.product(settings, seeds))
        runs = self.train(arm, points, split, on="validation", **options)
        errors = np.reshape([run["error"] for run in runs], (len(settings), len(seeds)))
        return list(zip(settings, errors.tolist(), strict=True))

    def test(self, arm: Arm, setting: Setting, split: _splits.Split, **options: Any) -> Row:
        """Test runs of one setting over fresh seeds."""
        points = [(setting, seed) for seed in range(self.seeds)]
        return Row(arm.name, setting, self.train(arm, points, split, on="test", **options), [])

    def tune_and_test(self, arm: Arm, split: _splits.Split, **options: Any) -> Row:
        """Test runs of the setting with the lowest mean validation error."""
        tuning = self.tune(arm, split, **options)
        setting, _ = min(tuning, key=lambda point: np.mean(point[1]))
        return self.test(arm, setting, split, **options)._replace(tuning=tuning)

    def compare(
        self, arms: Sequence[Arm], split: _splits.Split, baseline: str = "SGD", **options: Any
    ) -> dict[str, Row]:
        """Every arm, tuned and tested; options as of `train`."""
        check_budgets(arms, baseline)
        return {arm.name: self.tune_and_test(arm, split, **options) for arm in arms}

    # What is shown ---------------------------------------------------------

    def table(self, title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Prints aligned columns."""
        self._bar.clear()
        cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        print(f"\n{title}")
        for line in cells:
            first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            print("  ".join([first.strip().ljust(widths[0]), *rest]))

    def compared(self, title: str, rows: dict[str, Row], rival: Row) -> None:
        """The table of a comparison: settings, errors, p against a rival."""
        names = list(dict.fromkeys(name for row in rows.values() for name in row.setting))
        lines = [
            (
                row.name,
                *(f"{row.setting[n]:g}" if n in row.setting else "-" for n in names),
                spread(row.errors),
                "" if row is rival else f"{welch(row.errors, rival.errors):.1g}",
            )
            for row in rows.values()
        ]
        self.table(title, ["", *names, "test error %", f"p against {rival.name}"], lines)

    def claim(self, claim: str, *, published: str, verdict: str, measured: str) -> None:
        """Keeps and prints what became of a claim.

        Args:
          claim: what is claimed, with its number.
          published: the figures published for it.
          verdict: "held", "held only with ...", "did not hold here".
          measured: the numbers of this run.
        """
        entry = {"claim": claim, "published": published, "measured": measured, "verdict": verdict}
        self._claims.append(entry)
        self._bar.clear()
        print(f"\nClaim {claim}: {verdict}. {measured}.")

    def page(self, title: str, cells: Sequence[Sequence[str]]) -> None:
        """Keeps a table, its header first, for the pages that benchmarks/quote.py writes."""
        self._pages[title] = [list(map(str, line)) for line in cells]

    def save(self, figure: matplotlib.figure.Figure, part: str = "") -> Path:
        """Saves a figure: of the whole, or of a part of it with a name of its own."""
        name = f"{self.name}{'_' * bool(part)}{part}{'_quick' if self.quick else ''}"
        figure.savefig(self.out / f"{name}.png", dpi=150)
        plt.close(figure)
        return self.out / f"{name}.png"

    def close(self) -> None:
        """Ends the bar of progress."""
        self._bar.close()

    def finish(self, figure: matplotlib.figure.Figure) -> dict[str, Any]:
        """Saves the figure and the record of all runs; returns the record without the runs."""
        self.close()
        name = self.save(figure).stem
        record = {
            "name": self.name,
            "command": f"python experiments/{self.name}.py",
            "quick": self.quick,
            "seeds": self.seeds,
            **self.circumstances,
            "seconds": round(time.perf_counter() - self._begin + self._before, 1),
            "claims": self._claims,
            "pages": self._pages,
        }
        if self._pages:  # what a page quotes, without the runs, is small enough to be committed
            quoted = {**self.circumstances, "seconds": record["seconds"], "pages": self._pages}
            stem = f"{self.name}_pages{'_quick' * self.quick}"
            (self.out / f"{stem}.json").write_text(json.dumps(quoted, indent=1))
        runs = list(self._used.values())
        (self.out / f"{name}.json").write_text(json.dumps({**record, "runs": runs}, indent=1))
        if self.quick:
            print("\n--quick only shows that everything runs: its verdicts say nothing.")
        print(f"\n{record['seconds']:.0f} s in all. Figure and runs: {self.out / name}.png, .json")
        sys.stdout.flush()
        return record
