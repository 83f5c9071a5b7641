"""Every row of the pages "coming from": equal numbers with what the other library executes.

What it executes is written out here in NumPy, from its documentation and code; the gradient alone
is JAX's. `optax.contrib.sam` runs itself.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import PartitionSpec as P

import sam_optax

PAGES = Path(__file__).parents[2] / "docs" / "coming_from"
RHO, LR, MOMENTUM, DECAY = 0.3, 0.1, 0.9, 0.05


def problem():
    rng = np.random.default_rng(0)
    params = {"body": rng.normal(size=(3, 4)), "head": rng.normal(size=4), "bias": rng.normal()}
    return params, rng.normal(size=(8, 3)), rng.normal(size=8)


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["body"]) @ params["head"] + params["bias"] - y) ** 2)


@jax.jit
def gradient(params, x, y):
    return jax.grad(loss_fn)(params, x, y)


def backward(params, x, y, loss_scale=1.0):
    """What loss.backward() leaves in .grad."""
    return {k: loss_scale * np.asarray(g) for k, g in gradient(params, x, y).items()}


class PyTorch:
    """first_step climbs in place, second_step goes back and lets SGD with momentum step."""

    def __init__(self, params, rho=RHO, adaptive=False, weight_decay=0.0):
        self.params, self.adaptive, self.decay = dict(params), adaptive, weight_decay
        self.rho = rho if isinstance(rho, dict) else dict.fromkeys(params, rho)
        self.climbed, self.buffers = {}, {}

    def first_step(self, grad):
        size = {k: np.abs(p) if self.adaptive else 1.0 for k, p in self.params.items()}
        norm = np.sqrt(sum(np.sum((size[k] * g) ** 2) for k, g in grad.items()))
        for k, g in grad.items():
            self.climbed[k] = size[k] ** 2 * g * self.rho[k] / (norm + 1e-12)
            self.params[k] = self.params[k] + self.climbed[k]

    def second_step(self, grad):
        for k, g in grad.items():
            self.params[k] = self.params[k] - self.climbed[k]
            g = g + self.decay * self.params[k]
            self.buffers[k] = MOMENTUM * self.buffers[k] + g if k in self.buffers else g
            self.params[k] = self.params[k] - LR * self.buffers[k]

    def step(self, closure):
        self.first_step(closure(self.params))
        self.second_step(closure(self.params))


def torch_loop(steps=4, **options):
    params, x, y = problem()
    optimizer = PyTorch(params, **options)
    for _ in range(steps):
        optimizer.first_step(backward(optimizer.params, x, y))
        optimizer.second_step(backward(optimizer.params, x, y))
    return optimizer.params


def ours(*links, steps=4, batches=None):
    """The second door with SGD and momentum."""
    params, x, y = problem()
    tx = optax.chain(*links, optax.sgd(LR, MOMENTUM))

    @jax.jit
    def step(params, state, x, y):
        _, grads, grad_fn = sam_optax.value_and_grad_fn(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    carry = params, tx.init(params)
    for _ in range(steps):
        carry = step(*carry, x, y)
    return carry[0]


def first_door(value_and_grad, steps=4):
    params, x, y = problem()
    tx = optax.sgd(LR, MOMENTUM)
    state = tx.init(params)
    for _ in range(steps):
        grads = jax.jit(value_and_grad)(params, x, y)[1]
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def two_steps():
    return torch_loop(), first_door(sam_optax.value_and_grad(loss_fn, sam_optax.sam(RHO)))


def closure():
    params, x, y = problem()
    optimizer = PyTorch(params)
    for _ in range(4):
        optimizer.step(lambda params: backward(params, x, y))
    return optimizer.params, ours(sam_optax.sam(RHO))


def adaptive():
    asam = sam_optax.asam(RHO, eta=0.0, normalize_bias=True)
    return torch_loop(adaptive=True), ours(asam)


def groups():
    rho = {"body": 0.3, "head": 0.1, "bias": 0.1}
    scale = sam_optax.stateless(lambda e: {k: rho[k] * v for k, v in e.items()})
    ascent = optax.chain(sam_optax.dual_ascent(1.0), scale)
    return torch_loop(rho=rho), ours(sam_optax.sharpness_aware(ascent))


def weight_decay():
    links = sam_optax.sam(RHO), optax.add_decayed_weights(DECAY)
    return torch_loop(weight_decay=DECAY), ours(*links)


def no_sync():
    """Each worker climbs with its own gradient, the second gradients are averaged."""
    params, x, y = problem()
    optimizer = PyTorch(params)
    for _ in range(2):
        parts = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 8, 2)]
        second = []
        for own in parts:
            worker = PyTorch(optimizer.params)
            worker.first_step(backward(worker.params, *own))
            second.append(backward(worker.params, *own))
        optimizer.climbed = dict.fromkeys(params, 0.0)
        optimizer.second_step({k: np.mean([g[k] for g in second], axis=0) for k in params})
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharp = sam_optax.value_and_grad(loss_fn, sam_optax.sam(RHO), axis_name="batch", mesh=mesh)
    return optimizer.params, first_door(sharp, steps=2)


def grad_scaler():
    params, x, y = problem()
    optimizer, scale = PyTorch(params), 2.0**12
    for _ in range(4):
        grad = backward(optimizer.params, x, y, loss_scale=scale)
        optimizer.first_step({k: g / scale for k, g in grad.items()})  # scaler.unscale_ before
        grad = backward(optimizer.params, x, y, loss_scale=scale)
        optimizer.second_step({k: g / scale for k, g in grad.items()})
    scaled = lambda params, x, y: scale * loss_fn(params, x, y)

    def unscaled(params, x, y):
        value, grads = sam_optax.value_and_grad(scaled, sam_optax.sam(RHO))(params, x, y)
        return value, jax.tree.map(lambda g: g / scale, grads)

    return optimizer.params, first_door(unscaled)


def accumulation():
    """Several micro-batches, each with both steps, before the optimizer moves."""
    params, x, y = problem()
    parts = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4)]
    optimizer = PyTorch(params)
    for _ in range(4):
        total = dict.fromkeys(params, 0.0)
        for own in parts:
            worker = PyTorch(optimizer.params)
            worker.first_step(backward(worker.params, *own))
            total = {k: total[k] + g / 2 for k, g in backward(worker.params, *own).items()}
        optimizer.climbed = dict.fromkeys(params, 0.0)
        optimizer.second_step(total)
    sharp = sam_optax.value_and_grad(loss_fn, sam_optax.sam(RHO), microbatch_size=4)
    return optimizer.params, first_door(sharp)


def running_statistics():
    """The first pass moves them, in the second their momentum is set to zero."""
    params, x, y = problem()
    running, theirs = np.zeros(4), PyTorch(params)

    def normalised(params, x, y):
        hidden = x @ params["body"]
        mean = hidden.mean(0)
        out = jnp.tanh(hidden - mean) @ params["head"] + params["bias"]
        return jnp.mean((out - y) ** 2), mean

    grad = jax.jit(jax.grad(normalised, has_aux=True))
    for _ in range(4):
        first, mean = grad(theirs.params, x, y)
        running = 0.9 * running + 0.1 * np.asarray(mean)
        theirs.first_step(jax.tree.map(np.asarray, first))
        theirs.second_step(jax.tree.map(np.asarray, grad(theirs.params, x, y)[0]))
    own, stats, tx = params, jnp.zeros(4), optax.sgd(LR, MOMENTUM)
    state = tx.init(own)
    sharp = jax.jit(sam_optax.value_and_grad(normalised, sam_optax.sam(RHO), has_aux=True))
    for _ in range(4):
        (_, mean), grads = sharp(own, x, y)
        stats = 0.9 * stats + 0.1 * mean
        updates, state = tx.update(grads, state, own)
        own = optax.apply_updates(own, updates)
    return theirs.params | {"running": running}, own | {"running": stats}


def contrib(ascent, sync_period=2, steps=4, period=1, **options):
    """optax.contrib.sam as its documentation calls it."""
    params, x, y = problem()
    opaque = options.get("opaque_mode", True)
    tx = optax.contrib.sam(
        optax.sgd(LR, MOMENTUM), ascent, sync_period, **{"opaque_mode": True} | options
    )
    grad_fn = lambda params, _: jax.grad(loss_fn)(params, x, y)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = grad_fn(params, 0)
        updates, state = tx.update(grads, state, params, **({"grad_fn": grad_fn} if opaque else {}))
        return optax.apply_updates(params, updates), state

    for _ in range(steps * period):
        params, state = step(params, state)
    return params


def normalised(rho):
    return optax.chain(optax.contrib.normalize(), optax.sgd(rho))


def opaque():
    return contrib(normalised(RHO)), ours(sam_optax.sam(RHO))


def transparent():
    """Two calls a step, each with the gradient at the parameters that it finds."""
    theirs = contrib(normalised(RHO), opaque_mode=False, period=2)
    return theirs, ours(sam_optax.sam(RHO))


def sync_period():
    k = 3
    method = sam_optax.multi_step_sam(k * RHO, k, RHO)
    return contrib(normalised(RHO), sync_period=k + 1), ours(method)


def unnormalised_ascent():
    return contrib(optax.sgd(RHO)), ours(sam_optax.unnormalised_sam(RHO))


def adam_ascent():
    """Its memory is reset at every step, so the direction of Adam is a sign."""
    return contrib(optax.adam(RHO, eps=0.0)), ours(sam_optax.sam(RHO, p=jnp.inf))


def frozen_schedule():
    schedule = optax.piecewise_constant_schedule(RHO, {1: 0.0})
    return contrib(normalised(schedule)), ours(sam_optax.sam(RHO))


def batch_axis_name():
    """Its second gradient is averaged; the first one by the caller."""
    params, x, y = problem()
    tx = optax.contrib.sam(
        optax.sgd(LR, MOMENTUM), normalised(RHO), opaque_mode=True, batch_axis_name="batch"
    )
    split = lambda a: a.reshape(4, 2, *a.shape[1:])

    @functools.partial(jax.vmap, in_axes=(None, None, 0, 0), out_axes=None, axis_name="batch")
    def theirs(params, state, x, y):
        grad_fn = lambda params, _: jax.grad(loss_fn)(params, x, y)
        grads = jax.lax.pmean(grad_fn(params, 0), "batch")
        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    shared = optax.chain(sam_optax.pmean("batch"), sam_optax.sam(RHO))
    sharp = jax.vmap(
        sam_optax.value_and_grad(loss_fn, shared, axis_name="batch"),
        in_axes=(None, 0, 0), out_axes=None, axis_name="batch",
    )  # fmt: skip
    carry = params, tx.init(params)
    for _ in range(3):
        carry = theirs(*carry, split(x), split(y))
    return carry[0], first_door(lambda p, x, y: sharp(p, split(x), split(y)), steps=3)


def reference_step(params, parts, l2=0.0, clip=np.inf, synchronised=()):
    """One gradient of the authors' step: parts are the devices' own batches."""

    def grad(params, own):
        g = backward(params, *own)
        return {k: v + l2 * np.asarray(params[k]) for k, v in g.items()}  # L2 is in their loss

    first = [grad(params, own) for own in parts]
    for group in synchronised:
        mean = {k: np.mean([first[i][k] for i in group], axis=0) for k in params}
        for i in group:
            first[i] = mean
    second = []
    for own, g in zip(parts, first, strict=True):
        norm = np.sqrt(sum(np.sum(v**2) for v in g.values()))
        second.append(grad({k: params[k] + RHO * g[k] / norm for k in params}, own))
    result = {k: np.mean([g[k] for g in second], axis=0) for k in params}
    norm = np.sqrt(sum(np.sum(v**2) for v in result.values()))
    return {k: v * min(1.0, clip / norm) for k, v in result.items()}


def devices(sharp, *inner):
    """The sharpness-aware gradient over four devices, on a mesh of one or two axes."""
    shape = (2, 2) if inner else (4,)
    names = ("outer", "inner") if inner else ("batch",)
    mesh = jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))
    params, x, y = problem()
    spec = P(names)
    mapped = jax.shard_map(sharp, mesh=mesh, in_specs=(P(), spec, spec), out_specs=P())
    return jax.jit(mapped)(params, x, y)


def parts_of(count=4):
    _, x, y = problem()
    return list(zip(np.split(x, count), np.split(y, count), strict=True))


def per_device():
    sharp = sam_optax.grad(loss_fn, sam_optax.sam(RHO), axis_name="batch")
    return reference_step(problem()[0], parts_of()), devices(sharp)


def sync_perturbations():
    shared = optax.chain(sam_optax.pmean("batch"), sam_optax.sam(RHO))
    sharp = sam_optax.grad(loss_fn, shared, axis_name="batch")
    theirs = reference_step(problem()[0], parts_of(), synchronised=[range(4)])
    return theirs, devices(sharp)


def inner_group_size():
    shared = optax.chain(sam_optax.pmean("inner"), sam_optax.sam(RHO))
    sharp = sam_optax.grad(loss_fn, shared, axis_name=("outer", "inner"))
    theirs = reference_step(problem()[0], parts_of(), synchronised=[(0, 1), (2, 3)])
    return theirs, devices(sharp, "inner")


def l2_in_the_loss():
    l2_loss = lambda p, x, y: loss_fn(p, x, y) + DECAY / 2 * optax.tree.vdot(p, p)
    theirs = reference_step(problem()[0], parts_of(1), l2=DECAY)
    return theirs, sam_optax.grad(l2_loss, sam_optax.sam(RHO))(*problem())


def gradient_clipping():
    params, x, y = problem()
    tx = optax.chain(sam_optax.sam(RHO), optax.clip_by_global_norm(0.5))
    _, grads, grad_fn = sam_optax.value_and_grad_fn(loss_fn)(params, x, y)
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    return reference_step(params, parts_of(1), clip=0.5), updates


def keras_step(splits=1):
    """The gradients of the splits are summed, each at its own perturbation."""
    total = dict.fromkeys(problem()[0], 0.0)
    for part in parts_of(splits):
        for k, g in reference_step(problem()[0], [part]).items():
            total[k] = total[k] + g
    return total


def keras_plain():
    return keras_step(), sam_optax.grad(loss_fn, sam_optax.sam(RHO))(*problem())


def keras_splits():
    sharp = sam_optax.grad(loss_fn, sam_optax.sam(RHO), microbatch_size=2)
    return keras_step(4), jax.tree.map(lambda g: 4 * g, sharp(*problem()))


ROWS = {
    "pytorch": {
        "`first_step`, `second_step`": two_steps,
        "`optimizer.step(closure)`": closure,
        "`adaptive=True`": adaptive,
        "`rho` in parameter groups": groups,
        "`weight_decay=` of the base optimizer": weight_decay,
        "`model.no_sync()` around the first backward": no_sync,
        "`GradScaler`": grad_scaler,
        "several backward passes before the step": accumulation,
        "`disable_running_stats` in the second pass": running_statistics,
    },
    "optax": {
        "`opaque_mode=True`": opaque,
        "`opaque_mode=False`": transparent,
        "`sync_period=k + 1`": sync_period,
        "ascent without `normalize()`": unnormalised_ascent,
        "`adam(rho)` as ascent": adam_ascent,
        "a schedule in the ascent": frozen_schedule,
        '`batch_axis_name="batch"`': batch_axis_name,
    },
    "reference": {
        "each device its own perturbation": per_device,
        "`sync_perturbations`": sync_perturbations,
        "`inner_group_size`": inner_group_size,
        "weight decay": l2_in_the_loss,
        "`gradient_clipping`": gradient_clipping,
    },
    "keras": {
        "`SharpnessAwareMinimization(model, rho)`": keras_plain,
        "`num_batch_splits=n`": keras_splits,
    },
}


@pytest.mark.parametrize("page, row", [(page, row) for page in ROWS for row in ROWS[page]])
def test_a_row_has_equal_numbers(x64, page, row):
    theirs, here = ROWS[page][row]()
    assert theirs.keys() == here.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(here[name], value, rtol=1e-9, atol=1e-11, err_msg=name)


def test_the_numbers_tell_the_rows_apart(x64):
    """No row could pass as another method would: plain SGD and plain SAM are far away."""
    plain, sam = ours(), ours(sam_optax.sam(RHO))
    assert abs(plain["head"] - sam["head"]).max() > 1e-2
    for theirs in (torch_loop(adaptive=True), torch_loop(weight_decay=DECAY), keras_step(4)):
        assert abs(theirs["head"] - sam["head"]).max() > 1e-3


@pytest.mark.parametrize("page", ROWS)
def test_every_row_of_the_page_is_here(page):
    text = (PAGES / f"{page}.md").read_text()
    rows = re.findall(r"^\| (.+?) \| ", text, re.M)
    shown = [row for row in rows if not row.startswith(("There", "---"))]
    assert shown == list(ROWS[page])
