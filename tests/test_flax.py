"""Flax linen models in jit-compiled training steps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import sam_optax

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
