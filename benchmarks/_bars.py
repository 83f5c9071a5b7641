"""The bars that the library set itself, computed from the tables of a run."""

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
Tables = dict[str, list[Row]]

STEP_TIME = (  # step, ratio to, highest
    ("sam", "over floor", 1.03),
    ("sam, chain", "over floor", 1.03),
    ("sam", "over opaque", 1.0),
    ("sam, chain", "over opaque", 1.0),
    ("look_sam, host", "over plain", 1.25),
    ("late_phase, host", "over plain", 1.02),
    ("randomised, host", "over plain", 1.55),
    ("momentum_sam, chain", "over plain", 1.1),
    ("shared_momentum_sam", "over plain", 1.05),
)
PROGRAM = (
    ("loss traces", 1),
    ("trace over plain", 1.2),
    ("extra", 1.0),
    ("extra, kept", 1.0),
)
MICRO_BATCHES = (("over sam", 1.15), ("memory over sam", 1.0))
MOST_LEAVES_TRACE = 2.0  # highest, over adamw


def bars(tables: Tables) -> list[Row]:
    """A row for each bar that the tables of this run can answer.

    "met" is "yes" if the median is within the bar, "noise" if only the first quartile is.
    """
    return [*_step_time(tables), *_program(tables), *_micro_batches(tables), *_leaves(tables)]


def _row(bar: str, where: str, value: Any, limit: float, cores: Any = None) -> Row:
    low, middle = (value[0], value[1]) if isinstance(value, list) else (value, value)
    met = "yes" if middle <= limit else "noise" if low <= limit else "no"
    columns = {"bar": bar, "where": where, "value": value, "at most": limit}
    return columns | {"met": met, "in CPU seconds": cores}


def _step_time(tables: Tables) -> Iterator[Row]:
    rows = tables.get("step_time", [])
    for step, ratio, limit in (*STEP_TIME, ("floor again", "over floor", 1.0)):
        for row in rows:
            if row["step"] == step:
                where = f"{row['model']}, {row['optimizer']}"
                bar = _row(f"{step} {ratio}", where, row[ratio], limit, row[f"{ratio}, CPU"])
                # The floor against itself is no bar: it tells what the others are worth.
                yield bar | ({"met": "control"} if step == "floor again" else {})


def _program(tables: Tables) -> Iterator[Row]:
    for column, limit in PROGRAM:
        for row in tables.get("program", []):
            if row["step"] in ("sam", "sam, chain"):
                yield _row(f"{row['step']}: {column}", row["model"], row[column], limit)


def _micro_batches(tables: Tables) -> Iterator[Row]:
    rows = tables.get("micro_batches", [])
    for column, limit in MICRO_BATCHES:
        for row in rows:
            if row["mode"] == "automatic" and row["groups"] == 8:
                yield _row(f"micro-batches, m = B/8: {column}", row["model"], row[column], limit)


def _leaves(tables: Tables) -> Iterator[Row]:
    rows = [row for row in tables.get("leaves", []) if row["link"] == "sam"]
    for row in rows[-1:]:
        where = f"{row['leaves']} leaves"
        yield _row("sam: trace over adamw", where, row["trace over adamw"], MOST_LEAVES_TRACE)
