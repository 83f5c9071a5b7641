"""Stochastic weight averaging: the running mean of the iterates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sam_optax import _numerics
from sam_optax.averaging import _iterates


class SWAState(NamedTuple):
    """State of `swa`.

    Attributes:
      count: number of steps taken, int32.
      n: number of iterates averaged, int32.
      average: their mean like params, in float32 or wider; zeros while n = 0.
      inner: state of the optimizer.
    """

    count: jax.Array
    n: jax.Array
    average: optax.Params
    inner: optax.OptState


def swa(
    optimizer: optax.GradientTransformation, start: int, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic weight averaging (SWA): the mean of the iterates, beside the training.

    With a constant or cyclical learning rate the iterates wander around a flat
    region, and their mean lies in it, where no single one does. Wrap the whole
    optimizer, SAM included; the training itself does not change.

        after step k = start, start + every, ...:  w_swa <- (w_swa n + w_k)/(n + 1)

    Args:
      optimizer: any transformation whose updates are added to params as they
        are: nothing that changes them may stand after swa. Extra arguments
        (grad_fn, value, ...) pass to it.
      start: number of steps after which the first iterate is averaged, at
        least 0. The parameters given to init are not an iterate, so 0 begins
        with step `every`.
      every: steps between two averaged iterates, c in the paper, at least 1:
        the length of the cycle of the learning rate, or the steps of an epoch.

    Returns:
      The optimizer, with the same updates and a `SWAState`. Read the average by
      `swa_params`. Leaves of integers follow the last averaged iterate.

    Raises:
      ValueError: if start is negative or every below 1; at the call, if params
        are missing.

    Example:
      The iterates of this optimizer are 1/2, 1/4, 1/8, 1/16:

      >>> import jax.numpy as jnp, optax, sam_optax
      >>> from sam_optax import averaging
      >>> tx = averaging.swa(optax.sgd(0.5), start=2)
      >>> w = jnp.array(1.0)
      >>> state = tx.init(w)
      >>> for _ in range(4):
      ...     updates, state = tx.update(w, state, w)  # the gradient of w^2/2 is w
      ...     w = optax.apply_updates(w, updates)
      >>> print(averaging.swa_params(state, w), (1/4 + 1/8 + 1/16) / 3)
      0.14583333 0.14583333333333334

      With a cycle: 1000 steps as usual, then a mean of the ends of cycles of
      100 steps, where the learning rate is lowest. start=1000 would add the
      point where the cycles begin, as the paper does with trained weights.

      >>> schedule = averaging.cyclical_schedule(0.05, 0.005, c=100, start=1000)
      >>> tx = optax.chain(sam_optax.sam(0.05), optax.sgd(schedule, momentum=0.9))
      >>> tx = averaging.swa(tx, start=1000 + 100, every=100)

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018, algorithm 1;
      the iterates taken are those of the authors' code.

    Note:
      No gradient evaluation; one copy of the parameters in the state, in float32
      for narrower parameters: in bfloat16 the mean of a few hundred iterates would
      no longer move. The mean is computed as w_swa + (w - w_swa)/(n + 1), which
      leaves equal iterates as they are. Weights averaged by it need BatchNorm
      statistics of their own (`estimate_batch_stats`). Under `optax.MultiSteps`
      or `apply_if_finite` put it inside, where a step is a step of params.
    """

    def empty(params: optax.Params) -> optax.Params:
        return jax.tree.map(lambda w: jnp.zeros_like(w, dtype=_dtype(w)), params)

    def remember(average: optax.Params, n: jax.Array, iterate: optax.Params) -> optax.Params:
        def leaf(mean: jax.Array, w: jax.Array) -> jax.Array:
            if not _numerics.is_perturbable(w):
                return jnp.asarray(w)
            return mean + (_numerics.widened(w) - mean) / (n + 1).astype(mean.real.dtype)

        return jax.tree.map(leaf, average, iterate)

    return _iterates.remembering(optimizer, start, every, SWAState, empty, remember)


def swa_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    """The averaged parameters, out of the state of any optimizer that holds `swa`.

    For evaluation and checkpoints; training goes on from params.

        (1/n) sum_k w_k over the n averaged iterates;  params if n = 0

    Args:
      opt_state: the state of `swa`, alone or in that of a chain, MultiSteps,
        inject_hyperparams or any other wrapper.
      params: the current parameters.

    Returns:
      A tree with the structure, shapes and dtypes of params: the average, or
      params themselves before the first iterate is averaged. The average in full
      precision is the field `average` of `SWAState`.

    Raises:
      ValueError: if opt_state does not hold exactly one `SWAState`, or params
        have another structure.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sam_optax import averaging
      >>> tx = optax.MultiSteps(averaging.swa(optax.sgd(0.5), start=0), 2)
      >>> w = jnp.array(1.0)
      >>> state = tx.init(w)
      >>> print(averaging.swa_params(state, w))
      1.0
      >>> for _ in range(4):  # two steps, to 1/2 and 1/4
      ...     updates, state = tx.update(w, state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> print(averaging.swa_params(state, w))
      0.375

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018.
    """
    n, average = _iterates.read(opt_state, SWAState, "swa")

    def leaf(mean: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.where(n > 0, mean.astype(jnp.result_type(w)), w)

    return _iterates.map_with_params(leaf, average, params)


def _dtype(w: Any) -> Any:
    """That of the average of w."""
    dtype = jnp.result_type(w)
    return _numerics.wide_dtype(dtype) if _numerics.is_perturbable(w) else dtype
