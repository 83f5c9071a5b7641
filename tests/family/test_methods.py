"""SAM and ASAM against transcriptions of the papers, and what must hold of them exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as ref
import optax
import pytest
from checks import assert_exact as assert_close

import sam_optax

jax_loss = functools.partial(ref.loss, jnp)


def train(method, params, batch, steps, lr=0.05, momentum=0.9, decay=0.01):
    """The Optax door in a jitted step; `ref.trajectory` is its transcription."""
    tx = optax.chain(method, optax.add_decayed_weights(decay), optax.sgd(lr, momentum=momentum))

    @jax.jit
    def step(params, state):
        grad_fn = lambda params: jax.grad(jax_loss)(params, batch)
        updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def train_functional(method, params, batch, steps, lr=0.05, momentum=0.9, decay=0.01):
    """The functional door with the same base optimizer."""
    tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(lr, momentum=momentum))
    sharp = jax.jit(sam_optax.grad(jax_loss, method))
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(sharp(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("door", [train, train_functional])
@pytest.mark.parametrize("p", ref.P_VALUES)
def test_sam_follows_the_paper(x64, door, p):
    params, batch = ref.network()
    rho = 0.2

    def perturbation(w, g):
        return ref.ascent(g, {k: np.ones_like(v) for k, v in w.items()}, rho, p)

    expected = ref.trajectory(params, batch, 8, perturbation)
    assert_close(door(sam_optax.sam(rho, p=p), params, batch, 8), expected)


@pytest.mark.parametrize(
    "door, p",
    [*((train, p) for p in ref.P_VALUES), (train_functional, 1.0), (train_functional, 2.0)],
)
@pytest.mark.parametrize("kind", ["elementwise", "filterwise", "layerwise"])
@pytest.mark.parametrize("normalize_bias", [False, True])
def test_asam_follows_the_paper(x64, door, p, kind, normalize_bias):
    params, batch = ref.network()
    rho, eta = 0.3, 0.02

    def perturbation(w, g):
        return ref.ascent(g, ref.operator(kind, w, eta, normalize_bias), rho, p)

    expected = ref.trajectory(params, batch, 6, perturbation)
    method = sam_optax.asam(
        rho,
        eta,
        p=p,
        normalization=getattr(sam_optax, kind),
        normalize_bias=normalize_bias,
    )
    assert_close(door(method, params, batch, 6), expected)


@pytest.mark.parametrize("method", [sam_optax.sam(0.2), sam_optax.asam(0.3)])
def test_neither_a_plain_step_nor_a_descent(method):
    """Fails if the ascent is replaced by zeros or by its opposite."""
    params, batch = jax.tree.map(jnp.asarray, ref.network())
    seen = []

    def grad_fn(w):
        seen.append(jax_loss(w, batch))
        return jax.grad(jax_loss)(w, batch)

    clean = jax.grad(jax_loss)(params, batch)
    sharp, _ = method.update(clean, method.init(params), params, grad_fn=grad_fn)
    assert len(seen) == 1
    assert seen[0] > jax_loss(params, batch) + 0.01
    moved = optax.tree.norm(optax.tree.sub(sharp, clean)) / optax.tree.norm(clean)
    assert moved > 0.05


def test_perturbed_point_of_sam_is_at_distance_rho(x64):
    params, batch = jax.tree.map(jnp.asarray, ref.network())
    points = []

    def grad_fn(w):
        points.append(w)
        return jax.grad(jax_loss)(w, batch)

    clean = jax.grad(jax_loss)(params, batch)
    method = sam_optax.sam(0.2)
    method.update(clean, method.init(params), params, grad_fn=grad_fn)
    e = optax.tree.sub(points[0], params)
    np.testing.assert_allclose(optax.tree.norm(e), 0.2, rtol=1e-12)
    np.testing.assert_allclose(optax.tree.vdot(e, clean), 0.2 * optax.tree.norm(clean), rtol=1e-12)


@pytest.mark.parametrize("method", [sam_optax.sam, sam_optax.asam])
@pytest.mark.parametrize("base", [optax.sgd(0.1, momentum=0.9), optax.adamw(1e-2)])
def test_rho_zero_is_exactly_the_base_optimizer(method, base):
    params, batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), ref.network())

    def run(tx):
        w, state = params, tx.init(params)
        for _ in range(5):
            grad_fn = jax.jit(lambda w: jax.grad(jax_loss)(w, batch))
            updates, state = optax.with_extra_args_support(tx).update(
                grad_fn(w), state, w, grad_fn=grad_fn
            )
            w = optax.apply_updates(w, updates)
        return w

    jax.tree.map(np.testing.assert_array_equal, run(optax.chain(method(0.0), base)), run(base))


def relu_loss(params, x, y):
    out = jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"]
    return jnp.mean((out[:, 0] - y) ** 2)


@pytest.mark.parametrize(
    "name, method, invariant",
    [
        ("|w|, biases included", sam_optax.asam(0.3, 0.0, normalize_bias=True), True),
        (
            "filter norms",
            sam_optax.asam(0.3, 0.0, normalization=sam_optax.filterwise, normalize_bias=True),
            True,
        ),
        (
            "leaf norms",
            sam_optax.asam(0.3, 0.0, normalization=sam_optax.layerwise, normalize_bias=True),
            True,
        ),
        ("bias T = 1", sam_optax.asam(0.3, 0.0), False),
        ("eta > 0", sam_optax.asam(0.3, 0.1, normalize_bias=True), False),
        ("SAM", sam_optax.sam(0.3), False),
    ],
)
def test_invariant_2_rescaling_of_relu_networks(x64, name, method, invariant):
    rng = np.random.default_rng(1)
    params = {
        "w1": rng.normal(size=(3, 5)),
        "b1": rng.normal(size=5),
        "w2": rng.normal(size=(5, 1)),
    }
    x, y = rng.normal(size=(16, 3)), rng.normal(size=16)
    rescaled = {"w1": 4 * params["w1"], "b1": 4 * params["b1"], "w2": params["w2"] / 4}

    def perturbed_loss(w):
        w = jax.tree.map(jnp.asarray, w)
        seen = []

        def grad_fn(w):
            seen.append(float(relu_loss(w, x, y)))
            return jax.grad(relu_loss)(w, x, y)

        method.update(jax.grad(relu_loss)(w, x, y), method.init(w), w, grad_fn=grad_fn)
        return seen[0]

    close = np.isclose(perturbed_loss(params), perturbed_loss(rescaled), rtol=1e-10)
    assert close == invariant, name


def quadratic(seed=0, n=5):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n))
    return jnp.asarray(root @ root.T), jnp.asarray(rng.normal(size=n))


def test_invariant_3_quadratic(x64):
    H, w = quadratic()
    loss = lambda w: 0.5 * w @ H @ w
    g = H @ w
    unit, rho = g / jnp.linalg.norm(g), 0.3
    np.testing.assert_allclose(
        sam_optax.grad(loss, sam_optax.sam(rho))(w), g + rho * H @ unit, rtol=1e-12
    )
    # With the second-order term, the gradient of L(w + e(w)) itself, and its closed form.
    exact = jax.grad(lambda w: loss(w + rho * (H @ w) / jnp.linalg.norm(H @ w)))(w)
    g_s = H @ (w + rho * unit)
    projected = g_s - unit * (unit @ g_s)
    closed = g_s + rho / jnp.linalg.norm(g) * H @ projected
    second = sam_optax.grad(loss, sam_optax.sam(rho, second_order=True))(w)
    np.testing.assert_allclose(second, exact, rtol=1e-12)
    np.testing.assert_allclose(second, closed, rtol=1e-12)
    # On an eigenvector the term vanishes.
    vector = jnp.linalg.eigh(H)[1][:, 2]
    np.testing.assert_allclose(
        sam_optax.grad(loss, sam_optax.sam(rho, second_order=True))(vector),
        sam_optax.grad(loss, sam_optax.sam(rho))(vector),
        rtol=1e-10,
        atol=1e-12,
    )


def test_second_order_with_normalization_differentiates_the_operator(x64):
    params, batch = jax.tree.map(jnp.asarray, ref.network())
    ascent = sam_optax.dual_ascent(0.3, normalization=sam_optax.filterwise(0.01, True))

    def perturbed_loss(w):
        e, _ = ascent.update(jax.grad(jax_loss)(w, batch), ascent.init(w), w)
        return jax_loss(optax.apply_updates(w, e), batch)

    method = sam_optax.sharpness_aware(ascent, second_order=True)
    assert_close(sam_optax.grad(jax_loss, method)(params, batch), jax.grad(perturbed_loss)(params))


def smooth_network():
    """A loss with curvature everywhere, in float64, and params none of whose entries is 0."""
    rng = np.random.default_rng(3)
    params = {"a": jnp.asarray(rng.normal(size=(3, 2))), "b": jnp.asarray(rng.normal(size=2))}
    x = jnp.asarray(rng.normal(size=(5, 3)))
    return params, lambda w: jnp.mean(jnp.sin(x @ w["a"] + w["b"]) ** 2) + jnp.sum(w["b"] ** 4)


def finite_difference(fn, w, step=1e-5):
    flat, unflatten = jax.flatten_util.ravel_pytree(w)
    rows = step * np.eye(flat.size)
    value = lambda x: float(fn(unflatten(x)))
    return unflatten(jnp.asarray([(value(flat + d) - value(flat - d)) / (2 * step) for d in rows]))


@pytest.mark.parametrize("p", [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, np.inf])
@pytest.mark.parametrize("kind", [None, "elementwise", "filterwise", "layerwise"])
def test_second_order_is_the_derivative_of_the_perturbed_loss(x64, p, kind):
    params, loss = smooth_network()
    normalization = None if kind is None else getattr(sam_optax, kind)(0.1, True)

    def method(p):
        ascent = sam_optax.dual_ascent(0.1, p=p, normalization=normalization)
        return ascent, sam_optax.sharpness_aware(ascent, second_order=True)

    @jax.jit
    def perturbed_loss(w):
        e, _ = method(p)[0].update(jax.grad(loss)(w), optax.EmptyState(), w)
        return loss(optax.apply_updates(w, e))

    result = lambda p: sam_optax.grad(loss, method(p)[1])(params)
    expected = finite_difference(perturbed_loss, params)
    assert_close(result(p), expected, rtol=1e-6, atol=1e-8)
    if kind is None:
        assert_close(jax.jit(result)(p), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, np.inf])
def test_second_order_where_entries_are_zero_or_tie(p):
    """Dead units and symmetric ones, as at the start of training; a traced p = 2 gives 2."""
    w = jnp.array([1.0, 1.0, 0.0, -2.0, -2.0])
    loss = lambda w: jnp.sum(w**4)
    with jax.debug_nans(True):
        out = sam_optax.grad(loss, sam_optax.sam(0.1, p=p, second_order=True))(w)
        traced = jax.jit(
            lambda p: sam_optax.grad(loss, sam_optax.sam(0.1, p=p, second_order=True))(w)
        )(p)
    assert np.isfinite(out).all() and np.max(np.abs(out)) < 100
    np.testing.assert_allclose(traced, out, rtol=1e-5)


def test_second_order_of_complex_parameters_for_any_p(x64):
    """Against the finite difference over real and imaginary parts."""
    z = jnp.array([1.0 + 0.5j, -0.3 + 2.0j, 0.7 - 0.2j])
    loss = lambda z: jnp.sum(jnp.abs(z) ** 4) + jnp.sum(jnp.real(z) * jnp.imag(z) ** 3)
    for p in (1.0, 1.5, 3.0, np.inf):
        ascent = sam_optax.dual_ascent(0.1, p=p)

        def perturbed_loss(parts, ascent=ascent):
            z = parts[0] + 1j * parts[1]
            e, _ = ascent.update(jnp.conj(jax.grad(loss)(z)), optax.EmptyState(), z)
            return loss(z + e)

        parts = jnp.stack([jnp.real(z), jnp.imag(z)])
        expected = finite_difference(jax.jit(perturbed_loss), parts)
        out = sam_optax.grad(loss, sam_optax.sharpness_aware(ascent, second_order=True))(z)
        out = jnp.conj(out)  # back from the convention of jax.grad
        np.testing.assert_allclose(out, expected[0] + 1j * expected[1], rtol=1e-6, atol=1e-8)


def test_second_order_with_leaves_that_do_not_move(x64):
    """The numbers without them, whatever stands beside: integers, booleans, None, no elements."""
    params, loss = smooth_network()
    beside = {"n": jnp.arange(3), "on": jnp.array(True), "none": None, "no": jnp.zeros((0, 2))}
    whole = lambda w: loss(w) * jnp.where(w["on"], w["n"][1], 0)
    tx = sam_optax.sam(0.1, second_order=True)
    expected = sam_optax.grad(loss, tx)(params)
    out = jax.jit(sam_optax.grad(whole, tx, allow_int=True))(params | beside)
    assert_close({k: out[k] for k in params}, expected, rtol=1e-12)
    assert out["n"].dtype == out["on"].dtype == jax.dtypes.float0

    def from_value(w):
        return tx.update(jax.grad(whole, allow_int=True)(w), tx.init(w), w, value_fn=whole)[0]

    out = jax.jit(from_value)(params | beside)
    assert_close({k: out[k] for k in params}, expected, rtol=1e-12)


def test_second_order_where_the_descent_is_of_another_precision():
    params = {"a": jnp.array([1.0, 2.0])}
    loss = lambda w: jnp.sum(w["a"] ** 4)
    lower = lambda w: jax.tree.map(lambda g: g.astype(jnp.bfloat16), jax.grad(loss)(w))
    tx = sam_optax.sam(0.1, second_order=True)
    run = lambda **extra: tx.update(params, tx.init(params), params, value_fn=loss, **extra)[0]
    out = run(descent_grad_fn=lower)
    assert out["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(out["a"].astype(jnp.float32), run()["a"], rtol=2e-2)


def test_second_order_at_a_stationary_point_is_finite():
    with jax.debug_nans(True):
        out = sam_optax.grad(lambda w: jnp.sum(w**2), sam_optax.sam(0.1, second_order=True))(
            jnp.zeros(3)
        )
    np.testing.assert_array_equal(out, np.zeros(3))


def test_invariant_4_one_dimensional_two_cycle(x64):
    lr, curvature, rho = 0.1, 3.0, 0.2
    loss = lambda w: 0.5 * curvature * w**2
    sharp = jax.jit(sam_optax.grad(loss, sam_optax.sam(rho)))
    w = jnp.asarray(0.7)
    for _ in range(500):
        previous, w = w, w - lr * sharp(w)
    amplitude = lr * curvature * rho / (2 - lr * curvature)
    np.testing.assert_allclose([abs(w), abs(previous)], [amplitude, amplitude], rtol=1e-10)
    assert np.sign(w) == -np.sign(previous)


def test_sam_with_a_mask_perturbs_by_the_norm_of_what_is_left(x64):
    """SAM-ON by mask: only the normalization-like leaves are perturbed."""
    params, batch = ref.network()
    mask = {"w1": False, "b1": True, "w2": False, "b2": True}

    def perturbation(w, g):
        size = np.sqrt(sum((g[k] ** 2).sum() for k in g if mask[k]))
        return {k: 0.2 * mask[k] * g[k] / size for k in g}

    expected = ref.trajectory(params, batch, 5, perturbation)
    assert_close(train(sam_optax.sam(0.2, mask=mask), params, batch, 5), expected)


def test_complex_parameters_ascend():
    """Optax expects the direction of ascent, jax.grad gives its conjugate; both doors climb."""
    target = jnp.array([1.0 + 2.0j, -1.0j])
    loss = lambda z: jnp.sum(jnp.abs(z - target) ** 2)
    z = jnp.array([0.5 - 1.0j, 2.0 + 0.0j])
    direction = 2 * (z - target)
    perturbed = z + 0.1 * direction / jnp.linalg.norm(direction)
    np.testing.assert_allclose(
        sam_optax.grad(loss, sam_optax.sam(0.1))(z), jax.grad(loss)(perturbed), rtol=1e-6
    )
    method = sam_optax.sam(0.1)
    out, _ = method.update(jnp.conj(jax.grad(loss)(z)), method.init(z), z, value_fn=loss)
    np.testing.assert_allclose(out, jnp.conj(jax.grad(loss)(perturbed)), rtol=1e-6)


def powers(program):
    """Number of power operations in a program, those inside of others included."""
    inner = [p for eqn in program.eqns for p in jax.tree.leaves(eqn.params) if hasattr(p, "eqns")]
    own = sum(eqn.primitive.name == "pow" for eqn in program.eqns)
    return own + sum(powers(getattr(p, "jaxpr", p)) for p in inner)


@pytest.mark.parametrize(
    "factory, changes",
    [
        (sam_optax.sam, {}),
        (sam_optax.sam, {"second_order": True}),
        (sam_optax.asam, {}),
        (sam_optax.asam, {"normalize_bias": True}),
        (sam_optax.dual_ascent, {}),
    ],
)
def test_inject_hyperparams_takes_them_as_they_stand(factory, changes):
    """No static_args, and no power in the step: p is not traced unless it is given."""
    w = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([0.5, 3.0])}
    loss = lambda w: jnp.sum(w["a"] * w["a"] * w["b"]) + jnp.sum(w["b"] * w["b"] * w["b"])
    injected = optax.inject_hyperparams(factory)(rho=0.05, **changes)
    plain = factory(rho=0.05, **changes)

    def step(tx):
        update = lambda w, state: tx.update(jax.grad(loss)(w), state, w, grad_fn=jax.grad(loss))[0]
        state = tx.init(w)
        assert powers(jax.make_jaxpr(update)(w, state).jaxpr) == 0
        return jax.jit(update)(w, state)

    assert_close(step(injected), step(plain), rtol=1e-6, atol=1e-7)


def test_a_traced_p_that_is_given_is_a_power():
    """What the count above would find."""
    g = jnp.ones(2)
    update = lambda p: sam_optax.dual_ascent(0.1, p=p).update(g, optax.EmptyState())[0]
    assert powers(jax.make_jaxpr(update)(2.0).jaxpr) > 0


def test_none_is_the_default_of_p_and_of_the_normalization():
    params, loss = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.ones(2)}, lambda w: jnp.sum(w["a"] ** 4)
    for default, given in (
        (sam_optax.sam(0.1), sam_optax.sam(0.1, p=2)),
        (
            sam_optax.asam(0.1, 0.3),
            sam_optax.asam(0.1, 0.3, p=2.0, normalization=sam_optax.elementwise),
        ),
    ):
        out, expected = (sam_optax.grad(loss, m)(params) for m in (default, given))
        jax.tree.map(np.testing.assert_array_equal, out, expected)
