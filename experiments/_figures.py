"""Drawing that experiments share."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _harness import Row
from _report import COLORS, MARKERS, STYLE


def panels(count: int, title: str, width: float = 4.5, height: float = 3.6) -> tuple[Any, Any]:
    """A figure and its axes, at most three in a row."""
    plt.rcParams.update(STYLE)
    rows = math.ceil(count / 3)
    columns = math.ceil(count / rows)
    size = (max(width * columns, 6), height * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title, fontweight="bold")
    return figure, axes.ravel()[:count]


def dots(axis: Any, rows: Iterable[Row], names: Sequence[str] | None = None) -> None:
    """The test error of every run, and means with their numbers."""
    rows = list(rows)
    for i, row in enumerate(rows):
        color = COLORS[i % len(COLORS)]
        places = i + np.linspace(-0.14, 0.14, len(row.errors))
        axis.plot(
            places, row.errors, MARKERS[i % len(MARKERS)], color=color, alpha=0.6, ms=5, mew=0
        )
        axis.hlines(row.mean, i - 0.24, i + 0.24, color=color, lw=2)
        axis.text(i + 0.28, row.mean, f"{row.mean:.1f}", color=color, va="center", size=8)
    axis.set_xticks(range(len(rows)), names or [row.name.replace(", ", "\n") for row in rows])
    axis.set(xlim=(-0.5, len(rows) - 0.3), ylabel="test error (%)")


def band(axis: Any, x: Any, runs: Any, index: int, label: str, **looks: Any) -> None:
    """Mean and standard deviation of runs (first axis) over x."""
    runs, color = np.asarray(runs, float), COLORS[index % len(COLORS)]
    mean, std = runs.mean(0), runs.std(0, ddof=1 if len(runs) > 1 else 0)
    axis.plot(x, mean, color=color, label=label, **looks)
    axis.fill_between(x, mean - std, mean + std, color=color, alpha=0.15, lw=0)
