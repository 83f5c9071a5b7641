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
from public import WHOLE, build

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
    """((loss, clean state), g, perturbed state, g_s): the equations of SAM."""
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
    return sam_optax.equinox.value_and_grad(loss_fn, sam_optax.sam(RHO), has_aux=True, **options)


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
    for own in jax.random.split(key, 3):
        model, state, opt_state, loss = step(model, state, opt_state, own)
        (clean_loss, clean), g, perturbed, g_s = by_hand(w, s, x, y, own)
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
def test_the_state_given_is_not_used_up_and_an_old_one_is_refused(x64, wrap):
    """Of these layers Centre takes the very state that loss_fn gets, vmap hands out copies."""
    model, state, x, y, key = make_problem("centre")
    state = clone(state)
    before = jax.device_get(jax.tree.leaves(state))
    (_, new), _ = wrap(sharp())(model, state, x, y, key)
    assert_same(jax.device_get(jax.tree.leaves(state)), before)
    assert new.get(model.passes) == state.get(model.passes) + 1
    state.set(model.passes, jnp.array(5))
    with pytest.raises(ValueError, match="Attempted to use old state"):
        wrap(sharp())(model, state, x, y, key)


def test_the_core_door_with_a_model_partitioned_by_hand(one_problem):
    """As in Equinox's own documentation, for those who stay with jax.jit."""
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
    with pytest.raises(ValueError, match=r"batch_argnums must be positions.*got 0"):
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


# What stands among the arguments and in aux.


def test_frozen_leaves_are_not_perturbed_and_not_in_the_norm(one_problem):
    model, *_, key = one_problem
    spec = jax.tree.map(eqx.is_inexact_array, model)
    spec = eqx.tree_at(lambda m: (m.first.weight, m.first.bias), spec, (False, False))
    _, grads = eqx.filter_jit(sharp(filter_spec=spec))(*one_problem)
    expected = by_hand(*one_problem, filter_spec=spec)
    assert_same(grads, expected[3])
    assert grads.first.weight is None and grads.first.bias is None
    whole = by_hand(*one_problem)[3]
    assert differ(grads.last.weight, whole.last.weight)
    groups = eqx.filter_jit(sharp(filter_spec=spec, microbatch_size=4))(*one_problem)
    assert_same(groups, loop_over_groups(one_problem, folded(key, 4), spec))

    start = sam_optax.equinox.value_and_grad_fn(loss_fn, has_aux=True, filter_spec=spec)
    value, grads, grad_fn = start(*one_problem)
    tx, params = sam_optax.sam(RHO), eqx.filter(model, spec)
    updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    assert_same((value, updates), (expected[0], expected[3]))


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("wrap", [eqx.filter_jit, lambda f: f], ids=["jit", "eager"])
def test_modules_functions_and_text_among_the_arguments_and_in_aux(one_problem, wrap, size):
    """A second module is neither differentiated nor split, though 16 is its leading axis too."""
    model, state, x, y, key = one_problem
    teacher = eqx.nn.MLP(6, "scalar", EXAMPLES, 1, key=jax.random.key(7))

    def distil(model, state, x, y, key, teacher, distance, *, words):
        target = y + jax.vmap(teacher)(x)
        out, state = model(x, state, key)
        loss = jnp.mean(distance(out - target))
        aux = {
            "state": state,
            "teacher": teacher,
            "number": 3,
            "rest": (words["name"], distance, None, jnp.mean(target)),
        }
        return loss, aux

    run = sam_optax.equinox.value_and_grad(
        distil,
        sam_optax.sam(RHO),
        has_aux=True,
        microbatch_size=size,
        batch_argnums=None if size is None else (2, 3),
    )
    (loss, aux), grads = wrap(lambda *args: run(*args, words={"name": "distilled"}))(
        *one_problem, teacher, jnp.square
    )
    target = y + jax.vmap(teacher)(x)
    keys = [key] if size is None else folded(key, 4)
    expected = loop_over_groups((model, state, x, target, key), keys)
    assert_same(((loss, aux["state"]), grads), expected)
    assert_same(aux["teacher"], teacher)
    assert aux["number"] == 3
    assert aux["rest"][:3] == ("distilled", jnp.square, None)
    np.testing.assert_allclose(aux["rest"][3], jnp.mean(target), rtol=1e-11)


def test_a_module_is_not_split_by_default(one_problem):
    *_, key = one_problem
    scales = eqx.nn.Linear(6, EXAMPLES, key=key)

    def weighted(model, state, x, y, key, scales):
        loss, state = loss_fn(model, state, x, y, key)
        return loss * jnp.mean(scales.weight**2), state

    run = sam_optax.equinox.value_and_grad(
        weighted, sam_optax.sam(RHO), has_aux=True, microbatch_size=4
    )
    (loss, state), grads = eqx.filter_jit(run)(*one_problem, scales)
    expected = loop_over_groups(one_problem, folded(key, 4))
    factor = jnp.mean(scales.weight**2)
    scaled = jax.tree.map(lambda g: factor * g, expected[1])
    assert_same(((loss, state), grads), ((factor * expected[0][0], expected[0][1]), scaled))


def test_parts_of_aux_are_averaged_or_stacked_beside_a_state(one_problem):
    _, _, x, _, key = one_problem

    def loss_with_outputs(*args):
        loss, state = loss_fn(*args)
        return loss, (state, {"mean": jnp.mean(args[2]), "rows": args[2], "name": "rows"})

    run = sam_optax.equinox.value_and_grad(
        loss_with_outputs,
        sam_optax.sam(RHO),
        has_aux=True,
        microbatch_size=4,
        average_aux=(True, {"mean": True, "rows": False, "name": False}),
    )
    (loss, (new, aux)), grads = eqx.filter_jit(run)(*one_problem)
    assert_same(((loss, new), grads), loop_over_groups(one_problem, folded(key, 4)))
    np.testing.assert_allclose(aux["mean"], jnp.mean(x), rtol=1e-11)
    np.testing.assert_array_equal(aux["rows"], x.reshape(4, 4, 6))
    assert aux["name"] == "rows"


@pytest.mark.parametrize("size", [None, 4])
def test_extra_arguments_of_a_transform(one_problem, size):
    """As a mapping, or made of the model, its own state and the examples of the group."""

    def update(updates, state, params=None, *, weight, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda g: weight * g, updates), state

    weighted = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

    def made(model, state, x, y, key):
        del y, key
        count = state.get(model.passes)
        state.set(model.passes, count + 1)  # may not reach the passes
        return {"weight": jnp.sum(model.activation(x)) + count}

    model, state, x, y, key = one_problem
    run = functools.partial(
        sam_optax.equinox.value_and_grad,
        loss_fn,
        weighted,
        has_aux=True,
        microbatch_size=size,
        batch_argnums=None if size is None else (2, 3),
    )
    keys = [key] if size is None else folded(key, 4)
    total, plain = None, None
    for xs, ys, k in zip(np.split(x, len(keys)), np.split(y, len(keys)), keys, strict=True):
        _, g, _, _ = by_hand(model, state, xs, ys, k)
        weight = jnp.sum(jnp.tanh(xs)) + state.get(model.passes)
        part = jax.tree.map(lambda g, weight=weight: weight * g / len(keys), g)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
        g = jax.tree.map(lambda g: g / len(keys), g)
        plain = g if plain is None else jax.tree.map(jnp.add, plain, g)
    (_, new), grads = eqx.filter_jit(run(extra_args=made))(*one_problem)
    assert_same(grads, total)
    assert new.get(model.passes) == state.get(model.passes) + 1
    _, grads = eqx.filter_jit(run(extra_args={"weight": 3.0}))(*one_problem)
    assert_same(grads, jax.tree.map(lambda g: 3.0 * g, plain))


def test_the_loss_is_traced_once_in_a_jitted_step(one_problem):
    traces = []

    def counted(*args):
        traces.append(None)
        return loss_fn(*args)

    door = sam_optax.equinox
    three_gradients = sam_optax.multi_step_sam(RHO, steps=2)
    for options in ({}, {"microbatch_size": 4}, {"aux_from": "perturbed"}):
        run = door.value_and_grad(counted, three_gradients, has_aux=True, **options)
        traces.clear()
        for _ in range(2):
            eqx.filter_jit(run)(*one_problem)
        assert len(traces) == 1, options

    model, *rest = one_problem
    for options in ({}, {"microbatch_size": 4}):

        @eqx.filter_jit
        def step(model, rest, options=options):
            start = door.value_and_grad_fn(counted, has_aux=True, **options)
            _, grads, grad_fn = start(model, *rest)
            params = eqx.filter(model, eqx.is_inexact_array)
            return three_gradients.update(
                grads, three_gradients.init(params), params, grad_fn=grad_fn
            )[0]

        traces.clear()
        for _ in range(2):
            step(model, rest)
        assert len(traces) == 1, options


def test_errors(one_problem):
    door, method = sam_optax.equinox, sam_optax.sam(RHO)
    with pytest.raises(TypeError, match=r"options must be among .*got \['microbatch'\]"):
        door.value_and_grad(loss_fn, method, microbatch=4)
    with pytest.raises(TypeError, match=r"options must be among .*got \['aux_from'\]"):
        door.value_and_grad_fn(loss_fn, aux_from="clean")
    with pytest.raises(ValueError, match="aux_from must be one of 'clean', 'ascent', 'perturbed'"):
        door.value_and_grad(loss_fn, method, aux_from="both")
    with pytest.raises(ValueError, match="microbatch_size must be at least 1, got 0"):
        door.grad(loss_fn, method, microbatch_size=0)
    with pytest.raises(TypeError, match=r"GradientTransformation: call sam\(\)"):
        door.value_and_grad(loss_fn, sam_optax.sam)
    for start in (door.value_and_grad, door.grad, door.value_and_grad_fn):
        with pytest.raises(TypeError, match=r"has_aux must be True .* got a tuple of 2"):
            start(loss_fn)(*one_problem)
        with pytest.raises(TypeError, match=r"must return \(loss, aux\) with has_aux=True"):
            start(lambda *args: loss_fn(*args)[0], has_aux=True)(*one_problem)
    with pytest.raises(ValueError, match="microbatch_size 5 and a batch of 16"):
        sharp(microbatch_size=5)(*one_problem)
    with pytest.raises(ValueError, match=r"transform must be without state.*value_and_grad_fn"):
        door.value_and_grad(loss_fn, sam_optax.vasso(), has_aux=True)(*one_problem)
    with pytest.raises(NameError, match=r"axis_name must be an axis .*got 'nowhere'"):
        sharp(axis_name="nowhere")(*one_problem)


# Methods with memory.


class Small(eqx.Module):
    mlp: eqx.nn.MLP
    passes: eqx.nn.StateIndex

    def __init__(self):
        self.mlp = eqx.nn.MLP(6, "scalar", 8, 1, key=jax.random.key(0))
        self.passes = eqx.nn.StateIndex(jnp.array(0))


def small_problem():
    """An MLP and a state, in float32 as the contract has them, and five batches with keys."""

    model, state = eqx.nn.make_with_state(Small)()
    x = jax.random.normal(jax.random.key(1), (5, 8, 6))
    return model, state, (x, jnp.sin(3 * x[..., 0]), jax.random.split(jax.random.key(2), 5))


def small_loss(model, state, x, y, key):
    x = x * jax.random.bernoulli(key, 0.8, x.shape)
    state = state.set(model.passes, state.get(model.passes) + 1)
    return jnp.mean((jax.vmap(model.mlp)(x) - y) ** 2), state


def has_memory(name):
    params = eqx.filter(small_problem()[0], eqx.is_inexact_array)
    return bool(jax.tree.leaves(build(name).init(params)))


WITH_MEMORY = [name for name in WHOLE if has_memory(name)]


def test_methods_with_memory_are_found():
    assert {"look_sam", "vasso", "async_sam", "bsam"} <= set(WITH_MEMORY)
    assert not {"sam", "asam", "gsam"} & set(WITH_MEMORY)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_methods_with_memory_train_and_go_on_from_a_file(name, tmp_path):
    """The door's grad_fn gives the numbers of one by hand; a saved run goes on as if never left."""
    tx = optax.chain(build(name), optax.scale(-0.1))

    @eqx.filter_jit
    def step(model, state, opt_state, batch, previous):
        start = sam_optax.equinox.value_and_grad_fn(small_loss, has_aux=True)
        _, _, previous_grad_fn = start(model, state, *previous)
        (value, state), grads, grad_fn = start(model, state, *batch)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(
            grads, opt_state, params, grad_fn=grad_fn, previous_grad_fn=previous_grad_fn
        )
        return eqx.apply_updates(model, updates), state, opt_state, value

    @eqx.filter_jit
    def step_by_hand(model, state, opt_state, batch, previous):
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss_at(params, batch=batch):
            return small_loss(eqx.combine(params, static), clone(state), *batch)

        (value, new), grads = jax.value_and_grad(loss_at, has_aux=True)(params)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            grad_fn=lambda params: jax.grad(loss_at, has_aux=True)(params)[0],
            previous_grad_fn=lambda params: jax.grad(loss_at, has_aux=True)(params, previous)[0],
        )
        return eqx.combine(optax.apply_updates(params, updates), static), new, opt_state, value

    def start():
        model, state, _ = small_problem()
        return model, state, tx.init(eqx.filter(model, eqx.is_inexact_array))

    def run(step, carry, steps):
        values = []
        for i in steps:
            batch, previous = (jax.tree.map(lambda a, j=j: a[j], batches) for j in (i, i - 1))
            *carry, value = step(*carry, batch, previous)
            values.append(value)
        return carry, values

    batches = small_problem()[2]
    end, values = run(step, start(), (1, 2, 3, 4))
    expected, expected_values = run(step_by_hand, start(), (1, 2, 3, 4))
    arrays = eqx.filter(((end, values), (expected, expected_values)), eqx.is_array)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5), *arrays)
    model, state, _ = end
    assert state.get(model.passes) == 4

    half, _ = run(step, start(), (1, 2))
    eqx.tree_serialise_leaves(tmp_path / "run.eqx", half)
    like = eqx.filter_eval_shape(lambda: half)
    resumed = eqx.tree_deserialise_leaves(tmp_path / "run.eqx", like)
    end_resumed, values_resumed = run(step, resumed, (3, 4))
    assert eqx.tree_equal((end_resumed, values_resumed), (end, values[2:]))


def test_params_of_an_update(one_problem):
    """The parameters, alone or beside other arrays; a model of parameters only may go whole."""
    model, *rest = one_problem
    start = sam_optax.equinox.value_and_grad_fn(loss_fn, has_aux=True)
    value, grads, grad_fn = start(model, *rest)
    tx = sam_optax.sam(RHO)
    expected = by_hand(*one_problem)
    for keep in (eqx.is_inexact_array, eqx.is_array):
        params = eqx.filter(model, keep)
        updates, _ = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
        assert_same((value, updates), (expected[0], expected[3]))

    linear, x = model.last, rest[1] @ model.first.weight.T
    loss = lambda linear, x: jnp.mean(jnp.tanh(jax.vmap(linear)(x)))
    _, grads, grad_fn = sam_optax.equinox.value_and_grad_fn(loss)(linear, x)
    updates, _ = tx.update(grads, tx.init(linear), linear, grad_fn=grad_fn)
    assert_same(updates, sam_optax.equinox.grad(loss, tx)(linear, x))
    assert differ(updates, grads)


def test_a_whole_model_with_functions_as_params_says_what_to_give():
    model = eqx.nn.MLP(6, "scalar", 8, 2, key=jax.random.key(0))
    loss_fn = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)
    params = eqx.filter(model, eqx.is_inexact_array)
    tx = optax.chain(sam_optax.look_sam(0.1), optax.sgd(0.1))
    _, grads, grad_fn = sam_optax.equinox.value_and_grad_fn(loss_fn)(model, jnp.ones((4, 6)))
    with pytest.raises(ValueError, match=r"params must have the structure.*eqx\.filter\(model"):
        tx.update(grads, tx.init(params), model, grad_fn=grad_fn)
    tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
