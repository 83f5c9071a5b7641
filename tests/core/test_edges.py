"""Single cases at the edges: what random attacks and mutations found, each kept by its name."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from public import UNMAPPED, build, own_inputs

import sam_optax

INTEGERS = {"n": jnp.arange(3), "on": jnp.array([True, False])}
EMPTY = {"none": jnp.zeros((0, 2), jnp.float16), "nothing": None}


def quadratic(params):
    """Of every floating entry, whatever its dtype."""
    leaves = [w for w in jax.tree.leaves(params) if jnp.issubdtype(w.dtype, jnp.inexact)]
    return sum((jnp.sum(jnp.abs(w) ** 2 + w.real) for w in leaves), jnp.zeros(())).astype("float32")


def steps(tx, params, count=2, loss_fn=quadratic, **extra):
    """Updates and state after some steps with gradients as JAX gives them."""
    grad_fn = jax.grad(loss_fn, allow_int=True)
    state = tx.init(params)
    given = own_inputs(grad_fn, loss_fn) | {"grad_fn": grad_fn} | extra
    for _ in range(count):
        updates, state = tx.update(grad_fn(params), state, params, **given)
    return updates, state


# --- trees ---


@pytest.mark.parametrize("params", [INTEGERS, EMPTY, INTEGERS | EMPTY, {}], ids=str)
@pytest.mark.parametrize("name", ["eigen_sam", "look_sam", "momentum_sam", "sparse_sam", "z_sharp"])
def test_trees_in_which_nothing_can_be_perturbed(name, params):
    updates, _ = steps(build(name), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize("name", ["eigen_sam", "toward_eigenvector"])
def test_an_eigenvector_beside_integers_and_empty_halves(name):
    """The tangent of an integer is float0, and a carry keeps the dtype of what is empty."""
    params = {"w": jnp.ones(3, jnp.float16)} | INTEGERS | EMPTY
    updates, state = steps(build(name, every=1), params)
    assert updates["w"].dtype == jnp.float16
    vector = next(x for x in jax.tree.leaves(state) if x.dtype == jnp.float16 and x.size)
    assert float(jnp.linalg.norm(vector)) == pytest.approx(1, abs=1e-3)


def test_the_momentum_of_a_boolean_has_no_direction():
    params = {"w": jnp.ones(3)} | INTEGERS
    updates, _ = steps(sam_optax.momentum_sam(0.1), params)
    assert updates["w"].shape == (3,)


@pytest.mark.parametrize("microbatch_size", [None, 1, 2])
def test_integer_parameters_in_groups(microbatch_size):
    """Their gradients, float0, are summed over no groups."""
    params = {"w": jnp.ones(3)} | INTEGERS
    loss_fn = lambda params, x: jnp.mean(x) * jnp.sum(params["w"] ** 2)
    options = {"allow_int": True, "microbatch_size": microbatch_size}
    x = jnp.arange(4.0)
    for run in (lambda f: f, jax.jit):
        grads = run(sam_optax.grad(loss_fn, **options))(params, x)
        _, clean, _ = sam_optax.value_and_grad_fn(loss_fn, **options)(params, x)
        for tree in (grads, clean):
            assert tree["n"].dtype == tree["on"].dtype == jax.dtypes.float0
            assert tree["n"].shape == (3,)
        np.testing.assert_allclose(clean["w"], 2 * np.mean(x) * np.ones(3))


def test_five_thousand_leaves():
    grads = {str(i): jnp.full((2,), i, jnp.float32) for i in range(5000)}
    ascent = sam_optax.dual_ascent(0.05)
    with jax.disable_jit():
        e, _ = ascent.update(grads, ascent.init(grads))
    assert float(optax.tree.norm(e)) == pytest.approx(0.05, rel=1e-5)


def test_a_batch_of_one_and_groups_of_one():
    loss_fn = lambda w, x: jnp.mean(jnp.sum(jnp.tanh(x * w[None]) ** 2, -1))
    w, x = jnp.array([1.0, -2.0]), jnp.array([[0.5, 0.3], [0.2, -0.9], [1.5, 0.1]])
    sharp = functools.partial(sam_optax.value_and_grad, loss_fn, sam_optax.sam(0.1))
    each = [sharp()(w, x[i : i + 1]) for i in range(3)]
    value, grads = sharp(microbatch_size=1)(w, x)
    np.testing.assert_allclose(value, np.mean([v for v, _ in each]), rtol=1e-6)
    np.testing.assert_allclose(grads, np.mean([g for _, g in each], 0), rtol=1e-5)
    for a, b in zip(sharp(microbatch_size=1)(w, x[:1]), each[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


# --- dtypes ---


def test_a_normalization_is_applied_in_float32():
    """T g of half precision would be 0 here, and the square of ||w|| infinite."""
    params = {"w": jnp.full((4, 4), 300, jnp.float16), "v": jnp.full((4, 4), 1e-3, jnp.float16)}
    grads = jax.tree.map(lambda w: jnp.full_like(w, 1e-5), params)
    operator = sam_optax.layerwise(0.0)
    ascent = sam_optax.dual_ascent(0.1, normalization=operator)
    e, _ = ascent.update(grads, ascent.init(params), params)
    T = jax.tree.map(lambda t: np.float64(t), operator(params))
    assert T["w"] == pytest.approx(1200)
    length = np.sqrt(sum(np.sum((np.float64(e[k]) / T[k]) ** 2) for k in e))
    assert length == pytest.approx(0.1, rel=1e-3)
    small, g = params["v"], jnp.linspace(1e-5, 4e-5, 16, dtype=jnp.float16).reshape(4, 4)
    ascent = sam_optax.dual_ascent(100.0, normalization=operator)
    e, _ = ascent.update(g, ascent.init(small), small)
    expected = 100 * np.float64(operator(small)) * np.float64(g) / np.linalg.norm(np.float64(g))
    np.testing.assert_allclose(np.float64(e), expected, rtol=2e-3)


@pytest.mark.parametrize("normalization", [None, sam_optax.elementwise(0.1, True)])
def test_second_order_of_complex_parameters_is_that_of_two_real_ones(x64, normalization):
    """Real and imaginary parts as parameters of their own; the term is a direction, as Optax's."""
    rng = np.random.default_rng(0)
    A = jnp.asarray(rng.normal(size=(5, 3)) + 1j * rng.normal(size=(5, 3)))
    w = jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3))
    loss_fn = lambda w: jnp.sum(jnp.tanh(jnp.abs(A @ w) ** 2)) + jnp.sum((w**3).imag)

    def real_loss(parts):
        return loss_fn(parts[0] + 1j * parts[1])

    # The modulus of an entry has to be one number for both of its parts.
    modulus = lambda p: jnp.broadcast_to(jnp.hypot(*p) + 0.1, p.shape)
    of_parts = modulus if normalization else None
    tx = sam_optax.sam(0.2, second_order=True, normalization=normalization)
    of_real = sam_optax.sam(0.2, second_order=True, normalization=of_parts)
    parts = jnp.stack([w.real, w.imag])
    expected = sam_optax.grad(real_loss, of_real)(parts)
    out = sam_optax.grad(loss_fn, tx)(w)
    # As jax.grad: the conjugate of the direction.
    np.testing.assert_allclose(np.conj(out), expected[0] + 1j * expected[1], rtol=1e-8)
    updates, _ = tx.update(jnp.conj(jax.grad(loss_fn)(w)), tx.init(w), w, value_fn=loss_fn)
    np.testing.assert_allclose(updates, expected[0] + 1j * expected[1], rtol=1e-8)


# --- steps that are not finite ---


def test_memory_is_kept_or_replaced_by_the_gradient_alone():
    from sam_optax import _numerics

    keep = _numerics.keep_if_nonfinite
    new, old = {"m": jnp.ones(2)}, {"m": jnp.zeros(2)}
    for bad in (np.nan, np.inf, -np.inf):
        np.testing.assert_array_equal(keep({"g": jnp.array([1.0, bad])}, new, old)["m"], 0)
    np.testing.assert_array_equal(keep({"g": jnp.ones(2)}, new, old)["m"], 1)
    np.testing.assert_array_equal(keep({"n": jnp.arange(2)}, new, old)["m"], 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_mask_of_a_bad_step_is_not_kept(bad):
    """A step that a guard skips leaves the mask of before."""
    keep = sam_optax.largest_entries(0.5, every=1)
    grads = {"a": jnp.array([4.0, 1.0, 3.0, 2.0]), "n": jnp.arange(2)}
    _, state = keep.update(grads, keep.init(grads))
    np.testing.assert_array_equal(state.mask["a"], [True, False, True, False])
    other = {"a": jnp.array([1.0, 5.0, bad, 6.0]), "n": jnp.arange(2)}
    _, after = keep.update(other, state)
    np.testing.assert_array_equal(after.mask["a"], state.mask["a"])
    _, last = keep.update({"a": -other["a"].at[2].set(0.0), "n": jnp.arange(2)}, after)
    np.testing.assert_array_equal(last.mask["a"], [False, True, False, True])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_entry_outside_of_the_mask_is_seen(bad):
    """As a filter before an ascent, in a step that keeps the mask of before."""
    ascent = optax.chain(sam_optax.largest_entries(0.5, every=2), sam_optax.dual_ascent(0.1))
    grads = jnp.array([4.0, 1.0])
    _, state = ascent.update(grads, ascent.init(grads), grads)
    e, _ = ascent.update(grads.at[1].set(bad), state, grads)
    assert np.isnan(e).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 5])
def test_one_bad_entry_of_a_sharded_gradient_is_seen(bad, place):
    """The maximum over devices may leave a NaN out, so that nothing may rest on it alone."""
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
    sharded = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("model")))
    good = sharded(jnp.arange(1.0, 9.0))
    grads = sharded(good.at[place].set(bad))
    for p in (1, 1.5, 2, np.inf):
        ascent = sam_optax.dual_ascent(0.1, p=p)
        e, _ = jax.jit(ascent.update)(grads, ascent.init(good))
        assert np.isnan(e).all(), p
    keep = sam_optax.largest_entries(0.5, every=1)
    _, before = jax.jit(keep.update)(good, keep.init(good))
    _, after = jax.jit(keep.update)(grads, before)
    np.testing.assert_array_equal(after.mask, before.mask)
    for memory in (
        sam_optax.running_average(0.9),
        sam_optax.keep_momentum(0.9),
        sam_optax.keep_orthogonal(),
    ):
        update = jax.jit(functools.partial(memory.update, clean=jnp.sin(good)))
        _, before = update(good, memory.init(good))
        _, after = update(grads, before)
        jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("clean_size", [1e-30, 1.0, 1e30])
def test_the_orthogonal_part_at_the_ends_of_float32(size, clean_size):
    """A product of two such numbers is none of float32."""
    keep = sam_optax.keep_orthogonal()
    perturbed, clean = size * jnp.array([2.0, 3.0, -1.0]), clean_size * jnp.array([2.0, 0.0, 1.0])
    _, kept = keep.update(perturbed, jnp.zeros(3), clean=clean)
    expected = np.array([2.0, 3.0, -1.0]) - 3 / 5 * np.array([2.0, 0.0, 1.0])
    np.testing.assert_allclose(kept, expected / np.linalg.norm(expected), rtol=1e-6)


@pytest.mark.parametrize("where", ["a group", "a device"])
def test_one_bad_group_of_several_is_seen_by_all(where):
    """The mean over groups is not finite, and a guard around the optimizer skips the step."""
    loss_fn = lambda w, x: jnp.mean(jnp.sum(jnp.tanh(x * w[None]) ** 2, -1))
    w, x = jnp.array([1.0, -2.0]), jnp.ones((8, 2)).at[5, 0].set(jnp.nan)
    if where == "a group":
        options = {"microbatch_size": 2}
    else:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        options = {"axis_name": "data", "mesh": mesh}
    grads = sam_optax.grad(loss_fn, sam_optax.sam(0.1), **options)(w, x)
    assert not np.isfinite(grads).any()
    guarded = optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 3)
    state = guarded.init(w)
    updates, after = guarded.update(grads, state, w)
    np.testing.assert_array_equal(updates, 0)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


# --- threads ---


@pytest.mark.parametrize("name", ["sam", "look_sam", "vasso", "multi_step_sam"])
def test_two_threads_share_one_transformation(name):
    """It holds nothing of a run: each thread gets what it would get alone."""
    tx = build(name)
    loss_fn = lambda w: jnp.sum(jnp.tanh(w) ** 2)
    step = jax.jit(one_step(tx, loss_fn))

    def run(start):
        w = jnp.full(3, start)
        state = tx.init(w)
        for _ in range(20):
            updates, state = step(w, state)
            w = w - 0.1 * updates
        return w, state

    starts = [0.5, -1.5]
    alone = list(map(run, starts))
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        together = list(threads.map(run, starts))
    jax.tree.map(np.testing.assert_array_equal, together, alone)


# --- directions that are parallel ---


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("turn", [1.0, -1.0])
@pytest.mark.parametrize("rounding", [0.0, 4e-7])
def test_the_arc_between_parallel_directions(alpha, turn, rounding):
    """There is none: a straight line, without a division by sin(0), or by what rounding left."""
    clean = jnp.array([3.0, 4.0])
    rule = sam_optax.arc(alpha)
    with jax.debug_nans(True):
        perturbation = clean / 9 * jnp.array([1.0, 1 + rounding])
        out, _ = rule.update(
            2 * turn * clean, rule.init(clean), clean=clean, perturbation=perturbation
        )
    expected = 2 * clean * ((1 - alpha) + alpha * turn)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0])
def test_the_derivative_at_a_zero_entry_with_a_traced_order(x64, p):
    """Where |x|^(q-1) has the slope 0, 1 or infinity, for which 0 is taken."""

    def jacobian(p):
        def e(g):
            ascent = sam_optax.dual_ascent(0.1, p=p)
            return ascent.update(g, ascent.init(g))[0]

        return jax.jacobian(e)(jnp.array([3.0, 0.0, 4.0]))

    found = jax.jit(jacobian)(p)
    assert found[1, 1] == pytest.approx(0.1 / 5 if p == 2 else 0)
    np.testing.assert_allclose(found, jacobian(p), rtol=1e-12, atol=1e-15)


# --- meshes ---


def on_mesh(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    spec = {"w": PartitionSpec(None, "model"), "b": PartitionSpec("model")}
    params = {"w": jnp.ones((8, 4)) / 3, "b": jnp.ones(4)}
    x = jnp.cos(jnp.arange(64.0)).reshape(8, 8)
    loss_fn = lambda params: jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2)
    return (
        mesh,
        {k: jax.device_put(v, NamedSharding(mesh, spec[k])) for k, v in params.items()},
        loss_fn,
    )


def one_step(tx, loss_fn):
    grad_fn = jax.grad(loss_fn)

    def step(params, state):
        extra = own_inputs(grad_fn, loss_fn) | {"grad_fn": grad_fn}
        return tx.update(grad_fn(params), state, params, **extra)

    return step


@pytest.mark.parametrize("name", UNMAPPED)
def test_explicit_shardings_of_memory_are_those_it_had(name):
    """By type, so nothing has to run; a change would compile the second step again."""
    mesh, params, loss_fn = on_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        tx = build(name)
        state = tx.init(params)
        updates, after = jax.eval_shape(one_step(tx, loss_fn), params, state)
    spec = lambda x: (x.shape, x.dtype, tuple(jax.typeof(x).sharding.spec))
    assert jax.tree.map(spec, after) == jax.tree.map(spec, state)
    assert jax.tree.map(spec, updates) == jax.tree.map(spec, params)


REMEMBERS = [
    name
    for name in UNMAPPED
    if any(x.ndim > 1 for x in jax.tree.leaves(jax.eval_shape(build(name).init, jnp.ones((2, 2)))))
]


@pytest.mark.parametrize("name", REMEMBERS)
def test_on_automatic_axes_the_second_step_compiles_nothing(name):
    """Memory like params is sharded as they are from the start."""
    mesh, params, loss_fn = on_mesh(AxisType.Auto)
    tx = build(name)
    with jax.set_mesh(mesh):
        step = jax.jit(one_step(tx, loss_fn))
        state = tx.init(params)
        for _ in range(2):
            _, state = step(params, state)
        assert step._cache_size() <= 1
