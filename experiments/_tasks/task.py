"""What a task is: how parameters start, what the network says, the examples."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Examples = tuple[Any, Any]  # inputs and labels, the first axis of both that of examples
Hyper = dict[str, jax.Array]  # hyper-parameters by name: traced, so other values compile nothing


class Split(NamedTuple):
    """Three disjoint sets of examples; hyper-parameters are chosen by those of validation."""

    train: Examples
    validation: Examples
    test: Examples


class LogUniform(NamedTuple):
    """A hyper-parameter drawn with a uniform logarithm."""

    low: float
    high: float

    def at(self, u: float) -> float:
        return float(self.low * (self.high / self.low) ** u)


class Choice(NamedTuple):
    """A hyper-parameter drawn from a few values."""

    values: tuple[float, ...]

    def at(self, u: float) -> float:
        return float(self.values[int(u * len(self.values))])


Range = LogUniform | Choice

RHO = LogUniform(0.02, 0.5)  # of SAM, unless a task says otherwise
SEARCHED = {  # by the optimizer, unless a task says otherwise
    "sgd": {"lr": LogUniform(0.01, 0.5), "weight_decay": LogUniform(0.0005, 0.1)},
    "adamw": {"lr": LogUniform(0.001, 0.01), "weight_decay": LogUniform(0.05, 5.0)},
}


def smoothed_cross_entropy(logits: jax.Array, y: jax.Array, hyper: Hyper) -> jax.Array:
    """Of each example; with label smoothing if hyper names it."""
    labels = jax.nn.one_hot(y, logits.shape[-1])
    return optax.softmax_cross_entropy(
        logits, optax.smooth_labels(labels, hyper.get("smoothing", 0.0))
    )


def wrong(logits: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.asarray(logits.argmax(-1) != y, jnp.float32)


@dataclasses.dataclass(frozen=True, eq=False)  # known by identity: programs are kept for a task
class Task:
    """All that a comparison of methods needs to know.

    Attributes:
      name: part of the key under which runs are kept: another name for another network or data.
      init: key -> (parameters, other state of the network such as BatchNorm's, or {}).
      apply: (parameters, state, x, key, hyper) -> (outputs, state). key is None when the network
        is evaluated; while it trains, dropout draws from it and statistics move.
      data: number of a split -> Split. All splits should have one validation set, and none of its
        examples in any test set: then nothing that is reported was seen by the search.
      gradients: gradient evaluations of a training of length 1, for every method.
      batch: examples of a step.
      optimizer: "sgd" (momentum 0.9, Nesterov, L2 on kernels) or "adamw".
      ranges: of the hyper-parameters that all methods share, as (name, range): what loss and apply
        look up in hyper, such as smoothing or dropout; lr and weight_decay, where those of SEARCHED
        do not suit.
      rho: range of SAM's radius. ASAM's is 10 times, momentum_sam's 5 times that.
      own: ranges that a method has instead of these, as (name of the method, ((name, range), ...)).
      loss: (outputs, y, hyper) -> loss of every example, for training.
      error: (outputs, y) -> error of every example, 0 to 1.
      chunk: steps in one compiled program. 1 for convolutions: in a loop within a program they
        are many times slower on a CPU.
      seconds: of a training of length 1 by the base optimizer, for the estimate of time left.
    """

    name: str
    init: Callable[[jax.Array], tuple[Any, Any]]
    apply: Callable[..., tuple[jax.Array, Any]]
    data: Callable[[int], Split]
    gradients: int = 400
    batch: int = 100
    optimizer: str = "adamw"
    ranges: tuple[tuple[str, Range], ...] = ()
    rho: Range = RHO
    own: tuple[tuple[str, tuple[tuple[str, Range], ...]], ...] = ()
    loss: Callable[..., jax.Array] = smoothed_cross_entropy
    error: Callable[..., jax.Array] = wrong
    chunk: int = 10
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.optimizer not in SEARCHED:
            raise ValueError(f"optimizer must be among {[*SEARCHED]}, got {self.optimizer!r}")
        for name in ("gradients", "batch", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def searched(self) -> dict[str, Range]:
        """All hyper-parameters that methods share."""
        return SEARCHED[self.optimizer] | dict(self.ranges)


def wrong_labels(split: Split, share: float, seed: int) -> Split:
    """Exactly a share of the training labels replaced, each by another class."""
    if not 0 <= share < 1:
        raise ValueError(f"share must be at least 0 and below 1, got {share}")
    x, y = split.train
    y = np.array(y)
    if not (y.ndim == 1 and np.issubdtype(y.dtype, np.integer)):
        raise ValueError(f"wrong labels need one integer label an example, got {y.dtype} {y.shape}")
    rng, classes = np.random.default_rng(seed), np.unique(y)
    rows = rng.permutation(len(y))[: round(share * len(y))]
    index = np.searchsorted(classes, y[rows]) + rng.integers(1, len(classes), len(rows))
    y[rows] = classes[index % len(classes)]
    return split._replace(train=(x, y))


# Networks of three libraries, as (init, apply) --------------------------------


def linen(module: Any, x: Any, traced: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """Of a Linen module that is called as module(x, train=...).

    Args:
      module: may have collections beside its parameters, such as batch_stats, and draw "dropout".
      x: inputs of the right shape.
      traced: hyper-parameters that the call takes by name, too, such as a dropout rate.
    """

    def init(key: jax.Array) -> tuple[Any, Any]:
        variables = dict(module.init(key, x, train=False, **dict.fromkeys(traced, 0.0)))
        return variables.pop("params"), variables

    def apply(params: Any, state: Any, x: Any, key: Any, hyper: Hyper) -> tuple[Any, Any]:
        train, named = key is not None, {name: hyper[name] for name in traced}
        outputs, moved = module.apply(
            {"params": params, **state}, x, train=train, mutable=list(state) if train else [],
            rngs={"dropout": key} if train else {}, **named,
        )  # fmt: skip
        return outputs, dict(moved) if train else state

    return jax.jit(init), apply


def nnx(make: Callable[[Any], Any]) -> tuple[Any, Any]:
    """Of make(rngs), an NNX module that is called as module(x); dropout and BatchNorm in it."""
    from flax import nnx as flax_nnx

    graph, _, streams, _ = flax_nnx.split(
        make(flax_nnx.Rngs(0)), flax_nnx.Param, flax_nnx.RngState, ...
    )

    def init(key: jax.Array) -> tuple[Any, Any]:
        parts = flax_nnx.split(make(flax_nnx.Rngs(key)), flax_nnx.Param, flax_nnx.RngState, ...)
        return parts[1], parts[3]

    def apply(params: Any, state: Any, x: Any, key: Any, hyper: Hyper) -> tuple[Any, Any]:
        del hyper
        module = flax_nnx.merge(graph, params, streams, state, copy=True)  # moves in place
        if key is None:
            module.eval()
        else:
            module.train()
            flax_nnx.reseed(module, default=key, dropout=key)
        outputs = module(x)
        moved = flax_nnx.state(
            module, flax_nnx.Not(flax_nnx.Any(flax_nnx.Param, flax_nnx.RngState))
        )
        return outputs, moved if key is not None else state

    return init, apply


def equinox(make: Callable[[jax.Array], Any]) -> tuple[Any, Any]:
    """Of make(key), an Equinox module that is called on one example as module(x, key=...)."""
    import equinox as eqx

    static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)[1]

    def init(key: jax.Array) -> tuple[Any, Any]:
        return eqx.filter(make(key), eqx.is_inexact_array), {}

    def apply(params: Any, state: Any, x: Any, key: Any, hyper: Hyper) -> tuple[Any, Any]:
        del hyper
        module = eqx.nn.inference_mode(eqx.combine(params, static), key is None)
        if key is None:
            return jax.vmap(module)(x), state
        keys = jax.random.split(key, len(x))
        return jax.vmap(lambda x, key: module(x, key=key))(x, keys), state

    return init, apply
