"""All benchmarks in one run: tables, JSON and figures.

    python benchmarks/run.py                                   # two cores: some twenty minutes
    python benchmarks/run.py --quick                           # every table, tiny, for CI
    python benchmarks/run.py --only step_time --models mlp --optimizers adamw --repeats 100
    python benchmarks/run.py --device gpu --size large         # ResNet-50, ViT-B in bfloat16
    python benchmarks/run.py --device gpu --size large --dry-run    # what that would run

Competitors take turns within each repeat, in an order drawn anew; a ratio is the median of the
ratios within repeats, in brackets its quartiles. Only ratios of one run are comparable.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import _bars
import _figures
import _models
import _pages
import _paths  # noqa: F401
import _steps
import _timing
import devices
import growth
import jax
import matplotlib
import memory
import methods
import micro_batches
import program
import step_time
import tqdm
from _report import circumstances

import sam_optax

REPEATS = 40  # turns of every competitor; the median of 40 is known to about a fifth of the spread
TABLES = {  # name -> (what it shows, function of the options)
    "step_time": ("Step time", step_time.measure),
    "methods": ("All methods, SGD, first model", methods.measure),
    "memory": ("Peak memory of all methods, SGD, first model", memory.measure),
    "program": ("Trace, lower and compile time; memory; program", program.measure),
    "micro_batches": ("m-sharpness over micro-batches", micro_batches.measure),
    "microbatches": ("Growth with the number of groups", micro_batches.growth),
    "parameters": ("Growth with the number of parameters", growth.parameters),
    "leaves": ("Growth with the number of leaves", growth.leaves),
    "devices": ("Growth with the number of CPU devices", devices.measure),
}
# A quick run measures nothing worth knowing, and most of it is compilation.
UNOPTIMISED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")


def cell(value: Any) -> str:
    """A number, a median with its quartiles, or a name."""
    if isinstance(value, list):
        low, middle, high = (f"{v:.3g}" if v >= 1000 else f"{v:.2f}" for v in value)
        return f"{middle} ({low}-{high})"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.2f}"
    return "-" if value is None else str(value)


def show(title: str, rows: list[dict[str, Any]]) -> str:
    """A table as text, numbers to the right."""
    columns = list(rows[0])
    cells = [columns, *([cell(row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = [isinstance(value, str) for value in rows[0].values()]
    lines = [
        "  ".join(
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join(["", title, *lines])


def rounded(tree: Any) -> Any:
    """Floats to five figures, more than a time can tell, so that a result is small on disk."""
    if isinstance(tree, dict):
        return {name: rounded(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(value) for value in tree]
    return float(f"{tree:.5g}") if isinstance(tree, float) else tree


def plan(options: _timing.Options) -> list[dict[str, Any]]:
    """What the step-time benchmark would run, from shapes alone."""
    rows = []
    for name in options.models:
        problem = _models.problem(name, options.size, abstract=True)
        base = _steps.OPTIMIZERS[options.optimizers[0]]()
        flops = {}
        for label, rule in (("plain", _steps.plain), ("sam", _steps.sharp(sam_optax.sam()))):
            step, carry, _ = _steps.through_first_door(problem, base, rule)
            low, _ = _timing.lowered(step, carry, problem.batch)
            flops[label] = (low.cost_analysis() or {}).get("flops", float("nan")) / 1e9
        rows.append(
            {
                "model": name,
                "parameters": _models.count(problem.params),
                "million": _models.count(problem.params) / 1e6,
                "batch": problem.batch[0].shape[0],
                "image": "x".join(map(str, problem.batch[0].shape[1:])),
                "GFLOP, plain": flops["plain"],
                "GFLOP, sam": flops["sam"],
                "optimizers": "+".join(options.optimizers),
            }
        )
    return rows


def measured(name: str, options: _timing.Options) -> list[dict[str, Any]]:
    """The rows of a table; a process of its own sets its own number of CPU devices."""
    _, measure = TABLES[name]
    if name != "devices":
        return measure(options)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(measure, options).result()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = functools.partial(parser.add_argument, nargs="+", metavar="NAME")
    parser.add_argument("--size", choices=_models.SIZES, default="small")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    names("--only", choices=TABLES, default=list(TABLES), help=f"tables: {', '.join(TABLES)}")
    names("--models", choices=_models.MODELS, default=_models.MODELS)
    names("--optimizers", choices=_steps.OPTIMIZERS, default=list(_steps.OPTIMIZERS))
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--quick", action="store_true", help="tiny, one model, three repeats")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    models, optimizers = tuple(args.models), tuple(args.optimizers)
    options = _timing.Options(args.size, models, optimizers, args.repeats, quick=False)
    if args.quick:
        os.environ.setdefault("XLA_FLAGS", UNOPTIMISED)
        options = _timing.Options("tiny", models[:1], optimizers[:1], repeats=3, quick=True)
    if args.dry_run:
        jax.config.update("jax_platforms", "cpu")  # shapes need no accelerator
        print(show(f"Would run on {args.device}: {', '.join(args.only)}", plan(options)))
        return
    jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[args.device])
    matplotlib.use("agg")
    args.out.mkdir(parents=True, exist_ok=True)
    found = circumstances(PACKAGES) | {"options": options._asdict()}
    print(f"{found['device']}, {found['date']}, {found['versions']}, {options}")
    tables: dict[str, list[dict[str, Any]]] = {}
    for name in tqdm.tqdm(args.only, unit="table", disable=None):
        tables[name] = measured(name, options)
        tqdm.tqdm.write(show(TABLES[name][0], tables[name]))
        reached = _bars.bars(tables)
        everything = found | {"tables": tables, "bars": reached, "pages": _pages.pages(tables)}
        # After each table, so that a run that is stopped leaves what it has.
        (args.out / "benchmarks.json").write_text(json.dumps(rounded(everything)))
    if reached:
        print(show("Bars", reached))
    for path in _figures.draw(tables, args.out):
        print(f"Figure: {path}")
    print(f"Tables: {args.out / 'benchmarks.json'}")


if __name__ == "__main__":
    main()
