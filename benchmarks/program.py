"""What the compiler makes of a step: time to trace, lower and compile; memory; size.

Traces and lowerings are repeated in turns on functions made anew, so that nothing is cached; a
compilation runs once with donated and once with kept arguments.
"""

from typing import Any

import _models
import _steps
import _timing
import jax
import numpy as np


def measure(options: _timing.Options) -> list[dict[str, Any]]:
    """A row for each model and competitor, with the first optimizer."""
    builds = 2 if options.quick else 8
    rows = []
    for model in options.models:
        problem = _models.problem(model, options.size)
        traces: list[str] = []
        counting = problem._replace(loss_fn=_counting(problem.loss_fn, traces))
        steps = _steps.comparison(counting, options.optimizers[0])
        del steps["floor again"]
        steps = _timing.fewer(steps, options, "plain", "sam")
        seconds, lowered = _traced(steps, problem.batch, 1 + builds)
        counts = {}
        for name, build in steps.items():
            step, carry, _ = build()
            traces.clear()
            jax.jit(step).trace(carry, *problem.batch)
            counts[name] = len(traces)
        params = _models.count(problem.params) * 4e-6  # MB of one copy
        plain: list[float] = []
        for name, build in steps.items():
            step, carry, _ = build()
            donated, durations = _timing.compiled(step, carry, problem.batch)
            kept, _ = _timing.compiled(step, carry, problem.batch, donate=False)
            (temp, argument), (temp_kept, _) = map(_timing.megabytes, (donated, kept))
            plain = plain or [temp, temp_kept]
            rows.append(
                {
                    "model": model,
                    "step": name,
                    "loss traces": counts[name],
                    "trace ms": _timing.quartiles(1e3 * seconds[name][:, 0]),
                    "trace over plain": _timing.quartiles(
                        seconds[name][:, 0] / seconds["plain"][:, 0]
                    ),
                    "lower ms": _timing.quartiles(1e3 * seconds[name][:, 1]),
                    "compile ms": 1e3 * durations["compile"],
                    "argument MB": argument,
                    "temp MB": temp,
                    "temp MB, kept": temp_kept,
                    # In volumes of the parameters, beyond the plain step.
                    "extra": (temp - plain[0]) / params,
                    "extra, kept": (temp_kept - plain[1]) / params,
                    "StableHLO kB": len(lowered[name]) / 1e3,
                    **_timing.operations(donated),
                }
            )
    return rows


def _counting(loss_fn: Any, traces: list[str]) -> Any:
    def counted(*args):
        traces.append("loss")
        return loss_fn(*args)

    return counted


def _traced(steps: Any, batch: Any, builds: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Seconds (build, [trace, lower]) of every step in turns, the first left out; its text."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in steps}
    texts = {}
    rng, names = np.random.default_rng(0), list(steps)
    for _ in range(builds):
        for name in rng.permutation(names):
            step, carry, _ = steps[name]()
            lowered, durations = _timing.lowered(step, carry, batch)
            seconds[name].append(list(durations.values()))
            texts[name] = lowered.as_text()
    return {name: np.array(values)[1:] for name, values in seconds.items()}, texts
