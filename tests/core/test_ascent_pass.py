"""ascent_fraction and ascent_dtype: the ascent from a part of each group, in another precision."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as ref
import optax
import pytest
from checks import assert_close, assert_same
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from public import build

import sam_optax
import sam_optax.equinox
import sam_optax.nnx

RHO, P = 0.3, PartitionSpec


def loss_fn(params, x, y):
    """Statistics of the batch, and logits of every example."""
    loss = ref.loss(jnp, params, (x, y))
    return loss, (jnp.mean(x, axis=0) * params["b2"], x @ params["w1"])


@pytest.fixture
def problem(x64):
    params, (x, y) = ref.network(examples=16)
    return jax.tree.map(jnp.asarray, params), jnp.asarray(x), jnp.asarray(y)


def by_hand(params, x, y, count):
    """The definition in NumPy: the gradient of the first examples moves w; then all of them."""
    params, x, y = jax.tree.map(np.asarray, (params, x, y))
    g = ref.gradient(params, (x[:count], y[:count]))
    length = np.sqrt(sum((leaf**2).sum() for leaf in g.values()))
    moved = {name: w + RHO * g[name] / length for name, w in params.items()}
    seen = lambda w, x, y: (ref.loss(np, w, (x, y)), (x.mean(0) * w["b2"], x @ w["w1"]))
    passes = {
        "clean": seen(params, x, y),
        "ascent": seen(params, x[:count], y[:count]),
        "perturbed": (ref.loss(np, params, (x, y)), seen(moved, x, y)[1]),
    }
    return passes, ref.gradient(moved, (x, y))


def loop_over_groups(params, x, y, groups, fraction, aux_from="clean"):
    outs = []
    for xs, ys in zip(np.split(x, groups), np.split(y, groups), strict=True):
        passes, g_s = by_hand(params, xs, ys, round(fraction * len(xs)))
        outs.append((passes[aux_from], g_s))
    mean = lambda *leaves: sum(leaves) / groups
    loss, statistics, grads = jax.tree.map(mean, *((out[0], out[1][0], g) for out, g in outs))
    return (loss, (statistics, np.concatenate([out[1][1] for out, _ in outs]))), grads


def sharp(fraction, **options):
    options = {"average_aux": (True, False)} | options
    return sam_optax.value_and_grad(
        loss_fn, sam_optax.sam(RHO), has_aux=True, ascent_fraction=fraction, **options
    )


@pytest.mark.parametrize(
    "fraction, aux_from, wrap",
    [(f, a, jax.jit) for f in (1 / 16, 0.25) for a in ("clean", "ascent", "perturbed")]
    + [(1.0, "ascent", jax.jit), (0.25, "clean", lambda f: f)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_the_ascent_is_of_the_first_examples_and_the_descent_of_all(
    problem, fraction, aux_from, wrap
):
    passes, expected = by_hand(*problem, round(16 * fraction))
    out, grads = wrap(sharp(fraction, aux_from=aux_from))(*problem)
    assert_same((out, grads), (passes[aux_from], expected))


ROUTES = {
    "micro-batches": {"microbatch_size": 4},
    "micro-batches together": {"microbatch_size": 4, "vectorize": 2},
    "shard_map": {"axis_name": "batch", "check_vma": True},
    "shard_map unchecked": {"axis_name": "batch", "check_vma": False},
    "pmap": {"axis_name": "batch"},
    "automatic mesh": {"axis_name": "batch", "kind": AxisType.Auto},
    "explicit mesh": {"axis_name": "batch", "kind": AxisType.Explicit},
    "micro-batches on a mesh": {
        "axis_name": "batch",
        "kind": AxisType.Auto,
        "microbatch_size": 2,
    },
}


@pytest.mark.parametrize("route", ROUTES)
def test_each_group_takes_a_part_of_its_own_examples(problem, route):
    aux_from = "perturbed" if "together" in route or "unchecked" in route else "clean"
    options = dict(ROUTES[route])
    kind, check_vma = options.pop("kind", AxisType.Auto), options.pop("check_vma", None)
    params, x, y = problem
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,), devices=jax.devices()[:4])
    if "mesh" in route:
        options["mesh"] = mesh
        x, y = (jax.device_put(a, NamedSharding(mesh, P("batch"))) for a in (x, y))
    groups = 8 if options.get("microbatch_size") == 2 else 4
    f = sharp(0.5, aux_from=aux_from, **options)
    if check_vma is not None:
        specs = (P(), P("batch"), P("batch"))
        out = ((P(), (P(), P("batch"))), P())
        f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check_vma)
    if route == "pmap":
        x, y = x.reshape(4, 4, -1), y.reshape(4, 4)
        f = jax.pmap(f, axis_name="batch", in_axes=(None, 0, 0), devices=jax.devices()[:4])
        (loss, (statistics, logits)), grads = f(params, x, y)
        loss, statistics, grads = jax.tree.map(lambda a: a[0], (loss, statistics, grads))
    else:
        (loss, (statistics, logits)), grads = jax.jit(f)(params, x, y)
    expected = loop_over_groups(*problem, groups, 0.5, aux_from)
    flat = logits.reshape(16, -1)
    assert_same(((loss, (statistics, flat)), grads), expected)


def test_only_what_batch_argnums_names_is_cut(problem):
    params, x, y = problem
    weights = jnp.arange(1.0, 4.0)  # of features, not of examples

    def weighted(params, weights, x, *, targets, scale):
        return scale * loss_fn(params, weights * x, targets)[0]

    f = sam_optax.value_and_grad(
        *(weighted, sam_optax.sam(RHO)), ascent_fraction=0.25, batch_argnums=(2, "targets")
    )
    passes, expected = by_hand(params, weights * x, y, 4)
    loss, grads = jax.jit(lambda *args: f(*args, targets=y, scale=2.0))(params, weights, x)
    assert_same((loss, grads), (2 * passes["clean"][0], jax.tree.map(lambda g: 2 * g, expected)))


@pytest.mark.parametrize("aux_from", ["clean", "ascent", "perturbed"])
def test_a_lower_precision_moves_the_ascent_alone(aux_from):
    """In bfloat16 w[0] is rounded to 1 and x to 2, so that the ascent sees other numbers."""
    w, x = jnp.float32([1.001, 3.0]), jnp.float32([2.003, 2.0])

    def loss_fn(w, x):
        return jnp.sum((w - 1) ** 2 * x), {"w": w, "x": x}

    f = sam_optax.value_and_grad(  # without jit, as XLA may keep more precision than asked for
        *(loss_fn, sam_optax.sam(RHO)),
        **{"has_aux": True, "aux_from": aux_from, "ascent_dtype": "bfloat16"},
    )
    (loss, aux), grads = f(w, x)
    moved = w + jnp.float32([0, RHO])  # the rounded gradient is [0, 8]
    seen = {"clean": (w, x), "ascent": (jnp.float32([1, 3]), jnp.float32([2, 2]))}
    seen["perturbed"] = (moved, x)
    assert_close(aux, dict(zip("wx", seen[aux_from], strict=True)))
    assert_close(loss, loss_fn(*seen[aux_from if aux_from == "ascent" else "clean"])[0])
    assert_close(grads, 2 * (moved - 1) * x)
    assert {leaf.dtype for leaf in jax.tree.leaves((loss, aux, grads))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["asam", "cr_sam", "gam", "gsam", "multi_step_sam"])
def test_an_ascent_apart_in_the_same_precision_changes_nothing(problem, name):
    """Methods with more passes than two, and those that look at the clean gradient."""
    of = lambda **options: jax.jit(sam_optax.grad(loss_fn, build(name), has_aux=True, **options))
    assert_same(of(ascent_dtype="float64")(*problem), of()(*problem))


def test_all_passes_of_an_ascent_with_several_are_of_the_part(problem):
    """As in the second door with the two functions given by hand."""
    params, x, y = problem
    method = optax.with_extra_args_support(sam_optax.multi_step_sam(RHO, steps=3))
    part, whole = (
        lambda w, count=count: jax.grad(lambda w: loss_fn(w, x[:count], y[:count])[0])(w)
        for count in (4, 16)
    )
    functions = {"grad_fn": part, "descent_grad_fn": whole}
    want, _ = method.update(part(params), method.init(params), params, **functions)
    grads, _ = jax.jit(sam_optax.grad(loss_fn, method, has_aux=True, ascent_fraction=1 / 4))(
        params, x, y
    )
    assert_same(grads, want)


@pytest.mark.parametrize("aux_from", ["clean", "perturbed"])
def test_a_descent_of_the_caller_beside_an_ascent_of_a_part(problem, aux_from):
    """extra_args may bring the gradient function of the descent; loss and aux stay clean."""
    pull = lambda w: jax.tree.map(lambda leaf: 2 * leaf, w)
    f = sharp(0.25, aux_from=aux_from, extra_args={"descent_grad_fn": pull})
    if aux_from == "perturbed":
        with pytest.raises(ValueError, match='aux_from must be "clean" where extra_args'):
            f(*problem)
        return
    passes, _ = by_hand(*problem, 4)
    g = ref.gradient(*jax.tree.map(np.asarray, (problem[0], (problem[1][:4], problem[2][:4]))))
    length = np.sqrt(sum((leaf**2).sum() for leaf in g.values()))
    want = {name: 2 * (w + RHO * g[name] / length) for name, w in problem[0].items()}
    assert_same(jax.jit(f)(*problem), (passes["clean"], want))


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("fraction", [0.5, 0.25, 0.125])
def test_a_part_costs_a_part(fraction):
    """Of the products of one plain gradient, a third of which are those of a forward pass."""
    params, x = jnp.ones((64, 64)) / 64, jnp.ones((128, 64))

    def loss_fn(w, x):  # two products forward, four backward
        loss = jnp.mean((jnp.tanh(x @ w) @ w) ** 2)
        return loss, loss

    def flops(f):
        return jax.jit(f).lower(params, x).compile().cost_analysis()["flops"]

    plain = flops(jax.grad(lambda w, x: loss_fn(w, x)[0]))
    options = {"has_aux": True, "ascent_fraction": fraction}
    sharp = {
        aux_from: sam_optax.value_and_grad(loss_fn, sam_optax.sam(), aux_from=aux_from, **options)
        for aux_from in ("clean", "ascent", "perturbed")
    }
    forward = 2 / 5  # one of the backward products, with respect to x, is not needed
    expected = {"clean": 1 + fraction + forward, "ascent": 1 + fraction}
    for aux_from, gradients in expected.items():
        assert flops(sharp[aux_from]) / plain == pytest.approx(gradients, rel=0.04)
    for f in sharp.values():  # what is not used costs nothing
        assert flops(lambda w, x, f=f: f(w, x)[1]) / plain == pytest.approx(1 + fraction, rel=0.04)
    of_aux = lambda w, x: (sharp["perturbed"](w, x)[0][1], sharp["perturbed"](w, x)[1])
    assert flops(of_aux) / plain == pytest.approx(1 + fraction, rel=0.04)


def test_the_loss_is_traced_once_for_the_part_and_once_for_the_whole(problem):
    traced = []

    def loss(params, x, y):
        traced.append(len(x))
        return loss_fn(params, x, y)

    for aux_from in ("clean", "ascent", "perturbed"):
        traced.clear()
        f = sam_optax.value_and_grad(
            loss, sam_optax.sam(RHO), has_aux=True, aux_from=aux_from, ascent_fraction=0.25
        )
        jax.block_until_ready(jax.jit(f)(*problem))
        assert sorted(traced) == [4, 16]


class Module(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))[:, 0]


@pytest.mark.parametrize(
    "aux_from, dtype",
    [("clean", jnp.bfloat16), ("ascent", None), ("ascent", jnp.bfloat16), ("perturbed", None)],
)
def test_nnx_statistics_are_those_of_the_pass_that_owns_them(aux_from, dtype):
    _, (x, y) = jax.tree.map(functools.partial(jnp.asarray, dtype="float32"), ref.network())
    mse = lambda model, x, y: jnp.mean((model(x) - y) ** 2)
    model, expected = Module(), Module()
    kinds = jax.tree.map(jnp.result_type, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    f = sam_optax.nnx.value_and_grad(
        mse, sam_optax.sam(RHO), aux_from=aux_from, ascent_fraction=0.25, ascent_dtype=dtype
    )
    loss, grads = nnx.jit(f)(model, x, y)

    half = lambda tree: jax.tree.map(lambda a: a.astype(dtype or a.dtype), tree)
    graph, params, rest = nnx.split(Module(), nnx.Param, ...)
    of = lambda w: nnx.merge(graph, w, jax.tree.map(lambda a: a, rest))
    ascent = jax.jit(jax.grad(lambda w: mse(of(half(w)), *half((x[:2], y[:2])))))(params)
    moved = jax.tree.map(lambda w, g: w + RHO * g / optax.tree.norm(ascent), params, ascent)
    want = jax.jit(jax.grad(lambda w: mse(of(w), x, y)))(moved)
    tolerance = 1e-5 if dtype is None else 1e-2
    values = lambda state: nnx.to_pure_dict(state)
    assert_close(values(grads), values(want), rtol=tolerance, atol=tolerance)
    with_params = moved if aux_from == "perturbed" else params
    nnx.update(expected, with_params)
    seen = slice(0, 2) if aux_from == "ascent" else slice(None)
    own = mse(expected, x[seen], y[seen])
    statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    assert_close(statistics, values(nnx.state(expected, nnx.BatchStat)), rtol=1e-5 + tolerance)
    if aux_from != "perturbed":
        assert_close(loss, own, rtol=1e-5 + tolerance)
    assert jax.tree.map(jnp.result_type, statistics) == kinds
    assert model.dropout.rngs.count[...] == 1
    assert_close(model.first.kernel[...], Module().first.kernel[...])


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_equinox_states_are_those_of_the_clean_pass(dtype):
    class Network(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __init__(self):
            self.first = eqx.nn.Linear(3, 1, key=jax.random.key(0))
            self.norm = eqx.nn.BatchNorm(1, "examples", mode="batch")

        def __call__(self, x, state):
            one = lambda x, state: self.norm(self.first(x), state)
            return jax.vmap(one, (0, None), (0, None), axis_name="examples")(x, state)

    def loss(model, state, x, y):
        out, state = model(x, state)
        return jnp.mean((out[:, 0] - y) ** 2), state

    model, state = eqx.nn.make_with_state(Network)()
    _, (x, y) = jax.tree.map(functools.partial(jnp.asarray, dtype="float32"), ref.network())
    clone = lambda state: jax.tree.map(lambda a: a, state)
    f = sam_optax.equinox.value_and_grad(
        loss, sam_optax.sam(RHO), has_aux=True, ascent_fraction=0.5, ascent_dtype=dtype
    )
    (value, after), grads = eqx.filter_jit(f)(model, clone(state), x, y)
    want_value, want_after = loss(model, clone(state), x, y)
    assert_close(value, want_value)
    jax.tree.map(np.testing.assert_allclose, jax.tree.leaves(after), jax.tree.leaves(want_after))
    cast = lambda tree: jax.tree.map(
        lambda a: a.astype(dtype or a.dtype) if eqx.is_inexact_array(a) else a, tree
    )
    ascent = eqx.filter_grad(lambda m: loss(cast(m), clone(state), *cast((x[:4], y[:4])))[0])(model)
    moved = eqx.apply_updates(
        model, jax.tree.map(lambda g: RHO * g / optax.tree.norm(ascent), ascent)
    )
    want = eqx.filter_grad(lambda m: loss(m, clone(state), x, y)[0])(moved)
    assert_close(jax.tree.leaves(grads), jax.tree.leaves(want), rtol=1e-2 if dtype else 1e-5)


def test_options_that_cannot_be(problem):
    params, x, y = problem
    for bad in (0, 1.5, -0.5, float("nan"), "half"):
        with pytest.raises(ValueError, match=r"ascent_fraction must be .*got"):
            sharp(bad)
        with pytest.raises(ValueError, match=r"ascent_fraction must be .*got"):
            sam_optax.nnx.value_and_grad(loss_fn, ascent_fraction=bad)
    for bad in (jnp.int32, "bf17", 3):
        with pytest.raises(ValueError, match=r"ascent_dtype must be a real floating dtype.*got"):
            sharp(1.0, ascent_dtype=bad)
    with pytest.raises(ValueError, match="ascent_fraction must be a number known when building"):
        jax.jit(lambda f: sharp(f)(params, x, y))(0.5)
    for fraction, options, length in ((0.3, {}, 16), (0.25, {"microbatch_size": 2}, 2)):
        message = (
            r"ascent_fraction must make a whole number of the examples of each group.*"
            rf"got {fraction} and a group of {length}"
        )
        with pytest.raises(ValueError, match=message):
            sharp(fraction, **options)(params, x, y)
    jax.eval_shape(sharp(0.7), params, x[:10], y[:10])  # though 0.7 * 10 is no integer in floats
    with pytest.raises(ValueError, match="one common first axis"):
        sharp(0.5)(params, x, y[:8])
    with pytest.raises(ValueError, match="random keys must be typed"):
        with_key = lambda params, x, key: jnp.sum(params["w1"]) + 0 * x[0, 0]
        sam_optax.grad(with_key, ascent_fraction=0.5)(params, x, jax.random.PRNGKey(0))
    for transform in (optax.identity(), optax.clip(1.0)):
        with pytest.raises(ValueError, match="ascent_fraction and ascent_dtype must be left out"):
            sam_optax.grad(lambda *a: loss_fn(*a)[0], transform, ascent_fraction=0.5)(params, x, y)
    always = optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda updates, state, params=None: (True, state)
    )
    skipping = sam_optax.sharpness_aware(sam_optax.dual_ascent(0.1), when=always)
    with pytest.raises(ValueError, match=r"must be left out .*\(a cadence\)"):
        sam_optax.grad(lambda *a: loss_fn(*a)[0], skipping, ascent_fraction=0.5)(params, x, y)
