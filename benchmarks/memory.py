"""Peak memory of a step of every method, as the compiler plans it.

What a step holds at most: its arguments (parameters, state, batch), which are donated, results
that take no argument's place, and the compiler's temporary arrays. "state" is the optimizer's
memory with that of the method, beyond the plain optimizer's.
"""

from typing import Any

import _models
import _timing
import jax
import methods


def measure(options: _timing.Options) -> list[dict[str, Any]]:
    """A row for each method, on the first model, in MB and in volumes of the parameters."""
    problem = _models.problem(options.models[0], options.size)
    steps = _timing.fewer(methods.steps(problem), options, *methods.QUICK)
    params = _models.count(problem.params) * 4e-6
    rows: list[dict[str, Any]] = []
    for name, build in steps.items():
        step, carry, _ = build()
        program, _ = _timing.compiled(step, carry, problem.batch)
        state = sum(x.nbytes for x in jax.tree.leaves(carry[1])) / 1e6
        peak = _timing.peak_megabytes(program)
        plain = rows[0] if rows else {"peak MB": peak, "state MB": state}
        rows.append(
            {
                "method": name,
                "peak MB": peak,
                "over plain": peak / plain["peak MB"],
                "extra peak": (peak - plain["peak MB"]) / params,
                "state MB": state,
                "extra state": (state - plain["state MB"]) / params,
            }
        )
    return rows
