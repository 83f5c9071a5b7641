"""Parameters that a loss gathers over a mapped axis, which none of the doors can differentiate.

The gradient of a gathered parameter is summed over the devices by JAX. So it is that of all
groups, and of a part of the parameters alone: its norm, the perturbation and the mean over
devices are wrong, and nothing fails. What a loss gathers of its activations is right.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax


def refuse(gradient: Callable[[Any], Any], params: Any) -> None:
    """Refuses a function of params that gathers what depends on nothing but them."""
    program = jax.make_jaxpr(gradient)(params).jaxpr
    # What the function closes over (the batch, keys, states) is no input.
    axes = _gathered(program, [True] * len(program.invars))[1]
    if axes:
        raise ValueError(
            "loss_fn must not gather parameters: JAX sums their gradient over the devices, so that "
            "it is no longer that of a group. Give groups another axis than the one that shards "
            "parameters (axis_name, mesh: an axis that jit shards over needs no gathering by you), "
            "or gather before value_and_grad and scatter the gradient after it, "
            f"got all_gather of params over {axes[0]!r}"
        )


# Of a value: made of parameters alone (True), of other things too (False), of constants (None).
Made: TypeAlias = bool | None


def _gathered(program: Any, inputs: list[Made]) -> tuple[list[Made], list[Any]]:
    """What outputs are made of, and the axes over which what is made of parameters is gathered."""
    made = dict(zip(program.invars, inputs, strict=True))
    # Literals have a value; constants of the program may be anything.
    of = lambda atoms: [None if hasattr(a, "val") else made.get(a, False) for a in atoms]
    axes: list[Any] = []
    for eqn in program.eqns:
        operands = of(eqn.invars)
        outputs = [_joined(operands)] * len(eqn.outvars)
        if eqn.primitive.name.startswith("all_gather") and outputs[0]:
            names = eqn.params["axis_name"]
            axes += names if isinstance(names, tuple | list) else [names]
        within = [found for p in _programs(eqn) if (found := _within(eqn, p, operands))]
        axes += [name for _, more in within for name in more]
        exact = [found for found, _ in within if len(found) == len(outputs)]
        if exact:  # of a conditional there are several
            outputs = [_joined(values) for values in zip(*exact, strict=True)]
        made |= zip(eqn.outvars, outputs, strict=True)
    return of(program.outvars), axes


def _within(eqn: Any, program: Any, operands: list[Made]) -> tuple[list[Made], list[Any]] | None:
    """The same of a program inside of an equation, whose last operands are its inputs."""
    before = len(operands) - len(program.invars)
    if before < 0:
        return None
    inputs = operands[before:]
    if eqn.primitive.name in ("scan", "while"):
        # Slices, one a turn, are alike in all turns; of the rest turns may make something else.
        pairs = zip(eqn.invars[before:], program.invars, strict=True)
        sliced = [a.aval.shape != v.aval.shape for a, v in pairs]
        inputs = [x if s else False for s, x in zip(sliced, inputs, strict=True)]
    return _gathered(program, inputs)


def _joined(values: Iterable[Made]) -> Made:
    known = [value for value in values if value is not None]
    return all(known) if known else None


def _programs(eqn: Any) -> list[Any]:
    values = jax.tree.leaves(list(eqn.params.values()))
    return [getattr(value, "jaxpr", value) for value in values if hasattr(value, "eqns")]
