"""How the cost of SAM grows with the number of parameters and with the number of leaves."""

from typing import Any

import _models
import _steps
import _timing
import jax
import jax.numpy as jnp
import optax

import sam_optax

PARAMETERS = (10**4, 10**5, 10**6, 10**7, 10**8)
LAYERS = 4  # square and dense, so that width = sqrt(parameters/4)
EXAMPLES = 8  # so few that passes over the parameters count
LEAVES = (1, 10, 100, 1000, 10_000)
COMPILED = 1000  # leaves, at most: the compiler takes minutes for more
LEAF = 16  # entries


def parameters(options: _timing.Options) -> list[dict[str, Any]]:
    """A row for each number of parameters and competitor."""
    rows = []
    for wanted in PARAMETERS[:1] if options.quick else PARAMETERS:
        problem = dense(wanted)
        competitors = _steps.comparison(problem, "sgd")
        names = ("plain", "floor", "by hand", "optax.contrib.sam, opaque", "sam")
        chosen = {name: competitors[name] for name in names}
        chosen = _timing.fewer(chosen, options, "plain", "floor", "sam")
        turns, programs = _timing.compare(chosen, problem.batch, 1)
        repeats = options.repeats if wanted < 10**7 else max(2, options.repeats // 4)
        seconds, _ = _timing.paired(turns, repeats)
        plain = _timing.megabytes(programs["plain"])[0]
        rows += [
            {
                "parameters": _models.count(problem.params),
                "step": name,
                "ms": _timing.quartiles(1e3 * seconds[name]),
                "over plain": _timing.ratio(seconds, name, "plain"),
                "over floor": _timing.ratio(seconds, name, "floor"),
                "extra": (_timing.megabytes(programs[name])[0] - plain)
                / (4e-6 * _models.count(problem.params)),
            }
            for name in turns
        ]
    return rows


def dense(wanted: int) -> _models.Problem:
    """Square layers with about so many parameters in all."""
    width = round((wanted / LAYERS) ** 0.5)
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    params = [jax.random.normal(key, (width, width)) / width**0.5 for key in keys[1:]]
    x = jax.random.normal(keys[0], (EXAMPLES, width))

    def loss_fn(params, stats, key, x, y):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean((x - y) ** 2), stats

    return _models.Problem(loss_fn, params, {}, (x, jnp.zeros_like(x)), width)


def leaves(options: _timing.Options) -> list[dict[str, Any]]:
    """A row for each number of leaves and link, `sam` or `optax.adamw`; the gradient is trivial."""
    rows = []
    for n in LEAVES[:2] if options.quick else LEAVES:
        params = {f"leaf {i}": jnp.ones(LEAF) for i in range(n)}
        builds = 3 if n <= COMPILED else 1
        seconds: dict[str, list[list[float]]] = {"adamw": [], "sam": []}
        turns: dict[str, Any] = {}
        warm_up = int(n == LEAVES[0])
        for build in range(warm_up + builds):
            for name in seconds:
                step, carry = link(name, params)
                low, durations = _timing.lowered(step, carry, ())
                if build >= warm_up:
                    seconds[name].append(list(durations.values()))
            del low
        compiling = {}
        if n <= COMPILED:
            for name in seconds:
                step, carry = link(name, params)
                program, durations = _timing.compiled(step, carry, ())
                compiling[name] = 1e3 * durations["compile"]
                turns[name] = _timing.turn(program, _timing.own(carry), (), _steps.CYCLE)
        times, _ = _timing.paired(turns, options.repeats)
        rows += [
            {
                "leaves": n,
                "link": name,
                "trace ms": 1e3 * _median(seconds[name], 0),
                "trace over adamw": _median(seconds[name], 0) / _median(seconds["adamw"], 0),
                "lower ms": 1e3 * _median(seconds[name], 1),
                "compile ms": compiling.get(name),
                "step over adamw": _timing.ratio(times, name, "adamw") if times else None,
            }
            for name in seconds
        ]
    return rows


def link(name: str, params: Any) -> tuple[Any, Any]:
    """One update by a transformation alone, of parameters whose gradient is twice themselves."""
    tx = optax.with_extra_args_support(optax.adamw(1e-3) if name == "adamw" else sam_optax.sam())
    gradient = lambda params: jax.tree.map(lambda w: 2 * w, params)

    def step(carry):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params, grad_fn=gradient)
        return (optax.apply_updates(params, updates), state), jax.tree.leaves(updates)[0]

    return step, (params, tx.init(params))


def _median(values: list[list[float]], column: int) -> float:
    return _timing.quartiles([row[column] for row in values])[1]
