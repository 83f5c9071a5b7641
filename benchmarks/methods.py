"""Step time of every method that the library exports, beside the plain step of SGD.

Methods are found among the public names; one that is added appears here without an entry if it
has defaults. What a method does every 100 steps (`sparse_sam`, `eigen_sam`) is not in a median.
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
from _steps import LEARNING_RATE, Step

import sam_optax

# Arguments of methods that have required ones, or whose usual value costs something else.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adaptive": {"method": sam_optax.sam(), "steps": 10_000},
    "cadenced": {"method": sam_optax.sam(), "when": sam_optax.every(_steps.CYCLE)},
    "draws": {"method": sam_optax.sharpness_aware(sam_optax.gaussian_ascent()), "count": 2},
    "flat_lora": {"frozen": False, "steps": 10_000},
    "late_phase": {"method": sam_optax.sam(), "start": 1_000_000},  # before the start
    "late_tail": {"method": sam_optax.sam(), "steps": 1_000_000},  # before the tail
    "randomised": {"method": sam_optax.sam()},
    "tilted": {
        "method": sam_optax.sharpness_aware(sam_optax.gaussian_ascent(), sam_optax.keep_loss()),
        "count": 2,
    },
}
QUICK = ("plain", "floor", "asam", "k_sam")
# These hold the optimizer and so are the whole chain.
WITH_BASE: dict[str, Callable[[optax.GradientTransformation], Any]] = {
    "bsam": lambda base: sam_optax.bsam(LEARNING_RATE, data_size=10_000),
    "decoupled_wsam": lambda base: sam_optax.decoupled_wsam(base, LEARNING_RATE),
    "lookbehind": lambda base: sam_optax.lookbehind(base),
    "sampa": lambda base: sam_optax.sampa(base),
    "shared_momentum_sam": lambda base: sam_optax.shared_momentum_sam(base),
    "shared_preconditioned_sam": lambda base: sam_optax.shared_preconditioned_sam(
        optax.adam(LEARNING_RATE)
    ),
    "sharing": lambda base: sam_optax.sharing(sam_optax.sam(), base),
}


def names() -> list[str]:
    """Public names of methods that are links of a chain, or optimizers."""
    whole = ("method", "wrapper", "optimizer")
    return [name for name, member in sam_optax.FAMILY.items() if member.kind in whole]


def steps(problem: Problem) -> dict[str, Callable[[], Step]]:
    """Name -> builder of a step with that method and SGD."""
    base = _steps.OPTIMIZERS["sgd"]()

    def chained(name: str) -> Step:
        if name in WITH_BASE:
            tx = WITH_BASE[name](base)
        else:
            tx = optax.chain(getattr(sam_optax, name)(**ARGUMENTS.get(name, {})), base)
        member = sam_optax.FAMILY[name]
        # Where no clean gradient is needed, the loss comes from the pass that the method makes.
        source = "clean" if member.uses_clean else "perturbed"
        takes = ("grad_fn", *member.needs)
        return _steps.through_second_door(problem, tx, loss_from=source, takes=takes)

    second_order = optax.chain(sam_optax.sam(second_order=True), base)
    return {
        "plain": lambda: _steps.through_first_door(problem, base, _steps.plain),
        "floor": lambda: _steps.through_first_door(problem, base, _steps.floor),
        **{name: (lambda name=name: chained(name)) for name in names()},
        "sam, second order": lambda: _steps.through_second_door(problem, second_order),
        "momentum_sam, clean loss": lambda: _steps.through_second_door(
            problem, optax.chain(sam_optax.momentum_sam(), base)
        ),
        "esam": lambda: _on_examples(problem, base, "esam"),
        "k_sam": lambda: _on_examples(problem, base, "k_sam"),
    }


def _on_examples(problem: Problem, base: optax.GradientTransformation, name: str) -> Step:
    """A step of a method that chooses among the examples of the batch."""
    half = len(problem.batch[1]) // 2

    def step(carry, x, y):
        params, state, stats, count = carry
        key = jax.random.fold_in(jax.random.key(0), count)

        def losses(params, x, y):
            one = lambda x, y: problem.loss_fn(params, stats, key, x[None], y[None])[0]
            return jax.vmap(one)(x, y)

        if name == "esam":
            loss, grads = sam_optax.esam(losses)(key, params, x, y)
        else:
            loss, grads = sam_optax.k_sam(losses, half)(params, x, y)
        updates, state = base.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, stats, jnp.add(count, 1)), loss

    return Step(step, _steps.first_carry(problem, base))


def measure(options: _timing.Options) -> list[dict[str, Any]]:
    """A row for each method, on the first model."""
    problem = _models.problem(options.models[0], options.size)
    compared = _timing.fewer(steps(problem), options, *QUICK)
    turns, programs = _timing.compare(compared, problem.batch, _steps.CYCLE)
    seconds, _ = _timing.paired(turns, options.repeats)
    params = _models.count(problem.params) * 4e-6
    temp = {name: _timing.megabytes(program)[0] for name, program in programs.items()}
    return [
        {
            "method": name,
            "ms": _timing.quartiles(1e3 * seconds[name] / _steps.CYCLE),
            "over plain": _timing.ratio(seconds, name, "plain"),
            "over floor": _timing.ratio(seconds, name, "floor"),
            "extra": (temp[name] - temp["plain"]) / params,
            "instructions": _timing.operations(programs[name])["instructions"],
        }
        for name in turns
    ]
