"""BatchNorm statistics of given weights: the mean over a data set.

The weights were averaged, so their statistics must be measured anew. BatchNorm
only ever shows a running average, new = m old + (1 - m) batch, with a momentum
m that each layer hides. From old = 0 the result is (1 - m) batch, to rounding;
and from one huge old value it is m times that value, which tells m.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam_optax._measures import streams

_HUGE = 2.0**126  # in float32, and no batch statistic is seen beside it in float64


def estimate_batch_stats(
    apply_fn: Callable[[Any, Any], tuple[Any, Mapping[str, Any]]],
    variables: Mapping[str, Any],
    data: Iterable[Any],
    *,
    progress: bool = False,
) -> Any:
    r"""BatchNorm statistics of a Flax linen network, measured in one pass over a data set.

    For averaged weights (`swa_params`), snapshots, or any weights that the
    running statistics do not belong to: those of the training are useless for
    an average. NNX modules: `sam_optax.averaging.nnx.update_batch_stats`.

        stat = sum_b n_b stat_b / sum_b n_b,   n_b the examples of batch b

    Args:
      apply_fn: apply_fn(variables, batch) runs the network in training mode and
        returns (anything, changes) as Flax does with mutable=["batch_stats"]. It
        gets the whole batch: of (x, y) it takes batch[0]. Dropout is as you set
        it there.
      variables: the collections of the network, "params" with the weights and
        "batch_stats" with values of any finite size, which do not matter.
      data: the training data: an iterable of batches, or one batch as an array,
        tuple or dict. A batch is a pytree of arrays with the examples on axis 0.
        Read once; a generator will do.
      progress: whether to show a progress bar (needs tqdm).

    Returns:
      The statistics, with structure, shapes and dtypes of
      variables["batch_stats"]. A statistic that a batch does not move (momentum
      1, a layer that is frozen) keeps its value.

    Raises:
      ValueError: if variables lack batch_stats, if no statistic moves (the
        network runs in evaluation mode) or one is no running mean, if apply_fn
        returns no changes or takes an array where batches are tuples, or if
        data hold no batch.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from sam_optax import averaging
      >>> model = nn.BatchNorm(use_running_average=False, momentum=0.99)
      >>> batches = [jnp.array([[1.0], [3.0]]), jnp.array([[8.0]])]
      >>> variables = model.init(jax.random.key(0), batches[0])
      >>> apply_fn = lambda variables, x: model.apply(variables, x, mutable=["batch_stats"])
      >>> stats = averaging.estimate_batch_stats(apply_fn, variables, batches)
      >>> print(stats["mean"], stats["var"])  # (2 * 2 + 1 * 8)/3 and (2 * 1 + 1 * 0)/3
      [4.] [0.6666667]

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better
      Generalization <https://arxiv.org/abs/1803.05407>`_, 2018, section 3.2; the
      authors' code.

    Note:
      One forward pass over the data, in the memory of a batch, the first batch
      once more. As in the authors' code a layer's variance is the mean of the
      variances within batches, which leaves out the variance between their
      means: use shuffled batches as large as those of the training, of which
      it then is the expectation. Flax divides by n where PyTorch divides by n - 1.
      Without jax_enable_x64 the momentum is read from float32, which for momenta of
      up to seven digits costs no accuracy; for others the relative error is up to
      3e-8/(1 - m).
      `SpectralNorm` keeps no running mean in batch_stats and is not covered.
    """
    if "batch_stats" not in variables:
        raise ValueError(
            f"variables must hold the collection 'batch_stats', got {sorted(variables)}"
        )
    rest = {name: value for name, value in variables.items() if name != "batch_stats"}

    def run(rest: Any, stats: Any, batch: Any) -> Any:
        result: Any = apply_fn({**rest, "batch_stats": stats}, batch)
        changes = result[1] if isinstance(result, tuple) and len(result) == 2 else None
        if not isinstance(changes, Mapping) or "batch_stats" not in changes:
            raise ValueError(
                "apply_fn must return (anything, changes) with changes['batch_stats'], as "
                "model.apply(variables, x, mutable=['batch_stats']) does, "
                f"got {jax.tree.map(jnp.shape, result)} for shapes"
            )
        return changes["batch_stats"]

    unpacked = "apply_fn", "lambda variables, batch: model.apply(variables, batch{}, ...)"
    return measured(run, rest, variables["batch_stats"], data, progress, unpacked)


def measured(
    run: Callable[[Any, Any, Any], Any],
    rest: Any,
    stats: Any,
    data: Any,
    progress: bool,
    unpacked: tuple[str, str],
) -> Any:
    """Mean over the data of the batch statistics behind run(rest, stats, batch) -> new stats.

    unpacked: the argument behind run, and how to write one that takes a part of the batch.
    """
    leaves, treedef = jax.tree.flatten(stats)
    # As wide as there is: narrower ones would hide the momentum.
    wide = [jnp.asarray(x, float) for x in leaves]

    @jax.jit
    def run_from(rest: Any, stats: list[jax.Array], batch: Any) -> list[jax.Array]:
        return jax.tree.leaves(run(rest, jax.tree.unflatten(treedef, stats), batch))

    zeros = [jnp.zeros_like(x) for x in wide]
    batches = data if isinstance(data, Iterator) else streams.batches(data)
    shares: list[np.ndarray] = []
    total: Any = len(batches) if isinstance(batches, Sized) else None  # None: unknown
    with streams.bar(progress, total, "batch statistics") as tick:

        def evaluate(batch: Any) -> list[jax.Array]:
            if not shares:
                try:
                    moved = run_from(rest, [jnp.full_like(x, _HUGE) for x in wide], batch)
                except Exception as error:
                    _explain(error, functools.partial(run_from, rest, wide), batch, unpacked)
                    raise
                shares.extend(map(_share, moved))
                if not any(share.any() for share in shares):
                    raise ValueError(
                        "the network must run in training mode, so that its batch statistics "
                        "move, got none that does"
                    )
            tick()
            return run_from(rest, zeros, batch)

        means, _ = streams.mean(batches, evaluate)
    new = [
        jnp.where(share > 0, mean / np.where(share > 0, share, 1), old).astype(leaf.dtype)
        for mean, share, old, leaf in zip(means, shares, wide, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, new)


def _explain(
    error: Exception, run: Callable[[Any], Any], batch: Any, unpacked: tuple[str, str]
) -> None:
    """Raises what to change, if run fails with a batch because it takes one array of it alone."""
    parts = jax.tree_util.tree_leaves_with_path(batch)
    for path, part in parts if not jax.tree_util.all_leaves([batch]) else []:
        try:
            jax.eval_shape(run, part)
        except Exception:  # whatever the network raises: this part is not what it takes
            continue
        name, example = unpacked
        raise ValueError(
            f"{name} must take a whole batch, got one that fails with shapes "
            f"{jax.tree.map(np.shape, batch)} ({type(error).__name__}) and works with one array of "
            f"them: unpack the batch, {example.format(jax.tree_util.keystr(path))}, or give data "
            "of that array alone"
        ) from error


def _share(new: jax.Array) -> np.ndarray:
    """1 - m, the share of a batch in new = m huge + (1 - m) batch.

    The shortest decimal that rounds to m is what the layer was built with:
    1 - 0.99 in float32 is off by 2e-6 of itself. A layer may take the product in
    float32 and the sum in float64, so it is the value that tells the precision.
    """
    momentum = np.asarray(new, np.float64) / _HUGE
    narrow = momentum.astype(np.float32)
    momentum = np.where(narrow == momentum, narrow.astype(str), momentum.astype(str))
    momentum = momentum.astype(np.float64)
    if not ((momentum >= -1e-9) & (momentum <= 1)).all():
        raise ValueError(
            "batch statistics must be running means with a momentum in [0, 1], "
            f"got a momentum of {momentum}"
        )
    return 1 - momentum
