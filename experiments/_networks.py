"""Training of many small networks at once: seeds and settings of a method share one program."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _splits import Examples

import sam_optax

LANES = 4  # networks side by side under vmap: on two cores 0.6 to 0.8 of the time of one by one
MOMENTUM = 0.9  # Nesterov; multiplies the effective learning rate by 10
WARMUP = 0.05  # fraction of the steps with a rising learning rate; cosine to 0 after it

Hyper = dict[str, Any]  # hyper-parameters by name: traced, so other values compile nothing


def no_ascent(hyper: Hyper) -> optax.GradientTransformation:
    return optax.identity()


def sam(hyper: Hyper) -> optax.GradientTransformation:
    return sam_optax.sam(hyper["rho"])


def asam(hyper: Hyper) -> optax.GradientTransformation:
    """T = |w| + eta on all leaves, biases included; its rho is near ten times that of SAM."""
    return sam_optax.asam(hyper["rho"], hyper.get("eta", 0.01), normalize_bias=True)


def decayed_sgd(schedule: optax.ScalarOrSchedule, weight_decay: Any) -> Any:
    """SGD with momentum; L2 on kernels, added after the sharpness-aware gradient."""
    kernels = functools.partial(jax.tree.map, lambda w: w.ndim > 1)
    return optax.chain(
        optax.add_decayed_weights(weight_decay, kernels),
        optax.sgd(schedule, MOMENTUM, nesterov=True),
    )


def cosine_sgd(hyper: Hyper, epochs: int, per_epoch: int) -> optax.GradientTransformation:
    steps = epochs * per_epoch
    shape = optax.warmup_cosine_decay_schedule(0, 1, int(WARMUP * steps), steps)
    return decayed_sgd(lambda count: hyper["lr"] * shape(count), hyper["weight_decay"])


class Networks(NamedTuple):
    """LANES networks: the first axis of all leaves."""

    params: Any
    state: Any  # of the optimizer


def last(networks: Networks) -> Any:
    return networks.params


class Recipe(NamedTuple):
    """What a program is compiled for; hyper-parameters are not in it."""

    method: Callable[[Hyper], optax.GradientTransformation] = no_ascent
    widths: tuple[int, ...] = (256, 256)  # of the hidden layers
    epochs: int = 40
    batch: int = 100  # examples a step
    microbatch: int | None = None  # examples that share a perturbation; None: the batch
    optimizer: Callable[[Hyper, int, int], optax.GradientTransformation] = cosine_sgd
    solution: Callable[[Networks], Any] = last  # the parameters that are evaluated


class MLP(nn.Module):
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


def loss(widths: tuple[int, ...], params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    logits = MLP(widths).apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def padded(values: Sequence[Any]) -> jax.Array:
    """As an array over lanes; the last value fills those left."""
    return jnp.asarray(np.array([*values, *[values[-1]] * (LANES - len(values))]))


@functools.partial(jax.jit, static_argnames="widths")
def initial(widths: tuple[int, ...], seed: int, x: jax.Array) -> Any:
    return MLP(widths).init(jax.random.key(seed), x)


def stacked(trees: Sequence[Any]) -> Any:
    """Trees along the axis of lanes; the last fills those left."""
    return jax.tree.map(lambda *leaves: padded(leaves), *trees)


def _optimizer(recipe: Recipe, hyper: Hyper, examples: int) -> optax.GradientTransformation:
    return recipe.optimizer(hyper, recipe.epochs, examples // recipe.batch)


@functools.partial(jax.jit, static_argnames="recipe")
def _epoch(recipe: Recipe, hyper: Hyper, orders: jax.Array, networks: Networks, data: Examples):
    x, y = data

    def one(hyper: Hyper, order: jax.Array, network: Networks) -> Networks:
        tx = _optimizer(recipe, hyper, len(x))
        gradient = sam_optax.grad(
            functools.partial(loss, recipe.widths),
            recipe.method(hyper),
            microbatch_size=recipe.microbatch,
        )

        def step(network: Networks, rows: jax.Array) -> tuple[Networks, None]:
            grads = gradient(network.params, x[rows], y[rows])
            updates, state = tx.update(grads, network.state, network.params)
            return Networks(optax.apply_updates(network.params, updates), state), None

        return jax.lax.scan(step, network, order)[0]

    return jax.vmap(one)(hyper, orders, networks)


def _orders(recipe: Recipe, seeds: Sequence[int], epoch: int, examples: int) -> jax.Array:
    """(LANES, steps, batch) examples of an epoch; by NumPy, as JAX takes a second to compile it."""
    steps = examples // recipe.batch
    orders = [np.random.default_rng((seed, epoch)).permutation(examples) for seed in seeds]
    return padded([o[: steps * recipe.batch].reshape(steps, recipe.batch) for o in orders])


def fit(
    recipe: Recipe,
    settings: Sequence[dict[str, float]],
    seeds: Sequence[int],
    data: Examples,
    params: Any = None,
) -> Iterator[Networks]:
    """Yields the networks after every epoch, one for each setting and seed.

    A seed draws the initial weights, unless params (with the axis of lanes) are given, and the
    order of the examples.
    """
    hyper = {
        name: padded([np.float32(setting[name]) for setting in settings]) for name in settings[0]
    }
    if params is None:
        params = stacked([initial(recipe.widths, seed, data[0][:1]) for seed in seeds])
    init = lambda hyper, params: _optimizer(recipe, hyper, len(data[0])).init(params)
    networks = Networks(params, jax.vmap(init)(hyper, params))
    for epoch in range(recipe.epochs):
        orders = _orders(recipe, seeds, epoch, len(data[0]))
        networks = _epoch(recipe, hyper, orders, networks, data)
        yield networks


@functools.partial(jax.jit, static_argnames="widths")
def evaluate(widths: tuple[int, ...], params: Any, examples: Examples) -> dict[str, jax.Array]:
    """Error in % and loss of every network."""
    x, y = examples

    def one(params: Any) -> dict[str, jax.Array]:
        logits = MLP(widths).apply(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return {"error": 100 * (logits.argmax(-1) != y).mean(), "loss": losses.mean()}

    return jax.vmap(one)(params)


def lane(networks: Any, index: int) -> Any:
    """One network of several."""
    return jax.tree.map(lambda a: a[index], networks)
