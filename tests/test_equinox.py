"""Equinox models through their doors: BatchNorm, dropout, groups of examples, methods with memory.

What the doors give is compared with the equations written out, in float64 to rounding.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from test_contract import UNMAPPED, build

import sam_optax
import sam_optax.equinox

RHO = 0.3
EXAMPLES = 16  # as many as the network is wide, so that a state could be split by mistake


class Centre(eqx.Module):
    """Subtracts the mean of the batch and keeps a running one."""

    running: eqx.nn.StateIndex

    def __init__(self):
        self.running = eqx.nn.StateIndex(jnp.zeros(EXAMPLES))

    def __call__(self, x, state):
        mean = jnp.mean(x, axis=0)
        state = state.set(self.running, 0.9 * state.get(self.running) + 0.1 * mean)
        return x - mean, state


class Network(eqx.Module):
    first: eqx.nn.Linear
    norm: Callable
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear
    passes: eqx.nn.StateIndex  # how many passes the state has seen, an integer
    activation: Callable

    def __init__(self, norm, key):
        first, last = jax.random.split(key)
        self.first = eqx.nn.Linear(6, EXAMPLES, key=first)
        self.norm = norm()
        self.dropout = eqx.nn.Dropout(0.5)
        self.last = eqx.nn.Linear(EXAMPLES, "scalar", key=last)
        self.passes = eqx.nn.StateIndex(jnp.array(0))
        self.activation = jnp.tanh

    def __call__(self, x, state, key):
        norm = self.norm
        if isinstance(norm, eqx.nn.BatchNorm):
            norm = jax.vmap(norm, (0, None), (0, None), axis_name="examples")
        x, state = norm(jax.vmap(self.first)(x), state)
        state = state.set(self.passes, state.get(self.passes) + 1)
        return jax.vmap(self.last)(self.dropout(self.activation(x), key=key)), state


def loss_fn(model, state, x, y, key):
    out, state = model(x, state, key)
    return jnp.mean((out - y) ** 2), state


def batch_norm(mode):
    return lambda: eqx.nn.BatchNorm(EXAMPLES, "examples", mode=mode, momentum=0.9)


NORMS = {"batch": batch_norm("batch"), "ema": batch_norm("ema"), "centre": Centre}


@functools.cache
def make_problem(norm):
    model, state = eqx.nn.make_with_state(Network)(NORMS[norm], jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (EXAMPLES, 6))
    # A first pass, so that no statistic is at its initial value.
    _, state = eqx.filter_jit(loss_fn)(model, state, 2 * x + 1, x[:, 0], jax.random.key(9))
    return model, state, x, jnp.sin(3 * x[:, 0]), jax.random.key(2)


@pytest.fixture(params=["batch", "ema"])
def problem(request, x64):
    """model, state, x, y, key, for both kinds of BatchNorm."""
    return make_problem(request.param)


@pytest.fixture
def one_problem(x64):
    return make_problem("batch")


def clone(state):
    """A state can be used once; this is another one with its values."""
    return jax.tree.map(lambda x: x, state)


@eqx.filter_jit
def by_hand(model, state, x, y, key, filter_spec=eqx.is_inexact_array):
    """((loss, state of the clean pass), g, (state of the perturbed pass), g_s): equations of SAM."""
    params, static = eqx.partition(model, filter_spec)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def evaluate(params):
        return loss_fn(eqx.combine(params, static), clone(state), x, y, key)

    out, g = evaluate(params)
    length = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g)))
    (_, perturbed), g_s = evaluate(jax.tree.map(lambda w, g: w + RHO * g / length, params, g))
    return out, g, perturbed, g_s


def loop_over_groups(problem, keys, filter_spec=eqx.is_inexact_array):
    """((loss, state), g_s) by definition: a Python loop, then one mean, integers kept once."""
    model, state, x, y, _ = problem
    outs = []
    for xs, ys, key in zip(np.split(x, len(keys)), np.split(y, len(keys)), keys, strict=True):
        out, _, _, g_s = by_hand(model, state, xs, ys, key, filter_spec)
        outs.append(jax.device_get((out, g_s)))

    def mean(*leaves):
        if np.issubdtype(leaves[0].dtype, np.floating):
            return sum(leaves) / len(leaves)
        assert all(leaf == leaves[0] for leaf in leaves)
        return leaves[0]

    return jax.tree.map(mean, *outs)


def folded(key, *numbers):
    keys = [key]
    for n in numbers:
        keys = [jax.random.fold_in(k, i) for k in keys for i in range(n)]
    return keys


def assert_same(a, b):
    """The same trees, leaves to rounding; whatever is no array has to be equal."""

    def same(x, y):
        if eqx.is_array_like(x):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)
        else:
            assert x == y

    jax.tree.map(same, a, b)


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return any(not np.allclose(x, y, rtol=0, atol=1e-4) for x, y in pairs)


def sharp(**options):
    return sam_optax.equinox.value_and_grad(
        loss_fn, sam_optax.sam(RHO), has_aux=True, **options
    )


# The equations.


@pytest.mark.parametrize("aux_from", ["clean", "perturbed"])
@pytest.mark.parametrize("wrap", [eqx.filter_jit, lambda f: f], ids=["jit", "eager"])
def test_steps_follow_the_equation_with_one_mask_and_one_state(problem, wrap, aux_from):
    """A second mask or a state advanced twice would give other numbers."""
    model, state, x, y, key = problem
    tx = optax.sgd(0.1, momentum=0.9)
    traces = []

    @wrap
    def step(model, state, opt_state, key):
        traces.append(None)
        (loss, state), grads = sharp(aux_from=aux_from)(model, state, x, y, key)
        updates, opt_state = tx.update(grads, opt_state)
        return eqx.apply_updates(model, updates), state, opt_state, loss

    w, s, velocity = model, state, None
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for key in jax.random.split(key, 3):
        model, state, opt_state, loss = step(model, state, opt_state, key)
        (clean_loss, clean), g, perturbed, g_s = by_hand(w, s, x, y, key)
        assert differ(g, g_s) and differ(clean, perturbed)
        velocity = g_s if velocity is None else optax.tree.add_scale(g_s, 0.9, velocity)
        w = eqx.apply_updates(w, jax.tree.map(lambda v: -0.1 * v, velocity))
        s = clean if aux_from == "clean" else perturbed
        assert_same((model, state, loss), (w, s, clean_loss))
    assert len(traces) == (1 if wrap is eqx.filter_jit else 3)


def test_grad_is_value_and_grad_without_the_value(one_problem):
    (_, state), grads = sharp()(*one_problem)
    alone = sam_optax.equinox.grad(loss_fn, sam_optax.sam(RHO), has_aux=True)
    assert_same(alone(*one_problem), (grads, state))
    without_aux = lambda *args: loss_fn(*args)[0]
    assert_same(sam_optax.equinox.grad(without_aux, sam_optax.sam(RHO))(*one_problem), grads)


@pytest.mark.parametrize("wrap", [eqx.filter_jit, lambda f: f], ids=["jit", "eager"])
def test_the_state_given_is_not_used_up_and_an_old_one_is_refused(one_problem, wrap):
    model, state, x, y, key = one_problem
    state = clone(state)
    before = jax.device_get(jax.tree.leaves(state))
    (_, new), _ = wrap(sharp())(model, state, x, y, key)
    assert_same(jax.device_get(jax.tree.leaves(state)), before)
    assert new.get(model.passes) == state.get(model.passes) + 1
    state.set(model.passes, jnp.array(5))
    with pytest.raises(ValueError, match="Attempted to use old state"):
        wrap(sharp())(model, state, x, y, key)


def test_the_whole_model_and_the_core_door_agree(one_problem):
    """Without the door of modules: partition by hand, as in Equinox's own documentation."""
    model, state, x, y, key = one_problem
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss_of_params(params):
        return loss_fn(eqx.combine(params, static), clone(state), x, y, key)

    core = sam_optax.value_and_grad(loss_of_params, sam_optax.sam(RHO), has_aux=True)
    assert_same(jax.jit(core)(params), sharp()(*one_problem))


# Groups of examples.


@pytest.mark.parametrize(
    "size, options",
    [(4, {}), (8, {"unroll": True}), (2, {"vectorize": 4}), (16, {}), (4, {"vectorize": True})],
    ids=str,
)
def test_microbatches_equal_a_loop_and_never_split_a_state(problem, size, options):
    """Its floats are averaged, its integers kept once; every group has its own key."""
    out = eqx.filter_jit(sharp(microbatch_size=size, **options))(*problem)
    assert_same(out, loop_over_groups(problem, folded(problem[-1], EXAMPLES // size)))
    whole = by_hand(*problem)
    assert differ(out[1], whole[3])


def test_the_arguments_to_split_are_counted_as_in_the_loss(one_problem):
    """The model is 0, the state 1."""
    expected = loop_over_groups(one_problem, folded(one_problem[-1], 4))
    for argnums in ((2, 3), (1, 2, 3, 4)):
        out = eqx.filter_jit(sharp(microbatch_size=4, batch_argnums=argnums))(*one_problem)
        assert_same(out, expected)
    by_name = sharp(microbatch_size=4, batch_argnums=(2, "y"))
    model, state, x, y, key = one_problem
    assert_same(by_name(model, state, x, y=y, key=key), expected)
    with pytest.raises(ValueError, match="batch_argnums must be positions.*got 0"):
        sharp(microbatch_size=4, batch_argnums=0)(*one_problem)


def test_a_key_in_the_model_or_the_state_is_folded_for_every_group(x64):
    class Noisy(eqx.Module):
        weight: jax.Array
        key: jax.Array
        stream: eqx.nn.StateIndex

        def __init__(self):
            self.weight = jnp.ones(3)
            self.key = jax.random.key(3)
            self.stream = eqx.nn.StateIndex(jax.random.key(4))

    def noisy_loss(model, state, x, noise=jax.random.normal):
        key, own = jax.random.split(state.get(model.stream))
        state = state.set(model.stream, key)
        return jnp.sum(model.weight * x * noise(own, (3,)) * noise(model.key, (3,))), state

    model, state = eqx.nn.make_with_state(Noisy)()
    x = jnp.arange(1.0, 7).reshape(2, 3)
    run = sam_optax.equinox.value_and_grad(noisy_loss, has_aux=True, microbatch_size=1)
    (loss, new), grads = eqx.filter_jit(run)(model, state, x)
    total, streams = 0.0, []
    for i in range(2):
        stream, own = jax.random.split(jax.random.fold_in(jax.random.key(4), i))
        fixed = jax.random.fold_in(jax.random.key(3), i)
        streams.append(stream)
        total += x[i] * jax.random.normal(own, (3,)) * jax.random.normal(fixed, (3,)) / 2
    assert_same((loss, grads.weight), (jnp.sum(total), total))
    assert new.get(model.stream) == streams[0]


@pytest.mark.parametrize("place", ["argument", "model", "state"])
def test_keys_of_the_old_kind_are_refused_where_groups_would_share_them(one_problem, place):
    model, state, x, y, key = one_problem
    old = jax.random.PRNGKey(0)
    if place == "argument":
        key = old
    elif place == "model":
        model = eqx.tree_at(lambda m: m.activation, model, old)
    else:
        leaves, treedef = jax.tree.flatten(state)
        state = jax.tree.unflatten(treedef, [old, *leaves[1:]])
    with pytest.raises(ValueError, match=r"random keys must be typed.*got uint32\[2\]"):
        sharp(microbatch_size=4)(model, state, x, y, key)


# Devices.


def on_device(static, key_axis="batch", **options):
    def step(params, state, x, y, key):
        key = jax.random.fold_in(key, jax.lax.axis_index(key_axis))
        run = sharp(axis_name="batch", **options)
        return run(eqx.combine(params, static), state, x, y, key)

    return step


def shard_mapped(step, check_vma):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    specs = (P(), P(), P("batch"), P("batch"), P())
    return jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    )


def by_leading_axis(transform, step):
    def mapped(params, state, x, y, key):
        split = lambda a: a.reshape(8, -1, *a.shape[1:])
        in_axes = (None, None, 0, 0, None)
        return transform(step, axis_name="batch", in_axes=in_axes)(
            params, state, split(x), split(y), key
        )

    return mapped


# Equinox's BatchNorm works neither with replication checking, where JAX has no collectives over
# an axis of vmap, nor, with mode="ema", inside of any map over devices since jax 0.10.
ROUTES = {
    "shard_map": lambda step: shard_mapped(step, True),
    "shard_map unchecked": lambda step: shard_mapped(step, False),
    "pmap": functools.partial(by_leading_axis, jax.pmap),
    "filter_pmap": functools.partial(by_leading_axis, eqx.filter_pmap),
    "vmap": lambda step: jax.jit(by_leading_axis(jax.vmap, step)),
}


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize(
    "norm, route", [("centre", r) for r in ROUTES] + [("batch", r) for r in list(ROUTES)[1:]]
)
def test_devices_equal_a_loop(x64, norm, route, size):
    """Loss, state and gradient leave as one: of maps with a leading axis all entries agree."""
    model, *rest = problem = make_problem(norm)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    out = ROUTES[route](on_device(static, microbatch_size=size))(params, *rest)
    numbers = (8,) if size is None else (8, 2)
    expected = loop_over_groups(problem, folded(problem[-1], *numbers))
    assert_same(out, jax.tree.map(lambda e, o: np.broadcast_to(e, o.shape), expected, out))


@pytest.mark.parametrize("check_vma", [True, False])
def test_grad_fn_on_devices(x64, check_vma):
    """Each device perturbs with its own gradient; pmean after the method averages."""
    model, *rest = problem = make_problem("centre")
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = optax.chain(sam_optax.sam(RHO), sam_optax.pmean("batch"))

    def step(params, state, x, y, key):
        key = jax.random.fold_in(key, jax.lax.axis_index("batch"))
        start = sam_optax.equinox.value_and_grad_fn(loss_fn, has_aux=True, axis_name="batch")
        value, grads, grad_fn = start(eqx.combine(params, static), state, x, y, key)
        return value, tx.update(grads, tx.init(params), params, grad_fn=grad_fn)[0]

    out = shard_mapped(step, check_vma)(params, *rest)
    assert_same(out, loop_over_groups(problem, folded(problem[-1], 8)))
