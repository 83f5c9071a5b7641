"""What a cadence will say, told to the host, which may then say it: pay=.

What the cadence would have said itself `pays` reads in a state and `payments`
tells ahead. The same training either way:

    @functools.partial(jax.jit, static_argnames="pay")  # two programs, one of plain steps
    def step(params, opt_state, batch, pay):
        value, grads, grad_fn = evaluate(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn, pay=pay)
        return optax.apply_updates(params, updates), opt_state, value

    for pay, batch in zip(sam_optax.payments(sam_optax.every(5), len(batches)), batches):
        params, opt_state, value = step(params, opt_state, batch, pay)

With `pay=sam_optax.pays(opt_state)` the loop need not know the cadence, but waits
for each step before it can start the next. How the state tells: a field `cadence`
marks the state of a method, and in it stands that of a cadence, whose field `pays`
is the decision on the coming step.
"""

from typing import Any

import jax
import numpy as np

from sam_optax import _checks
from sam_optax._cadence import CadencedState, cadence_of
from sam_optax._types import When


def pays(opt_state: Any) -> bool | None:
    """Whether the coming step pays for the perturbed gradient, as far as its state tells.

    For a loop that decides on the host: its answer, given to update as `pay=`,
    leads to a program with one branch instead of `jax.lax.cond`, in which XLA
    compiles convolutions badly on a CPU. Make `pay` a static argument of the
    jitted step. Results and states are those without `pay`.

        pay = the cadence's decision at the step that this state has come to

    Args:
      opt_state: the state of a method, or whatever holds it: of a chain,
        `optax.MultiSteps`, `optax.inject_hyperparams`, or `opt_state` of
        `nnx.Optimizer`. Of several copies (a mapped axis) all are asked.

    Returns:
      True or False; or None where the cadences in the state do not agree, since
      `pay=` is one word for all of them: the step then decides by `jax.lax.cond`
      as `pay=None` says. What stands in a `cadenced` that does not pay stands
      still and is not asked.

    Raises:
      ValueError: if the state holds no cadence, or one without a field `pays`:
        `when_large` looks at the gradient, which is not there yet; or under
        `jax.jit`, where nothing is known yet.

    Example:
      >>> import functools, jax, jax.numpy as jnp, optax, sam_optax
      >>> tx = optax.chain(sam_optax.look_sam(rho=0.1, k=3), optax.sgd(0.1))
      >>> evaluate = sam_optax.value_and_grad_fn(lambda w: jnp.sum(w**2))
      >>> @functools.partial(jax.jit, static_argnames="pay")
      ... def step(w, state, pay):
      ...     value, grads, grad_fn = evaluate(w)
      ...     updates, state = tx.update(grads, state, w, grad_fn=grad_fn, pay=pay)
      ...     return optax.apply_updates(w, updates), state
      >>> w, paid = jnp.array([3.0, 4.0]), []
      >>> state = tx.init(w)
      >>> for _ in range(4):
      ...     paid.append(sam_optax.pays(state))
      ...     w, state = step(w, state, paid[-1])
      >>> print(paid)
      [True, False, False, True]

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022, whose cost this reaches.

    Note:
      Reads one boolean, for which it waits until the step before has run: up to
      a third of a short step. `payments` does not wait. The state was made by
      the step before: hyperparameters of a cadence that change in between count
      one step later.
    """
    words = _words(opt_state)
    if not words:
        raise ValueError(f"opt_state must hold a method with a cadence, got {type(opt_state)}")
    return None if len(words) > 1 else words.pop()


def payments(when: When, steps: int) -> np.ndarray:
    """Which of the first steps a cadence pays for, known before they are taken.

    For a loop that decides on the host and does not wait for a step before it
    starts the next, as it would with `pays`. Give update one of these as `pay=`.

        pay_t = the decision of `when` at step t,  t = 0 ... steps - 1

    Args:
      when: the cadence of the method: every(k) of `look_sam`, from_step(start)
        of `late_phase`, with_probability(probability, key) of `randomised`, or
        a function of the step count to a boolean.
      steps: how many, at least 1. A run that goes on from a checkpoint takes
        them from its step on. Inside of another `cadenced` a cadence counts
        only the steps that this one pays for.

    Returns:
      A NumPy array of booleans, one for each step.

    Raises:
      ValueError: if steps is below 1, or for a cadence whose state has no field
        `pays`, such as `when_large`, which looks at the gradient.

    Example:
      >>> import sam_optax
      >>> print(sam_optax.payments(sam_optax.every(3), 5))
      [ True False False  True False]

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022, whose cost this reaches.

    Note:
      One small program before training.
    """
    steps = _checks.integer_at_least("steps", steps, 1)
    cadence = cadence_of(when)
    start = cadence.init({})  # of any parameters
    _own_words(start)  # refuses one that needs the gradient

    def step(state: Any, _: None) -> tuple[Any, Any]:
        pay, state = cadence.update({}, state)
        return state, pay

    return np.asarray(jax.lax.scan(step, start, length=steps)[1])


def _words(state: Any) -> set[bool]:
    """What the cadences within a state say of the coming step."""

    def is_method(node: Any) -> bool:
        return "cadence" in getattr(node, "_fields", ())

    found: set[bool] = set()
    for node in filter(is_method, jax.tree.leaves(state, is_leaf=is_method)):
        cadence, *parts = node
        own = set() if cadence is None else _own_words(cadence)
        stands_still = isinstance(node, CadencedState) and own == {False}
        found |= own if stands_still else own | _words(parts)
    return found


def _own_words(cadence: Any) -> set[bool]:
    while not hasattr(cadence, "pays") and hasattr(cadence, "inner_state"):
        cadence = cadence.inner_state  # of inject_hyperparams and the like
    if not hasattr(cadence, "pays"):
        raise ValueError(
            "the state of a cadence must have a field pays for the host to know its decision; one "
            "that looks at the gradient has none: leave pay=None, or update that cadence by hand "
            f"with the gradient and give its decision as pay=bool(...), got {type(cadence)}"
        )
    word: Any = jax.tree.leaves(cadence.pays)[0]  # an array, also where NNX wraps it
    if _checks.is_traced(word):
        raise ValueError(f"opt_state must be known, so ask pays outside of jax.jit, got {word}")
    return set(np.ravel(word).tolist())
