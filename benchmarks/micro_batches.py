"""m-sharpness over micro-batches: every way to run the groups beside the plain SAM step.

One after another in a loop, written out, several at a time, and the automatic choice; beside them
`optax.microbatching` around the same SAM gradient, which deals examples out in strides and gives
all groups the same dropout key, so that the compiler draws one mask for all. "one key" does that
here; the others draw a mask in every group, which costs in a loop on a CPU.
"""

from collections.abc import Callable
from typing import Any

import _models
import _steps
import _timing
import jax
import jax.numpy as jnp
import optax
from _models import Problem
from _steps import BATCH, RHO, Step

import sam_optax

GROUPS = (2, 4, 8)  # m = B/2, B/4, B/8
MODES: dict[str, dict[str, Any]] = {
    "automatic": {},
    "loop": {"unroll": 1},
    "written out": {"unroll": True},
    "two at a time": {"vectorize": 2},
    "all at once": {"vectorize": True},
}


def steps(problem: Problem, groups: int) -> dict[str, Callable[[], Step]]:
    """Name -> builder of a step that has this number of groups."""
    base = _steps.OPTIMIZERS["sgd"]()
    size = len(problem.batch[1]) // groups

    def by_optax(loss_fn: Callable) -> Callable:
        sharp = sam_optax.value_and_grad(loss_fn, sam_optax.sam(RHO), has_aux=True)
        mean = optax.microbatching.AccumulationType.RUNNING_MEAN
        return optax.microbatching.microbatch(sharp, BATCH, size, mean)

    def one_key(loss_fn: Callable) -> Callable:
        def on_key_data(params, stats, data, x, y):
            return loss_fn(params, stats, jax.random.wrap_key_data(data), x, y)

        settings = {"microbatch_size": size, "batch_argnums": BATCH}
        sharp = _steps.sharp(sam_optax.sam(RHO), **settings)(on_key_data)
        return lambda params, stats, key, x, y: sharp(params, stats, jax.random.key_data(key), x, y)

    rules = {
        mode: _steps.sharp(
            sam_optax.sam(RHO), microbatch_size=size, batch_argnums=BATCH, **settings
        )
        for mode, settings in MODES.items()
    }
    rules["automatic, one key"] = one_key
    rules["optax.microbatching"] = by_optax
    return {
        name: lambda rule=rule: _steps.through_first_door(problem, base, rule)
        for name, rule in rules.items()
    }


def measure(options: _timing.Options) -> list[dict[str, Any]]:
    """A row for each model, number of groups and mode."""
    rows = []
    for model in options.models:
        problem = _models.problem(model, options.size)
        base = _steps.OPTIMIZERS["sgd"]()
        first = lambda rule, p=problem, b=base: lambda: _steps.through_first_door(p, b, rule)
        reference = {"sam": first(_steps.sharp(sam_optax.sam(RHO))), "floor": first(_steps.floor)}
        for groups in GROUPS[-1:] if options.quick else GROUPS:
            competitors = reference | steps(problem, groups)
            competitors = _timing.fewer(competitors, options, "sam", "floor", "automatic")
            turns, programs = _timing.compare(competitors, problem.batch, 1)
            seconds, _ = _timing.paired(turns, options.repeats)
            temp = {name: _timing.megabytes(program)[0] for name, program in programs.items()}
            rows += [
                {
                    "model": model,
                    "groups": groups,
                    "m": len(problem.batch[1]) // groups,
                    "mode": name,
                    "ms": _timing.quartiles(1e3 * seconds[name]),
                    "over sam": _timing.ratio(seconds, name, "sam"),
                    "temp MB": temp[name],
                    "memory over sam": temp[name] / temp["sam"],
                }
                for name in turns
                if name != "sam"
            ]
    return rows


def growth(options: _timing.Options) -> list[dict[str, Any]]:
    """Time and memory of the automatic mode over the plain SAM step, up to one example a group."""
    model = options.models[0]
    problem = _models.problem(model, options.size)
    examples = len(problem.batch[1])
    counts = [2**i for i in range(examples.bit_length()) if 2**i <= examples]
    base = _steps.OPTIMIZERS["sgd"]()
    competitors = {
        str(n): lambda n=n: _steps.through_first_door(
            problem,
            base,
            _steps.sharp(
                sam_optax.sam(RHO),
                microbatch_size=jnp.size(problem.batch[1]) // n,
                batch_argnums=BATCH,
            ),
        )
        for n in (counts[:2] if options.quick else counts)
    }
    turns, programs = _timing.compare(competitors, problem.batch, 1)
    seconds, _ = _timing.paired(turns, options.repeats)
    return [
        {
            "model": model,
            "groups": int(name),
            "over one group": _timing.ratio(seconds, name, "1"),
            "temp MB": _timing.megabytes(programs[name])[0],
        }
        for name in turns
    ]
