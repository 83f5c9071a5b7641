"""Fast geometric ensembling: snapshots of the iterates, and averaged predictions."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_optax import _checks, _numerics
from sam_optax.averaging import _iterates


class SnapshotsState(NamedTuple):
    """State of `snapshots`.

    Attributes:
      count: number of steps taken, int32.
      n: number of snapshots taken, int32; the last `size` of them are held.
      stack: params with a leading axis of `size`; snapshot i is in slot i % size.
      inner: state of the optimizer.
    """

    count: jax.Array
    n: jax.Array
    stack: optax.Params
    inner: optax.OptState


def snapshots(
    optimizer: optax.GradientTransformation, size: int, start: int, every: int = 1
) -> optax.GradientTransformationExtraArgs:
    r"""Fast geometric ensembling (FGE): keeps the iterates at the minima of the learning rate.

    Each cycle of `triangular_schedule` ends up in another network nearly as
    good as the last; an ensemble of them costs the training of one. Prefer
    `swa` where predictions must cost no more than those of one network.

        after step k = start, start + every, ...:  stack[n mod size] <- w_k,  n <- n + 1

    Args:
      optimizer: any transformation whose updates are added to params as they
        are: nothing that changes them may stand after snapshots. Extra
        arguments (grad_fn, value, ...) pass to it.
      size: number of snapshots held, at least 1; a further one replaces the
        oldest.
      start: number of steps after which the first snapshot is taken, at least
        0: with `triangular_schedule`, its start + c/2. The parameters given to
        init are not an iterate, so 0 begins with step `every`.
      every: steps between two snapshots, at least 1: the length c of the cycle.

    Returns:
      The optimizer, with the same updates and a `SnapshotsState`. Read it by
      `snapshot_params`, and predict by `ensemble_predictions`.

    Raises:
      ValueError: if size or every is below 1 or start negative; at the call, if
        params are missing.

    Example:
      1000 steps as usual, then ten cycles of 100 steps with a snapshot in each:

      >>> import jax.numpy as jnp, optax, sam_optax
      >>> from sam_optax import averaging
      >>> schedule = averaging.triangular_schedule(0.05, 0.0005, c=100, start=1000)
      >>> tx = optax.chain(sam_optax.sam(0.05), optax.sgd(schedule, momentum=0.9))
      >>> tx = averaging.snapshots(tx, size=10, start=1000 + 50, every=100)

      The iterates of this optimizer are 1/2, 1/4, 1/8, 1/16:

      >>> tx = averaging.snapshots(optax.sgd(0.5), size=2, start=1)
      >>> w = jnp.array(1.0)
      >>> state = tx.init(w)
      >>> for _ in range(4):
      ...     updates, state = tx.update(w, state, w)  # the gradient of w^2/2 is w
      ...     w = optax.apply_updates(w, updates)
      >>> print(*averaging.snapshot_params(state, w))
      [0.125 0.0625] [0.5 0.5]

    References:
      Garipov et al., `Loss Surfaces, Mode Connectivity, and Fast Ensembling of
      DNNs <https://arxiv.org/abs/1802.10026>`_, 2018, section 4.

    Note:
      No gradient evaluation; `size` copies of the parameters in the state. Each
      member needs BatchNorm statistics of its own: those it was trained with,
      kept by the caller, or `estimate_batch_stats`.
    """
    _checks.integer_at_least("size", size, 1)

    def empty(params: optax.Params) -> optax.Params:
        # Made from the leaf, for its sharding.
        stacked = lambda w: jnp.broadcast_to(jnp.zeros_like(w), (size, *jnp.shape(w)))
        return jax.tree.map(stacked, params)

    def remember(stack: optax.Params, n: jax.Array, iterate: optax.Params) -> optax.Params:
        return jax.tree.map(lambda s, w: s.at[n % size].set(w), stack, iterate)

    return _iterates.remembering(optimizer, start, every, SnapshotsState, empty, remember)


def snapshot_params(
    opt_state: optax.OptState, params: optax.Params
) -> tuple[optax.Params, jax.Array]:
    """The snapshots, out of the state of any optimizer that holds `snapshots`.

    The shapes do not depend on how many were taken, so it works under jit; the
    weights tell the members from the slots that are still empty.

        weights = 1/n for the n members, 0 for the other slots

    Args:
      opt_state: the state of `snapshots`, alone or in that of a chain,
        MultiSteps, inject_hyperparams or any other wrapper.
      params: the current parameters. They fill empty slots, and are the only
        member before the first snapshot.

    Returns:
      The snapshots, a tree like params with a leading axis of `size`, oldest
      first, and their weights, float32 of shape (size,), for
      `ensemble_predictions`.

    Raises:
      ValueError: if opt_state does not hold exactly one `SnapshotsState`, or
        params have another structure.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from sam_optax import averaging
      >>> tx = averaging.snapshots(optax.sgd(0.5), size=3, start=0)
      >>> w = jnp.array(1.0)
      >>> updates, state = tx.update(w, tx.init(w), w)
      >>> print(*averaging.snapshot_params(state, w))
      [0.5 1.  1. ] [1. 0. 0.]

    References:
      Garipov et al., `Loss Surfaces, Mode Connectivity, and Fast Ensembling of
      DNNs <https://arxiv.org/abs/1802.10026>`_, 2018.
    """
    n, stack = _iterates.read(opt_state, SnapshotsState, "snapshots")
    size = len(stack[0])
    slots = jnp.arange(size)
    oldest = jnp.where(n > size, n % size, 0)

    def leaf(held: jax.Array, w: jax.Array) -> jax.Array:
        taken = (slots < n).reshape(size, *[1] * jnp.ndim(w))
        return jnp.where(taken, jnp.roll(held, -oldest, axis=0), w)

    member = slots < jnp.maximum(n, 1)
    weights = member / jnp.sum(member, dtype=jnp.float32)
    return _iterates.map_with_params(leaf, stack, params), weights


def ensemble_predictions(
    predict_fn: Callable[..., Any],
    stacked_params: optax.Params,
    *args: Any,
    weights: jax.typing.ArrayLike | None = None,
) -> Any:
    """The mean prediction of an ensemble, in the memory of one member.

    Give probabilities to be averaged, as FGE does, not logits.

        out = sum_k weights_k predict_fn(w_k, *args) / sum_k weights_k

    Args:
      predict_fn: predict_fn(params, *args) returns an array or a tree of arrays,
        for a classifier the probabilities. It is compiled once per function
        and shapes: define it once, not in the call.
      stacked_params: the members: a tree with a leading axis, such as
        `snapshot_params` returns. Any other tree that predict_fn takes will do,
        such as stacked Flax variables with batch statistics.
      *args: further arguments of predict_fn, alike for all members.
      weights: one per member, at least 0; a member of weight 0 may predict NaN.
        None weighs all alike.

    Returns:
      The mean, like one prediction but in float32 or wider.

    Raises:
      ValueError: if stacked_params have no common leading axis or weights do not
        have its length.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sam_optax import averaging
      >>> def predict_fn(w, x):
      ...     return jax.nn.sigmoid(w * x)
      >>> members, x = jnp.array([0.0, 50.0, 99.0]), jnp.array([-1.0, 1.0])
      >>> print(averaging.ensemble_predictions(predict_fn, members, x, weights=[1, 1, 0]))
      [0.25 0.75]

    References:
      Garipov et al., `Loss Surfaces, Mode Connectivity, and Fast Ensembling of
      DNNs <https://arxiv.org/abs/1802.10026>`_, 2018, section 4.

    Note:
      One forward pass per member, one after the other. The loop over members is
      in Python: under an outer jit it is written out.
    """
    sizes = {np.shape(x)[:1] for x in jax.tree.leaves(stacked_params)}
    if len(sizes) != 1 or sizes & {(), (0,)}:
        raise ValueError(
            f"stacked_params must share one leading axis of at least 1, got {sorted(sizes)} "
            "(stack a list of trees: jax.tree.map(lambda *w: jnp.stack(w), *members))"
        )
    ((size,),) = sizes
    weights = _numerics.widened(jnp.ones(size) if weights is None else weights)
    if weights.shape != (size,):
        raise ValueError(
            f"weights must have one entry per member, shape ({size},), got shape {weights.shape}"
        )
    weights = weights / jnp.sum(weights)
    total: Any = None
    for i in range(size):
        total = _with_member(predict_fn, total, weights, i, stacked_params, args)
    return total


@functools.partial(jax.jit, static_argnums=0)
def _with_member(
    predict_fn: Callable[..., Any], total: Any, weights: jax.Array, i: Any, stack: Any, args: Any
) -> Any:
    """The total, None before the first, plus the weighted prediction of member i."""
    prediction = predict_fn(jax.tree.map(lambda x: x[i], stack), *args)
    # Selected, because 0 times NaN is NaN.
    term = jax.tree.map(lambda p: jnp.where(weights[i] > 0, weights[i] * p, 0), prediction)
    return term if total is None else jax.tree.map(jnp.add, total, term)
