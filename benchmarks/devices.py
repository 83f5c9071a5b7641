"""Step time over devices: SAM with `axis_name` beside SGD, on CPU devices of one machine.

The batch of the whole is the same for all numbers of devices, and the devices share the cores:
the figures are the ratio to SGD and the all-reduces, not a speed-up. JAX fixes the number of CPU
devices when it starts, so this runs in a process of its own.
"""

from typing import Any

import _models
import _steps
import _timing
import jax
import optax
from _models import Problem
from _steps import RHO
from jax.sharding import AxisType, PartitionSpec

import sam_optax

DEVICES = (1, 2, 4, 8)
AXIS = "batch"


def measure(options: _timing.Options) -> list[dict[str, Any]]:
    """A row for each number of devices and competitor; JAX must not have started before."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    problem = _models.problem(options.models[0], options.size)
    rows = []
    for n in DEVICES[-1:] if options.quick else DEVICES:
        compared = _timing.fewer(steps(problem, n), options, "plain", "floor", "sam")
        turns, programs = _timing.compare(compared, problem.batch, 1)
        seconds, _ = _timing.paired(turns, options.repeats)
        rows += [
            {
                "model": options.models[0],
                "devices": n,
                "step": name,
                "ms": _timing.quartiles(1e3 * seconds[name]),
                "over plain": _timing.ratio(seconds, name, "plain"),
                "over floor": _timing.ratio(seconds, name, "floor"),
                "all-reduce": _timing.operations(programs[name])["all-reduce"],
            }
            for name in turns
        ]
    return rows


def steps(problem: Problem, n: int) -> dict[str, Any]:
    """Name -> builder of a step over n devices, each with its part of the batch."""
    mesh = jax.make_mesh((n,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    base = _steps.OPTIMIZERS["sgd"]()
    averaged = optax.chain(sam_optax.pmean(AXIS), base)  # the mean of gradients, as for SGD
    chained = optax.chain(sam_optax.sam(RHO), averaged)
    builders = {
        "plain": lambda: _steps.through_first_door(problem, averaged, _steps.plain),
        "floor": lambda: _steps.through_first_door(problem, averaged, _steps.floor),
        "sam": lambda: _steps.through_first_door(
            problem, base, _steps.sharp(sam_optax.sam(RHO), axis_name=AXIS)
        ),
        "sam, chain": lambda: _steps.through_second_door(problem, chained),
    }

    def over_devices(name: str) -> _steps.Step:
        step, carry, calls = builders[name]()

        def local(carry, x, y):
            (params, state, stats, count), loss = step(carry, x, y)
            if name != "sam":  # which has averaged them
                loss, stats = jax.lax.pmean((loss, stats), AXIS)
            return (params, state, stats, count), loss

        everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(everywhere, split, split),
            out_specs=(everywhere, everywhere),
            check_vma=False,  # with it the plain step's gradients would be summed by JAX itself
        )
        return _steps.Step(mapped, carry, calls)

    return {name: lambda name=name: over_devices(name) for name in builders}
