"""Hyper-parameters that are numbers or schedules of the step."""

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
