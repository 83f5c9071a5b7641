"""Eigenvalues, trace, density and the monitor against dense Hessians and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as ref
import optax
import pytest

import sam_optax
from sam_optax import sharpness
from sam_optax.sharpness import _lanczos

KEY = jax.random.key(0)


def matrix_loss(w, batch):
    """A quadratic whose Hessian is the mean of the matrices in the batch."""
    return 0.5 * jnp.mean(jnp.einsum("i,nij,j->n", w, batch, w))


def network_loss(params, batch):
    return ref.loss(jnp, params, batch)


def dense_hessian(params, batch):
    w, unravel = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda w: network_loss(unravel(w), batch)))(w))


def test_eigenvalues_and_trace_of_a_network_equal_its_dense_hessian(x64):
    params, (x, y) = ref.network(examples=17)
    H = dense_hessian(params, (x, y))
    expected = np.linalg.eigvalsh(H)
    batches = [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])]
    for data in ((x, y), batches):
        found = sharpness.hessian_eigenvalues(network_loss, params, data, key=KEY, tolerance=1e-13)
        np.testing.assert_allclose(found.top, expected[::-1][:5], rtol=1e-9)
        np.testing.assert_allclose(found.bottom, expected[:5], rtol=1e-9, atol=1e-11)
        assert found.steps == len(H) and found.examples == 17
        np.testing.assert_allclose(found.ratio, expected[-1] / expected[-5], rtol=1e-9)
    trace = sharpness.hessian_trace(network_loss, params, (x, y), key=KEY, probes=600)
    assert abs(trace.value - np.trace(H)) < 4 * trace.standard_error
    variance = 2 * ((H**2).sum() - (np.diag(H) ** 2).sum())
    np.testing.assert_allclose(trace.probes.var(ddof=1), variance, rtol=0.25)
    np.testing.assert_allclose(trace.standard_error, trace.probes.std(ddof=1) / np.sqrt(600))
    streamed = sharpness.hessian_trace(network_loss, params, batches, key=KEY, probes=20)
    np.testing.assert_allclose(streamed.probes, trace.probes[:20], rtol=1e-10)


@pytest.mark.parametrize("operator", ["elementwise", "filterwise"])
def test_under_a_normalization_the_matrix_is_scaled_on_both_sides(x64, operator):
    params, batch = ref.network()
    T = ref.operator(operator, params, 0.01, True)
    diagonal = np.concatenate([T[k].ravel() for k in sorted(T)])
    expected = np.linalg.eigvalsh(diagonal[:, None] * dense_hessian(params, batch) * diagonal)
    normalization = getattr(sam_optax, operator)(0.01, True)
    found = sharpness.hessian_eigenvalues(
        network_loss, params, batch, key=KEY, normalization=normalization, tolerance=1e-13
    )
    np.testing.assert_allclose(found.top, expected[::-1][:5], rtol=1e-9)


def test_residuals_bound_the_error_before_convergence(x64):
    matrix = np.diag(np.linspace(-1, 2, 300))[None]
    errors = []
    for steps in (5, 10, 20, 40):
        found = sharpness.hessian_eigenvalues(
            matrix_loss, np.zeros(300), matrix, key=KEY, steps=steps, count=1
        )
        errors.append(2 - found.top[0])
        assert 0 < errors[-1] <= found.top_residuals[0] and not found.broke_down
        assert 0 < found.bottom[0] + 1 <= found.bottom_residuals[0]
    assert errors[-1] < 1e-2 < errors[0]


@pytest.mark.parametrize(
    ("matrix", "distinct"),
    [
        (np.eye(40), [1.0]),
        (np.zeros((40, 40)), [0.0]),
        (np.diag(np.eye(40)[0]) + np.ones((40, 40)), None),
        (np.diag([7.2] * 20 + [-1.0] * 20), [-1.0, 7.2]),
        (np.kron(np.eye(20), [[0.0, 5.0], [5.0, 0.0]]), [-5.0, 5.0]),  # a diagonal of zeros
        (1e-12 * np.diag([3.0] * 20 + [1.0] * 20), [1e-12, 3e-12]),
        (np.diag([1e6] + [1.0] * 39), [1.0, 1e6]),
    ],
    ids=["identity", "zero", "rank-2", "two", "zero diagonal", "tiny", "spread"],
)
def test_lanczos_stops_at_breakdown_in_float32(matrix, distinct):
    if distinct is None:
        values = np.linalg.eigvalsh(matrix)
        distinct = [0.0, *values[-2:]]
    data = matrix[None].astype(np.float32)
    scale = max(np.abs(distinct)) or 1.0
    for seed in range(5):
        found = sharpness.hessian_eigenvalues(
            matrix_loss, jnp.zeros(40), data, key=jax.random.key(seed)
        )
        assert found.broke_down and found.steps == len(distinct)
        np.testing.assert_allclose(found.bottom, distinct, atol=3e-6 * scale)
        np.testing.assert_allclose(found.top, distinct[::-1], atol=3e-6 * scale)


def test_lanczos_stops_where_all_diagonal_entries_are_zero():
    # A bipartite graph, seen from one side: every alpha is 0, and only the betas give a scale.
    B = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    matrix = jnp.asarray(np.block([[np.zeros((3, 3)), B], [B.T, np.zeros((5, 5))]]), jnp.float32)
    start = jnp.asarray([1.0, 2.0, 3.0, 0, 0, 0, 0, 0])
    found = _lanczos.lanczos(lambda v: [matrix @ v[0]], [start], 50, 1e-5, lambda: None)
    assert found.broke_down and len(found.diagonal) == 6 and not found.diagonal.any()
    singular = np.linalg.svd(B, compute_uv=False)
    np.testing.assert_allclose(found.ritz()[0], [*-singular, *singular[::-1]], rtol=1e-5)


def test_no_ghost_copies_in_float32():
    # A wide gap converges early; without reorthogonalisation 1000 would come back many times.
    values = np.concatenate([np.linspace(0, 1, 199), [1000.0]]).astype(np.float32)
    found = sharpness.hessian_eigenvalues(
        matrix_loss, jnp.zeros(200), np.diag(values)[None], key=KEY, steps=80, tolerance=0.0
    )
    np.testing.assert_allclose(found.top[0], 1000, rtol=1e-6)
    assert found.top[1] < 1.001 and found.bottom[0] > -1e-3
    assert found.ratio > 900


def test_the_largest_is_not_the_largest_in_size(x64):
    found = sharpness.hessian_eigenvalues(
        matrix_loss, np.zeros(3), np.diag([-9.0, 1.0, 2.0])[None], key=KEY, count=1
    )
    np.testing.assert_allclose((found.top[0], found.bottom[0]), (2, -9), rtol=1e-12)
    assert np.isnan(found.ratio)


def test_softmax_regression_at_zero(x64):
    rng = np.random.default_rng(0)
    x, classes = rng.normal(size=(50, 4)), 3
    labels = rng.integers(0, classes, 50)

    def loss_fn(w, batch):
        return optax.softmax_cross_entropy_with_integer_labels(batch[0] @ w, batch[1]).mean()

    params = np.zeros((4, classes))
    expected = np.linalg.eigvalsh(x.T @ x / 50) / classes  # each classes - 1 times, and zeros
    found = sharpness.hessian_eigenvalues(loss_fn, params, (x, labels), key=KEY)
    np.testing.assert_allclose(found.top[:4], expected[::-1], rtol=1e-9)
    assert found.steps == 5 and abs(found.bottom[0]) < 1e-9
    density = sharpness.spectral_density(loss_fn, params, (x, labels), key=KEY, probes=400)
    # In the mean over probes every distinct eigenvalue has the weight of its multiplicity.
    nodes = np.concatenate([[0.0], expected])
    nearest = np.abs(density.nodes[..., None] - nodes).argmin(-1)
    weights = [density.weights[nearest == i].sum() / 400 for i in range(5)]
    np.testing.assert_allclose(weights, [4 / 12, 2 / 12, 2 / 12, 2 / 12, 2 / 12], atol=0.02)


def test_a_diagonal_hessian_gives_its_multiplicities_and_its_trace_exactly(x64):
    values = np.array([4.0] * 5 + [1.0] * 3 + [-2.0] * 2)
    data = np.diag(values)[None]
    density = sharpness.spectral_density(matrix_loss, np.zeros(10), data, key=KEY, probes=3)
    np.testing.assert_allclose(density.nodes, [[-2.0, 1.0, 4.0]] * 3, rtol=1e-12)
    np.testing.assert_allclose(density.weights, [[0.2, 0.3, 0.5]] * 3, rtol=1e-12)
    trace = sharpness.hessian_trace(matrix_loss, np.zeros(10), data, key=KEY, probes=2)
    np.testing.assert_allclose(trace.probes, [19.0, 19.0], rtol=1e-14)


def test_a_density_integrates_to_one_and_has_the_trace_as_mean(x64):
    params, batch = ref.network()
    H = dense_hessian(params, batch)
    density = sharpness.spectral_density(network_loss, params, batch, key=KEY, probes=40)
    t = density.grid(4000)
    width = t[1] - t[0]
    np.testing.assert_allclose(density(t).sum() * width, 1, rtol=1e-6)
    mean = (density(t) * t).sum() * width * density.size
    traces = density.size * (density.nodes * density.weights).sum(1)  # of each probe
    np.testing.assert_allclose(mean, traces.mean(), rtol=1e-6)
    assert abs(mean - np.trace(H)) < 4 * traces.std(ddof=1) / np.sqrt(40)
    np.testing.assert_allclose(
        density(t),
        sum(
            w / 40 * np.exp(-(((t - n) / density.sigma) ** 2) / 2)
            for n, w in zip(density.nodes.ravel(), density.weights.ravel(), strict=True)
        )
        / (density.sigma * np.sqrt(2 * np.pi)),
        rtol=1e-9,
    )
    assert density.sigma == (density.nodes.max() - density.nodes.min()) / 80
    narrow = sharpness.spectral_density(network_loss, params, batch, key=KEY, sigma=1e-3, probes=1)
    assert narrow.sigma == 1e-3


def test_density_of_zero_is_a_narrow_peak_at_zero():
    density = sharpness.spectral_density(matrix_loss, jnp.zeros(8), jnp.zeros((1, 8, 8)), key=KEY)
    np.testing.assert_array_equal(density.nodes, 0)
    t = density.grid(1001)
    np.testing.assert_allclose(density(t).sum() * (t[1] - t[0]), 1, rtol=1e-5)


def test_the_trace_also_takes_a_loss_with_a_custom_vjp(x64):
    @jax.custom_vjp
    def square(w):
        return w**2

    square.defvjp(lambda w: (w**2, w), lambda w, g: (2 * w * g,))
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(square(w))
    trace = sharpness.hessian_trace(loss_fn, np.ones(3), np.ones(2), key=KEY, probes=2)
    np.testing.assert_allclose(trace.value, 6)


def test_a_hessian_that_is_not_finite_is_reported_as_such():
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(jnp.sqrt(w))
    found = sharpness.hessian_eigenvalues(loss_fn, jnp.zeros(3), jnp.ones(2), key=KEY)
    assert np.isnan(found.top).all() and found.steps == 1
    assert not np.isfinite(
        sharpness.hessian_trace(loss_fn, jnp.zeros(3), jnp.ones(2), key=KEY).value
    )


def test_summary_prints_the_figures_of_its_parts():
    params, batch = jax.tree.map(jnp.float32, ref.network())
    result = sharpness.summary(network_loss, params, batch, key=KEY, rho=0.1)
    one = sharpness.one_step(network_loss, params, batch, rho=0.1)
    assert result.one_step.value == one.value and result.worst_case.value >= one.value
    lines = str(result).splitlines()
    assert len(lines) == 7 and f"{result.trace.value:.4g}" in lines[-1]
    assert f"{result.eigenvalues.top[0]:.4g}" in lines[3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *a: sharpness.hessian_eigenvalues(*a, key=KEY, count=0), "count must be at least"),
        (lambda *a: sharpness.hessian_eigenvalues(*a, key=KEY, steps=0), "steps must be at least"),
        (lambda *a: sharpness.hessian_trace(*a, key=KEY, probes=0), "probes must be at least"),
        (lambda *a: sharpness.spectral_density(*a, key=KEY, sigma=0.0), "sigma must be above 0"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(call, message):
    with pytest.raises(ValueError, match=f"{message}.*got 0"):
        call(lambda w, x: jnp.mean(x) * w, 1.0, np.ones(4))
    with pytest.raises(ValueError, match=r"params must be real.*complex64"):
        sharpness.hessian_trace(lambda w, x: 0.0, jnp.ones(2, jnp.complex64), np.ones(4), key=KEY)


# The monitor


def monitored(rho=0.1, **options):
    return sam_optax.sharpness_aware(
        sam_optax.dual_ascent(rho), descent=sharpness.monitor(), **options
    )


def test_monitor_sees_the_one_step_sharpness_of_a_quadratic_exactly(x64):
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    H, w = root @ root.T, rng.normal(size=5)
    grad_fn = lambda w: H @ w
    tx = monitored()
    out, state = tx.update(H @ w, tx.init(w), w, grad_fn=grad_fn)
    seen = state.descent
    e = 0.1 * H @ w / np.linalg.norm(H @ w)
    expected = sharpness.one_step(matrix_loss, w, H[None], rho=0.1)
    np.testing.assert_allclose(seen.sharpness, expected.value, rtol=1e-6)
    np.testing.assert_allclose(seen.first_order, 0.1 * np.linalg.norm(H @ w), rtol=1e-6)
    np.testing.assert_allclose(seen.curvature, e @ H @ e / 0.01, rtol=1e-5)
    np.testing.assert_allclose(seen.gradient_norm, np.linalg.norm(H @ w), rtol=1e-6)
    g, s = H @ w, H @ (w + e)
    cosine = g @ s / np.linalg.norm(g) / np.linalg.norm(s)
    np.testing.assert_allclose(seen.cosine, cosine, rtol=1e-6)
    plain = sam_optax.sam(0.1)
    expected, _ = plain.update(H @ w, plain.init(w), w, grad_fn=grad_fn)
    np.testing.assert_array_equal(out, expected)


def test_monitor_is_third_order_accurate_on_a_network(x64):
    params, batch = ref.network()
    grad_fn = jax.grad(lambda params: network_loss(params, batch))
    errors = []
    for rho in (0.1, 0.05):
        tx = monitored(rho)
        _, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
        truth = sharpness.one_step(network_loss, params, batch, rho=rho).value
        errors.append(abs(float(state.descent.sharpness) - truth))
        assert errors[-1] < 0.01 * truth
    np.testing.assert_allclose(errors[0] / errors[1], 8, rtol=0.15)


def test_monitor_keeps_its_figures_on_steps_that_do_not_pay():
    w = jnp.ones(3)
    tx = optax.chain(monitored(when=lambda count: count == 1), optax.sgd(0.1))
    step = jax.jit(lambda s: tx.update(2 * w, s, w, grad_fn=lambda w: 2 * w)[1])
    states = [tx.init(w)]
    for _ in range(3):
        states.append(step(states[-1]))
    figures = [float(optax.tree.get(s, "sharpness")) for s in states]
    assert figures[:2] == [0, 0] and figures[2] == figures[3] > 0
    chex_like = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in states]
    assert chex_like[0] == chex_like[-1]


def test_monitor_of_a_zero_gradient_is_zero_without_nan():
    tx, w = monitored(), jnp.zeros(3)
    with jax.debug_nans(True):
        _, state = tx.update(w, tx.init(w), w, grad_fn=lambda w: 2 * w)
    assert all(float(x) == 0 for x in state.descent)


def test_monitor_of_extreme_gradients_has_a_finite_cosine():
    w = jnp.ones(3)
    for scale in (1e-18, 1e18):
        tx = monitored()
        _, state = tx.update(scale * w, tx.init(w), w, grad_fn=lambda w, s=scale: s * w)
        np.testing.assert_allclose(state.descent.cosine, 1, rtol=1e-5)


def test_monitor_averages_over_devices_and_composes_with_other_descents():
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    descent = optax.chain(sharpness.monitor("batch"), optax.scale(2.0), sam_optax.pmean("batch"))
    tx = sam_optax.sharpness_aware(sam_optax.dual_ascent(0.1), descent=descent)
    x, w = jnp.arange(8.0).reshape(8, 1), jnp.ones(1)
    loss_fn = lambda w, x: jnp.mean((w * x) ** 2)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(jax.P(), jax.P("batch")), out_specs=jax.P()
    )
    def step(w, x):
        w = jax.lax.pcast(w, "batch", to="varying")
        grad_fn = lambda w: jax.grad(loss_fn)(w, x)
        out, state = tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)
        return out, optax.tree.get(state, "sharpness")

    out, rise = jax.jit(step)(w, x)
    np.testing.assert_allclose(rise, 0.21 * np.mean(np.arange(8.0) ** 2), rtol=1e-5)
    np.testing.assert_allclose(out, [2 * 2.2 * np.mean(np.arange(8.0) ** 2)], rtol=1e-5)


def test_monitor_outside_its_place_says_so():
    with pytest.raises(ValueError, match=r"clean must be given.*descent rule.*got None"):
        sharpness.monitor().update(jnp.ones(2), sharpness.monitor().init(jnp.ones(2)))
