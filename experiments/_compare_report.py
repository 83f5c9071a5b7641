"""Statistics, tables and the figure of compare_methods.py."""

import warnings
from collections.abc import Sequence
from typing import Any

import _paths  # noqa: F401
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from _harness import SIGNIFICANT
from _inference import holm
from _report import BLUE, GREEN, ORANGE, STYLE, spread, welch

Rows = list[dict[str, Any]]
Ratios = dict[str, list[float]]  # quartiles of a step's time over that of the plain step

AGAINST_SAM, AGAINST_PLAIN = "p against sam", "p against plain"
GOAL = (1.1, 0.9)  # of the plain step's time at most, of SAM's gain at least
CONFIDENCE = 0.95
RESAMPLES = 9999
LEFT, TICKS = 0.55, (1, 1.25, 1.5, 2, 3, 4, 6, 8, 10)  # of the figure's costs
TITLES = {
    "steps": "At equal steps",
    "gradients": "At equal gradients",
    "time": "At equal time",
}


def share(plain: Any, sam: Any, own: Any, axis: int = -1) -> Any:
    """The part of SAM's gain over the plain optimizer that a method keeps; NaN of no gain."""
    plain, sam, own = (np.mean(errors, axis=axis) for errors in (plain, sam, own))
    gain = np.where(plain > sam, plain - sam, np.nan)
    return (plain - own) / gain


def interval(plain: Sequence[float], sam: Sequence[float], own: Sequence[float]) -> list[float]:
    """Of the share: percentiles over seeds drawn anew, in all three."""
    if np.isnan(share(plain, sam, own)):
        return [np.nan, np.nan]
    # Percentiles by hand, because a draw in which SAM gains nothing leaves its own undefined.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        drawn = scipy.stats.bootstrap(
            *((plain, sam, own), share),
            **{"paired": False, "vectorized": True, "n_resamples": RESAMPLES, "axis": -1},
            **{"confidence_level": CONFIDENCE, "method": "percentile"},
            random_state=np.random.default_rng(0),
        )
    outside = 50 * (1 - CONFIDENCE)
    found = np.nanpercentile(drawn.bootstrap_distribution, (outside, 100 - outside))
    return found.tolist()


def judged(rows: Rows) -> Rows:
    """Adds to the rows their mean, share of SAM's gain with interval, and p-values.

    Of a gain that is not told apart from none a share would be noise over noise: it is NaN.
    """
    for row in rows:
        row["mean"] = float(np.mean(row["errors"]))
    plain = min((r for r in rows if r["method"] == "plain"), key=lambda row: row["mean"])
    (sam,) = (row for row in rows if row["method"] == "sam")
    others = [row for row in rows if row["method"] != "plain"]
    against = [welch(row["errors"], plain["errors"]) for row in others]
    for row, p in zip(others, holm(against), strict=True):
        row[AGAINST_PLAIN] = float(p)
    rest = [row for row in others if row is not sam]
    for row, p in zip(rest, holm([welch(r["errors"], sam["errors"]) for r in rest]), strict=True):
        row[AGAINST_SAM] = float(p)
    gained = sam[AGAINST_PLAIN] < SIGNIFICANT
    for row in others:
        row["share"] = float("nan")
        if gained:
            row["share"] = float(share(plain["errors"], sam["errors"], row["errors"]))
        # SAM's share of its own gain is 1, whatever the seeds.
        triple = plain["errors"], sam["errors"], row["errors"]
        alone = row is sam or np.isnan(row["share"])
        row["share interval"] = [row["share"]] * 2 if alone else interval(*triple)
    plain["best"] = True
    return rows


def gains(rows: Rows) -> bool:
    """Whether SAM is better than the plain optimizer, and told apart from it."""
    return not np.isnan(next(row["share"] for row in rows if row["method"] == "sam"))


def percent(row: dict[str, Any]) -> str:
    if np.isnan(row.get("share", np.nan)):
        return "-"
    low, high = (round(100 * end) for end in row["share interval"])
    if row["method"] == "sam":
        return "100"
    return f"{100 * row['share']:.0f} ({low} to {high})"


def pages(pictures: dict[str, Rows], ratios: Ratios) -> dict[str, list[list[str]]]:
    """Tables as cells of text, for the terminal and for pages of the documentation."""
    found = {}
    for name, rows in pictures.items():
        header = ["method", "gradients a step", "step time", "steps", "test error %"]
        header += ["% of SAM's gain", "p against SAM", "p against plain"]
        cells = [
            [
                *(row["method"], f"{row['gradients']:.2f}"),
                f"{ratios[row['method']][1]:.2f}" if row["method"] in ratios else "-",
                *(str(row["steps"]), spread(row["errors"]), percent(row)),
                *(f"{row[p]:.1g}" if p in row else "-" for p in (AGAINST_SAM, AGAINST_PLAIN)),
            ]
            for row in sorted(rows, key=lambda row: row["mean"])
        ]
        found[TITLES[name]] = [header, *cells]
    return found


def cost(row: dict[str, Any], ratios: Ratios) -> float:
    """Of a step over the plain one: measured, or else counted in gradients."""
    return ratios[row["method"]][1] if row["method"] in ratios else row["gradients"]


def advice(rows: Rows, ratios: Ratios) -> str:
    """One sentence: who reaches the goal, or comes closest."""
    limit, wanted = GOAL
    if not gains(rows):
        return "SAM is not told apart from the plain optimizer here."
    others = [
        row for row in rows if row["method"] != "sam" and not row["method"].startswith("plain")
    ]
    words = lambda row: (
        f"{row['method']} ({cost(row, ratios):.2f} of a plain step, {percent(row)} % of SAM's gain)"
    )
    goal = f"{wanted:.0%} of SAM's gain at {limit:g} of a plain step or less"
    cheap = sorted(
        (r for r in others if cost(r, ratios) <= limit), key=lambda r: r["share"], reverse=True
    )
    reached = [row for row in cheap if row["share"] >= wanted]
    if reached:
        sure = [row for row in reached if row["share interval"][0] >= wanted]
        claim = "so does the interval" if sure else "the interval reaches below"
        return f"{goal}: {words((sure or reached)[0])}; {claim}."
    enough = sorted((r for r in others if r["share"] >= wanted), key=lambda row: cost(row, ratios))
    closest = f"none; of those so cheap {words(cheap[0])} keeps most" if cheap else "none"
    if enough:
        closest += f", of those that keep so much {words(enough[0])} costs least"
    return f"{goal}: {closest}."


def heights(rows: Rows) -> dict[str, np.ndarray]:
    """What a method gains, and its interval: in % of SAM's gain, or else in points of error."""
    plain = min((r for r in rows if r["method"] == "plain"), key=lambda row: row["mean"])
    methods = [row for row in rows if row["method"] != "plain"]
    if gains(rows):
        return {r["method"]: 100 * np.array([r["share"], *r["share interval"]]) for r in methods}
    found = {}
    for row in methods:
        less = scipy.stats.ttest_ind(plain["errors"], row["errors"], equal_var=False)
        found[row["method"]] = np.array(
            [plain["mean"] - row["mean"], *less.confidence_interval(CONFIDENCE)]
        )
    return found


def frontier(rows: Rows, ratios: Ratios, height: dict[str, np.ndarray]) -> list[str]:
    """The methods that none beats in both cost and gain, the plain optimizer included."""
    best, names = 0.0, []
    methods = [row for row in rows if not row["method"].startswith("plain")]
    for row in sorted(methods, key=lambda row: (cost(row, ratios), -height[row["method"]][0])):
        if height[row["method"]][0] > best:
            best, names = height[row["method"]][0], [*names, row["method"]]
    return names


def draw(title: str, rows: Rows, ratios: Ratios, path: str) -> None:
    """What a step costs against what it gains; points have numbers, and names beside."""
    plt.rcParams.update(STYLE)
    figure, (axis, names) = plt.subplots(
        1, 2, figsize=(11, 6), layout="constrained", width_ratios=(3.2, 1)
    )
    height, (limit, wanted) = heights(rows), GOAL
    levels = {0.0: "plain optimizer"}
    if gains(rows):
        low, high, unit = -25.0, 150.0, "%"
        axis.set_ylabel("% of SAM's gain in test error, at equal steps")
        axis.fill_between((LEFT, limit), 100 * wanted, high, color=GREEN, alpha=0.15, lw=0)
        axis.text(1.01 * LEFT, high - 2, "the goal", color=GREEN, va="top", size=8)
        levels[100.0] = "SAM"
    else:  # no gain of SAM's to have a part of
        every = np.nan_to_num(np.concatenate([*height.values(), [0.0]]))
        low, high = np.array([every.min(), every.max()]) + 0.1 * np.ptp(every) * np.array([-1, 1])
        unit = "points"
        axis.set_ylabel("points of test error below the plain optimizer's, at equal steps")
    rows = [row for row in rows if row["method"] != "plain"]
    rows.sort(key=lambda row: (cost(row, ratios), -height[row["method"]][0]))
    front = frontier(rows, ratios, height)
    for level, label in levels.items():
        axis.axhline(level, color="0.5", lw=0.8, ls=":")
        place = {"transform": axis.get_yaxis_transform(), "ha": "left", "va": "bottom"}
        axis.text(0.005, level, label, color="0.4", size=8, **place)
    line = [(cost(r, ratios), height[r["method"]][0]) for r in rows if r["method"] in front]
    axis.step(*np.transpose([(1.0, 0.0), *line]), where="post", color=BLUE, lw=1, alpha=0.4)
    names.set_axis_off()
    named = 0
    for number, row in enumerate(rows, 1):
        x, (y, *ends) = cost(row, ratios), height[row["method"]]
        at_front, is_sam = row["method"] in front, row["method"] == "sam"
        color = ORANGE if is_sam else BLUE if at_front else "0.45"
        big = at_front or is_sam
        width = 1.2 if big else 0.6
        axis.vlines(x, *np.clip(ends, low, high), color=color, lw=width, alpha=0.6)
        marker, shown = "v" if y < low else "^" if y > high else "o", np.clip(y, low, high)
        axis.plot(x, shown, marker, color=color, ms=6 if big else 3.5)
        looks = {"color": color, "size": 8 if big else 6, "weight": "bold" if big else "normal"}
        label = row["method"] if big else str(number)
        # Names above and below in turn, or neighbours would overlap.
        place = ((-5, (4, -11)[named % 2]), "right") if big else ((4, 1), "left")
        named += big
        axis.annotate(label, (x, shown), place[0], textcoords="offset points", ha=place[1], **looks)
        told = f"{y:.0f} %" if unit == "%" else f"{y:.2f}"
        text = f"{number:2}  {row['method']}  {x:.2f}, {told}"
        spot = 1 - (number - 1) / max(len(rows), 20)
        names.text(0, spot, text, va="top", **looks | {"size": 6.5})
    measured = "measured" if ratios else "in gradients"
    axis.set(ylim=(low, high), xscale="log", xlim=(LEFT, None))
    ticks = [tick for tick in TICKS if tick < 1.2 * cost(rows[-1], ratios)]
    axis.set_xticks(ticks, map(str, ticks))
    axis.set_xticks([], minor=True)
    axis.set_xlabel(f"cost of a step over the plain optimizer's ({measured})")
    axis.set_title("lines: 95 % intervals over seeds; blue: no other is cheaper and better", size=8)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=150)
    plt.close(figure)
