"""One contract, run over every transformation that sam_optax exports."""

import functools
import inspect

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import sam_optax

# Arguments of those that have required ones; a new method with defaults needs no entry.
ARGUMENTS = {
    "adaptive": {"method": sam_optax.sam(), "steps": 10},
    "bsam": {"learning_rate": 0.1, "data_size": 100},
    "decoupled_wsam": {"base": optax.sgd(0.1), "learning_rate": 0.1},
    "dual_ascent": {"rho": 0.1},
    "late_phase": {"method": sam_optax.sam(), "start": 1},
    "lookbehind": {"base": optax.sgd(0.1)},
    "pmean": {"axis_name": "batch"},
    "randomised": {"method": sam_optax.sam()},
    "sampa": {"base": optax.sgd(0.1)},
    "sharpness_aware": {"ascent": sam_optax.dual_ascent(0.1)},
}


def exported():
    """Public functions that return a transformation."""
    for name in sam_optax.__all__:
        public = getattr(sam_optax, name)
        if inspect.isfunction(public):
            returned = str(inspect.signature(public).return_annotation)
            if "GradientTransformation" in returned:
                yield name


METHODS = sorted(exported())
UNMAPPED = [name for name in METHODS if name != "pmean"]


def build(name, **overrides):
    return getattr(sam_optax, name)(**ARGUMENTS.get(name, {}), **overrides)


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(8, 4)), dtype),
        "b": jnp.asarray(rng.normal(size=4), dtype),
        "none": None,
    }
    x = jnp.asarray(rng.normal(size=(8, 8)), dtype)

    def loss_fn(params):
        return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)

    return params, loss_fn


def step_of(tx, loss_fn):
    def step(params, state):
        grad_fn = jax.grad(loss_fn)
        extra = {"grad_fn": grad_fn, "previous_grad_fn": grad_fn, "value": loss_fn(params)}
        return tx.update(grad_fn(params), state, params, **extra, unknown=None)

    return step


@functools.cache
def compiled(name):
    """params, the transformation and its step: one compilation for several tests."""
    params, loss_fn = problem()
    tx = build(name)
    return params, tx, jax.jit(step_of(tx, loss_fn))


def layout(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), jax.typeof(x).weak_type), tree)


def test_the_contract_runs_over_something():
    assert {"sam", "asam", "dual_ascent", "sharpness_aware", "pmean"} <= set(METHODS)


@pytest.mark.parametrize("name", UNMAPPED)
def test_state_and_dtypes_are_stable_and_nothing_recompiles(name):
    dtype = jnp.bfloat16 if METHODS.index(name) % 2 else jnp.float16
    params, loss_fn = problem(dtype)
    tx = optax.with_extra_args_support(build(name))
    step = jax.jit(step_of(tx, loss_fn))
    state = tx.init(params)
    assert layout(jax.eval_shape(tx.init, params)) == layout(state)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert layout(tx.init(like)) == layout(state)
    for _ in range(2):
        updates, new_state = step(params, state)
        assert layout(updates) == layout(params)
        assert layout(new_state) == layout(state)
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
        state = new_state
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", UNMAPPED)
def test_float64(x64, name):
    params, loss_fn = problem(jnp.float64)
    tx = build(name)
    updates, _ = jax.eval_shape(step_of(tx, loss_fn), params, tx.init(params))
    assert layout(updates) == layout(params)


@pytest.mark.parametrize("name", UNMAPPED)
def test_a_zero_gradient_gives_no_nan(name):
    params, _ = problem()
    tx = build(name)
    zeros = lambda params: jax.tree.map(jnp.zeros_like, params)
    with jax.debug_nans(True):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(
                zeros(params), state, params, grad_fn=zeros, previous_grad_fn=zeros
            )
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", UNMAPPED)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_nonfinite_gradient_stays_nonfinite(name, bad):
    params, loss_fn = problem()
    tx = build(name)
    grads = jax.tree.map(lambda w: jnp.full_like(w, bad), params)
    ignores_it = name in ("async_sam", "bsam", "momentum_sam", "random_perturbation", "sampa")
    grad_fn = (lambda params: grads) if ignores_it else jax.grad(loss_fn)
    extra = {"grad_fn": grad_fn, "previous_grad_fn": grad_fn}
    updates, _ = tx.update(grads, tx.init(params), params, **extra)
    assert not np.isfinite(updates["w"]).any()


@pytest.mark.parametrize("name", UNMAPPED)
def test_params_and_gradients_given_are_left_alone(name):
    params, loss_fn = problem()
    grads = jax.grad(loss_fn)(params)
    before = jax.tree.map(np.array, (params, grads))
    tx = build(name)
    step_of(tx, loss_fn)(params, tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, (params, grads), before)


@pytest.mark.parametrize("name", UNMAPPED)
def test_inside_cond_scan_and_vmap(name):
    params, loss_fn = problem()
    tx = build(name)
    step = step_of(tx, loss_fn)

    def body(carry, on):
        params, state = carry
        updates, new = jax.lax.cond(
            on,
            lambda: step(params, state),
            lambda: (jax.tree.map(jnp.zeros_like, params), state),
        )
        return (optax.apply_updates(params, updates), new), None

    (end, _), _ = jax.jit(lambda carry: jax.lax.scan(body, carry, jnp.array([True, False, True])))(
        (params, tx.init(params))
    )
    assert layout(end) == layout(params)
    two = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
    batched, _ = jax.jit(jax.vmap(step))(two, jax.vmap(tx.init)(two))
    for i in range(2):
        one = jax.tree.map(lambda w, i=i: w[i], two)
        single, _ = compiled(name)[2](one, tx.init(one))
        jax.tree.map(
            lambda b, s, i=i: np.testing.assert_allclose(b[i], s, rtol=1e-4, atol=1e-6),
            batched,
            single,
        )


@pytest.mark.parametrize("name", UNMAPPED)
def test_sharded_parameters_stay_sharded_and_the_norm_runs_over_all_shards(name):
    params, tx, step = compiled(name)
    expected, _ = step(params, tx.init(params))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    sharded = {**jax.device_put(params, whole), "w": jax.device_put(params["w"], rows)}
    updates, _ = jax.jit(step, out_shardings=({"w": rows, "b": whole, "none": None}, None))(
        sharded, tx.init(sharded)
    )
    assert updates["w"].sharding.is_equivalent_to(rows, 2)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, updates, expected)


@pytest.mark.parametrize("name", ["sam", "asam", "gsam", "look_sam", "vasso", "eigen_sam"])
def test_explicit_shardings_carry_through(name):
    """Meshes of jax.make_mesh are explicit by default: shardings are part of the types."""
    params, _ = problem()
    x = jax.random.normal(jax.random.key(0), (8, 8))
    loss_fn = lambda params: jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)
    tx = build(name)
    expected, _ = jax.jit(step_of(tx, loss_fn))(params, tx.init(params))
    with jax.set_mesh(
        jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    ):
        x = jax.device_put(x, PartitionSpec("data"))
        columns = {"w": PartitionSpec(None, "model"), "b": PartitionSpec("model"), "none": None}
        sharded = jax.tree.map(jax.device_put, params, columns)
        updates, _ = jax.jit(step_of(tx, loss_fn))(sharded, tx.init(sharded))
    assert updates["w"].sharding.spec == columns["w"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    jax.tree.map(close, updates, expected)


@pytest.mark.parametrize("name", UNMAPPED)
def test_training_goes_on_the_same_from_a_serialised_state(name):
    """Flax writes the state to bytes and back, keys of random methods included."""
    params, tx, step = compiled(name)
    _, state = step(params, tx.init(params))
    restored = flax.serialization.from_bytes(tx.init(params), flax.serialization.to_bytes(state))
    jax.tree.map(np.testing.assert_array_equal, step(params, restored), step(params, state))


@pytest.mark.parametrize("name", UNMAPPED)
def test_multi_steps_and_extra_arguments_in_a_chain(name):
    params, loss_fn = problem()
    tx = optax.MultiSteps(optax.chain(build(name), optax.sgd(0.1)), every_k_schedule=2)
    state = tx.init(params)
    step = jax.jit(step_of(tx, loss_fn))
    for mini_step in range(2):
        updates, state = step(params, state)
        assert bool(jnp.any(updates["w"] != 0)) == (mini_step == 1)


@pytest.mark.parametrize(
    "name", [n for n in UNMAPPED if "rho" in inspect.signature(getattr(sam_optax, n)).parameters]
)
def test_rho_by_inject_hyperparams_changes_without_recompiling(name):
    """The numbers of the method built with it (schedules are tested in test_family)."""
    params, loss_fn = problem()
    arguments = {n: v for n, v in ARGUMENTS.get(name, {}).items() if n != "rho"}
    factory = functools.partial(getattr(sam_optax, name), **arguments)
    parameters = inspect.signature(factory).parameters
    static = {n for n, p in parameters.items() if type(p.default) is int} | {"quantile", "sparsity"}
    static = (static | {"mask", "normalization", *arguments}) & set(parameters)
    tx = optax.inject_hyperparams(factory, static_args=static)(rho=0.1)

    @jax.jit
    def expected(rho):
        plain = factory(rho=rho)
        return step_of(plain, loss_fn)(params, plain.init(params))[0]

    step, state = jax.jit(step_of(tx, loss_fn)), tx.init(params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    for rho in (0.1, 0.5):
        state.hyperparams["rho"] = jnp.asarray(rho, jnp.float32)
        jax.tree.map(close, step(params, state)[0], expected(rho))
    assert step._cache_size() == 1
