"""Weight averaging with Flax NNX modules."""

from collections.abc import Callable, Iterable
from typing import Any

from sam_optax.averaging import _batch_norm

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(
        "sam_optax.averaging.nnx needs Flax: pip install 'sam-optax[flax]'"
    ) from error

__all__ = ("update_batch_stats",)


def _call(model: Any, batch: Any) -> Any:
    return model(batch)


def update_batch_stats(
    model: Any,
    data: Iterable[Any],
    forward: Callable[[Any, Any], Any] = _call,
    *,
    progress: bool = False,
) -> None:
    r"""Measures the BatchNorm statistics of an NNX module anew, in one pass over a data set.

    For averaged weights (`sam_optax.averaging.swa_params`), snapshots, or any
    weights that the running statistics do not belong to. BatchNorm layers
    normalise by the batch meanwhile; all others, such as dropout, behave as in
    evaluation.

        stat = sum_b n_b stat_b / sum_b n_b,   n_b the examples of batch b

    Args:
      model: the module, whose BatchNorm statistics change in place. Its mode
        (train or eval), random streams and all other state stay as they are.
      data: the training data: an iterable of batches, or one batch as an array,
        tuple or dict. A batch is a pytree of arrays with the examples on axis 0.
        Read once; a generator will do.
      forward: forward(model, batch) runs the network; model(batch) by default,
        so batches (x, y) need lambda model, batch: model(batch[0]).
        If your layers take use_running_average in the call, let it be False.
      progress: whether to show a progress bar (needs tqdm).

    Returns:
      None.

    Raises:
      ValueError: if the module has no BatchNorm layer or none is run, if
        forward takes an array where batches are tuples, or if data hold no
        batch.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import sam_optax.averaging.nnx
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> model.eval()
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[8.0]])]
      >>> sam_optax.averaging.nnx.update_batch_stats(model, batches)
      >>> print(model.mean[...], model.var[...])  # (2 * 2 + 1 * 8)/3 and (2 * 1 + 1 * 0)/3
      [4.] [0.6666667]

      The averaged weights of an optimizer with `swa`, as a state for `nnx.update`:

      >>> import optax
      >>> from sam_optax import averaging
      >>> model = nnx.Sequential(nnx.Linear(1, 2, rngs=nnx.Rngs(0)), model)
      >>> optimizer = nnx.Optimizer(model, averaging.swa(optax.sgd(0.1), start=0), wrt=nnx.Param)
      >>> averaged = averaging.swa_params(optimizer.opt_state, nnx.state(model, nnx.Param))
      >>> nnx.update(model, averaged)

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018, section 3.2; the
      authors' code, which leaves dropout on.

    Note:
      The cost, and which variance this is: see
      `sam_optax.averaging.estimate_batch_stats`.
    """
    copy = nnx.merge(*nnx.split(model))  # shares the arrays, not the modes
    copy.eval()
    layers = [module for _, module in nnx.iter_modules(copy) if isinstance(module, nnx.BatchNorm)]
    if not layers:
        raise ValueError(f"model must hold a BatchNorm layer, got none in {type(model).__name__}")
    for layer in layers:
        layer.use_running_average = False
        layer.momentum = 0.0  # the batch statistic itself
    graph, stats, rest = nnx.split(copy, nnx.BatchStat, ...)

    def run(rest: Any, stats: Any, batch: Any) -> Any:
        module = nnx.merge(graph, stats, rest)
        forward(module, batch)
        return nnx.state(module, nnx.BatchStat)

    unpacked = "forward", "forward=lambda model, batch: model(batch{})"
    nnx.update(model, _batch_norm.measured(run, rest, stats, data, progress, unpacked))
