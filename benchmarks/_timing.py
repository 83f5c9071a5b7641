"""Paired timing, and what the compiler reports.

On a machine that others use too, times of one run and times of another cannot be compared. Here
the competitors take turns within each repeat, in an order drawn anew, and a ratio is the median of
the ratios within repeats. Seconds of the cores are counted beside those of the clock: they hardly
see what other programs do, but not what waits for memory or for one core either.
"""

import gc
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import sam_optax

WARM_UP = 2  # turns that do not count
MOST_STEPS = 100_000  # of one competitor in one run


class Options(NamedTuple):
    """What a run measures; every measurement takes it and returns rows of a table."""

    size: str  # of the subjects, as in `_models.SIZES`
    models: tuple[str, ...]
    optimizers: tuple[str, ...]
    repeats: int  # turns of every competitor
    quick: bool  # every table, but few rows, for CI


Seconds = dict[str, np.ndarray]  # entry i of each array belongs to repeat i


def paired(turns: Mapping[str, Callable[[], Any]], repeats: int) -> tuple[Seconds, Seconds]:
    """Seconds of every turn, by the clock and of all cores together."""
    rng = np.random.default_rng(0)
    wall: dict[str, list[float]] = {name: [] for name in turns}
    cores: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for repeat in range(WARM_UP + repeats):
        for name in rng.permutation(names):
            begin = time.perf_counter(), time.process_time()
            turns[name]()
            if repeat >= WARM_UP:
                wall[name].append(time.perf_counter() - begin[0])
                cores[name].append(time.process_time() - begin[1])
    return {n: np.array(v) for n, v in wall.items()}, {n: np.array(v) for n, v in cores.items()}


def quartiles(values: np.ndarray) -> list[float]:
    """First quartile, median, third quartile."""
    return [float(q) for q in np.percentile(values, (25, 50, 75))]


def ratio(seconds: Mapping[str, np.ndarray], name: str, base: str) -> list[float]:
    """Quartiles of the ratios within repeats."""
    return quartiles(seconds[name] / seconds[base])


def turn(step: Callable[..., Any], carry: Any, batch: tuple[Any, ...], calls: int) -> Callable:
    """A turn of some calls, each on the carry of the one before; the last is waited for."""

    def run() -> None:
        nonlocal carry
        for _ in range(calls):
            carry, loss = step(carry, *batch)
        jax.block_until_ready((carry, loss))

    return run


def fewer(steps: Mapping[str, Any], options: Options, *names: str) -> dict[str, Any]:
    """Those of these names alone in a quick run, else all."""
    return {name: step for name, step in steps.items() if name in names or not options.quick}


def own(tree: Any) -> Any:
    """A copy of every array, so that each competitor can donate its own."""
    return jax.tree.map(jnp.copy, tree)


def compare(steps: Mapping[str, Callable[[], Any]], batch: tuple[Any, ...], cycle: int) -> Any:
    """Compiles the steps that these build, and returns {name: turn} and {name: program}."""
    turns, programs = {}, {}
    for name, build in steps.items():
        step, carry, calls = build()
        programs[name], _ = compiled(step, carry, batch)
        turns[name] = turn(programs[name], own(carry), batch, calls * cycle)
    return turns, programs


def by_host(build: Callable[[], Any], batch: tuple[Any, ...], cycle: int, when: Any) -> Callable:
    """A turn of a step with this cadence, for which the host chooses between two programs.

    Without the cadence it asks the state at every step, and so waits for the step before.
    """
    step, carry, calls = build()
    jitted = jax.jit(step, donate_argnums=(0,), static_argnames="pay")
    programs = {pay: jitted.lower(carry, *batch, pay=pay).compile() for pay in (True, False)}
    told = when and iter(sam_optax.payments(when, MOST_STEPS).tolist())

    def decided(carry: Any, *batch: Any) -> Any:
        _, opt_state, *_ = carry
        return programs[next(told) if told else sam_optax.pays(opt_state)](carry, *batch)

    return turn(decided, own(carry), batch, calls * cycle)


def lowered(step: Callable[..., Any], carry: Any, batch: tuple[Any, ...], donate: bool = True):
    """The lowered step, and the seconds it took to trace and to lower."""
    jitted = jax.jit(step, donate_argnums=(0,) if donate else ())
    # What earlier traces left behind would otherwise be collected at the cost of this one.
    gc.collect()
    gc.disable()
    begin = time.perf_counter()
    traced = jitted.trace(carry, *batch)
    middle = time.perf_counter()
    result = traced.lower()
    end = time.perf_counter()
    gc.enable()
    return result, {"trace": middle - begin, "lower": end - middle}


def compiled(step: Callable[..., Any], carry: Any, batch: tuple[Any, ...], donate: bool = True):
    """The compiled step, and the seconds it took to trace, to lower and to compile."""
    low, durations = lowered(step, carry, batch, donate)
    begin = time.perf_counter()
    result = low.compile()
    return result, durations | {"compile": time.perf_counter() - begin}


def megabytes(program: Any) -> tuple[float, float]:
    """Temporary memory of a compiled program, and that of its arguments, in MB of 10^6 bytes."""
    analysis = program.memory_analysis()
    return analysis.temp_size_in_bytes / 1e6, analysis.argument_size_in_bytes / 1e6


def peak_megabytes(program: Any) -> float:
    """What a step of a compiled program holds at most, donated arguments and results once."""
    analysis = program.memory_analysis()
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return (analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + results) / 1e6


def operations(program: Any) -> dict[str, int]:
    """Instructions of a compiled program, in all and of the kinds that cost passes over memory."""
    kinds = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = .*? ([a-z][\w-]*)\(", program.as_text(), re.M)
    counted = {"instructions": len(kinds)}
    for kind in ("fusion", "copy", "convert", "all-reduce", "dot", "convolution"):
        counted[kind] = sum(k in (kind, f"{kind}-start") for k in kinds)
    return counted
