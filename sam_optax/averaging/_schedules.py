"""Cyclical learning rates of SWA and of fast geometric ensembling."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam_optax import _checks


def cyclical_schedule(
    a1: jax.typing.ArrayLike,
    a2: jax.typing.ArrayLike,
    c: int,
    *,
    start: int = 0,
    before: jax.typing.ArrayLike | optax.Schedule | None = None,
) -> optax.Schedule:
    r"""SWA's cyclical learning rate: falls from near a1 to a2 in each cycle, then jumps back.

    High rates carry the iterate to another place of the flat region, the low
    one settles it there; `swa` averages the ends of the cycles.

        t(i) = ((i - 1) mod c + 1)/c,   lr(i) = (1 - t(i)) a1 + t(i) a2,   i = count + 1 - start

    Args:
      a1: highest rate, at least 0; with c > 1 it is approached, not reached.
      a2: rate at the end of a cycle, at least 0.
      c: steps in a cycle, at least 1; 1 is the constant rate a2.
      start: steps before the first cycle, at least 0: the step of count `start`
        is i = 1, and cycles end with steps start + c, start + 2c, ...
      before: rate of the steps before `start`: a number, or a schedule such as
        the one the network is usually trained with. None is a1.

    Returns:
      An Optax schedule: a function of the count of steps, from 0, to a scalar.

    Raises:
      ValueError: if a1, a2, before or start is negative, or c below 1.

    Example:
      >>> from sam_optax import averaging
      >>> schedule = averaging.cyclical_schedule(0.5, 0.1, c=4, start=2, before=1.0)
      >>> print(*(f"{schedule(count):.1f}" for count in range(2 + 2 * 4)))
      1.0 1.0 0.4 0.3 0.2 0.1 0.4 0.3 0.2 0.1

      `swa` with start=2 + 4, every=4 averages the iterates after the steps at 0.1.

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018, section 3.1.
    """
    _checks.integer_at_least("c", c, 1)
    return _cycles(lambda t: _blend(a1, a2, t), a1, a2, c, start, before)


def triangular_schedule(
    a1: jax.typing.ArrayLike,
    a2: jax.typing.ArrayLike,
    c: int,
    *,
    start: int = 0,
    before: jax.typing.ArrayLike | optax.Schedule | None = None,
) -> optax.Schedule:
    r"""The triangular cycle of fast geometric ensembling (FGE): from a1 down to a2 and up again.

    In the middle of a cycle the rate is lowest and `snapshots` takes a member of
    the ensemble; both halves are linear.

        t(i) = ((i - 1) mod c + 1)/c,   i = count + 1 - start
        lr(i) = (1 - 2t) a1 + 2t a2 for t <= 1/2,   (2 - 2t) a2 + (2t - 1) a1 above

    Args:
      a1: highest rate, at the end of a cycle, at least 0.
      a2: lowest rate, in the middle of a cycle, at least 0.
      c: steps in a cycle: even, at least 2.
      start: steps before the first cycle, at least 0: the step of count `start`
        is i = 1, and the minima are steps start + c/2, start + 3c/2, ...
      before: rate of the steps before `start`: a number, or a schedule such as
        the one the network is usually trained with. None is a1.

    Returns:
      An Optax schedule: a function of the count of steps, from 0, to a scalar.

    Raises:
      ValueError: if a1, a2, before or start is negative, or c odd or below 2.

    Example:
      >>> from sam_optax import averaging
      >>> schedule = averaging.triangular_schedule(0.5, 0.1, c=4, start=1)
      >>> print(*(f"{schedule(count):.1f}" for count in range(1 + 2 * 4)))
      0.5 0.3 0.1 0.3 0.5 0.3 0.1 0.3 0.5

      `snapshots` with start=1 + 2, every=4 keeps the iterates after the steps at 0.1.

    References:
      Garipov et al., `Loss Surfaces, Mode Connectivity, and Fast Ensembling of
      DNNs <https://arxiv.org/abs/1802.10026>`_, 2018, section 4. The authors'
      code begins a cycle at t = 0, one step earlier, so that its snapshot comes
      before the step at a2.
    """
    _checks.integer_at_least("c", c, 2)
    if c % 2:
        raise ValueError(f"c must be even, for a minimum in the middle of the cycle, got {c}")
    # 1 - |1 - 2t| is 2t in the first half and 2 - 2t in the second.
    return _cycles(lambda t: _blend(a1, a2, 1 - abs(1 - 2 * t)), a1, a2, c, start, before)


def _cycles(
    rate: Callable[[Any], Any], a1: Any, a2: Any, c: int, start: int, before: Any
) -> optax.Schedule:
    """The rate as a function of t in (0, 1], again and again, after another schedule."""
    _checks.at_least("a1", a1, 0.0)
    _checks.at_least("a2", a2, 0.0)
    _checks.integer_at_least("start", start, 0)
    if not callable(before):
        before = a1 if before is None else before
        _checks.at_least("before", before, 0.0)
    first: Any = before if callable(before) else optax.constant_schedule(before)

    def cycle(count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        return rate((jnp.asarray(count) % c + 1) / c)

    return optax.join_schedules([first, cycle], [start])


def _blend(a1: Any, a2: Any, t: Any) -> Any:
    return (1 - t) * a1 + t * a2
