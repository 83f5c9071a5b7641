"""Figures of the tables of a run; each draws what its table holds."""

from pathlib import Path
from typing import Any

import _paths  # noqa: F401
import matplotlib.pyplot as plt
import numpy as np
from _report import BLACK, BLUE, COLORS, GREEN, GREY, MARKERS, ORANGE, SKY, STYLE
from matplotlib import ticker

Rows = list[dict[str, Any]]


def bars(axis: Any, names: list[str], values: list[list[float]], colors: list[str]) -> None:
    """Horizontal bars of medians with quartiles, the first name on top."""
    data = np.array(values)
    error = np.abs(data[:, [0, 2]].T - data[:, 1])
    axis.barh(names, data[:, 1], xerr=error, color=colors, ecolor="0.2", height=0.65)
    axis.invert_yaxis()


def ours(name: str) -> str:
    """Colour of a competitor: the library, the plain step and the floor, or others."""
    if name.startswith(("plain", "floor")):
        return GREY
    return ORANGE if name.startswith(("by hand", "optax", "PyTorch")) else BLUE


# Rows of the figure of step times: what each is called for a reader who has not seen the table.
SHOWN = (
    ("plain", "plain step: 1 gradient"),
    ("late_phase, host", "late_phase, before its start"),
    ("shared_momentum_sam", "shared_momentum_sam"),
    ("look_sam, host", "look_sam, k = 5"),
    ("sam, ascent 1/4", "sam, ascent on 1/4 of the batch"),
    ("randomised, host", "randomised, p = 0.5"),
    ("floor", "the least for SAM: 2 gradients, 1 update"),
    ("sam", "sam"),
    ("asam", "asam"),
    ("optax.contrib.sam, opaque", "optax.contrib.sam"),
)
SUBJECTS = {"mlp": "MLP", "resnet": "small ResNet, BatchNorm", "transformer": "small transformer"}


def step_time(rows: Rows) -> Any:
    """For the first optimizer of the run; every bar has its number."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    optimizer = rows[0]["optimizer"]
    figure, axes = plt.subplots(
        1, len(models), figsize=(2.9 + 2.3 * len(models), 3.7), layout="constrained", squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        of_model = [r for r in rows if r["model"] == model and r["optimizer"] == optimizer]
        by_step = {row["step"]: row for row in of_model}
        shown = [(by_step[step], label) for step, label in SHOWN if step in by_step]
        values = [row["over plain"] for row, _ in shown]
        controls = ("plain", "floor", "optax.contrib.sam, opaque")
        colors = [GREY if row["step"] in controls else BLUE for row, _ in shown]
        bars(axis, [label for _, label in shown], values, colors)
        for i, (_, middle, high) in enumerate(values):
            axis.text(max(middle, high) + 0.06, i, f"{middle:.2f}", va="center", size=8)
        end = max(high for *_, high in values)
        axis.set(xlim=(0, 1.25 * end), xticks=np.arange(0, end + 0.5, 0.5 if end < 3 else 1))
        axis.axvline(1, color="0.2", linewidth=0.8)
        milliseconds = by_step["plain"]["ms"][1]
        axis.set_title(f"{SUBJECTS.get(model, model)}\n1 = {milliseconds:.1f} ms", size=9)
        if axis is not axes[0, 0]:
            axis.set_yticklabels([])
    names = {"sgd": "SGD", "adamw": "AdamW"}
    figure.suptitle(
        f"How long a training step takes, as a multiple of a plain step of {names[optimizer]}",
        fontweight="bold",
    )
    figure.supxlabel(
        "grey: for comparison; blue: this library; whiskers: half of the turns lie within", size=8
    )
    return figure


def methods(rows: Rows) -> Any:
    rows = sorted(rows, key=lambda row: row["over plain"][1])
    figure, axis = plt.subplots(figsize=(7, 0.22 * len(rows) + 1), layout="constrained")
    names = [row["method"] for row in rows]
    bars(axis, names, [row["over plain"] for row in rows], [ours(n) for n in names])
    axis.set(xlabel="step time over SGD's (median, quartiles)")
    axis.margins(y=0.01)
    if rows[-1]["over plain"][1] > 10:
        axis.set_xscale("log")
    return figure


def program(rows: Rows) -> Any:
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(
        1, len(models), figsize=(2.6 + 2.9 * len(models), 4), layout="constrained", squeeze=False
    )
    for axis, model in zip(axes[0], models, strict=True):
        chosen = [row for row in rows if row["model"] == model]
        names, left = [row["step"] for row in chosen], np.zeros(len(chosen))
        for part, color in (("trace", BLUE), ("lower", ORANGE), ("compile", GREEN)):
            values = [row[f"{part} ms"] for row in chosen]
            seconds = np.array([v[1] if isinstance(v, list) else v for v in values]) / 1e3
            axis.barh(names, seconds, left=left, color=color, height=0.65, label=part)
            left += seconds
        axis.invert_yaxis()
        axis.set(title=model, xlabel="seconds")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def micro_batches(rows: Rows) -> Any:
    models = list(dict.fromkeys(row["model"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    figure, axes = plt.subplots(
        2, len(models), figsize=(1 + 3 * len(models), 5), layout="constrained", squeeze=False
    )
    for column, model in enumerate(models):
        for mode, color, marker in zip(modes, COLORS, MARKERS, strict=False):
            chosen = [r for r in rows if r["model"] == model and r["mode"] == mode]
            groups = [row["groups"] for row in chosen]
            times, temp = axes[:, column]
            style = {"color": color, "marker": marker, "label": mode, "markersize": 5}
            times.plot(groups, [row["over sam"][1] for row in chosen], **style)
            temp.plot(groups, [row["memory over sam"] for row in chosen], **style)
        times.set(title=model, yscale="log")
        temp.set(xlabel="groups in the batch", yscale="log")
        for axis in (times, temp):
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(ticker.NullLocator())
        for axis in (times, temp):
            axis.axhline(1, color="0.2", linewidth=0.8, linestyle="--")
            axis.set_xscale("log", base=2)
            axis.set_xticks(
                sorted({r["groups"] for r in rows}), sorted({r["groups"] for r in rows})
            )
    axes[0, 0].set_ylabel("step time\nover plain SAM's")
    axes[1, 0].set_ylabel("temporary memory\nover plain SAM's")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def growth(tables: dict[str, Rows]) -> Any:
    """Over the sizes of whichever of the four growth tables there are."""
    panels = (  # table, axis, ratio, competitor's column, label of the axis
        ("parameters", "parameters", "over plain", "step", "step time over SGD's"),
        ("leaves", "leaves", "trace over adamw", "link", "trace time over adamw's"),
        ("microbatches", "groups", "over one group", "model", "step time over one group's"),
        ("devices", "devices", "over plain", "step", "step time over SGD's"),
    )
    panels = tuple(p for p in panels if tables.get(p[0]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    colors = {"plain": GREY, "adamw": GREY, "floor": BLACK, "by hand": GREEN}
    colors |= {"optax.contrib.sam, opaque": ORANGE, "sam, chain": SKY}
    for axis, (table, x, y, kind, label) in zip(axes[0], panels, strict=True):
        names = list(dict.fromkeys(row[kind] for row in tables[table]))
        for name, marker in zip(names, MARKERS, strict=False):
            rows = [row for row in tables[table] if row[kind] == name]
            values = [row[y][1] if isinstance(row[y], list) else row[y] for row in rows]
            color = colors.get(name, BLUE)
            axis.plot([row[x] for row in rows], values, color=color, marker=marker, label=name)
        axis.set(xscale="log", xlabel=x, ylabel=label)
        if tables[table][-1][x] < 100:  # powers of two, few enough to name
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
        axis.set_ylim(0)
        axis.legend(frameon=False, fontsize=7)
    return figure


def draw(tables: dict[str, Rows], folder: Path) -> list[Path]:
    """Writes the figures that the tables allow, and returns their paths."""
    plt.rcParams.update(STYLE)
    drawers = (step_time, methods, program, micro_batches)
    figures = {f.__name__: f(tables[f.__name__]) for f in drawers if tables.get(f.__name__)}
    if any(tables.get(name) for name in ("parameters", "leaves", "microbatches", "devices")):
        figures["growth"] = growth(tables)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=150)
        plt.close(figure)
    return paths
