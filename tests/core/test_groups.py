"""m-sharpness: micro-batches and mapped axes equal a plain Python loop over the groups."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as ref
import optax
import pytest
from checks import assert_same
from jax.sharding import AxisType, PartitionSpec

import sam_optax
from sam_optax import _axes

METHOD = sam_optax.asam(0.3)


def loss_fn(params, x, y, *, weight=1.0):
    loss = weight * ref.loss(jnp, params, (x, y))
    return loss, {"statistics": jnp.mean(x, axis=0) * params["b2"]}


@pytest.fixture
def problem(x64):
    params, (x, y) = ref.network(examples=16)
    return jax.tree.map(jnp.asarray, params), jnp.asarray(x), jnp.asarray(y)


def loop_over_groups(params, x, y, groups):
    """The definition: each group perturbs with its own gradient, then one mean."""
    total = None
    for xs, ys in zip(jnp.split(x, groups), jnp.split(y, groups), strict=True):
        (loss, aux), g = jax.value_and_grad(loss_fn, has_aux=True)(params, xs, ys)
        e = ref.ascent(
            jax.tree.map(np.asarray, g),
            ref.operator("elementwise", jax.tree.map(np.asarray, params), 0.01, False),
            0.3,
            2.0,
        )
        _, g_s = jax.value_and_grad(loss_fn, has_aux=True)(optax.apply_updates(params, e), xs, ys)
        out = ((loss, aux), g_s)
        total = out if total is None else jax.tree.map(jnp.add, total, out)
    return jax.tree.map(lambda t: t / groups, total)


def sharp(**options):
    return sam_optax.value_and_grad(loss_fn, METHOD, has_aux=True, **options)


def mesh():
    return jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))


def shard_mapped(f, check_vma):
    P = PartitionSpec
    return jax.jit(
        jax.shard_map(
            f,
            mesh=mesh(),
            in_specs=(P(), P("batch"), P("batch")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )


def over_leading_axis(transform, f, groups=8):
    def mapped(params, x, y):
        split = lambda a: a.reshape(groups, -1, *a.shape[1:])
        f_mapped = transform(f, axis_name="batch", in_axes=(None, 0, 0), out_axes=None)
        return f_mapped(params, split(x), split(y))

    return mapped


@pytest.mark.parametrize(
    "wrap, size, unroll",
    [(jax.jit, size, unroll) for size in (1, 4, 16) for unroll in (1, True)]
    + [(jax.jit, 4, 2), (lambda f: f, 4, 1)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_microbatches(problem, size, unroll, wrap):
    params, x, y = problem
    out = wrap(sharp(microbatch_size=size, unroll=unroll))(params, x, y)
    assert_same(out, loop_over_groups(params, x, y, 16 // size))


ROUTES = {
    "pmap": lambda f: over_leading_axis(jax.pmap, f),
    "vmap": lambda f: over_leading_axis(jax.vmap, f),
    "shard_map": lambda f: shard_mapped(f, True),
    "shard_map unchecked": lambda f: shard_mapped(f, False),
}


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("size", [None, 1])
def test_devices_and_both_together(problem, route, size):
    params, x, y = problem
    out = route(sharp(axis_name="batch", microbatch_size=size))(params, x, y)
    assert_same(out, loop_over_groups(params, x, y, 8 if size is None else 16))


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("synchronised", [False, True])
def test_pmean_in_a_chain(problem, route, synchronised):
    """After sam: per-device m-sharpness. Also inside the ascent: one shared perturbation."""
    params, x, y = problem
    rule = sam_optax.dual_ascent(0.3, normalization=sam_optax.elementwise())
    ascent = optax.chain(sam_optax.pmean("batch"), rule) if synchronised else rule
    tx = optax.chain(sam_optax.sharpness_aware(ascent), sam_optax.pmean("batch"))

    def step(params, x, y):
        grad_fn = lambda w: jax.grad(loss_fn, has_aux=True)(w, x, y)[0]
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

    def varied(params, x, y):
        # Under replication checking JAX sums the gradient of what does not vary.
        return step(_axes.vary(params, "batch"), x, y)

    expected = loop_over_groups(params, x, y, 1 if synchronised else 8)[1]
    assert_same(route(varied)(params, x, y), expected)


def all_reduced_elements(compiled):
    """Elements moved by all-reduces of a compiled program (operations may be merged)."""
    import re

    total = 0
    for line in compiled.as_text().splitlines():
        found = re.search(r"= (.*) all-reduce(-start)?\(", line)
        if found:
            for shape in re.findall(r"[a-z]\d+\[([\d,]*)\]", found.group(1)):
                total += int(np.prod([int(n) for n in shape.split(",") if n] or [1]))
    return total


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.usefixtures("optimised")
def test_one_parameter_volume_is_all_reduced(problem, check_vma):
    params, x, y = problem
    size = sum(w.size for w in jax.tree.leaves(params))
    compiled = shard_mapped(sharp(axis_name="batch"), check_vma).lower(params, x, y).compile()
    extras = 1 + 3  # the loss and the statistics
    assert all_reduced_elements(compiled) == size + extras


def test_loss_is_traced_once(problem):
    traces = []

    def counted(*args):
        traces.append(1)
        return loss_fn(*args)

    for options in ({"microbatch_size": 4}, {"microbatch_size": 4, "unroll": True}):
        traces.clear()
        jax.jit(sam_optax.grad(counted, METHOD, has_aux=True, **options))(*problem)
        assert len(traces) == 1


@pytest.mark.usefixtures("optimised")
def test_memory_does_not_grow_with_the_groups(problem):
    params = {"w": jnp.ones((64, 64))}

    def temp(groups):
        step = sam_optax.grad(
            lambda p, x: jnp.mean(jnp.tanh(x @ p["w"]) ** 2), METHOD, microbatch_size=8
        )
        compiled = jax.jit(step).lower(params, jnp.ones((8 * groups, 64))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp(64) <= 1.05 * temp(4)


def test_only_named_arguments_are_split(problem):
    params, x, y = problem

    def loss(params, x, statistics, *, y):
        assert statistics.shape == (16,) and x.shape[0] == y.shape[0] == 4
        return ref.loss(jnp, params, (x, y)) + 0 * jnp.sum(statistics)

    step = sam_optax.value_and_grad(loss, METHOD, microbatch_size=4, batch_argnums=(1, "y"))
    loss, grads = step(params, x, jnp.ones(16), y=y)
    (expected, _), expected_grads = loop_over_groups(params, x, y, 4)
    assert_same((loss, grads), (expected, expected_grads))


def test_pytrees_scalars_and_keys_among_the_arguments(problem):
    """Keys are folded with the index of the group; scalars are shared."""
    params, x, y = problem
    key = jax.random.key(3)

    def loss(params, batch, key, weight):
        noise = jax.random.normal(key, ())
        return (weight + noise) * ref.loss(jnp, params, (batch["x"], batch["y"]))

    step = sam_optax.value_and_grad(loss, sam_optax.sam(0.2), microbatch_size=8)
    out = jax.jit(step)(params, {"x": x, "y": y}, key, 2.0)
    plain = sam_optax.value_and_grad(loss, sam_optax.sam(0.2))
    halves = [
        plain(params, {"x": x[s], "y": y[s]}, jax.random.fold_in(key, i), 2.0)
        for i, s in enumerate((slice(0, 8), slice(8, 16)))
    ]
    assert_same(out, jax.tree.map(lambda a, b: (a + b) / 2, *halves))


def test_both_passes_of_a_group_share_the_key(problem):
    params, x, _ = problem
    drawn = []

    def loss(params, x, key):
        noise = jax.random.normal(key, ())
        jax.debug.callback(lambda n: drawn.append(float(n)), noise)
        return jnp.mean(params["b2"] * x) + jnp.sum(params["b2"] ** 2)

    step = jax.jit(sam_optax.grad(loss, sam_optax.sam(0.2), microbatch_size=8))
    jax.block_until_ready(step(params, x, jax.random.key(0)))
    jax.effects_barrier()
    assert len(drawn) == 4 and len(set(drawn)) == 2


def test_aux_stacked_on_request_and_integers_refused(problem):
    params, x, y = problem

    def loss(params, x, y):
        value = ref.loss(jnp, params, (x, y))
        return value, {"index": jnp.arange(4), "rows": x}

    with pytest.raises(TypeError, match=r"aux must be floating.*got int\d+ at aux\['index'\]"):
        sam_optax.grad(loss, METHOD, has_aux=True, microbatch_size=4)(params, x, y)
    step = sam_optax.grad(loss, METHOD, has_aux=True, microbatch_size=4, average_aux=False)
    _, aux = step(params, x, y)
    np.testing.assert_array_equal(aux["index"], np.tile(np.arange(4), (4, 1)))
    np.testing.assert_array_equal(aux["rows"].reshape(16, -1), x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"microbatch_size": 5}, "microbatch_size 5 and a batch of 16"),
        ({"microbatch_size": 4, "batch_argnums": 3}, "batch_argnums must be positions.*got 3"),
        ({"microbatch_size": 4, "batch_argnums": "z"}, "batch_argnums must be positions.*got 'z'"),
        ({"microbatch_size": 4, "vectorize": 3}, "vectorize 3 and 4 groups"),
        ({"microbatch_size": 4, "vectorize": 0}, "vectorize must be at least 1, got 0"),
        ({"microbatch_size": 4, "batch_argnums": ()}, "batch_argnums must name at least one array"),
        ({"microbatch_size": 4}, r"one common first axis to split, got lengths \[16, 15\]"),
    ],
)
def test_errors(problem, options, message):
    params, x, y = problem
    y = y[:15] if "lengths" in message else y
    with pytest.raises(ValueError, match=message):
        sharp(**options)(params, x, y)


@pytest.mark.parametrize(
    "size, options",
    [(4, {"vectorize": 2}), (2, {"vectorize": True}), (2, {"vectorize": 4, "unroll": True})],
    ids=str,
)
def test_groups_evaluated_together(problem, size, options):
    params, x, y = problem
    out = jax.jit(sharp(microbatch_size=size, **options))(params, x, y)
    assert_same(out, loop_over_groups(params, x, y, 16 // size))


def test_stacked_aux_of_groups_evaluated_together(problem):
    params, x, y = problem

    def loss(params, x, y):
        return ref.loss(jnp, params, (x, y)), x

    options = {"microbatch_size": 2, "vectorize": 4, "average_aux": False}
    _, aux = jax.jit(sam_optax.grad(loss, METHOD, has_aux=True, **options))(params, x, y)
    np.testing.assert_array_equal(aux, x.reshape(8, 2, -1))


def compiled_loop(loss, x, **options):
    step = sam_optax.grad(loss, sam_optax.sam(0.1), microbatch_size=4, **options)
    return jax.jit(step).lower(jnp.full((3, 3, 2, 2), 0.1), x).compile()


@pytest.mark.usefixtures("optimised")
def test_convolutions_on_cpu_are_written_out_of_the_loop():
    """Inside of a loop XLA compiles their gradient to something 10 to 30 times slower."""

    def convolved(w, x):
        return jnp.mean(jax.lax.conv(x, w.transpose(), (1, 1), "SAME") ** 2)

    def dense(w, x):
        return jnp.mean(jnp.tanh(x * w[0, 0, 0, 0]) ** 2)

    x = jnp.ones((16, 2, 5, 5))
    assert "while(" not in compiled_loop(convolved, x).as_text()
    assert "while(" in compiled_loop(convolved, x, unroll=1).as_text()
    assert "while(" in compiled_loop(dense, x).as_text()


@pytest.mark.usefixtures("optimised")
def test_groups_written_out_wait_for_each_other():
    """Otherwise the compiler holds the intermediate results of all of them."""
    params = jnp.ones((64, 64))

    def loss(w, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2)

    def temp(groups):
        step = sam_optax.grad(loss, microbatch_size=256, unroll=True)
        compiled = jax.jit(step).lower(params, jnp.ones((256 * groups, 64))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp(8) < 1.5 * temp(2)


EXPLICIT = (AxisType.Explicit,)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("size, vectorize, unroll", [(8, 1, None), (4, 2, None), (4, 1, True)])
def test_a_batch_that_jit_shards(problem, axis_type, size, vectorize, unroll):
    """Same numbers; on explicit axes each group stays spread over the devices."""
    params, x, y = problem
    expected = loop_over_groups(params, x, y, 16 // size)
    with jax.set_mesh(jax.make_mesh((4,), ("batch",), axis_types=(axis_type,))):
        x, y = jax.device_put((x, y), PartitionSpec("batch"))
        params = jax.device_put(params, PartitionSpec())
        step = jax.jit(sharp(microbatch_size=size, vectorize=vectorize, unroll=unroll))
        assert_same(jax.device_get(step(params, x, y)), expected)


def test_groups_of_an_explicitly_sharded_batch_stay_spread():
    shardings = []

    def loss(w, x):
        shardings.append(jax.typeof(x).sharding.spec)
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    with jax.set_mesh(jax.make_mesh((4,), ("batch",), axis_types=EXPLICIT)):
        x = jax.device_put(jnp.ones((16, 3)), PartitionSpec("batch"))
        w = jax.device_put(jnp.ones(3), PartitionSpec())
        jax.jit(sam_optax.grad(loss, microbatch_size=4))(w, x)
        jax.jit(sam_optax.grad(loss, microbatch_size=2))(w, x)  # too small to spread
    assert shardings == [PartitionSpec("batch", None), PartitionSpec(None, None)]


@pytest.mark.parametrize("names", [["batch"], ("batch",)], ids=str)
@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
def test_axis_names_in_a_list_or_a_tuple(problem, route, names):
    params, x, y = problem
    out = route(sharp(axis_name=names))(params, x, y)
    assert_same(out, loop_over_groups(params, x, y, 8))
    tx = optax.chain(METHOD, sam_optax.pmean(names))

    def step(params, x, y):
        evaluate = sam_optax.value_and_grad_fn(loss_fn, has_aux=True, axis_name=names)
        value, grads, grad_fn = evaluate(params, x, y)
        return value, tx.update(grads, tx.init(params), params, grad_fn=grad_fn)[0]

    assert_same(route(step)(params, x, y), loop_over_groups(params, x, y, 8))


def test_pmean_refuses_what_jax_has_summed(problem):
    """Checked shard_map, params not cast: the gradient is a sum over devices, alike on all."""
    params, x, y = problem
    tx = optax.chain(METHOD, sam_optax.pmean("batch"))

    def step(params, x, y):
        grad_fn = lambda w: jax.grad(loss_fn, has_aux=True)(w, x, y)[0]
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

    with pytest.raises(ValueError, match=r"updates must vary over the axis 'batch'.*pcast\(params"):
        shard_mapped(step, True)(params, x, y)
    expected = loop_over_groups(params, x, y, 8)[1]
    assert_same(shard_mapped(step, False)(params, x, y), expected)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("call", [sam_optax.value_and_grad, sam_optax.value_and_grad_fn])
def test_a_wrong_axis_name(problem, check_vma, call):
    options = {} if call is sam_optax.value_and_grad_fn else {"transform": METHOD}
    f = call(loss_fn, **options, has_aux=True, axis_name=("batch", "bach"))
    with pytest.raises(NameError, match=r"axis_name must be an axis of .* got 'bach'"):
        shard_mapped(lambda *args: f(*args)[0], check_vma)(*problem)
    link = sam_optax.pmean("bach")
    with pytest.raises(NameError, match=r"axis_name must be an axis of .* got 'bach'"):
        shard_mapped(lambda *args: link.update(args[0], link.init(args[0]))[0], check_vma)(*problem)


def loss_with_logits(params, x, y):
    loss, aux = loss_fn(params, x, y)
    return loss, (aux["statistics"], x @ params["w1"])


@pytest.mark.parametrize("size", [None, 1])
@pytest.mark.parametrize("check_vma", [True, False])
def test_logits_are_kept_where_statistics_are_averaged(problem, check_vma, size):
    """The mean of the logits of other images is no logit."""
    params, x, y = problem
    P = PartitionSpec
    f = sam_optax.value_and_grad(
        loss_with_logits,
        METHOD,
        has_aux=True,
        axis_name="batch",
        microbatch_size=size,
        average_aux=(True, False),
    )
    step = jax.jit(
        jax.shard_map(
            lambda *args: f(*args)[0][1],
            mesh=mesh(),
            in_specs=(P(), P("batch"), P("batch")),
            out_specs=(P(), P("batch")),
            check_vma=check_vma,
        )
    )
    statistics, logits = step(params, x, y)
    (_, expected), _ = loop_over_groups(params, x, y, 8)
    assert_same(statistics, expected["statistics"])
    assert_same(logits.reshape(16, -1), x @ params["w1"])


def test_logits_of_micro_batches_are_stacked(problem):
    params, x, y = problem
    f = sam_optax.value_and_grad(
        loss_with_logits, METHOD, has_aux=True, microbatch_size=4, average_aux=(True, False)
    )
    for wrap in (jax.jit, lambda f: f):
        (_, (statistics, logits)), _ = wrap(f)(params, x, y)
        assert_same(statistics, loop_over_groups(params, x, y, 4)[0][1]["statistics"])
        assert_same(logits, (x @ params["w1"]).reshape(4, 4, -1))


@pytest.mark.parametrize("average_aux", [(True,), "yes", (True, 1)], ids=str)
def test_average_aux_that_does_not_fit(problem, average_aux):
    f = sam_optax.grad(
        loss_with_logits, METHOD, has_aux=True, microbatch_size=4, average_aux=average_aux
    )
    with pytest.raises(ValueError, match="average_aux must"):
        f(*problem)


@pytest.mark.parametrize("argnums", [None, (1, 2), (1, 2, 3)], ids=str)
def test_keys_of_the_old_kind_are_refused(problem, argnums):
    """All groups would share one, and a dropout mask with it."""
    params, x, y = problem
    loss = lambda params, x, y, key: jax.random.normal(key) * loss_fn(params, x, y)[0]
    step = sam_optax.grad(loss, METHOD, microbatch_size=4, batch_argnums=argnums)
    with pytest.raises(ValueError, match=r"keys must be typed.*jax\.random\.key.*got uint32\[2\]"):
        step(params, x, y, jax.random.PRNGKey(0))
    step(params, x, y, jax.random.key(0))
    old = sam_optax.grad(loss, METHOD)  # without groups nothing is shared
    assert_same(old(params, x, y, jax.random.PRNGKey(0)), old(params, x, y, jax.random.key(0)))


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_a_batch_sharded_over_a_mesh_that_is_not_in_context(problem, wrap):
    params, x, y = problem
    explicit = jax.make_mesh((4,), ("batch",), axis_types=EXPLICIT)
    rows = jax.sharding.NamedSharding(explicit, PartitionSpec("batch"))
    sharded = jax.device_put((x, y), rows)
    params = jax.device_put(params, jax.sharding.NamedSharding(explicit, PartitionSpec()))
    out = wrap(sharp(microbatch_size=8))(params, *sharded)
    assert_same(jax.device_get(out), loop_over_groups(*problem, 2))
