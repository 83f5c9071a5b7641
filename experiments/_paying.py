"""Whether a method pays on a task: its rows, tests, sentences and tables."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from _harness import SIGNIFICANT, Result, Study
from _inference import Curve, expected_best, expected_gain, from_trial, holm, paired
from _report import spread, welch
from _tasks.suite import TASKS
from _tasks.task import Task
from _training import BASE, Method
from _trials import Search, Trials, by_split

BROKEN = 2.0  # times the median error of a method's runs: such a run broke down
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

    @property
    def broken(self) -> np.ndarray:
        """Which runs broke down."""
        return self.errors > BROKEN * np.median(self.errors)

    def told(self, digits: int = 2) -> str:
        """Mean and spread of the errors; the median too where a run broke down."""
        middle, count = np.median(self.errors), int(self.broken.sum())
        of = f" (median {middle:.{digits}f}: {count} of {len(self.runs)} broke down)"
        return spread(self.errors, digits) + of * (count > 0)


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
                row.told(),
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
        measured=f"{name} {base.told(1)} %; "
        + "; ".join(
            f"{r.method.name} {r.told(1)} % (p = {r.p_welch:.1g} Welch, {r.p_paired:.1g} paired)"
            for r in rows.values()
            if r is not base
        ),
    )


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


def cells(results: dict[str, tuple[Trials, dict[str, Row]]], budget: int) -> list[list[str]]:
    """One row a task below a header: what a user asks, and the answer.

    The p-values of SAM are corrected once for all tasks of the table: the primary comparison.
    """
    compared = {name: next(r for r in rows.values() if r.method is not BASE)
                for name, (_, rows) in results.items()}  # fmt: skip
    p_welch, p_paired = (holm([row.raw_p[kind] for row in compared.values()]) for kind in (0, 1))
    first = next(iter(compared.values())).method.name
    lines = [
        [
            *("network, data", "labels", "base, test error %", f"{first}, test error %"),
            *("p (Welch, paired)", f"does {first} pay, with up to {budget} trials?"),
            *("others", "command"),
        ]
    ]
    for (name, (trials, rows)), *p in zip(results.items(), p_welch, p_paired, strict=True):
        base, row = rows[BASE.name], compared[name]
        of_table = row._replace(p_welch=p[0], p_paired=p[1])
        others = [r for r in rows.values() if r.method is not BASE and r is not row]
        known = trials.task.name.split(",")[0]
        argument = known if known in TASKS else trials.task.name
        optimizer = base_name(trials.task)
        lines.append(
            [
                *(trials.task.name, trials.labels),
                *(f"{optimizer} {base.told(1)}", f"{row.method.name} {row.told(1)}"),
                "{:.1g}, {:.1g}".format(*p),
                verdict(of_table, base, optimizer),
                "; ".join(verdict(r, base, optimizer) for r in others),
                f"`python experiments/does_it_pay.py --task {argument} --wrong {trials.share:g}`",
            ]
        )
    return lines
