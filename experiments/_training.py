"""Training of a task by a method: one compiled program for both, whatever the hyper-parameters.

The length of a training is a hyper-parameter, too: a program is `task.chunk` steps, called as often
as it takes, and the schedules know the number of steps as a traced value. Batches are cut out on
the host, so that the number of examples is no matter for the program either.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _tasks.task import Examples, Task

import sam_optax

WARMUP = 0.05  # fraction of the steps with a rising learning rate; cosine to 0 after it
MOMENTUM = 0.9  # of SGD, Nesterov
TAIL = 0.25  # of the steps, those at the end that the late tail pays for

EVALUATED = 500  # examples in a program

Hyper = dict[str, Any]
_compiling = threading.RLock()


def shape(hyper: Hyper) -> optax.Schedule:
    """Learning rate over its peak, after so many of hyper["steps"] steps."""
    permille = optax.warmup_cosine_decay_schedule(0.0, 1.0, int(1000 * WARMUP), 1000)
    return lambda count: permille(1000 * count / hyper["steps"])


def kernels(params: Any) -> Any:
    """What is decayed: leaves of at least two dimensions."""
    return jax.tree.map(lambda w: w.ndim > 1, params)


def base_optimizer(task: Task, hyper: Hyper) -> optax.GradientTransformation:
    decay, rising = hyper["weight_decay"], shape(hyper)
    rate = lambda count: hyper["lr"] * rising(count)
    if task.optimizer == "adamw":
        return optax.adamw(rate, weight_decay=decay, mask=kernels)
    l2 = optax.add_decayed_weights(decay, kernels)  # after the sharpness-aware gradient
    return optax.chain(l2, optax.sgd(rate, MOMENTUM, nesterov=True))


class Method(NamedTuple):
    """Static: a program is compiled for a task and a method.

    Attributes:
      name: in tables and in the keys of runs.
      build: (hyper, base optimizer) -> optimizer.
      cost: gradient evaluations of a step, the mean over a training.
      rho: None, or the range of its rho as a multiple of the task's range for SAM.
      late: whether it pays for the perturbed gradient in the tail of a training only.
      probe: None, or from (task, setting, seed, examples) to hyper-parameters that it finds before
        the training, with gradient evaluations of its own.
      overhead: how many those are; the training is shorter by them.
    """

    name: str
    build: Callable[[Hyper, optax.GradientTransformation], Any]
    cost: float
    rho: float | None
    late: bool = False
    probe: Callable[..., dict[str, float]] | None = None
    overhead: int = 0


def _base(hyper: Hyper, base: Any) -> Any:
    return base


def _sam(hyper: Hyper, base: Any) -> Any:
    return optax.chain(sam_optax.sam(hyper["rho"]), base)


def _asam(hyper: Hyper, base: Any) -> Any:
    """T = |w| + 0.01 on all leaves, biases included."""
    return optax.chain(sam_optax.asam(hyper["rho"], normalize_bias=True), base)


def _momentum_sam(hyper: Hyper, base: Any) -> Any:
    return sam_optax.shared_momentum_sam(base, hyper["rho"])


def _late_tail(hyper: Hyper, base: Any) -> Any:
    start = jnp.asarray((1 - TAIL) * hyper["steps"], jnp.int32)
    return optax.chain(sam_optax.late_phase(sam_optax.sam(hyper["rho"]), start), base)


BASE = Method("base", _base, 1, None)
SAM = Method("SAM", _sam, 2, 1.0)
METHODS = (
    BASE,
    SAM,
    Method("ASAM", _asam, 2, 10.0),
    Method("momentum_sam", _momentum_sam, 1, 5.0),
    Method("late tail", _late_tail, 1 + TAIL, 1.0, late=True),
)


def length(task: Task, method: Method, budget: float) -> int:
    """Steps of a training that costs `budget` times the gradient evaluations of one of length 1.

    Whole chunks, also before and in a late tail.
    """
    chunks = task.chunk * (round(1 / TAIL) if method.late else 1)
    return chunks * max(
        1, round((budget * task.gradients - method.overhead) / method.cost / chunks)
    )


class Carry(NamedTuple):
    params: Any
    state: Any  # of the network
    opt_state: Any
    count: jax.Array


@functools.partial(jax.jit, static_argnames=("task", "method"))
def _start(task: Task, method: Method, hyper: Hyper, params: Any, state: Any) -> Carry:
    tx = method.build(hyper, base_optimizer(task, hyper))
    return Carry(params, state, tx.init(params), jnp.zeros([], jnp.int32))


@functools.partial(jax.jit, static_argnames=("task", "method", "pay"))
def _chunk(
    task: Task, method: Method, pay: bool | None, hyper: Hyper, carry: Carry, batches: Examples
) -> Carry:
    tx = optax.with_extra_args_support(method.build(hyper, base_optimizer(task, hyper)))
    word = {} if pay is None else {"pay": pay}

    def step(carry: Carry, batch: Examples) -> tuple[Carry, None]:
        x, y = batch
        key = jax.random.fold_in(jax.random.key(hyper["seed"]), carry.count)

        def loss(params: Any) -> tuple[jax.Array, Any]:
            outputs, moved = task.apply(params, carry.state, x, key, hyper)
            return task.loss(outputs, y, hyper).mean(), moved

        evaluate = sam_optax.value_and_grad_fn(loss, has_aux=True)
        (value, state), grads, grad_fn = evaluate(carry.params)
        updates, opt_state = tx.update(
            grads, carry.opt_state, carry.params, grad_fn=grad_fn, value=value, **word
        )
        params = optax.apply_updates(carry.params, updates)
        return Carry(params, state, opt_state, carry.count + 1), None

    if task.chunk == 1:
        return step(carry, jax.tree.map(lambda a: a[0], batches))[0]
    return jax.lax.scan(step, carry, batches)[0]


def orders(seed: int, examples: int, batch: int, steps: int) -> np.ndarray:
    """(steps, batch) examples, every epoch in a new order; by NumPy, which compiles nothing."""
    rng, each = np.random.default_rng(seed), examples // batch
    if each == 0:
        raise ValueError(f"batch must be at most {examples}, the training examples, got {batch}")
    epochs = -(-steps // each)
    rows = [rng.permutation(examples)[: each * batch].reshape(each, batch) for _ in range(epochs)]
    return np.concatenate(rows)[:steps]


class Trained(NamedTuple):
    params: Any
    state: Any


def fit(
    task: Task,
    method: Method,
    setting: dict[str, float],
    seed: int,
    data: Examples,
    steps: int,
    *,
    start: Trained | None = None,
    horizon: int | None = None,
    watch: Callable[[int, Carry], None] | None = None,
) -> Trained:
    """A network trained for a number of steps.

    Args:
      task: the task.
      method: the method.
      setting: hyper-parameters.
      seed: of the initial weights, the order of the examples, dropout.
      data: training examples.
      steps: a multiple of task.chunk.
      start: where to start from, instead of task.init.
      horizon: steps that schedules reckon with, instead of steps.
      watch: sees what there is after every chunk, with the number of steps.
    """
    hyper = {name: np.float32(value) for name, value in setting.items()}
    hyper |= {"steps": np.float32(horizon or steps), "seed": np.int32(seed)}
    rows = orders(seed, len(data[1]), task.batch, steps)
    tail = steps - round(TAIL * steps)
    with _compiling:  # of two threads the second waits for the program of the first
        params, state = start or task.init(jax.random.key(seed))
        carry = _start(task, method, hyper, params, state)
    x, y = map(np.asarray, data)
    for first in range(0, steps, task.chunk):
        pay = first >= tail if method.late else None
        part = rows[first : first + task.chunk]
        with _compiling if first in (0, tail) else contextlib.nullcontext():
            carry = _chunk(task, method, pay, hyper, carry, (x[part], y[part]))
        if watch:
            watch(first + task.chunk, carry)
    return Trained(carry.params, carry.state)


@functools.partial(jax.jit, static_argnames="task")
def _outputs(task: Task, trained: Trained, x: Any) -> Any:
    still = dict.fromkeys(task.searched, 0.0)  # apply looks some of them up
    return task.apply(*trained, x, None, still)[0]


def outputs(task: Task, trained: Trained, x: Any) -> np.ndarray:
    """What a network says to all examples; one program for sets of all sizes."""
    parts = []
    for first in range(0, len(x), EVALUATED):
        part = np.asarray(x[first : first + EVALUATED])
        rest = [(0, EVALUATED - len(part))] + [(0, 0)] * (part.ndim - 1)
        with _compiling if first == 0 else contextlib.nullcontext():
            said = _outputs(task, trained, np.pad(part, rest))
        parts.append(np.asarray(said)[: len(part)])
    return np.concatenate(parts)


def error(task: Task, said: np.ndarray, y: np.ndarray) -> float:
    """Mean in %; what is not a number is an error."""
    return 100 * float(np.nan_to_num(task.error(said, y), nan=1.0).mean())
