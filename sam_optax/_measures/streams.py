"""Data sets: one batch or many, and means over them in constant memory.

A batch is a pytree of arrays with the examples on axis 0. A list, or any other
iterable that is not a pytree (a loader), holds batches; it is read again on
every pass, one batch at a time, and never gathered. Batches weigh as their
examples do, unless `weighted` says otherwise.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A data set whose batches weigh as a function of them says, from `weighted`."""

    data: Any
    weight: Callable[[Any], Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)


def weighted(data: Any, weight: Callable[[Any], Any]) -> Weighted:
    r"""Data whose batches are weighted by tokens, or by a mask, in every mean.

    For losses that are means over something else than examples. A loss that
    averages over tokens, or over what a mask leaves, is a mean over batches
    only if these are weighted by how many there were; plain data counts
    examples. Pass the result as data to any measure or landscape.

        mean = sum_b weight(b) L(w, b) / sum_b weight(b)

    Args:
      data: one batch or a re-iterable of batches, see `one_step`.
      weight: weight(batch) returns a number, at least 0: that of the entries
        over which loss_fn takes its mean. A batch of weight 0 is left out.

    Returns:
      A `Weighted`, in the place of data.

    Raises:
      ValueError: at the measure, if a weight is negative or not finite, or all
        are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from sam_optax import sharpness
      >>> def loss_fn(w, batch):
      ...     x, mask = batch
      ...     return jnp.sum(mask * (x * w) ** 2) / jnp.sum(mask)
      >>> short = jnp.array([[3.0, 9.0]]), jnp.array([[1.0, 0.0]])  # the 9 is padding
      >>> long = jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 1.0]])
      >>> data = sharpness.weighted([short, long], lambda batch: batch[1].sum())
      >>> print(round(sharpness.one_step(loss_fn, jnp.ones(()), data).loss, 4))  # (9 + 1 + 1) / 3
      3.6667

    References:
      None; a mean of means of unequal counts.
    """
    return Weighted(data, weight)


def weight_of(data: Any, batch: Any) -> float:
    """The weight of one batch of the data, or of a group of its examples."""
    if not isinstance(data, Weighted):
        return examples(batch)
    weight = float(data.weight(batch))
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"weight must return a finite number, at least 0, got {weight}")
    return weight


def batches(data: Any) -> Iterable[Any]:
    """The batches of a data set, to be iterated any number of times."""
    if isinstance(data, Weighted):
        return Weighted(batches(data.data), data.weight)
    if isinstance(data, list):
        dimensions = {np.ndim(batch) for batch in data if hasattr(batch, "shape")}
        if len(dimensions) > 1:
            raise ValueError(
                "data must be a list of batches that are alike, got arrays of "
                f"{sorted(dimensions)} dimensions (inputs and labels of one batch go into a "
                "tuple: (x, y), or [(x, y)])"
            )
        return data
    if not jax.tree_util.all_leaves([data]) or hasattr(data, "shape"):
        return [jax.device_put(data)]  # moved once, not once a pass
    if isinstance(data, Iterator):
        raise ValueError(
            "data must be iterable again and again, which an iterator or generator is not: "
            f"give a list of batches or a loader, got {data!r}"
        )
    if not isinstance(data, Iterable):
        raise ValueError(f"data must be a batch or an iterable of batches, got {data!r}")
    return data


def examples(batch: Any) -> int:
    """Number of examples in a batch: the size of axis 0, which its arrays share."""
    sizes = {np.shape(leaf)[0] for leaf in jax.tree.leaves(batch) if np.ndim(leaf) > 0}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            "data must have the same number of examples, at least 1, on axis 0 of every array "
            f"of a batch, got {sorted(sizes)} (batches go into a list, a batch into a tuple)"
        )
    return sizes.pop()


def mean(data: Iterable[Any], evaluate: Callable[[Any], Any]) -> tuple[Any, int]:
    """Mean of evaluate(batch), weighted by examples, and the number of examples.

    One batch gives its own value to the last bit. Each batch is waited for:
    memory must not grow because the host runs ahead of the device, and programs
    with collectives must not overlap, which can deadlock on CPU devices.
    """
    total, count, result = 0.0, 0, None
    for batch in data:
        count += examples(batch)
        weight = weight_of(data, batch)
        if not weight:  # nothing but padding, whose mean is 0 / 0
            continue
        total += weight
        value = jax.block_until_ready(evaluate(batch))
        if result is None:
            result = value
        else:
            blend = _blend_arrays if isinstance(value, np.ndarray) else _blend
            result = blend(result, value, weight / total)
    if result is None:
        raise ValueError(
            "data must hold at least one batch in every pass, of a weight above 0, got none of "
            f"{data!r}"
        )
    return result, count


def means(
    data: Iterable[Any],
    evaluations: int,
    evaluate: Callable[[int, Any], Any],
    tick: Callable[[], Any],
) -> tuple[np.ndarray, int]:
    """Means of many scalars evaluate(i, batch) in one pass over the data."""

    def all_of(batch: Any) -> np.ndarray:
        values = np.empty(evaluations)
        for i in range(evaluations):
            values[i] = jax.device_get(evaluate(i, batch))
            tick()
        return values

    return mean(data, all_of)


def groups(data: Iterable[Any], sizes: Iterable[int]) -> Iterator[tuple[int, int, Any, int]]:
    """For each size the consecutive groups of as many examples, across the borders of batches.

    Yields size, the group's index, the group and its number of examples; the
    last of a size is smaller where it does not divide the number of examples.
    One pass over the data for all sizes. Works on the host, so that any
    placement of the data will do.
    """
    kept: dict[int, Any] = dict.fromkeys(sizes)
    index = dict.fromkeys(kept, 0)
    for batch in data:
        batch = jax.tree.map(lambda x: np.asarray(x) if np.ndim(x) else x, batch)
        for size, rest in kept.items():
            own = batch if rest is None else _joined(rest, batch)
            count = examples(own)
            for start in range(0, count - size + 1, size):
                yield size, index[size], _part(own, start, start + size), size
                index[size] += 1
            left = count % size
            kept[size] = _part(own, count - left, count) if left else None
    for size, rest in kept.items():
        if rest is not None:
            yield size, index[size], rest, examples(rest)


@contextlib.contextmanager
def bar(progress: bool, total: int, label: str) -> Generator[Callable[[], Any]]:
    """A progress bar's tick, which does nothing unless progress."""
    if not progress:
        yield lambda: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    with tqdm(total=total, desc=label, leave=False) as shown:
        yield shown.update


def _joined(first: Any, second: Any) -> Any:
    return jax.tree.map(lambda a, b: np.concatenate([a, b]) if np.ndim(b) else b, first, second)


def _part(batch: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda x: x[start:stop] if np.ndim(x) else x, batch)


def _blend_arrays(old: Any, new: Any, share: float) -> Any:
    return jax.tree.map(lambda a, b: a * (1 - share) + b * share, old, new)


_blend = jax.jit(_blend_arrays)
