"""Step time of every route beside the plain step, the floor and the competitors, in one run.

The floor is two gradients and one update. "floor again" is the same step compiled a second time:
its ratio to the floor says what the run can resolve. One turn is a cycle of look_sam, five steps.
Methods with a cadence come in a chain, where `jax.lax.cond` decides, and by the host's word, told
ahead or, "asked", read in each state; `randomised` pays for any number of the five, by chance.
"""

from typing import Any

import _models
import _nnx
import _steps
import _timing
import _torch

OPAQUE = "optax.contrib.sam, opaque"
QUICK = ("plain", "floor", "floor again", OPAQUE, "sam", "momentum_sam, chain", "look_sam, host")


def measure(options: _timing.Options) -> list[dict[str, Any]]:
    """A row for each model, optimizer and competitor; times are of one step."""
    rows = []
    for model in options.models:
        problem = _models.problem(model, options.size)
        for optimizer in options.optimizers:
            steps = _steps.comparison(problem, optimizer)
            if model == "mlp":
                steps |= _nnx.steps(problem, _steps.OPTIMIZERS[optimizer]())
            cadences = _steps.cadences(problem, optimizer)
            steps |= {f"{name}, chain": build for name, build in cadences.items()}
            hosts = {
                f"{name}, host": (cadences[name], _steps.CADENCES[name][1]) for name in cadences
            }
            hosts["look_sam, asked"] = cadences["look_sam"], None
            steps = _timing.fewer(steps, options, *QUICK)
            turns, _ = _timing.compare(steps, problem.batch, _steps.CYCLE)
            for name, (build, when) in _timing.fewer(hosts, options, *QUICK).items():
                turns[name] = _timing.by_host(build, problem.batch, _steps.CYCLE, when)
            if model == "mlp" and optimizer == "sgd":
                widths = _models.SIZES[options.size][model][0].widths
                turns |= _torch.turns(widths, problem.batch, problem.classes)
            seconds, cores = _timing.paired(turns, options.repeats)
            rows += [
                {
                    "model": model,
                    "optimizer": optimizer,
                    "step": name,
                    "ms": _timing.quartiles(1e3 * seconds[name] / _steps.CYCLE),
                    "over plain": _timing.ratio(seconds, name, _plain(name)),
                    "over floor": _timing.ratio(seconds, name, "floor"),
                    "over opaque": _timing.ratio(seconds, name, OPAQUE),
                    "over plain, CPU": _timing.ratio(cores, name, _plain(name)),
                    "over floor, CPU": _timing.ratio(cores, name, "floor"),
                    "over opaque, CPU": _timing.ratio(cores, name, OPAQUE),
                }
                for name in turns
            ]
    return rows


def _plain(name: str) -> str:
    """The plain step of the same framework."""
    if "NNX" in name:
        return "plain, NNX"
    return "PyTorch, plain" if "PyTorch" in name else "plain"
