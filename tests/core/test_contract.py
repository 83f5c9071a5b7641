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
from public import ARGUMENTS, METHODS, UNMAPPED, as_method, build, own_inputs

import sam_optax
from sam_optax import FAMILY


def test_the_table_of_the_family_knows_every_name():
    """And nothing else: whoever adds a method says what it is and needs."""
    parts = {"pmean", "sharpness_aware", "stateless"}
    assert set(FAMILY) == set(METHODS) - parts | {"esam", "k_sam", "jacobian_sam"}
    assert list(FAMILY) == sorted(FAMILY)


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(8, 4)), dtype),
        "b": jnp.asarray(rng.normal(size=4), dtype),
        "none": None,
        "count": jnp.arange(3),
        "on": jnp.array([True, False]),
        "empty": jnp.zeros((0, 2), dtype),
    }
    x = jnp.asarray(rng.normal(size=(8, 8)), dtype)

    def loss_fn(params, scale=1):
        x_scaled = x * jnp.where(params["on"][0], scale * params["count"][1], 0).astype(dtype)
        return jnp.mean(jnp.tanh(x_scaled @ params["w"] + params["b"][None]) ** 2)

    return params, loss_fn


def gradient_of(loss_fn):
    """The gradient of an integer leaf is float0."""
    return jax.grad(loss_fn, allow_int=True)


def to_add(updates, params):
    """Updates whose integer leaves, float0 or 0, are 0 of the dtype of params."""

    def leaf(u, w):
        assert u.shape == w.shape
        return u if is_float(w) else jnp.zeros_like(w)

    return jax.tree.map(leaf, updates, params)


def is_float(w):
    return jnp.issubdtype(w.dtype, jnp.inexact)


def step_of(tx, loss_fn):
    def step(params, state):
        grad_fn = gradient_of(loss_fn)
        extra = own_inputs(grad_fn, loss_fn) | {"grad_fn": grad_fn, "value": loss_fn(params)}
        updates, state = tx.update(grad_fn(params), state, params, **extra, unknown=None)
        return to_add(updates, params), state

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
    assert step._cache_size() <= 1


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
            extra = own_inputs(zeros, lambda params: jnp.zeros([]))
            updates, state = tx.update(zeros(params), state, params, grad_fn=zeros, **extra)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", UNMAPPED)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_nonfinite_gradient_stays_nonfinite(name, bad):
    params, loss_fn = problem()
    tx = build(name)
    grads = jax.tree.map(lambda w: jnp.full_like(w, bad if is_float(w) else 0), params)
    late = ("async_sam", "previous")  # the step after sees it
    ignores_it = name in late or (name in FAMILY and not FAMILY[name].uses_clean)
    ignores_it |= name in ("draws", "tilted")  # of a method that ignores it
    grad_fn = (lambda params: grads) if ignores_it else gradient_of(loss_fn)
    extra = own_inputs(grad_fn, loss_fn) | {"grad_fn": grad_fn}
    updates, _ = tx.update(grads, tx.init(params), params, **extra)
    assert not np.isfinite(updates["w"]).any()


@pytest.mark.parametrize("name", UNMAPPED)
def test_params_and_gradients_given_are_left_alone(name):
    params, loss_fn = problem()
    grads = gradient_of(loss_fn)(params)
    before = jax.tree.map(np.array, (params, grads))
    tx = build(name)
    step_of(tx, loss_fn)(params, tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, (params, grads), before)


@pytest.mark.parametrize("name", UNMAPPED)
@pytest.mark.parametrize("as_zeros", [True, False])
def test_integer_leaves_stay(name, as_zeros):
    """Whether the gradients given for them are float0, as from JAX, or zeros of the caller."""
    params, loss_fn = problem()
    tx = build(name)

    def grad_fn(w):
        gradient = gradient_of(loss_fn)(w)
        return to_add(gradient, w) if as_zeros else gradient

    state = tx.init(params)
    for _ in range(2):
        extra = own_inputs(grad_fn, loss_fn) | {"grad_fn": grad_fn}
        updates, state = tx.update(grad_fn(params), state, params, **extra)
        for u, w in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            if not is_float(w) and u.dtype != jax.dtypes.float0:
                np.testing.assert_array_equal(u, np.zeros(w.shape))


@pytest.mark.parametrize("name", UNMAPPED)
def test_trees_without_anything_to_perturb(name):
    params = {"count": jnp.arange(3), "none": None}
    tx = build(name)
    grad_fn = lambda params: {"count": jnp.zeros(3, jnp.int32), "none": None}
    extra = own_inputs(grad_fn, lambda params: jnp.zeros([])) | {"grad_fn": grad_fn}
    updates, state = tx.update(grad_fn(params), tx.init(params), params, **extra)
    np.testing.assert_array_equal(updates["count"], np.zeros(3))
    assert layout(state) == layout(tx.init(params))


@pytest.mark.parametrize("name", UNMAPPED)
def test_inside_cond_scan_and_vmap(name):
    """All three around one another, in one program, against steps one by one."""
    params, tx, alone = compiled(name)
    turns = [True, False, True]
    step = step_of(tx, problem()[1])

    def body(carry, on):
        params, state = carry
        updates, new = jax.lax.cond(
            on,
            lambda: step(params, state),
            lambda: (jax.tree.map(jnp.zeros_like, params), state),
        )
        return (optax.apply_updates(params, updates), new), None

    run = lambda params: jax.lax.scan(body, (params, tx.init(params)), jnp.array(turns))[0]
    two = jax.tree.map(lambda w: jnp.stack([w, (2 * w).astype(w.dtype)]), params)
    ends = jax.jit(jax.vmap(run))(two)
    for i in range(2):
        one = jax.tree.map(lambda w, i=i: w[i], two)
        state = tx.init(one)
        for _ in range(sum(turns)):
            updates, state = alone(one, state)
            one = optax.apply_updates(one, updates)
        end = jax.tree.map(lambda w, i=i: w[i], ends[0])
        assert layout(end) == layout(one)
        jax.tree.map(lambda e, w: np.testing.assert_allclose(e, w, rtol=1e-3, atol=1e-5), end, one)


@pytest.mark.parametrize("name", UNMAPPED)
def test_sharded_parameters_stay_sharded_and_the_norm_runs_over_all_shards(name):
    params, tx, step = compiled(name)
    expected, _ = step(params, tx.init(params))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    sharded = {**jax.device_put(params, whole), "w": jax.device_put(params["w"], rows)}
    shardings = jax.tree.map(lambda w: w.sharding, sharded)
    updates, _ = jax.jit(step, out_shardings=(shardings, None))(sharded, tx.init(sharded))
    assert updates["w"].sharding.is_equivalent_to(rows, 2)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, updates, expected)


@pytest.mark.parametrize("name", ["sam", "asam", "gsam", "look_sam", "vasso", "eigen_sam"])
def test_explicit_shardings_carry_through(name):
    """Meshes of jax.make_mesh are explicit by default: shardings are part of the types."""
    params, _ = problem()
    x = jax.random.normal(jax.random.key(0), (8, 8))
    loss_fn = lambda params: jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2)
    tx = build(name)
    expected, _ = jax.jit(step_of(tx, loss_fn))(params, tx.init(params))
    with jax.set_mesh(
        jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    ):
        x = jax.device_put(x, PartitionSpec("data"))
        columns = jax.tree.map(lambda w: PartitionSpec(), params)
        columns |= {"w": PartitionSpec(None, "model"), "b": PartitionSpec("model")}
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
    # Optax's accumulator takes neither float0 nor booleans.
    integers = {k: w for k, w in params.items() if w is not None and not is_float(w)}
    params = {k: w for k, w in params.items() if k not in integers}
    state = tx.init(params)
    step = step_of(tx, lambda params: loss_fn(params | integers))
    with jax.disable_jit():
        for mini_step in range(2):
            updates, state = step(params, state)
            assert bool(jnp.any(updates["w"] != 0)) == (mini_step == 1)


# Per step and method: evaluations of grad_fn and of descent_grad_fn where both are given, on top
# of the caller's gradient. Without the latter they add up, less those that it makes necessary.
EVALUATIONS = {
    "bsam": (1, 1),
    "cr_sam": (0, 3),
    "curvature": (0, 3),
    "decoupled_wsam": (0, 2),
    "draws": (0, 2),
    "eigen_sam": (1, 1),
    "extrapolate": (0, 2),
    "from_step": (0, 0),
    "gam": (2, 2),
    "gradient_norm_penalty": (0, 2),
    "gsam": (0, 2),
    "in_turn": (1, 1),
    "late_phase": (0, 0),
    "late_tail": (0, 0),
    "lookbehind": (1, 2),
    "multi_step": (1, 1),
    "multi_step_sam": (1, 1),
    "sagm": (0, 2),
    "sampa": (1, 1),
    "surrogate_gap": (0, 2),
    "tilted": (0, 2),
    "tilted_sam": (3, 3),
    "toward_eigenvector": (1, 1),
    "wsam": (0, 2),
}
SAVED_BY_ONE_FUNCTION = {"cr_sam": 1, "curvature": 1, "gam": 1, "lookbehind": 1, "sampa": 1}
SAVED_BY_ONE_FUNCTION |= dict.fromkeys(("extrapolate", "gradient_norm_penalty", "wsam", "sagm"), 1)
SAVED_BY_ONE_FUNCTION |= dict.fromkeys(("decoupled_wsam", "gsam", "surrogate_gap"), 1)


# imb_sam refuses descent_grad_fn, whose place its own input takes.
@pytest.mark.parametrize("name", [name for name in UNMAPPED if name != "imb_sam"])
def test_ascent_and_descent_from_two_functions(name):
    """Each is evaluated as often as documented, and both have a part in the result."""
    params, loss_fn = problem()
    tx = build(name)

    # The scale of the loss is traced: one program for the ascent's function and the descent's.
    @functools.partial(jax.jit, static_argnames="apart")
    def step(params, state, scale, apart):
        def counted(place, fn):
            def gradient(w):
                jax.debug.callback(lambda: calls.append(place))
                return fn(w)

            return gradient

        main = gradient_of(functools.partial(loss_fn, scale=scale))
        loss = functools.partial(loss_fn, scale=3 if apart else scale)
        extra = own_inputs(main, loss) | {"grad_fn": counted("ascent", main)}
        if apart:
            extra["descent_grad_fn"] = counted("descent", gradient_of(loss))
        updates, state = tx.update(main(params), state, params, **extra)
        return to_add(updates, params), state

    results = {}
    for kind, scale in {"both": 1, "ascent's": 1, "descent's": 3}.items():
        state, calls, w, counts = tx.init(params), [], params, []
        for _ in range(3):
            before = len(calls)
            updates, state = step(w, state, scale, kind == "both")
            jax.block_until_ready(updates)
            jax.effects_barrier()
            counts.append([calls[before:].count(place) for place in ("ascent", "descent")])
            w = optax.apply_updates(w, jax.tree.map(lambda u: (-0.1 * u).astype(u.dtype), updates))
        results[kind] = np.asarray(updates["w"])
        at, below = EVALUATIONS.get(name, (0, 1))
        saved = SAVED_BY_ONE_FUNCTION.get(name, 0)
        expected = [at, below] if kind == "both" else [at + below - saved, 0]
        assert counts[0] == expected, (kind, counts)
    off = lambda a, b: np.max(np.abs(results[a] - results[b])) / np.max(np.abs(results[a]))
    assert off("both", "ascent's") > 1e-3
    looks_twice = name in ("bsam", "sampa", "tilted_sam")  # at gradients of its own
    ignores_the_ascent = name in ("draws", "tilted") or (
        name in FAMILY and not FAMILY[name].uses_clean
    )
    ignores_the_ascent &= not looks_twice
    assert ignores_the_ascent == (off("both", "descent's") < 1e-6)


# Arguments that shape the program: counts of what is written out, and of steps in a cycle.
STATIC = {"k", "every", "power_steps", "samples", "count", "ns_steps"}
# Scalars whose default, None, is another thing than a number.
OPTIONAL = {
    "asam": {"p": 3.0},
    "dual_ascent": {"p": 3.0},
    "multi_step_sam": {"step_size": 0.04},
    "sam": {"p": 3.0},
}


def scalars(name):
    """Every numerical argument of a method, found by looking, with a value."""
    parameters = inspect.signature(getattr(sam_optax, name)).parameters
    values = {n: p.default for n, p in parameters.items()}
    values |= ARGUMENTS.get(name, {}) | OPTIONAL.get(name, {})
    static = STATIC | ({"steps"} if "multi_step" in name else set())
    return {n: v for n, v in values.items() if type(v) in (int, float) and n not in static}


def test_the_scalars_are_found():
    assert set(scalars("bsam")) == {
        *("learning_rate", "data_size", "rho", "b1", "b2"),
        *("prior_precision", "damping", "scale", "key"),
    }
    assert set(scalars("eigen_sam")) == {"rho", "alpha", "key"}
    assert set(scalars("adaptive")) == {"steps", "decay", "c_start", "c_end"}


@functools.cache
def three_steps(name, injected):
    """The updates of three steps as a function of all scalar arguments."""
    params, loss_fn = problem()
    arguments = {n: v for n, v in ARGUMENTS.get(name, {}).items() if n not in scalars(name)}
    factory = functools.partial(getattr(sam_optax, name), **arguments)
    parameters = inspect.signature(factory).parameters
    static = {n for n in parameters if n in STATIC | set(arguments)}
    static |= {"steps"} if "multi_step" in name else set()
    make = optax.inject_hyperparams(factory, static_args=static) if injected else factory

    @jax.jit
    def run(values):
        tx = as_method(name, make(**values))
        step = step_of(tx, loss_fn)

        def body(carry, _):
            params, state = carry
            updates, state = step(params, state)
            moved = optax.apply_updates(
                params, jax.tree.map(lambda u: (-0.1 * u).astype(u.dtype), updates)
            )
            return (moved, state), updates["w"]

        return jax.lax.scan(body, (params, tx.init(params)), length=3)[1]

    return run


# An `otherwise` rule has no state of its own for inject_hyperparams to keep them in.
INJECTED = [n for n in UNMAPPED if scalars(n) and n != "reuse_orthogonal"]


@pytest.mark.parametrize("name", INJECTED)
def test_every_scalar_argument_by_inject_hyperparams(name):
    """The numbers of the method built with the traced value, for the defaults and any change."""
    defaults = scalars(name)
    changed = {n: v + 3 if type(v) is int else 0.6 * v for n, v in defaults.items()}
    for values in [defaults, *(defaults | {n: v} for n, v in changed.items())]:
        np.testing.assert_allclose(
            three_steps(name, True)(values),
            three_steps(name, False)(values),
            rtol=1e-4,
            atol=1e-6,
        )


@pytest.mark.parametrize("name", UNMAPPED)
def test_concrete_arrays_made_outside_of_jit_are_arguments_inside_of_it(name):
    parameters = inspect.signature(getattr(sam_optax, name)).parameters
    values = {n: p.default for n, p in parameters.items()}
    values |= ARGUMENTS.get(name, {}) | OPTIONAL.get(name, {})
    values = {n: v for n, v in values.items() if type(v) in (int, float)}
    params, loss_fn = problem()
    if name in OPTIONAL:
        tx = build(name, **OPTIONAL[name])
        expected, _ = step_of(tx, loss_fn)(params, tx.init(params))
    else:
        _, tx, step = compiled(name)
        expected, _ = step(params, tx.init(params))
    arrays = {n: jnp.asarray(v) for n, v in values.items()}

    @jax.jit
    def inside(params):
        tx = as_method(name, getattr(sam_optax, name)(**{**ARGUMENTS.get(name, {}), **arrays}))
        return step_of(tx, loss_fn)(params, tx.init(params))[0]

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, inside(params), expected)


@pytest.mark.parametrize("name", UNMAPPED)
def test_numbers_of_any_kind_are_taken_and_nothing_else(name):
    """Scalars of NumPy and JAX, bfloat16 too; no booleans, no arrays of other shapes."""
    defaults = scalars(name)
    checked = {"c_start", "c_end", "beta0", "beta1", "key", "learning_rate"}
    for argument, value in defaults.items():
        arguments = ARGUMENTS.get(name, {}) | OPTIONAL.get(name, {})
        make = lambda v, a=argument, rest=arguments: getattr(sam_optax, name)(**{**rest, a: v})
        kinds = (np.int32, jnp.uint8) if type(value) is int else (np.float32, jnp.bfloat16)
        for kind in kinds:
            make(kind(value) if type(value) is int else kind(value / 2))
            make(np.asarray(value))
            make(jnp.asarray(value // 2 or 1 if type(value) is int else value / 2, kind))
        if argument in checked:
            continue
        for bad in (True, np.True_, jnp.asarray(True), np.ones(2), jnp.ones(1), "much"):
            with pytest.raises(ValueError, match=f"{argument} must be an? "):
                make(bad)


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
    assert step._cache_size() <= 1


# Names whose ascent is another than dual_ascent.
OTHER_ASCENTS = {"bsam", "eigen_sam", "multi_step_sam", "random_perturbation", "unnormalised_sam"}
OTHER_ASCENTS |= {"fisher_sam", "z_sharp", "unified_sam", "sagm", "preconditioned_sam"}
OTHER_ASCENTS |= {"shared_preconditioned_sam", "spectral_sam", "tilted_sam", "flat_lora", "sharing"}
DUAL = [
    name
    for name, member in FAMILY.items()
    if member.kind in ("method", "optimizer", "examples") and name not in OTHER_ASCENTS
]


@pytest.mark.parametrize("name", DUAL)
def test_what_dual_ascent_takes_every_method_over_it_takes(name, x64):
    """A masked leaf stays, and ||T^-1 e||_p of the first perturbed point is rho."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4))), "b": jnp.asarray(rng.normal(size=4))}
    x = jnp.asarray(rng.normal(size=(8, 3)))
    points = []

    def losses(params, x):
        jax.debug.callback(points.append, params)
        return jnp.mean(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2, axis=1)

    rho, p = 0.3, 4.0
    own = {
        "asam": {"eta": 0.1},
        "esam": {"beta": 1.0, "gamma": 1.0},
        "gam": {"rho_inner": rho},
        "le_sam": {"sigma": 1e9},
        "periodic_sam": {"k": 1},
        "k_sam": {"k": 8},
        "sparse_sam": {"sparsity": 0.0},
    }
    options = {"rho": rho, "p": p, "mask": {"w": True, "b": False}, **own.get(name, {})}
    if name != "asam":
        options["normalization"] = sam_optax.elementwise(0.1)
    build_method = functools.partial(getattr(sam_optax, name), **ARGUMENTS.get(name, {}), **options)
    if FAMILY[name].kind == "examples":
        key = (jax.random.key(0),) if "key" in FAMILY[name].needs else ()
        build_method(losses)(*key, params, x)
    else:
        method, grad_fn = build_method(), jax.grad(lambda w: jnp.mean(losses(w, x)))
        g, state = grad_fn(params), method.init(params)
        value_fn = lambda w: jnp.mean(losses(w, x))
        extra = own_inputs(grad_fn, value_fn) | {"grad_fn": grad_fn}
        for _ in range(2):  # those that ascend along what they remember move in the second step
            _, state = method.update(g, state, params, **extra)
    jax.effects_barrier()
    moved = [e for e in (jax.tree.map(np.subtract, w, params) for w in points) if e["w"].any()]
    assert moved
    assert not any(e["b"].any() for e in moved if name not in ("lookbehind", "sampa"))
    T = np.abs(params["w"]) + 0.1
    lengths = [(np.abs(e["w"] / T) ** p).sum() ** (1 / p) for e in moved]
    assert any(abs(length - rho) < 1e-9 for length in lengths), lengths
