"""Flax linen and Flax NNX models in jit-compiled training steps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import sam_optax
import sam_optax.nnx

RHO = 0.3
X = jax.random.normal(jax.random.key(0), (16, 6))
Y = jnp.sin(3 * X[:, 0])


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def perturbed(params, grads):
    norm = optax.tree.norm(grads)
    return jax.tree.map(lambda w, g: w + RHO * g / norm, params, grads)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(0.5, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(1)(x)[:, 0]


class State(TrainState):
    batch_stats: dict


MODEL = Linen()
VARIABLES = MODEL.init(jax.random.key(1), X, train=False)


def linen_loss(params, batch_stats, x, y, key):
    out, changes = MODEL.apply(
        {"params": params, "batch_stats": batch_stats},
        x,
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    return jnp.mean((out - y) ** 2), changes["batch_stats"]


@pytest.mark.parametrize("aux_from", ["clean", "perturbed"])
def test_linen_with_stock_train_state_batch_norm_and_dropout(aux_from):
    """Statistics from the pass asked for; both passes share one mask, or gradients would differ."""
    sharp = sam_optax.value_and_grad(
        linen_loss, sam_optax.sam(RHO), has_aux=True, aux_from=aux_from
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, key):
        (loss, stats), grads = sharp(state.params, state.batch_stats, X, Y, key)
        return state.apply_gradients(grads=grads, batch_stats=stats), loss

    state = State.create(
        apply_fn=MODEL.apply,
        params=jax.tree.map(jnp.copy, VARIABLES["params"]),
        batch_stats=jax.tree.map(jnp.copy, VARIABLES["batch_stats"]),
        tx=optax.sgd(0.1, momentum=0.9),
    ).replace(step=jnp.zeros([], jnp.int32))  # a Python 0 would compile twice
    params, stats, velocity = VARIABLES["params"], VARIABLES["batch_stats"], None
    for i in range(3):
        key = jax.random.key(i)
        state, loss = step(state, key)
        reference = functools.partial(jax.value_and_grad(linen_loss, has_aux=True))
        (clean_loss, clean_stats), g = reference(params, stats, X, Y, key)
        (_, perturbed_stats), g_s = reference(perturbed(params, g), stats, X, Y, key)
        velocity = g_s if velocity is None else optax.tree.add(optax.tree.scale(0.9, velocity), g_s)
        params = jax.tree.map(lambda w, v: w - 0.1 * v, params, velocity)
        stats = clean_stats if aux_from == "clean" else perturbed_stats
        assert_close((state.params, state.batch_stats, loss), (params, stats, clean_loss))
    assert step._cache_size() == 1


def test_linen_microbatches_average_the_statistics():
    sharp = sam_optax.value_and_grad(
        linen_loss, sam_optax.sam(RHO), has_aux=True, microbatch_size=8, batch_argnums=(2, 3)
    )
    key = jax.random.key(5)
    params, stats = VARIABLES["params"], VARIABLES["batch_stats"]
    (loss, new_stats), grads = jax.jit(sharp)(params, stats, X, Y, key)
    whole = sam_optax.value_and_grad(linen_loss, sam_optax.sam(RHO), has_aux=True)
    halves = [
        whole(params, stats, X[s], Y[s], jax.random.fold_in(key, i))
        for i, s in enumerate((slice(0, 8), slice(8, 16)))
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    assert_close(((loss, new_stats), grads), mean)


class Module(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))[:, 0]


def nnx_loss(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def pure(tree):
    """Values of an NNX state, keys of random streams as their data."""

    def value(x):
        x = x[...] if isinstance(x, nnx.Variable) else x
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(value, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


@pytest.mark.parametrize("jit", [True, False])
def test_nnx_follows_the_equation_and_advances_once(jit):
    model, reference = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    plain = nnx.Optimizer(reference, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)

    def step(model, optimizer):
        loss, grads = sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam(RHO))(model, X, Y)
        optimizer.update(model, grads)
        return loss

    step = nnx.jit(step) if jit else step
    for _ in range(3):
        loss = step(model, optimizer)
        # By hand: two copies of the module, as it was, one moved by e.
        moved = nnx.clone(reference)
        clean_loss, g = nnx.value_and_grad(nnx_loss)(reference, X, Y)
        nnx.update(moved, perturbed(nnx.state(reference, nnx.Param), g))
        plain.update(reference, nnx.grad(nnx_loss)(moved, X, Y))
        assert_close(loss, clean_loss)
        assert_close(pure(nnx.state(model)), pure(nnx.state(reference)))


def test_nnx_options_aux_microbatches_and_perturbed_statistics():
    def loss_with_aux(model, x, y):
        return nnx_loss(model, x, y), {"mean": jnp.mean(x)}

    model = Module(nnx.Rngs(0))
    before = pure(nnx.state(model))
    sharp = sam_optax.nnx.value_and_grad(
        loss_with_aux, sam_optax.sam(RHO), has_aux=True, microbatch_size=8
    )
    (_, aux), grads = nnx.jit(lambda model: sharp(model, X, Y))(model)
    np.testing.assert_allclose(aux["mean"], jnp.mean(X), rtol=1e-5)
    assert jax.tree.structure(pure(grads)) == jax.tree.structure(pure(nnx.state(model, nnx.Param)))
    after = pure(nnx.state(model))
    expected = 0.1 * np.mean(
        [pure_mean(Module(nnx.Rngs(0)), X[:8]), pure_mean(Module(nnx.Rngs(0)), X[8:])], axis=0
    )
    np.testing.assert_allclose(after["norm"]["mean"], expected, rtol=1e-4, atol=1e-6)
    assert after["dropout"]["rngs"]["count"] == before["dropout"]["rngs"]["count"] + 1

    clean, other = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam(RHO))(clean, X, Y)
    sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam(RHO), aux_from="perturbed")(other, X, Y)
    assert np.abs(clean.norm.mean[...] - other.norm.mean[...]).max() > 1e-4


def pure_mean(model, x):
    return np.asarray(jnp.mean(model.first(x), axis=0))


def test_nnx_optimizer_in_the_optax_door():
    """A stock nnx.Optimizer hands grad_fn on to the chain."""
    model, other = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    for module in (model, other):
        module.eval()  # no state moves
    tx = optax.chain(sam_optax.sam(RHO), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, _, rest = nnx.split(model, nnx.Param, ...)

    def grad_fn(params):
        return jax.grad(lambda params: nnx_loss(nnx.merge(graph, params, rest), X, Y))(params)

    optimizer.update(model, nnx.grad(nnx_loss)(model, X, Y), grad_fn=grad_fn)
    plain = nnx.Optimizer(other, optax.sgd(0.1), wrt=nnx.Param)
    _, grads = sam_optax.nnx.value_and_grad(nnx_loss, sam_optax.sam(RHO))(other, X, Y)
    plain.update(other, grads)
    assert_close(pure(nnx.state(model)), pure(nnx.state(other)))
