"""Training and timing of any method on any task, several networks side by side."""

import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from _methods import METHODS, Setting, grid, optimizer
from _tasks import Task

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # last: some names are here as well
import _timing

CYCLE = 20  # steps in a turn of the timing
RARE_CYCLE = 100  # of those that do something every 100 steps


class Run(NamedTuple):
    setting: Setting
    seed: int  # draws the initial weights and the order of the examples


def make_step(task: Task, name: str, setting: Setting, steps: Any):
    """step((params, state, previous rows), rows, pay=None), as in a training loop."""
    x, y = task.train
    tx = optimizer(name, task, setting, steps)

    def gradient_of(rows: jax.Array) -> Any:  # traced once, however often a method evaluates it
        return jax.jit(lambda params: jax.grad(task.loss)(params, (x[rows], y[rows])))

    def step(carry: Any, rows: jax.Array, pay: bool | None = None) -> Any:
        params, state, previous = carry
        grad_fn, previous_grad_fn = gradient_of(rows), gradient_of(previous)
        batch = x[rows], y[rows]
        extra = {"batch": batch, "value_fn": lambda params: task.loss(params, batch)}
        extra |= {"grad_fn": grad_fn, "previous_grad_fn": previous_grad_fn}
        extra |= {} if pay is None else {"pay": pay}
        updates, state = tx.update(grad_fn(params), state, params, **extra)
        return optax.apply_updates(params, updates), state, rows

    return step


def first(task: Task, name: str, setting: Setting, steps: Any, seed: jax.Array) -> Any:
    params = task.init(jax.random.key(seed))
    state = optimizer(name, task, setting, steps).init(params)
    return params, state, jnp.arange(task.batch)


def over_lanes(name: str, f: Any) -> Any:
    """Side by side; one after another where a branch must not be taken by all at every step."""
    method = METHODS[name]
    if method.rarely or method.paid is not None:
        return lambda *args: jax.lax.map(lambda lane: f(*lane), args)
    return jax.vmap(f)


@functools.partial(jax.jit, static_argnames=("task", "name"))
def _begin(task: Task, name: str, settings: Setting, steps: Any, seeds: jax.Array) -> Any:
    one = lambda setting, seed: first(task, name, setting, steps, seed)
    return over_lanes(name, one)(settings, seeds)


@functools.partial(jax.jit, static_argnames=("task", "name"), donate_argnames="carries")
def _advance(
    task: Task, name: str, settings: Setting, steps: Any, carries: Any, orders: Any, n: Any
):
    """The first n of the steps in orders, whose length is always an epoch's."""

    def one(setting: Setting, carry: Any, order: jax.Array) -> Any:
        step = make_step(task, name, setting, steps)
        return jax.lax.fori_loop(0, n, lambda i, carry: step(carry, order[i]), carry)

    return over_lanes(name, one)(settings, carries, orders)


@functools.partial(jax.jit, static_argnames=("task", "on"))
def _errors(task: Task, params: Any, on: str) -> jax.Array:
    return jax.lax.map(lambda lane: task.error(lane, getattr(task, on)), params)


def fit(
    task: Task, name: str, steps: int, runs: Sequence[Run], lanes: int, on: str
) -> Iterator[float]:
    """Errors in % of one network for each run, of which there are at most so many as lanes."""
    filled = [*runs, *[runs[-1]] * (lanes - len(runs))]
    settings = jax.tree.map(lambda *values: jnp.float32(values), *(run.setting for run in filled))
    orders = np.stack([_order(task, run.seed, steps) for run in filled])
    count = jnp.float32(steps)  # traced: another length compiles nothing
    carries = _begin(task, name, settings, count, jnp.array([run.seed for run in filled]))
    piece = len(task.train[1]) // task.batch  # an epoch
    for begin in range(0, steps, piece):
        rows = orders[:, begin : begin + piece]
        n = rows.shape[1]
        rows = np.pad(rows, ((0, 0), (0, piece - n), (0, 0)))
        carries = _advance(task, name, settings, count, carries, rows, n)
    yield from np.asarray(_errors(task, carries[0], on))[: len(runs)]


def _order(task: Task, seed: int, steps: int) -> np.ndarray:
    """(steps, batch) examples; every epoch shuffles anew."""
    examples = len(task.train[1])
    per_epoch = examples // task.batch
    epochs = [
        np.random.default_rng((seed, epoch)).permutation(examples)[: per_epoch * task.batch]
        for epoch in range(-(-steps // per_epoch))
    ]
    return np.concatenate(epochs).reshape(-1, task.batch)[:steps].astype(np.int32)


def step_times(task: Task, names: Sequence[str], turns: int) -> dict[str, dict[str, Any]]:
    """For each method quartiles of the time of a step: in ms, and over that of the plain one.

    Where a cadence says beforehand which steps are paid for, both kinds of step are timed as the
    two programs that a host chooses between, and counted in their proportion.
    """
    turns_of: dict[str, Any] = {}
    for name in tqdm.tqdm(names, desc="compiling", unit="method", dynamic_ncols=True):
        for pay in (None,) if METHODS[name].paid is None else (True, False):
            turns_of[f"{name}, {pay}"] = _turn(task, name, pay)
    turns_of["floor, None"] = _floor_turn(task)
    seconds, _ = _timing.paired(turns_of, turns)
    of = lambda name, pay: seconds[f"{name}, {pay}"] / _cycle(name)
    found = {}
    for name in [*names, "floor"]:
        paid = METHODS[name].paid if name in METHODS else None
        if paid is None:
            own = of(name, None)
        else:
            own = paid * of(name, True) + (1 - paid) * of(name, False)
        quartiles = lambda values: [round(q, 4) for q in _timing.quartiles(values)]
        found[name] = {
            "ms": quartiles(1e3 * own),
            "over plain": quartiles(own / of("plain", None)),
        }
    return found


def _cycle(name: str) -> int:
    return RARE_CYCLE if name in METHODS and METHODS[name].rarely else CYCLE


def _turn(task: Task, name: str, pay: bool | None) -> Any:
    setting = grid(name, task)[0]
    step = make_step(task, name, setting, 10_000)
    carry = _timing.own(first(task, name, setting, 10_000, 0))
    rows = jnp.asarray(_order(task, 0, 1)[0])
    jitted = jax.jit(functools.partial(step, pay=pay), donate_argnums=0)
    program = jitted.lower(carry, rows).compile()
    return _repeated(program, carry, rows, _cycle(name))


def _floor_turn(task: Task) -> Any:
    """Two gradients and one update: the control."""
    x, y = task.train
    setting = grid("plain", task)[0]
    tx = optimizer("plain", task, setting, 10_000)

    def step(carry: Any, rows: jax.Array) -> Any:
        params, state, _ = carry
        gradient = jax.jit(lambda params: jax.grad(task.loss)(params, (x[rows], y[rows])))
        nearby = jax.tree.map(lambda w, g: w + 1e-6 * g, params, gradient(params))
        updates, state = tx.update(gradient(nearby), state, params)
        return optax.apply_updates(params, updates), state, rows

    carry = _timing.own(first(task, "plain", setting, 10_000, 0))
    rows = jnp.asarray(_order(task, 0, 1)[0])
    return _repeated(
        jax.jit(step, donate_argnums=0).lower(carry, rows).compile(), carry, rows, CYCLE
    )


def _repeated(program: Any, carry: Any, rows: jax.Array, cycle: int) -> Any:
    def turn() -> None:
        nonlocal carry
        for _ in range(cycle):
            carry = program(carry, rows)
        jax.block_until_ready(carry)

    return turn
