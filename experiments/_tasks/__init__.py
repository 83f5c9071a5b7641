"""Small real problems, each with its parameters, loss, splits and error: what a comparison needs.

    task = load("cities", cache)
    params = task.init(jax.random.key(0))
    loss = task.loss(params, (x, y));  percent = task.error(params, task.test)

A task is a name in TASKS and a function of some twenty lines. It knows nothing of methods: what
it says of tuning is where a search for its plain optimizer begins.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from _tasks import images, special, text
from _tasks.problem import Problem

Examples = tuple[jax.Array, jax.Array]  # inputs (n, ...), labels (n,)
TASKS: dict[str, Callable[[Path, bool], Problem]] = {
    "mnist": functools.partial(images.noisy_digits, "mnist"),
    "digits": functools.partial(images.noisy_digits, "digits"),
    "cities": text.cities,
    "glosses": text.glosses,
    "adam": special.adam,
    "rare": special.rare,
    "adapters": special.adapters,
}


@dataclasses.dataclass(frozen=True, eq=False)  # by identity, so that it may be static under jit
class Task:
    name: str
    problem: Problem

    def __getattr__(self, field: str) -> Any:
        return getattr(self.problem, field)

    def init(self, key: jax.Array) -> Any:
        return self.problem.model.init(key, self.problem.train[0][:1])

    def losses(self, params: Any, batch: Examples) -> jax.Array:
        """One loss per example."""
        x, y = batch
        logits = self.problem.model.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def loss(self, params: Any, batch: Examples) -> jax.Array:
        return self.losses(params, batch).mean()

    def error(self, params: Any, examples: Examples) -> jax.Array:
        """In %; in parts, because attention over all examples at once would not fit."""
        x, y = examples
        part = lambda batch: self.problem.model.apply(params, batch[None])[0].argmax(-1)
        return 100 * jnp.mean(jax.lax.map(part, x, batch_size=500) != y)


@functools.cache
def load(name: str, cache: Path, quick: bool = False) -> Task:
    """A task by its name; files that take long to parse are kept in the folder."""
    return Task(name, TASKS[name](cache, quick))
