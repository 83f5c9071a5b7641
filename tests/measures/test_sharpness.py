"""Worst case, average case and m-sharpness against closed forms and plain loops."""

import itertools
import math
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as ref
import optax
import pytest
from flax.training.train_state import TrainState

import sam_optax
from sam_optax import landscape, sharpness

KEY = jax.random.key(0)


def quadratic(seed=0, size=6):
    """A tree {"w": (2, 2), "b": (2,)} with a dense Hessian H and a gradient, as loss and data."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    H = root @ root.T / size
    linear = rng.normal(size=size)
    params = {"w": rng.normal(size=(2, 2)), "b": rng.normal(size=2)}
    # The examples sum to the quadratic: one H and one linear part each, whose means are these.
    noise = rng.normal(size=(8, size))
    data = (np.repeat(H[None], 8, 0), linear + noise - noise.mean(0))
    return params, data, H, linear


def flat(params):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params)])


def quadratic_loss(params, batch):
    H, linear = batch
    w = flat(params)
    return jnp.mean(0.5 * jnp.einsum("i,nij,j->n", w, H, w) + linear @ w)


def trust_region_maximum(H, g, rho):
    """max 1/2 u^T H u + g^T u on the ball, by bisection of the secular equation."""
    values, vectors = np.linalg.eigh(H)
    c = vectors.T @ g
    low, high = values[-1], values[-1] + np.linalg.norm(g) / rho + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if np.sum((c / (middle - values)) ** 2) > rho**2 else (low, middle)
        )
    u = vectors @ (c / (high - values))
    return 0.5 * u @ H @ u + g @ u


def scales(normalization, params):
    T = {"w": np.ones((2, 2)), "b": np.ones(2)} if normalization is None else normalization(params)
    return np.asarray(flat(jax.tree.map(lambda t, w: t * jnp.ones_like(w), T, params)))


OPERATORS = {
    "none": None,
    "elementwise": sam_optax.elementwise(0.01),
    "filterwise": sam_optax.filterwise(0.01, normalize_bias=True),
    "layerwise": sam_optax.layerwise(0.0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_one_step_on_a_quadratic(x64, name):
    params, data, H, linear = quadratic()
    T, rho = scales(OPERATORS[name], params), 0.3
    g = H @ flat(params) + linear
    Tg = np.linalg.norm(T * g)
    expected = rho * Tg + rho**2 / 2 * (T**2 * g) @ H @ (T**2 * g) / Tg**2
    result = sharpness.one_step(
        quadratic_loss, params, data, rho=rho, normalization=OPERATORS[name]
    )
    np.testing.assert_allclose(result.value, expected, rtol=1e-12)
    np.testing.assert_allclose(flat(result.perturbation), rho * T**2 * g / Tg, rtol=1e-12)
    np.testing.assert_allclose(result.loss, quadratic_loss(params, data), rtol=1e-14)
    assert result.examples == 8


@pytest.mark.parametrize("name", OPERATORS)
def test_worst_case_reaches_the_secular_equation(x64, name):
    params, data, H, linear = quadratic()
    T, rho = scales(OPERATORS[name], params), 0.3
    g = H @ flat(params) + linear
    expected = trust_region_maximum(T[:, None] * H * T, T * g, rho)
    options = {"rho": rho, "normalization": OPERATORS[name], "key": KEY}
    result = sharpness.worst_case(quadratic_loss, params, data, **options)
    np.testing.assert_allclose(result.value, expected, rtol=1e-10)
    u = np.asarray(flat(result.perturbation)) / T
    assert np.linalg.norm(u) <= rho * (1 + 1e-12)


def test_worst_case_at_a_minimum_needs_its_random_start(x64):
    params, (hessians, _), H, _ = quadratic(1)
    params, data = jax.tree.map(np.zeros_like, params), (hessians, np.zeros((8, 6)))
    options = {"rho": 0.3, "steps": 400}
    still = sharpness.worst_case(quadratic_loss, params, data, restarts=0, **options)
    assert still.value == 0.0 == sharpness.one_step(quadratic_loss, params, data).value
    found = sharpness.worst_case(quadratic_loss, params, data, key=KEY, **options)
    np.testing.assert_allclose(found.value, 0.3**2 * np.linalg.eigvalsh(H)[-1] / 2, rtol=1e-9)


def test_one_step_of_projected_ascent_is_the_step_of_sam():
    params, data, *_ = quadratic()
    for p in (2, math.inf):
        one = sharpness.one_step(quadratic_loss, params, data, rho=0.3, p=p)
        same = sharpness.worst_case(quadratic_loss, params, data, rho=0.3, p=p, steps=1, restarts=0)
        np.testing.assert_allclose(one.value, same.value, rtol=1e-5)
        grads = jax.grad(quadratic_loss)(params, data)
        ascent = sam_optax.dual_ascent(0.3, p=p)
        e, _ = ascent.update(grads, ascent.init(params), params)
        jax.tree.map(
            lambda a, b, c: np.testing.assert_allclose((a, b), (c, c), rtol=1e-5),
            one.perturbation,
            same.perturbation,
            e,
        )


def test_the_cube_s_best_corner_is_found(x64):
    params, data, H, linear = quadratic(2)
    g, rho = H @ flat(params) + linear, 0.4
    T = scales(OPERATORS["elementwise"], params)
    corners = rho * T * np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    expected = max(0.5 * e @ H @ e + g @ e for e in corners)  # a convex function: at a corner
    options = {"rho": rho, "p": math.inf, "normalization": OPERATORS["elementwise"]}
    result = sharpness.worst_case(quadratic_loss, params, data, key=KEY, restarts=5, **options)
    np.testing.assert_allclose(result.value, expected, rtol=1e-12)
    assert np.abs(np.asarray(flat(result.perturbation)) / T).max() <= rho * (1 + 1e-12)


def test_worst_case_keeps_the_best_iterate_and_never_falls_below_zero():
    # Concave: every step down the gradient's line overshoots, and 0 is the best there is.
    loss_fn = lambda w, x: -jnp.mean(x) * jnp.sum(w**2)
    result = sharpness.worst_case(loss_fn, jnp.zeros(3), jnp.ones(4), key=KEY, rho=0.5)
    assert result.value == 0.0 and not np.any(result.perturbation)
    steep = lambda w, x: jnp.mean(x) * jnp.sum(jnp.sin(9 * w))
    values = [
        sharpness.worst_case(steep, jnp.full(3, 0.01), jnp.ones(4), rho=1.0, steps=k, restarts=0)
        for k in (1, 2, 5, 30)
    ]
    assert all(a.value <= b.value for a, b in itertools.pairwise(values))


def test_a_loss_that_is_not_a_number_is_reported():
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(jnp.sqrt(1.05 - w))
    result = sharpness.worst_case(loss_fn, jnp.ones(2), -jnp.ones(4), rho=1.0, steps=3, restarts=0)
    assert math.isnan(result.value)


@pytest.mark.parametrize("p", ref.P_VALUES)
def test_one_step_of_a_linear_loss_is_the_dual_norm(x64, p):
    g = np.array([3.0, -4.0, 1.0])
    q = {1.0: np.inf, np.inf: 1.0}.get(p, p / (p - 1) if p != 1 else None)
    result = sharpness.one_step(lambda w, x: jnp.mean(x @ w), np.zeros(3), g[None], rho=0.2, p=p)
    np.testing.assert_allclose(result.value, 0.2 * np.linalg.norm(g, q), rtol=1e-12)


@pytest.mark.parametrize("name", ["none", "elementwise"])
def test_average_case_is_half_the_trace(x64, name):
    params, data, H, _ = quadratic()
    T, rho = scales(OPERATORS[name], params), 0.1
    result = sharpness.average_case(
        quadratic_loss, params, data, key=KEY, rho=rho, samples=400,
        normalization=OPERATORS[name],
    )  # fmt: skip
    scaled = T[:, None] * H * T
    assert abs(result.value - rho**2 * np.trace(scaled) / 2) < 4 * result.standard_error
    # For Gaussian d the variance of d^T H d / 2 is |H|_F^2 / 2: the linear part must have gone.
    expected = rho**2 * np.sqrt((scaled**2).sum() / 2 / 400)
    np.testing.assert_allclose(result.standard_error, expected, rtol=0.15)
    assert result.samples == 400 and result.examples == 8


def relu_network(params, batch):
    x, y = batch
    return jnp.mean((jnp.maximum(x @ params["w1"], 0) @ params["w2"] - y) ** 2)


def relu_problem():
    rng = np.random.default_rng(0)
    params = {"w1": rng.normal(size=(3, 5)), "w2": rng.normal(size=(5, 2))}
    return params, (rng.normal(size=(20, 3)), rng.normal(size=(20, 2)))


def test_adaptive_average_case_does_not_see_a_rescaling(x64):
    params, data = relu_problem()
    factors = np.array([0.1, 0.5, 2.0, 10.0, 3.0])  # for each neuron
    same = {"w1": params["w1"] * factors, "w2": params["w2"] / factors[:, None]}
    for normalization, equal in ((sam_optax.elementwise(eta=0.0), True), (None, False)):
        values = [
            sharpness.average_case(
                relu_network, w, data, key=KEY, samples=5, normalization=normalization
            ).value
            for w in (params, same)
        ]
        assert math.isclose(*values, rel_tol=1e-10) == equal


@pytest.mark.parametrize("operator", ["none", "elementwise"])
def test_m_sharpness_of_a_logistic_loss_is_exact_for_single_examples(x64, operator):
    rng = np.random.default_rng(0)
    x, y, w, rho = rng.normal(size=(30, 4)), rng.choice([-1.0, 1.0], 30), rng.normal(size=4), 0.2
    normalization = None if operator == "none" else sam_optax.elementwise(0.01, True)
    T = np.ones(4) if operator == "none" else np.abs(w) + 0.01
    loss_fn = lambda w, batch: jnp.mean(jnp.log1p(jnp.exp(-batch[1] * (batch[0] @ w))))
    margin, length = -y * (x @ w), np.linalg.norm(T * x, axis=1)
    rises = np.log1p(np.exp(margin + rho * length)) - np.log1p(np.exp(margin))
    for steps in (1, 3):  # it is the maximum, so further steps change nothing
        result = sharpness.m_sharpness(
            loss_fn, w, (x, y), m=1, rho=rho, normalization=normalization, steps=steps
        )
        np.testing.assert_allclose(result.value, rises.mean(), rtol=1e-12)
        np.testing.assert_allclose(result.standard_error, rises.std(ddof=1) / np.sqrt(30))


def test_m_sharpness_equals_a_loop_over_groups_and_counts_what_is_left(x64):
    params, (x, y) = ref.network(examples=23)
    batches = [(x[:9], y[:9]), (x[9:11], y[9:11]), (x[11:], y[11:])]  # groups cross these
    loss_fn = lambda params, batch: ref.loss(jnp, params, batch)
    expected = [
        sharpness.one_step(loss_fn, params, (x[i : i + 5], y[i : i + 5]), rho=0.1).value
        for i in range(0, 20, 5)
    ]
    for data in ((x, y), batches):
        result = sharpness.m_sharpness(loss_fn, params, data, m=5, rho=0.1)
        np.testing.assert_allclose(result.value, np.mean(expected), rtol=1e-12)
        assert (result.m, result.groups, result.left_out) == (5, 4, 3)
    whole = sharpness.m_sharpness(loss_fn, params, batches, m=23, rho=0.1)
    one = sharpness.one_step(loss_fn, params, (x, y), rho=0.1)
    np.testing.assert_allclose(whole.value, one.value, rtol=1e-12)
    assert math.isnan(whole.standard_error) and whole.left_out == 0


def test_batches_of_unequal_size_are_weighted_by_examples(x64):
    params, (x, y) = ref.network(examples=17)
    loss_fn = lambda params, batch: ref.loss(jnp, params, batch)
    batches = [(x[:8], y[:8]), (x[8:16], y[8:16]), (x[16:], y[16:])]
    for measure, options in (
        (sharpness.one_step, {}),
        (sharpness.worst_case, {"key": KEY, "steps": 3}),
        (sharpness.average_case, {"key": KEY, "samples": 5}),
    ):
        whole = measure(loss_fn, params, (x, y), rho=0.1, **options)
        streamed = measure(loss_fn, params, batches, rho=0.1, **options)
        np.testing.assert_allclose(streamed.value, whole.value, rtol=1e-11)
        np.testing.assert_allclose(streamed.loss, ref.loss(np, params, (x, y)), rtol=1e-13)
        assert streamed.examples == 17


class Loader:
    """Batches made on the fly, which remembers how many were alive at once."""

    def __init__(self, batches=6):
        self.batches, self.alive, self.most = batches, weakref.WeakSet(), 0

    def __iter__(self):
        rng = np.random.default_rng(0)
        for _ in range(self.batches):
            batch = Batch(rng.normal(size=(4, 3)).astype(np.float32))
            self.alive.add(batch)
            yield (batch,)
            del batch
            self.most = max(self.most, len(self.alive))


class Batch(np.ndarray):
    def __new__(cls, values):
        return values.view(cls)

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_a_data_set_is_streamed_not_gathered():
    loss_fn = lambda w, batch: jnp.mean((batch[0] @ w) ** 2)
    for measure, options in (
        (sharpness.one_step, {}),
        (sharpness.average_case, {"samples": 3, "key": KEY}),
        (sharpness.hessian_eigenvalues, {"steps": 3, "key": KEY}),
        (sharpness.hessian_trace, {"probes": 3, "key": KEY}),
    ):
        loader = Loader()
        assert measure(loss_fn, jnp.ones(3), loader, **options).examples == 24
        assert 0 < loader.most <= 2


@pytest.mark.parametrize("explicit", [False, True])
def test_sharded_data_gives_the_same_numbers(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(kind,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    rng = np.random.default_rng(0)
    w = {"w": rng.normal(size=(3, 2)).astype(np.float32)}
    x = rng.normal(size=(16, 3)).astype(np.float32)
    loss_fn = lambda params, x: jnp.mean(jnp.sum(jnp.tanh(x @ params["w"]) ** 2, axis=-1))
    for measure, options, field in (
        (sharpness.worst_case, {"key": KEY}, "value"),
        (sharpness.average_case, {"key": KEY, "samples": 3}, "value"),
        (sharpness.m_sharpness, {"m": 3}, "value"),
        (sharpness.hessian_trace, {"key": KEY, "probes": 3}, "value"),
        (sharpness.hessian_eigenvalues, {"key": KEY}, "top"),
        (sharpness.spectral_density, {"key": KEY, "probes": 2}, "nodes"),
    ):
        whole = getattr(measure(loss_fn, w, x, **options), field)
        sharded = jax.device_put(x, sharding)
        replicated = jax.device_put(w, jax.sharding.NamedSharding(mesh, jax.P()))
        # With explicit axes jax.grad itself wants the parameters on the mesh.
        params = replicated if explicit else w
        found = getattr(measure(loss_fn, params, sharded, **options), field)
        np.testing.assert_allclose(found, whole, rtol=2e-4, atol=2e-6)


def test_the_second_call_traces_nothing_even_with_new_params_data_and_operator():
    traces = []

    def loss_fn(params, batch):
        traces.append(None)
        return ref.loss(jnp, params, batch)

    for seed in range(2):
        before = len(traces)
        params, data = jax.tree.map(jnp.float32, ref.network(seed))
        normalization = sam_optax.elementwise()
        for measure, options in (
            (sharpness.worst_case, {"key": jax.random.key(seed), "rho": 0.1 + seed}),
            (sharpness.average_case, {"key": jax.random.key(seed), "samples": 3}),
            (sharpness.m_sharpness, {"m": 4}),
            (sharpness.hessian_eigenvalues, {"key": jax.random.key(seed), "steps": 5}),
            (sharpness.hessian_trace, {"key": jax.random.key(seed), "probes": 3}),
        ):
            measure(loss_fn, params, data, normalization=normalization, **options)
    assert before > 0 and len(traces) == before


def test_leaves_under_the_mask_and_integers_stay(x64):
    params = {"a": np.ones(2), "b": np.full(3, 2.0), "n": np.arange(2)}
    loss_fn = lambda p, x: jnp.mean(x) * (3 * jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)) / 2
    mask = {"a": True, "b": False, "n": True}
    options = {"mask": mask, "key": KEY}
    result = sharpness.worst_case(loss_fn, params, np.ones(4), rho=0.1, **options)
    assert not np.any(result.perturbation["b"]) and not np.any(result.perturbation["n"])
    np.testing.assert_allclose(result.value, 3 * ((np.sqrt(2) + 0.1) ** 2 - 2) / 2)
    found = sharpness.hessian_eigenvalues(loss_fn, params, np.ones(4), **options)
    np.testing.assert_allclose(found.top, [3.0])
    density = sharpness.spectral_density(loss_fn, params, np.ones(4), **options)
    np.testing.assert_allclose(density.nodes, 3.0)
    assert density.size == 2


def test_low_precision_leaves_keep_their_dtype():
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    loss_fn = lambda p, x: jnp.mean(x @ p["w"].astype(jnp.float32) ** 2)
    result = sharpness.one_step(loss_fn, params, jnp.ones((2, 4)), rho=0.5)
    assert result.perturbation["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(result.value, 4 * 1.25**2 - 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, d: sharpness.one_step(f, 1.0, d, rho=-1), "rho must be at least 0.0, got -1"),
        (lambda f, d: sharpness.one_step(f, 1.0, d, p=0.5), "p must be at least 1"),
        (lambda f, d: sharpness.worst_case(f, 1.0, d, p=3, key=KEY), "p must be 2 or inf.*got 3"),
        (lambda f, d: sharpness.worst_case(f, 1.0, d), "key must be given.*got None"),
        (lambda f, d: sharpness.worst_case(f, 1.0, d, steps=0, key=KEY), "steps must be at least"),
        (lambda f, d: sharpness.m_sharpness(f, 1.0, d, m=0), "m must be at least 1, got 0"),
        (lambda f, d: sharpness.m_sharpness(f, 1.0, d, m=9), "m must be at most .* 4, got 9"),
        (lambda f, d: sharpness.average_case(f, 1.0, d, key=KEY, samples=0), "samples must be"),
        (lambda f, d: sharpness.one_step(f, 1.0, iter([d])), "data must be iterable again"),
        (lambda f, d: sharpness.one_step(f, 1.0, []), "data must hold at least one batch"),
        (lambda f, d: sharpness.one_step(f, 1.0, (d, d[:2])), r"same number.*got \[2, 4\]"),
        (lambda f, d: sharpness.one_step(f, 1.0, 3), "data must be a batch or an iterable"),
        (lambda f, d: sharpness.one_step(f, 1, d), "params must hold a floating leaf"),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(lambda w, x: jnp.mean(x) * w, np.ones(4))


def test_a_progress_bar_is_shown_on_request(capsys):
    loss_fn = lambda w, x: jnp.mean(x @ w**2)
    sharpness.worst_case(loss_fn, jnp.ones(2), jnp.ones((3, 2)), key=KEY, progress=True)
    assert "worst case: " in capsys.readouterr().err
    sharpness.worst_case(loss_fn, jnp.ones(2), jnp.ones((3, 2)), key=KEY)
    assert capsys.readouterr().err == ""


MEASURES = [
    lambda f, w, b, **o: sharpness.one_step(f, w, b),
    lambda f, w, b, **o: sharpness.worst_case(f, w, b, **o, steps=2),
    lambda f, w, b, **o: sharpness.average_case(f, w, b, **o, samples=2),
    lambda f, w, b, **o: sharpness.m_sharpness(f, w, b, **o, m=4, restarts=1),
    lambda f, w, b, **o: sharpness.hessian_eigenvalues(f, w, b, **o),
    lambda f, w, b, **o: sharpness.hessian_trace(f, w, b, **o, probes=2),
    lambda f, w, b, **o: sharpness.spectral_density(f, w, b, **o, probes=2),
    lambda f, w, b, **o: sharpness.summary(f, w, b, **o),
    lambda f, w, b, **o: landscape.rays(f, w, b, **o, distances=[1.0]),
    lambda f, w, b, **o: landscape.random_plane(f, w, b, **o, x=[1.0]),
    lambda f, w, b, **o: landscape.interpolate(f, w, w, b),
]


@pytest.mark.parametrize("measure", MEASURES)
def test_a_loss_that_is_no_scalar_says_what_to_return(measure):
    params, data, *_ = quadratic()
    for loss_fn, shape in (
        (lambda w, b: (quadratic_loss(w, b), {"accuracy": 1.0}), r"\(\(\), \{'accuracy': \(\)\}\)"),
        (lambda w, b: b[1] @ flat(w), r"\([48],\)"),
        (lambda w, b: quadratic_loss(w, b)[None], r"\(1,\)"),
        (lambda w, b: None, "None"),
    ):
        with pytest.raises(ValueError, match=f"loss_fn must return one scalar.*got the .*{shape}"):
            measure(loss_fn, params, data, key=KEY)


@pytest.mark.parametrize("measure", MEASURES)
def test_an_equinox_module_is_told_to_be_partitioned(measure):
    model = eqx.nn.MLP(2, 1, 3, 1, key=KEY)
    loss = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)
    x = jnp.ones((8, 2))
    with pytest.raises(ValueError, match=r"at \.activation\. .*eqx\.partition\(model, eqx\.is_in"):
        measure(loss, model, x, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)  # as the message says
    measure(lambda params, x: loss(eqx.combine(params, static), x), params, x, key=KEY)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_seed_is_its_key(measure):
    params, data, *_ = quadratic()
    found = [measure(quadratic_loss, params, data, key=key) for key in (3, jax.random.key(3))]
    assert str(found[0]) == str(found[1])


def test_numbers_of_things_are_integers():
    params, data, *_ = quadratic()
    for name, call in {
        "samples": lambda n: sharpness.average_case(
            quadratic_loss, params, data, key=KEY, samples=n
        ),
        "steps": lambda n: sharpness.hessian_eigenvalues(
            quadratic_loss, params, data, key=KEY, steps=n
        ),
        "count": lambda n: sharpness.hessian_eigenvalues(
            quadratic_loss, params, data, key=KEY, count=n
        ),
        "probes": lambda n: sharpness.hessian_trace(
            quadratic_loss, params, data, key=KEY, probes=n
        ),
        "m": lambda n: sharpness.m_sharpness(quadratic_loss, params, data, m=n),
        "restarts": lambda n: sharpness.worst_case(
            quadratic_loss, params, data, key=KEY, restarts=n
        ),
    }.items():
        with pytest.raises(ValueError, match=rf"{name} must be an integer .*got 2\.5"):
            call(2.5)


def test_inputs_and_labels_in_a_list_are_no_two_batches():
    """A loss that takes both shapes would be averaged over inputs and labels alike."""
    x, y = np.ones((8, 2)), np.ones(8)
    loss_fn = lambda w, b: jnp.mean(w * b.sum())
    with pytest.raises(ValueError, match=r"got arrays of \[1, 2\] dimensions .*\[\(x, y\)\]"):
        sharpness.one_step(loss_fn, np.ones(2), [x, y])
    assert sharpness.one_step(loss_fn, np.ones(2), [x, x[:3]]).examples == 11


@pytest.mark.parametrize("measure", MEASURES)
def test_a_train_state_is_no_tree_of_parameters(measure):
    params, data, *_ = quadratic()
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    with pytest.raises(
        ValueError, match=r"state of an optimizer.*opt_state.*: give .*state\.param"
    ):
        measure(lambda state, b: quadratic_loss(state.params, b), state, data, key=KEY)


def test_data_that_end_after_one_pass_say_so():
    class Once:
        batches = iter([quadratic()[1]])

        def __iter__(self):
            return self.batches

    with pytest.raises(ValueError, match="at least one batch in every pass"):
        sharpness.one_step(quadratic_loss, quadratic()[0], Once())
