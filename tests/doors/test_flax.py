"""Flax linen models in jit-compiled training steps."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_close
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sam_optax

RHO = 0.3
X = jax.random.normal(jax.random.key(0), (16, 6))
Y = jnp.sin(3 * X[:, 0])


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
    assert step._cache_size() <= 1


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


def test_train_state_with_a_chain_that_has_memory():
    """apply_gradients has no grad_fn to hand on, so the step updates and replaces by hand."""
    tx = optax.chain(sam_optax.look_sam(RHO, k=2), optax.sgd(0.1, momentum=0.9))
    evaluate = sam_optax.value_and_grad_fn(linen_loss, has_aux=True)

    @jax.jit
    def step(state, x, y, key):
        out, grads, grad_fn = evaluate(state.params, state.batch_stats, x, y, key)
        loss, batch_stats = out
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, grad_fn=grad_fn)
        params = optax.apply_updates(state.params, updates)
        state = state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, batch_stats=batch_stats
        )
        return state, loss

    state = State.create(apply_fn=MODEL.apply, tx=tx, **VARIABLES)
    with pytest.raises(ValueError, match="grad_fn"):
        state.apply_gradients(grads=state.params, batch_stats=state.batch_stats)
    params, stats, g_v, velocity = *VARIABLES.values(), None, None
    for i in range(3):
        key = jax.random.key(i)
        state, loss = step(state, X, Y, key)
        # LookSAM by hand: the part of g_s that stands on g is kept for the step without one.
        value_and_grad = jax.value_and_grad(linen_loss, has_aux=True)
        (clean_loss, new_stats), g = value_and_grad(params, stats, X, Y, key)
        if i % 2 == 0:
            (_, _), direction = value_and_grad(perturbed(params, g), stats, X, Y, key)
            part = optax.tree.vdot(direction, g) / optax.tree.vdot(g, g)
            g_v = jax.tree.map(lambda g_s, g: g_s - part * g, direction, g)  # noqa: B023
        else:
            reuse = 0.7 * optax.tree.norm(g) / optax.tree.norm(g_v)
            direction = jax.tree.map(lambda g, v: g + reuse * v, g, g_v)  # noqa: B023
        old = velocity or jax.tree.map(jnp.zeros_like, g)
        velocity = jax.tree.map(lambda v, d: 0.9 * v + d, old, direction)
        params = jax.tree.map(lambda w, v: w - 0.1 * v, params, velocity)
        stats = new_stats
        assert_close(loss, clean_loss)
        assert_close((state.params, state.batch_stats), (params, stats), rtol=1e-4, atol=1e-5)
    assert state.step == 3


# float16 with Flax's DynamicScale.


class ScaledState(TrainState):
    dynamic_scale: DynamicScale


def half_loss(params, x, y, wall, dtype=jnp.float16):
    """Least squares, and a gradient of 40 in w[0] above a wall."""
    w, b, x, y, wall = jax.tree.map(
        lambda a: a.astype(dtype), (params["w"], params["b"], x, y, wall)
    )
    # Not 40 times a maximum: its gradient would be 0 times infinity below the wall.
    steep = jnp.where(w[0] > wall, 40 * (w[0] - wall), 0)
    return jnp.mean((x @ w + b - y) ** 2) + steep


def first_door_step(state, batch):
    scale = state.dynamic_scale.scale
    scaled = lambda params, *batch: scale * half_loss(params, *batch)
    loss, grads = sam_optax.value_and_grad(scaled, sam_optax.sam(RHO))(state.params, *batch)
    # DynamicScale judges and unscales what it differentiates: a function with this gradient.
    linear = lambda params: optax.tree.vdot(grads, params) / scale
    dynamic_scale, finite, _, grads = state.dynamic_scale.value_and_grad(linear)(state.params)
    new = state.apply_gradients(grads=grads)
    state = jax.tree.map(functools.partial(jnp.where, finite), new, state)
    return state.replace(dynamic_scale=dynamic_scale), loss / scale


def second_door_step(state, batch):
    evaluate = state.dynamic_scale.value_and_grad(lambda params: half_loss(params, *batch))
    _, _, loss, grads = evaluate(state.params)
    grad_fn = lambda params: evaluate(params).grad
    updates, opt_state = state.tx.update(grads, state.opt_state, state.params, grad_fn=grad_fn)
    # The updates have seen both passes. DynamicScale judges them as the gradient of a function.
    linear = lambda params: optax.tree.vdot(updates, params)
    dynamic_scale, finite, *_ = state.dynamic_scale.value_and_grad(linear)(state.params)
    params = optax.apply_updates(state.params, updates)
    new = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    state = jax.tree.map(functools.partial(jnp.where, finite), new, state)
    return state.replace(dynamic_scale=dynamic_scale), loss


SGD = optax.sgd(optax.linear_schedule(0.01, 0.005, 10), momentum=0.9)
CHAIN = optax.chain(sam_optax.sam(optax.constant_schedule(RHO)), SGD)


@pytest.mark.parametrize("where", ["clean", "perturbed"])
@pytest.mark.parametrize("step, tx", [(first_door_step, SGD), (second_door_step, CHAIN)])
def test_dynamic_scale_sees_both_passes(step, tx, where):
    """A step that overflows at w, or at w + e alone, changes nothing but the scale."""
    step = jax.jit(step)
    params = {"w": jnp.linspace(0.6, -0.2, 6), "b": jnp.float32(0.5)}
    scaler = DynamicScale(growth_interval=2, scale=jnp.float32(4096))
    state = ScaledState.create(apply_fn=half_loss, params=params, tx=tx, dynamic_scale=scaler)
    plain = functools.partial(half_loss, dtype=jnp.float32)
    velocity = jax.tree.map(jnp.zeros_like, params)
    for i in range(5):
        wall = jnp.float32(9)  # none
        if i == 2:
            g = jax.grad(plain)(params, X, Y, wall)
            e = perturbed(params, g)["w"][0] - params["w"][0]
            assert e > 0.02  # so that both passes are on sides of the wall that float16 tells apart
            wall = params["w"][0] + (e / 2 if where == "perturbed" else -0.1)
            scaled = lambda params: 4096 * half_loss(params, X, Y, wall)  # noqa: B023
            finite = [jnp.isfinite(g).all() for g in jax.tree.leaves(jax.grad(scaled)(params))]
            assert all(finite) == (where == "perturbed")
            for scale in (4096, 2048):  # 40 times these do not fit into float16
                assert state.dynamic_scale.scale == scale
                new, _ = step(state, (X, Y, wall))
                for name in ("step", "params", "opt_state"):
                    jax.tree.map(
                        np.testing.assert_array_equal, getattr(new, name), getattr(state, name)
                    )
                state = new
        state, loss = step(state, (X, Y, wall))
        assert state.step == i + 1  # not skipped
        clean, g = jax.value_and_grad(plain)(params, X, Y, wall)
        g_s = jax.grad(plain)(perturbed(params, g), X, Y, wall)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, g_s)
        rate = 0.01 - 0.0005 * i  # a schedule that counts the steps made
        params = jax.tree.map(lambda w, v: w - rate * v, params, velocity)  # noqa: B023
        assert_close((state.params, loss), (params, clean), rtol=1e-2, atol=2e-3)
    # Down twice; up with the third good step after it, as Flax counts an interval of 2.
    assert state.dynamic_scale.scale == 2048 and state.dynamic_scale.fin_steps == 0


# Statistics and logits in aux over devices, as in Flax's steps for images.


class Classifier(nn.Module):
    axis_name: str | None = None  # given, BatchNorm is synchronised

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, momentum=0.9, axis_name=self.axis_name)(x)
        return nn.Dense(10)(jnp.tanh(nn.Dense(16)(x)))


IMAGES = jax.random.normal(jax.random.key(2), (32, 6))
LABELS = jnp.argmax(IMAGES @ jax.random.normal(jax.random.key(3), (6, 10)), axis=1)
DEVICES = 4


def images_loss(params, batch_stats, batch, axis_name):
    variables = {"params": params, "batch_stats": batch_stats}
    logits, changes = Classifier(axis_name).apply(variables, batch["x"], mutable=["batch_stats"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return loss, (changes["batch_stats"], logits)


def hand_made_step(params, batch_stats, axis_name):
    """The losses of all devices as a function of all their parameters, by vmap over devices."""
    batch = {"x": IMAGES.reshape(DEVICES, 8, 6), "y": LABELS.reshape(DEVICES, 8)}

    def total(copies):
        of_device = lambda params, batch: images_loss(params, batch_stats, batch, axis_name)
        loss, aux = jax.vmap(of_device, axis_name="batch")(copies, batch)
        return jnp.sum(loss), aux

    copies = jax.tree.map(lambda w: jnp.stack([w] * DEVICES), params)
    g, (stats, logits) = jax.grad(total, has_aux=True)(copies)
    g_s, _ = jax.grad(total, has_aux=True)(jax.vmap(perturbed)(copies, g))
    g_s, stats = jax.tree.map(lambda x: jnp.mean(x, axis=0), (g_s, stats))
    params = jax.tree.map(lambda w, g: w - 0.5 * g, params, g_s)
    return params, stats, jnp.mean(jnp.argmax(logits, axis=-1) == batch["y"])


@pytest.mark.parametrize("axis_name", [None, "batch"])
@pytest.mark.parametrize("route", ["pmap", "shard_map", "shard_map unchecked"])
def test_training_accuracy_over_devices(route, axis_name):
    """The mean of the devices' logits belongs to no label: they stay each device's own."""
    loss_fn = functools.partial(images_loss, axis_name=axis_name)
    evaluate = sam_optax.value_and_grad(
        loss_fn, sam_optax.sam(RHO), has_aux=True, axis_name="batch", average_aux=(True, False)
    )

    def step(params, batch_stats, batch):
        out, grads = evaluate(params, batch_stats, batch)
        _, (batch_stats, logits) = out
        accuracy = jax.lax.pmean(jnp.mean(jnp.argmax(logits, -1) == batch["y"]), "batch")
        params = jax.tree.map(lambda w, g: w - 0.5 * g, params, grads)
        return params, batch_stats, accuracy

    batch = {"x": IMAGES, "y": LABELS}
    if route == "pmap":
        batch = jax.tree.map(lambda x: x.reshape(DEVICES, 8, *x.shape[1:]), batch)
        axes = {"in_axes": (None, None, 0), "out_axes": None}
        step = jax.pmap(step, "batch", devices=jax.devices()[:DEVICES], **axes)
    else:
        step = jax.shard_map(
            step,
            mesh=jax.make_mesh((DEVICES,), ("batch",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P(), P("batch")),
            out_specs=P(),
            check_vma=route == "shard_map",
        )
    step = jax.jit(step)
    variables = Classifier().init(jax.random.key(0), IMAGES)
    state = expected = variables["params"], variables["batch_stats"]
    for _ in range(3):
        *state, accuracy = step(*state, batch)
        *expected, right = hand_made_step(*expected, axis_name)
        assert_close((state, accuracy), (expected, right), rtol=1e-4, atol=1e-5)
    assert right > 0.25  # of ten labels; the logits' mean gets about 0.1
