"""mesh=: groups of devices inside an ordinary jitted step equal a Python loop over the groups."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_same
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax
import sam_optax.equinox
import sam_optax.nnx

RHO = 0.3
METHOD = sam_optax.sam(RHO)
KINDS = [AxisType.Auto, AxisType.Explicit]
# Axes of the mesh, the axis of the groups, how parameters and the batch are placed.
LAYOUTS = {
    "data parallel": ({"data": 8}, "data", {}, P("data")),
    "a batch on all devices": ({"data": 8}, "data", {}, P()),
    "tensor parallel": (
        *({"data": 4, "model": 2}, "data"),
        *({"in": P(None, "model"), "bias": P("model"), "out": P("model")}, P("data")),
    ),
    "HSDP": (
        *({"replica": 2, "fsdp": 4}, "replica"),
        *({"in": P("fsdp"), "bias": P("fsdp"), "out": P("fsdp")}, P(("replica", "fsdp"))),
    ),
    "two axes": ({"replica": 4, "data": 2}, ("replica", "data"), {}, P(("replica", "data"))),
}


def loss_fn(params, x, key, *, train=True):
    """A statistic of the group and its dropout mask, which differs between groups."""
    assert train is True  # a flag, not an array
    whole = jax.tree.map(gathered, params)  # what FSDP does; nothing on automatic axes
    hidden = jnp.tanh(x @ whole["in"] + whole["bias"])
    kept = jax.random.bernoulli(key, 0.8, hidden.shape[1:])
    out = jnp.where(kept, hidden, 0) @ whole["out"]
    return jnp.mean(out**2), (jnp.mean(x, axis=0) * jnp.sum(whole["bias"]), out)


def gathered(w):
    """Whole over the explicit axes, which refuse ambiguous products."""
    spec = jax.typeof(w).sharding.spec
    return jax.sharding.reshard(w, P(*[None] * w.ndim)) if any(spec) else w


@pytest.fixture
def problem(x64):
    rng = np.random.default_rng(0)
    shapes = {"in": (8, 16), "bias": (16,), "out": (16, 4)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 3) for name, shape in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(32, 8))), jax.random.key(3)


def loop_over_groups(problem, keys, method=METHOD):
    """The definition: each group perturbs with its own gradient; then one mean."""
    params, x, _ = problem
    plain = jax.jit(sam_optax.value_and_grad(loss_fn, method, has_aux=True))
    outs = [plain(params, xs, k) for xs, k in zip(np.split(x, len(keys)), keys, strict=True)]
    logits = [out for (_, (_, out)), _ in outs]
    rest = [((loss, statistic), grads) for (loss, (statistic, _)), grads in outs]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(keys), *rest), logits


def folded(key, *numbers):
    keys = [key]
    for n in numbers:
        keys = [jax.random.fold_in(k, i) for k in keys for i in range(n)]
    return keys


def make_mesh(axes, kind):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def placed(layout, kind, problem):
    """mesh, the axis of groups and their number, and the problem on the mesh."""
    axes, names, specs, batch = LAYOUTS[layout]
    mesh = make_mesh(axes, kind)
    params, x, key = problem
    on = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    params = {name: on(w, specs.get(name, P())) for name, w in params.items()}
    groups = int(np.prod([axes[n] for n in ([names] if isinstance(names, str) else names)]))
    return mesh, names, groups, (params, on(x, batch), on(key, P()))


def sharp(mesh, names, method=METHOD, **options):
    options = {"has_aux": True, "average_aux": (True, False)} | options
    return sam_optax.value_and_grad(loss_fn, method, axis_name=names, mesh=mesh, **options)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [None, 2])
def test_equals_the_loop_over_groups(problem, layout, kind, size):
    mesh, names, groups, own = placed(layout, kind, problem)
    step = jax.jit(functools.partial(sharp(mesh, names, microbatch_size=size), train=True))
    (loss, (statistic, logits)), grads = step(*own)
    numbers = (groups,) if size is None else (groups, 32 // groups // size)
    expected, outs = loop_over_groups(problem, folded(problem[-1], *numbers))
    assert_same(jax.device_get(((loss, statistic), grads)), expected)
    # Joined along their first axis: of examples, or of micro-batches.
    outs = np.concatenate(outs) if size is None else np.stack(outs)
    assert_same(jax.device_get(logits), outs)
    if kind == AxisType.Explicit:  # on automatic axes the partitioner decides, as for jax.grad
        for name, w in own[0].items():
            assert grads[name].sharding.is_equivalent_to(w.sharding, w.ndim)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("context", [False, True])
def test_outside_of_jit_and_with_the_mesh_in_context(problem, kind, context):
    mesh, names, groups, own = placed("HSDP", kind, problem)
    expected, _ = loop_over_groups(problem, folded(problem[-1], groups))
    if context:
        with jax.set_mesh(mesh):
            (loss, (statistic, _)), grads = jax.jit(sharp(mesh, names))(*own)
    else:
        (loss, (statistic, _)), grads = sharp(mesh, names)(*own)
    assert_same(jax.device_get(((loss, statistic), grads)), expected)


def test_the_perturbation_is_not_the_shared_one(problem):
    mesh, names, groups, own = placed("data parallel", AxisType.Auto, problem)
    shared = optax.chain(sam_optax.pmean("data"), METHOD)
    grads, together = (jax.jit(sharp(mesh, names, m))(*own)[1] for m in (METHOD, shared))
    assert max(np.abs(grads[n] - together[n]).max() for n in grads) > 1e-3
    # The shared one by hand.
    keys, parts = folded(problem[-1], groups), np.split(problem[1], groups)
    mean = lambda w: jax.tree.map(
        lambda *g: sum(g) / groups,
        *(jax.grad(loss_fn, has_aux=True)(w, x, k)[0] for x, k in zip(parts, keys, strict=True)),
    )
    g = mean(problem[0])
    e = jax.tree.map(lambda g, norm=optax.tree.norm(g): RHO * g / norm, g)
    assert_same(jax.device_get(together), mean(optax.apply_updates(problem[0], e)))


def test_a_traced_radius_and_a_loss_that_scans(problem):
    """Replication checking would refuse the scan, which starts from zeros that do not vary."""
    mesh, names, groups, (params, x, _) = placed("data parallel", AxisType.Auto, problem)

    def loss(params, x):
        total, _ = jax.lax.scan(lambda t, row: (t + row @ params["in"], None), jnp.zeros(16), x)
        return jnp.sum(jnp.tanh(total + params["bias"]) ** 2)

    @jax.jit
    def step(rho, params, x):
        return sam_optax.grad(loss, sam_optax.sam(rho), axis_name=names, mesh=mesh)(params, x)

    plain = sam_optax.grad(loss, METHOD)
    outs = [plain(problem[0], xs) for xs in np.split(problem[1], groups)]
    assert_same(step(RHO, params, x), jax.tree.map(lambda *g: sum(g) / groups, *outs))


def test_half_precision_beside_other_axes():
    """XLA ends the process if it is left to sum bfloat16 there on a CPU."""
    mesh = make_mesh({"data": 4, "model": 2}, AxisType.Auto)
    w, x = jnp.eye(4, dtype=jnp.bfloat16), jnp.arange(64, dtype=jnp.bfloat16).reshape(16, 4) / 64
    loss = lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2)
    out = jax.jit(sam_optax.grad(loss, METHOD, axis_name="data", mesh=mesh))(w, x)
    plain = jax.jit(sam_optax.grad(loss, METHOD))
    expected = np.mean([np.float32(plain(w, xs)) for xs in jnp.split(x, 4)], axis=0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), expected, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_training_step_compiles_once(problem, kind):
    mesh, names, _, (params, x, key) = placed("HSDP", kind, problem)
    traces = []

    def counted(*args):
        traces.append(1)
        return loss_fn(*args)

    def step(params, x, key):
        f = sam_optax.grad(counted, METHOD, axis_name=names, mesh=mesh, has_aux=True)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, f(params, x, key)[0])

    layout = jax.tree.map(lambda w: w.sharding, params)
    step = jax.jit(step, out_shardings=layout, donate_argnums=0)
    params = step(params, x, key)
    for _ in range(2):
        params = step(params, x, key)
    assert len(traces) == 1 >= step._cache_size()


def moved(compiled, kind):
    """Elements that the collectives of a kind of a compiled program produce."""
    import re

    lines = re.findall(rf"= (.*?) {kind}(?:-start)?\(", compiled.as_text())
    shapes = [s for line in lines for s in re.findall(r"[a-z]\d+\[([\d,]*)\]", line)]
    return sum(int(np.prod([int(n) for n in s.split(",") if n] or [1])) for s in shapes)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("optimised")
def test_one_parameter_volume_is_all_reduced(problem, kind):
    mesh, names, _, own = placed("data parallel", kind, problem)
    size = sum(w.size for w in jax.tree.leaves(own[0]))
    compiled = jax.jit(sharp(mesh, names)).lower(*own).compile()
    assert moved(compiled, "all-reduce") == size + 1 + 8  # the loss and the statistic
    assert moved(compiled, "all-gather") == moved(compiled, "all-to-all") == 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("options", [{}, {"vectorize": 2}, {"vectorize": True}], ids=str)
@pytest.mark.usefixtures("optimised")
def test_micro_batches_of_a_device_stay_there(problem, kind, options):
    """Evaluated together too: nothing of the batch moves, on explicit axes either."""
    mesh, names, _, own = placed("data parallel", kind, problem)
    size = sum(w.size for w in jax.tree.leaves(own[0]))
    f = sharp(mesh, names, microbatch_size=1, **options)
    compiled = jax.jit(f).lower(*own).compile()
    assert moved(compiled, "all-reduce") == size + 1 + 8
    assert moved(compiled, "all-gather") == moved(compiled, "all-to-all") == 0
    (loss, (statistic, _)), grads = jax.jit(f)(*own)
    expected, _ = loop_over_groups(problem, folded(problem[-1], 8, 4))
    assert_same(jax.device_get(((loss, statistic), grads)), expected)


# JAX 0.9 draws from no keys that are spread over explicit axes.
DRAWS = KINDS[: 1 if jax.__version_info__ < (0, 10) else None]


@pytest.mark.parametrize("kind", DRAWS, ids=str)
@pytest.mark.parametrize("size, together", [(4, True), (1, 16)], ids=str)
@pytest.mark.usefixtures("optimised")
def test_groups_evaluated_together_stay_on_their_devices(problem, kind, size, together):
    """Without mesh=: of a batch that jit shards nothing moves, whatever groups take turns."""
    *_, (params, x, key) = placed("data parallel", kind, problem)
    volume = sum(w.size for w in jax.tree.leaves(params))
    options = {"microbatch_size": size, "vectorize": together, "average_aux": (True, False)}
    step = jax.jit(sam_optax.value_and_grad(loss_fn, METHOD, has_aux=True, **options))
    compiled = step.lower(params, x, key).compile()
    assert moved(compiled, "all-reduce") == volume + 1 + 8  # the loss and the statistic
    for other in ("all-gather", "all-to-all", "collective-permute"):
        assert moved(compiled, other) == 0
    (loss, (statistic, logits)), grads = compiled(params, x, key)
    expected, outs = loop_over_groups(problem, folded(problem[-1], 32 // size))
    assert_same(jax.device_get(((loss, statistic), grads)), expected)
    assert_same(jax.device_get(logits), np.stack(outs))


@pytest.mark.parametrize("kind", DRAWS, ids=str)
@pytest.mark.parametrize("names", ["replica", ("replica", "data")], ids=str)
def test_fewer_groups_together_than_devices(problem, kind, names):
    """The examples of a group are on several devices; one of the arguments is on all."""
    mesh, _, _, (params, x, key) = placed("two axes", kind, problem)
    x = jax.device_put(x, NamedSharding(mesh, P(names)))
    rows = jax.device_put(np.arange(32.0), NamedSharding(mesh, P()))

    def loss(params, rows, x, key):
        value, (statistic, out) = loss_fn(params, x, key)
        return value, (statistic, (rows, out))

    options = {"microbatch_size": 4, "vectorize": 4, "average_aux": (True, False)}
    f = sam_optax.value_and_grad(loss, METHOD, has_aux=True, **options)
    expected, outs = loop_over_groups(problem, folded(problem[-1], 8))
    for step in (jax.jit(f), f):
        (loss, (statistic, (rows_of, logits))), grads = step(params, rows, x, key)
        assert_same(jax.device_get(((loss, statistic), grads)), expected)
        assert_same(jax.device_get(logits), np.stack(outs))
        np.testing.assert_array_equal(jax.device_get(rows_of), np.arange(32.0).reshape(8, 4))


def hsdp_loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"]) ** 2)


@pytest.mark.usefixtures("optimised")
def test_hsdp_moves_over_the_outer_axis_what_sgd_moves():
    """Parameters cut over the inner axis, a perturbation for each group of the outer one.

    XLA writes the scatter of gradients on a CPU as an all-reduce of a whole volume within a
    group; between groups moves the part of a volume that a device holds.
    """
    mesh = make_mesh({"replica": 2, "fsdp": 4}, AxisType.Auto)
    cut = NamedSharding(mesh, P("fsdp"))
    params = jax.device_put({"in": jnp.ones((64, 256)), "out": jnp.ones((256, 64))}, cut)
    x = jax.device_put(jnp.ones((512, 64)), NamedSharding(mesh, P(("replica", "fsdp"))))
    volume = 2 * 64 * 256
    group = {"axis_name": "replica", "mesh": mesh}
    counts, memory = {}, {}
    for name, f in {
        "SGD": jax.grad(hsdp_loss),
        "SGD by groups": sam_optax.grad(hsdp_loss, optax.identity(), **group),
        "shared": sam_optax.grad(hsdp_loss, METHOD),
        "group": sam_optax.grad(hsdp_loss, METHOD, **group),
    }.items():
        compiled = jax.jit(f, out_shardings=jax.tree.map(lambda _: cut, params))
        compiled = compiled.lower(params, x).compile()
        kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
        counts[name] = np.array([moved(compiled, kind) for kind in kinds]) / volume
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
    scalars = 10 / volume  # norms
    np.testing.assert_allclose(counts["SGD"], [1 + 1 / 4, 1, 0, 0], atol=scalars)
    np.testing.assert_allclose(counts["SGD by groups"], counts["SGD"], atol=scalars)
    np.testing.assert_allclose(counts["shared"], [2 + 2 / 4, 2, 0, 0], atol=scalars)
    np.testing.assert_allclose(counts["group"], [2 + 1 / 4, 2, 0, 0], atol=scalars)
    assert memory["group"] <= 1.05 * memory["SGD"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_second_door_shares_one_perturbation(problem, kind):
    """Means over groups, as with microbatch_size; keys and statistics are each group's own."""
    mesh, names, groups, own = placed("HSDP", kind, problem)
    options = {"axis_name": names, "mesh": mesh, "has_aux": True, "average_aux": (True, False)}
    traces = []

    def counted(*args):
        traces.append(1)
        return loss_fn(*args)

    evaluate = sam_optax.value_and_grad_fn(counted, **options)

    @functools.partial(jax.jit, static_argnames="tx")
    def step(params, x, key, tx):
        (loss, (statistic, _)), grads, grad_fn = evaluate(params, x, key)
        out = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)[0]
        return (loss, statistic), out

    keys, parts = folded(problem[-1], groups), np.split(problem[1], groups)
    mean = lambda w: jax.tree.map(
        lambda *g: sum(g) / groups,
        *(jax.grad(loss_fn, has_aux=True)(w, x, k)[0] for x, k in zip(parts, keys, strict=True)),
    )
    g = mean(problem[0])
    e = jax.tree.map(lambda g, norm=optax.tree.norm(g): RHO * g / norm, g)
    value, out = step(*own, tx=METHOD)
    assert len(traces) == 1
    assert_same(jax.device_get(out), mean(optax.apply_updates(problem[0], e)))
    clean, _ = loop_over_groups(problem, keys, optax.identity())
    assert_same(jax.device_get(value), clean[0])
    with pytest.raises(NameError, match=r"axis_name must be an axis of the .*needs no pmean"):
        step(*own, tx=optax.chain(METHOD, sam_optax.pmean(names)))


@pytest.mark.parametrize("call", [sam_optax.value_and_grad, sam_optax.value_and_grad_fn])
def test_errors(problem, call):
    mesh, _, _, (params, x, key) = placed("tensor parallel", AxisType.Explicit, problem)
    with pytest.raises(ValueError, match=r"axis_name must name the axes of mesh.*got None"):
        call(loss_fn, mesh=mesh)
    with pytest.raises(ValueError, match=r"axis_name must be an axis of mesh.*got 'date'"):
        call(loss_fn, mesh=mesh, axis_name=("data", "date"))
    with pytest.raises(ValueError, match=r"mesh must be a jax.sharding.Mesh, got 'data'"):
        call(loss_fn, mesh="data", axis_name="data")
    f = call(loss_fn, mesh=mesh, axis_name="data", has_aux=True)
    with pytest.raises(ValueError, match=r"must divide the batch.*4 groups, got a batch of 30"):
        f(params, problem[1][:30], key)
    with pytest.raises(ValueError, match="random keys must be typed"):
        f(params, x, jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="must name at least one array to split"):
        f(params, x=x, key=key)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("jit", [True, False])
def test_parameters_sharded_over_the_axis_of_groups(problem, kind, jit):
    """Refused where it can be seen; else they are gathered, and the numbers are right."""
    mesh, _, _, own = placed("tensor parallel", kind, problem)
    f = sharp(mesh, "model")
    f = jax.jit(f) if jit else f
    if jit and kind == AxisType.Auto:
        (loss, (statistic, _)), grads = f(*own)
        expected, _ = loop_over_groups(problem, folded(problem[-1], 2))
        assert_same(jax.device_get(((loss, statistic), grads)), expected)
        return
    message = r"params must be whole.*another axis.*out_shardings.*over 'model' at \['bias'\]"
    with pytest.raises(ValueError, match=message):
        f(*own)


# Losses that gather.


def whole(w):
    return jax.lax.all_gather(w, "data", axis=w.ndim - 2, tiled=True)


@jax.custom_vjp
def gathered_by_hand(w):
    return whole(w)


def scattered(_, g):
    return (jax.lax.psum_scatter(g, "data", scatter_dimension=g.ndim - 2, tiled=True),)


gathered_by_hand.defvjp(lambda w: (whole(w), None), scattered)


def layers(gather, w, x):
    for v in w:
        x = jnp.tanh(x @ gather(v))
    return jnp.mean(x**2)


def scanned(w, x):
    block = jax.checkpoint(lambda x, v: (jnp.tanh(x @ whole(v)), None))
    return jnp.mean(jax.lax.scan(block, x, w)[0] ** 2)


def in_half_precision(w, x):
    half, x = jax.jit(lambda w, x: (w.astype(jnp.float16), x))(w, x)
    return layers(whole, half.astype(float), x)


GATHER = {
    "layers": functools.partial(layers, whole),
    "scan": scanned,
    "custom_vjp": functools.partial(layers, gathered_by_hand),
    "cast": in_half_precision,
    "cond": lambda w, x: jax.lax.cond(
        jnp.sum(x) > 0, functools.partial(layers, whole), lambda w, x: jnp.sum(w), w, x
    ),
}


def contrast(w, x):
    """Of examples with those of all devices."""
    z = jnp.tanh(x @ w[0, 0])
    return jnp.mean((z - jnp.mean(jax.lax.all_gather(z, "data", tiled=True))) ** 2)


def carried(w, x):
    """Starts from a parameter, and is made of activations from the second turn on."""

    def turn(h, row):
        return h + row, jax.lax.all_gather(h, "data")

    return jnp.mean(jax.lax.scan(turn, w[0, 0], x)[1] ** 2)


def traced(loss, door, axis_name):
    """On devices that each hold a part of w."""
    mesh = make_mesh({"data": 8}, AxisType.Auto)

    def gradient(w, x):
        if door == "first":
            return sam_optax.grad(loss, METHOD, axis_name=axis_name)(w, x)
        size = 1 if door == "micro-batches" else None
        f = sam_optax.value_and_grad_fn(loss, axis_name=axis_name, microbatch_size=size)
        return f(w, x)[1]

    part = P(None, "data")
    mapped = jax.shard_map(
        gradient, mesh=mesh, in_specs=(part, P("data")), out_specs=part, check_vma=False
    )
    return jax.eval_shape(mapped, jnp.ones((4, 16, 16)), jnp.ones((16, 16)))


@pytest.mark.parametrize("loss", GATHER)
@pytest.mark.parametrize("door", ["first", "second", "micro-batches"])
def test_a_loss_that_gathers_its_parameters_is_refused(loss, door):
    """Also without axis_name: the perturbation would have the norm of a shard."""
    for axis_name in ("data", None):
        message = r"must not gather parameters.*another axis.*all_gather of params over 'data'"
        with pytest.raises(ValueError, match=message):
            traced(GATHER[loss], door, axis_name)


@pytest.mark.parametrize("loss", [contrast, carried])
@pytest.mark.parametrize("door", ["first", "second", "micro-batches"])
def test_a_loss_may_gather_activations(loss, door):
    assert traced(loss, door, "data").shape == (4, 16, 16)


def test_gathered_activations_are_differentiated_rightly(problem):
    """Each device's own gradient holds what its examples do to the losses of the others."""
    w, x = problem[0]["in"][None, None], problem[1]

    def loss(w, x):
        z = jnp.tanh(x @ w[0, 0])
        return jnp.mean((z - jnp.mean(jax.lax.all_gather(z, "data", tiled=True))) ** 2)

    def alone(w, x):
        z = jnp.tanh(x @ w[0, 0])
        return jnp.mean((z - jnp.mean(z)) ** 2)

    mesh = make_mesh({"data": 8}, AxisType.Auto)
    f = sam_optax.grad(loss, optax.identity(), axis_name="data", mesh=mesh)
    assert_same(jax.device_get(jax.jit(f)(w, x)), jax.grad(alone)(w, x))


# Modules.


class Module(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs, param_dtype=float)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs, param_dtype=float)
        for statistic in (self.norm.mean, self.norm.var):
            statistic.set_value(statistic[...].astype(float))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(16, 1, rngs=rngs, param_dtype=float)

    def __call__(self, x):
        return self.last(self.dropout(jnp.tanh(self.norm(self.first(x)))))[:, 0]


def nnx_loss(model, x):
    out = model(x)
    return jnp.mean((out - x[:, 0]) ** 2), out


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nnx_with_batch_norm_and_dropout(problem, kind):
    x, groups = problem[1], 8
    mesh = make_mesh({"data": groups}, kind)
    options = {"axis_name": "data", "mesh": mesh, "has_aux": True, "average_aux": False}

    def own_keys(model, i):
        for _, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.RngKey):
                variable[...] = jax.random.fold_in(variable[...], i)
        return model

    plain = sam_optax.nnx.value_and_grad(nnx_loss, METHOD, has_aux=True)
    outs, stats = [], []
    for i, xs in enumerate(np.split(x, groups)):
        model = own_keys(Module(nnx.Rngs(0)), i)
        outs.append(plain(model, xs))
        stats.append(jax.tree.leaves(nnx.state(model, nnx.BatchStat)))
    mean = lambda *leaves: sum(leaves) / groups
    loss, grads = jax.tree.map(mean, *[(loss, jax.tree.leaves(g)) for (loss, _), g in outs])

    model = Module(nnx.Rngs(0))
    before = nnx.clone(model)
    replicated = jax.device_put(nnx.state(model), NamedSharding(mesh, P()))
    nnx.update(model, replicated)
    f = sam_optax.nnx.value_and_grad(nnx_loss, METHOD, **options)
    step = nnx.jit(lambda model, x: f(model, x))
    own_x = jax.device_put(x, NamedSharding(mesh, P("data")))
    (own_loss, logits), own_grads = step(model, own_x)
    own = jax.device_get(
        (own_loss, jax.tree.leaves(own_grads), jax.tree.leaves(nnx.state(model, nnx.BatchStat)))
    )
    assert_same(own, (loss, grads, jax.tree.map(mean, *stats)))
    assert_same(jax.device_get(logits), np.concatenate([out for (_, out), _ in outs]))
    # The stream has moved once and its key is the one it had; every device says so.
    assert model.dropout.rngs.count[...] == before.dropout.rngs.count[...] + 1
    data = jax.random.key_data(model.dropout.rngs.key[...])
    for shard in data.addressable_shards:
        np.testing.assert_array_equal(shard.data, jax.random.key_data(before.dropout.rngs.key[...]))
    step(model, own_x)  # what came back goes in again


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nnx_with_groups_evaluated_together(problem, kind):
    """Counts, alike in all groups, are spread with these over explicit axes."""
    options = {"microbatch_size": 2, "vectorize": 8, "has_aux": True, "average_aux": False}
    f = sam_optax.nnx.value_and_grad(nnx_loss, METHOD, **options)
    plain, own = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    expected = nnx.jit(lambda model, x: f(model, x))(plain, problem[1])
    mesh = make_mesh({"data": 8}, kind)
    nnx.update(own, jax.device_put(nnx.state(own), NamedSharding(mesh, P())))
    x = jax.device_put(problem[1], NamedSharding(mesh, P("data")))
    out = nnx.jit(lambda model, x: f(model, x))(own, x)
    assert_same(jax.device_get(jax.tree.leaves(out)), jax.tree.leaves(expected))
    stats = [jax.tree.leaves(nnx.state(m, nnx.BatchStat)) for m in (own, plain)]
    assert_same(*jax.device_get(stats))
    assert own.dropout.rngs.count[...] == plain.dropout.rngs.count[...] > 0


def test_nnx_second_door_and_metrics(problem):
    x, mesh = problem[1], make_mesh({"data": 8}, AxisType.Auto)
    options = {"axis_name": "data", "mesh": mesh, "has_aux": True, "average_aux": False}
    model, other = Module(nnx.Rngs(0)), Module(nnx.Rngs(0))
    f = sam_optax.nnx.value_and_grad(nnx_loss, optax.identity(), **options)
    g = sam_optax.nnx.value_and_grad_fn(nnx_loss, **options)
    out = nnx.jit(lambda m, x: g(m, x)[:2])(model, x)
    assert_same(*(jax.tree.leaves(o) for o in (out, nnx.jit(lambda m, x: f(m, x))(other, x))))
    with pytest.raises(ValueError, match="metrics must be updated after the call"):
        f(model, x, nnx.metrics.Average())


class Network(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    last: eqx.nn.Linear
    steps: eqx.nn.StateIndex

    def __init__(self, key):
        self.first = eqx.nn.Linear(8, 16, key=key)
        self.norm = eqx.nn.BatchNorm(16, "examples", mode="batch", momentum=0.9)
        self.last = eqx.nn.Linear(16, 1, key=key)
        self.steps = eqx.nn.StateIndex((jnp.asarray(0), jax.random.key(5)))

    def __call__(self, x, state):
        norm = jax.vmap(self.norm, (0, None), (0, None), axis_name="examples")
        x, state = norm(jax.vmap(self.first)(x), state)
        count, key = state.get(self.steps)
        state = state.set(self.steps, (count + 1, jax.random.split(key)[0]))
        return jax.vmap(self.last)(jnp.tanh(x))[:, 0], state


def eqx_loss(model, state, x):
    out, state = model(x, state)
    return jnp.mean((out - x[:, 0]) ** 2), (state, out)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equinox_with_a_state(problem, kind):
    x, groups = problem[1], 8
    mesh = make_mesh({"data": groups}, kind)
    model, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    clone = lambda: jax.tree.map(lambda x: x, state)
    plain = sam_optax.equinox.value_and_grad(eqx_loss, METHOD, has_aux=True)
    outs = [plain(model, clone(), xs) for xs in np.split(x, groups)]
    floats = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    mean = lambda *leaves: sum(leaves) / groups
    expected = jax.tree.map(mean, *[floats((loss, s, g)) for (loss, (s, _)), g in outs])

    f = sam_optax.equinox.value_and_grad(
        eqx_loss, METHOD, has_aux=True, axis_name="data", mesh=mesh, average_aux=False
    )
    own_x = jax.device_put(x, NamedSharding(mesh, P("data")))
    (loss, (new, out)), grads = eqx.filter_jit(f)(model, clone(), own_x)
    assert_same(jax.device_get(floats((loss, new, grads))), expected)
    assert_same(jax.device_get(out), np.concatenate([o for (_, (_, o)), _ in outs]))
    # What is no float is the first group's, on every device.
    count, key = new.get(model.steps)
    assert count == 1
    first = jax.random.split(jax.random.fold_in(state.get(model.steps)[1], 0))[0]
    for shard in jax.random.key_data(key).addressable_shards:
        np.testing.assert_array_equal(shard.data, jax.random.key_data(first))
