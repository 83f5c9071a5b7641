"""Tables of a run as pages of the documentation quote them: cells of text."""

from typing import Any

Row = dict[str, Any]
Tables = dict[str, list[Row]]
Pages = dict[str, list[list[str]]]  # title -> header and rows

STEPS = (  # of the tables of step times
    *("plain", "floor", "floor again", "by hand", "sam", "sam, chain", "asam"),
    *("optax.contrib.sam, opaque", "optax.contrib.sam, transparent"),
)
CHEAPER = (
    *("plain", "floor", "momentum_sam, chain", "shared_momentum_sam"),
    *("look_sam, chain", "look_sam, host", "randomised, chain", "randomised, host"),
    *("late_phase, chain", "late_phase, host"),
    *("sam, ascent 1/2", "sam, ascent 1/4", "sam, ascent 1/8"),
    *("sam, ascent 1/4, clean loss", "sam, ascent bfloat16"),
)


def pages(tables: Tables) -> Pages:
    """What the tables of this run can fill."""
    found: Pages = {}
    times = tables.get("step_time", [])
    if times:
        found["Step time of SAM"] = _times(times, STEPS)
        found["Step time of cheaper steps"] = _times(times, CHEAPER)
    methods = {row["method"]: row for row in tables.get("methods", [])}
    if methods:
        cells = [[name, _median(row["over plain"])] for name, row in methods.items()]
        found["Step time of all methods"] = [["method", "step time over plain"], *cells]
    if tables.get("memory"):
        header = [
            "method",
            "peak, MB",
            "over plain",
            "state beyond SGD's, copies of the parameters",
        ]
        cells = [
            [
                *(row["method"], f"{row['peak MB']:.1f}", f"{row['over plain']:.2f}"),
                f"{row['extra state']:.1f}",
            ]
            for row in tables["memory"]
        ]
        found["Peak memory of all methods"] = [header, *cells]
    return found


def _times(rows: list[Row], steps: tuple[str, ...]) -> list[list[str]]:
    """A line for each step, a column for each model and optimizer; the plain step in ms."""
    columns = list(dict.fromkeys((row["model"], row["optimizer"]) for row in rows))
    found = {(row["step"], row["model"], row["optimizer"]): row for row in rows}
    header = ["step time over plain", *(f"{model}, {optimizer}" for model, optimizer in columns)]
    lines = [["plain, ms", *(f"{found['plain', *c]['ms'][1]:.2f}" for c in columns)]]
    for step in steps:
        cells = [found.get((step, *column)) for column in columns]
        if any(cells):
            lines.append([step, *(_median(row["over plain"]) if row else "-" for row in cells)])
    return [header, *lines]


def _median(quartiles: list[float]) -> str:
    return f"{quartiles[1]:.2f}"
