"""The figures of does_it_pay.py."""

from pathlib import Path
from typing import Any

import matplotlib.ticker
import numpy as np
import scipy.stats
from _figures import panels
from _harness import SIGNIFICANT, Study
from _inference import expected_best
from _paying import AFTER, Row, base_name
from _report import COLORS, MARKERS
from _training import BASE
from _trials import Trials, by_split


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
    largest = max(row.errors[~row.broken].max() for row in rows.values())
    least = min(row.errors.min() for row in rows.values())
    height = 0.08 * (largest - least) + 0.05
    for i, (name, row) in enumerate(zip(names, rows.values(), strict=True)):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        curve = expected_best(row.search.validation, row.search.test)
        k = np.arange(1, len(curve.mean) + 1)
        curves.plot(k, curve.mean, color=color, marker=marker, ms=3, label=name)
        if i < 2:  # of all, they would hide each other
            curves.fill_between(k, curve.low, curve.high, color=color, alpha=0.15, lw=0)
        places, whole = i + np.linspace(-0.2, 0.2, len(row.runs)), ~row.broken
        dots.plot(places[whole], row.errors[whole], marker, color=color, alpha=0.6, ms=5, mew=0)
        mean = row.errors[whole].mean()
        dots.hlines(mean, i - 0.3, i + 0.3, color=color, lw=2)
        dots.text(i, largest + height, f"{mean:.1f}", color=color, ha="center")
        if not whole.all():
            note = f"{row.broken.sum()} more\nbroke down"
            dots.text(i, largest + 2 * height, note, color=color, ha="center", size=7)
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
    dots.set(ylabel="test error (%)", ylim=(least - height, largest + 4 * height))
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
