"""Data sets: one batch or many, and means over them in constant memory.

A batch is a pytree of arrays with the examples on axis 0. A list, or any other
iterable that is not a pytree (a loader), holds batches; it is read again on
every pass, one batch at a time, and never gathered.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import jax
import numpy as np


def batches(data: Any) -> Iterable[Any]:
    """The batches of a data set, to be iterated any number of times."""
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
    total, result = 0, None
    for batch in data:
        count = examples(batch)
        total += count
        value = jax.block_until_ready(evaluate(batch))
        if result is None:
            result = value
        else:
            blend = _blend_arrays if isinstance(value, np.ndarray) else _blend
            result = blend(result, value, count / total)
    if result is None:
        raise ValueError(f"data must hold at least one batch in every pass, got none of {data!r}")
    return result, total


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


def groups(data: Iterable[Any], size: int) -> Iterator[tuple[Any, int]]:
    """Consecutive groups of `size` examples, across the borders of batches.

    The last group is smaller where `size` does not divide the number of
    examples. Works on the host, so that any placement of the data will do.
    """
    kept: Any = None
    for batch in data:
        batch = jax.tree.map(lambda x: np.asarray(x) if np.ndim(x) else x, batch)
        if kept is not None:
            batch = jax.tree.map(
                lambda a, b: np.concatenate([a, b]) if np.ndim(b) else b, kept, batch
            )
        count = examples(batch)
        for start in range(0, count - size + 1, size):
            yield _part(batch, start, start + size), size
        left = count % size
        kept = _part(batch, count - left, count) if left else None
    if kept is not None:
        yield kept, examples(kept)


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


def _part(batch: Any, start: int, stop: int) -> Any:
    return jax.tree.map(lambda x: x[start:stop] if np.ndim(x) else x, batch)


def _blend_arrays(old: Any, new: Any, share: float) -> Any:
    return jax.tree.map(lambda a, b: a * (1 - share) + b * share, old, new)


_blend = jax.jit(_blend_arrays)
