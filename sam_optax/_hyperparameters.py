"""Hyper-parameters that are numbers or schedules of the step."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax


def count_for(value: optax.ScalarOrSchedule) -> optax.OptState:
    """State of a hyper-parameter: a count of steps for a schedule, else empty."""
    if callable(value):
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))
    return optax.EmptyState()


def scheduled(value: optax.ScalarOrSchedule, state: Any) -> tuple[Any, optax.OptState]:
    """Value of a hyper-parameter at this step, and its next state."""
    if callable(value):
        return value(state.count), optax.ScaleByScheduleState(optax.safe_increment(state.count))
    return value, state


def combined(fn: Callable[..., Any], *values: Any) -> Any:
    """A function of hyper-parameters as one more: a schedule if any of them is one."""
    if not any(callable(value) for value in values):
        return fn(*values)
    return lambda count: fn(*(value(count) if callable(value) else value for value in values))
