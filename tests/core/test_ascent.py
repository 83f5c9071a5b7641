"""The ascent rule: its equation, its invariants, its numbers at the edges, its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as ref
import optax
import pytest

import sam_optax

OPERATORS = ("elementwise", "filterwise", "layerwise")


def perturbation_of(ascent, grads, params=None):
    return ascent.update(grads, ascent.init(params), params)[0]


def norm(tree):
    return float(
        np.sqrt(
            sum((np.abs(np.asarray(x, np.complex128)) ** 2).sum() for x in jax.tree.leaves(tree))
        )
    )


@pytest.mark.parametrize("p", ref.P_VALUES)
@pytest.mark.parametrize("kind", [None, *OPERATORS])
@pytest.mark.parametrize("normalize_bias", [False, True])
def test_equals_the_equation_and_its_invariants(x64, p, kind, normalize_bias):
    params, batch = ref.network()
    g = ref.gradient(params, batch)
    eta, rho = 0.01, 0.3
    if kind is None:
        T, normalization = {k: np.ones_like(v) for k, v in params.items()}, None
    else:
        T = ref.operator(kind, params, eta, normalize_bias)
        normalization = getattr(sam_optax, kind)(eta, normalize_bias)
    e = perturbation_of(sam_optax.dual_ascent(rho, p=p, normalization=normalization), g, params)
    expected = ref.ascent(g, T, rho, p)
    for k in params:
        np.testing.assert_allclose(e[k], expected[k], rtol=1e-12, atol=1e-14)
    # Invariant 1: the constraint is met with equality and the bound is attained.
    u = np.concatenate([np.ravel(e[k] / T[k]) for k in params])
    Tg = np.concatenate([np.ravel(T[k] * g[k]) for k in params])
    q = np.inf if p == 1 else (1.0 if p == np.inf else p / (p - 1))
    np.testing.assert_allclose(np.linalg.norm(u, p), rho, rtol=1e-12)
    inner = sum((np.asarray(e[k]) * g[k]).sum() for k in params)
    np.testing.assert_allclose(inner, rho * np.linalg.norm(Tg, q), rtol=1e-12)


@pytest.mark.parametrize("p", ref.P_VALUES)
def test_traced_p_and_rho_give_the_same_numbers(x64, p):
    g = {"a": jnp.array([[3.0, 0.0], [-1.0, 2.0]]), "b": jnp.array(0.5)}

    @jax.jit
    def traced(p, rho):
        return perturbation_of(sam_optax.dual_ascent(rho, p=p), g)

    expected = perturbation_of(sam_optax.dual_ascent(0.2, p=p), g)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-12), traced(p, 0.2), expected
    )


def test_ties_share_the_perturbation_for_p_one():
    e = perturbation_of(sam_optax.dual_ascent(1.0, p=1), jnp.array([2.0, -2.0, 1.0]))
    np.testing.assert_allclose(e, [0.5, -0.5, 0.0])


def test_a_function_of_the_user_is_an_operator():
    params, g = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.0, 1.0])}
    ascent = sam_optax.dual_ascent(1.0, normalization=lambda p: jax.tree.map(lambda w: 2.0, p))
    np.testing.assert_allclose(perturbation_of(ascent, g, params)["w"], 2 / np.sqrt(2) * np.ones(2))


@pytest.mark.parametrize("p", ref.P_VALUES)
def test_zero_gradient_gives_zero(p):
    with jax.debug_nans(True):
        ascent = sam_optax.dual_ascent(0.1, p=p, normalization=sam_optax.elementwise())
        e = perturbation_of(ascent, {"w": jnp.zeros((2, 3))}, {"w": jnp.ones((2, 3))})
    np.testing.assert_array_equal(e["w"], np.zeros((2, 3)))


def test_zero_weights_move_only_with_eta():
    g, w = {"w": jnp.ones((1, 2))}, {"w": jnp.array([[0.0, 1.0]])}
    for eta, moves in ((0.0, False), (0.01, True)):
        ascent = sam_optax.dual_ascent(0.1, normalization=sam_optax.elementwise(eta))
        assert (float(perturbation_of(ascent, g, w)["w"][0, 0]) != 0) == moves


@pytest.mark.parametrize("p", ref.P_VALUES)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_nonfinite_gradient_stays_nonfinite_everywhere(p, bad):
    grads = {"a": jnp.array([1.0, bad]), "b": jnp.array([1.0])}
    e = perturbation_of(sam_optax.dual_ascent(0.1, p=p), grads)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(e))


@pytest.mark.parametrize(
    "dtype, size, tolerance",
    [
        (jnp.float16, 1e-4, 2e-3),
        (jnp.float16, 400.0, 2e-3),
        (jnp.bfloat16, 1e30, 1e-2),
        (jnp.float32, 1e30, 5e-6),
        (jnp.float32, 1e-30, 5e-6),
        (jnp.float32, 1e-10, 5e-6),
        (jnp.float32, 1.0, 5e-6),
    ],
)
@pytest.mark.parametrize("kind", [None, *OPERATORS])
def test_norm_is_rho_at_extreme_gradients_and_dtype_is_kept(dtype, size, tolerance, kind):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(30, 40)), dtype), "b": jnp.ones(7, dtype)}
    grads = jax.tree.map(lambda w: (size * jnp.sign(w)).astype(dtype), params)
    normalization = None if kind is None else getattr(sam_optax, kind)(0.01)
    e = perturbation_of(sam_optax.dual_ascent(0.5, normalization=normalization), grads, params)
    assert {x.dtype for x in jax.tree.leaves(e)} == {jnp.dtype(dtype)}
    T = jax.tree.map(lambda w: np.ones(w.shape), params)
    if kind is not None:
        T = ref.operator(
            kind, jax.tree.map(lambda w: np.asarray(w, np.float64), params), 0.01, False
        )
    assert norm(jax.tree.map(lambda e, t: np.asarray(e, np.float64) / t, e, T)) == pytest.approx(
        0.5, rel=tolerance
    )


@pytest.mark.parametrize("p", ref.P_VALUES)
@pytest.mark.parametrize("size", [3.3e38, 1e38, 1e20, 1e-20, 1.2e-38])
def test_the_length_is_rho_over_the_whole_range_of_float32(p, size):
    g = jnp.asarray(size * np.linspace(-1, 1, 50), jnp.float32)
    g = jnp.concatenate([g, jnp.array([1e-40], jnp.float32)])  # subnormal beside normal ones
    ascent = jax.jit(lambda g: perturbation_of(sam_optax.dual_ascent(0.5, p=p), g))
    with jax.debug_nans(True):
        e = np.asarray(ascent(g), np.float64)
    assert np.linalg.norm(e, p) == pytest.approx(0.5, rel=1e-5)


def test_loss_scale_does_not_change_the_perturbation():
    g = {"w": jnp.array([1e-3, -2e-3, 5e-4])}
    ascent = sam_optax.dual_ascent(0.05)
    plain = perturbation_of(ascent, g)
    scaled = perturbation_of(ascent, jax.tree.map(lambda x: x * 2.0**15, g))
    np.testing.assert_array_equal(plain["w"], scaled["w"])


@pytest.mark.parametrize("as_function", [False, True])
def test_masked_leaves_stay_and_do_not_count(as_function):
    grads = {
        "layer": {"w": jnp.array([3.0, 4.0]), "b": jnp.array([5.0])},
        "scale": jnp.array([12.0]),
    }
    mask = {"layer": False, "scale": True}  # a prefix
    given = (lambda params: mask) if as_function else mask
    e = perturbation_of(sam_optax.dual_ascent(0.1, mask=given), grads, grads)
    np.testing.assert_array_equal(e["layer"]["w"], np.zeros(2))
    np.testing.assert_allclose(e["scale"], [0.1], rtol=1e-6)


def test_leaves_that_cannot_be_perturbed_pass():
    params = {
        "w": jnp.array([1.0, 2.0]),
        "none": None,
        "masked": optax.MaskedNode(),
        "steps": jnp.array([7, 8]),
        "empty": jnp.zeros((0, 3)),
    }
    float0 = np.zeros(2, jax.dtypes.float0)
    grads = {**params, "w": jnp.array([3.0, 4.0]), "steps": float0}
    ascent = sam_optax.dual_ascent(0.5, normalization=sam_optax.layerwise())
    moved = optax.apply_updates(params, perturbation_of(ascent, grads, params))
    np.testing.assert_allclose(moved["w"], [1.3, 2.4], rtol=1e-6)
    np.testing.assert_array_equal(moved["steps"], [7, 8])
    assert moved["steps"].dtype == params["steps"].dtype
    assert jax.tree.structure(moved) == jax.tree.structure(params)


def test_nothing_to_perturb_is_no_error():
    ascent = sam_optax.dual_ascent(0.5, mask=False)
    np.testing.assert_array_equal(perturbation_of(ascent, {"w": jnp.ones(2)})["w"], np.zeros(2))
    assert perturbation_of(sam_optax.dual_ascent(0.5), {}) == {}


@pytest.mark.parametrize("p", ref.P_VALUES)
def test_complex_leaves_are_vectors_of_their_moduli(p):
    z = jnp.array([3.0 + 4.0j, 0.0, -1.0j])
    e = perturbation_of(sam_optax.dual_ascent(0.5, p=p), z)
    assert e.dtype == z.dtype
    assert np.linalg.norm(np.abs(e), p) == pytest.approx(0.5, rel=1e-6)
    np.testing.assert_allclose(np.angle(e[0]), np.angle(z[0]), rtol=1e-6)


def test_schedule_of_rho_advances_in_the_state():
    ascent = sam_optax.dual_ascent(optax.linear_schedule(0.0, 1.0, 4))
    g, state, radii = jnp.array([3.0, 4.0]), ascent.init(jnp.zeros(2)), []
    for _ in range(5):
        e, state = jax.jit(ascent.update)(g, state)
        radii.append(norm(e))
    np.testing.assert_allclose(radii, [0, 0.25, 0.5, 0.75, 1.0], rtol=1e-6)


def test_state_of_a_constant_rho_has_no_arrays():
    assert jax.tree.leaves(sam_optax.sam(0.05).init({"w": jnp.ones(2)})) == []


def test_filters_before_the_rule_are_optax_links():
    """The direction of an average of gradients, as in VaSSO, by composition alone."""
    ascent = optax.chain(optax.ema(0.5, debias=False), sam_optax.dual_ascent(1.0))
    state, g1, g2 = ascent.init(jnp.zeros(2)), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    _, state = ascent.update(g1, state)
    e, _ = ascent.update(g2, state)
    np.testing.assert_allclose(e, np.array([0.25, 0.5]) / np.linalg.norm([0.25, 0.5]), rtol=1e-6)


def test_groups_with_their_own_radius_by_partition():
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([5.0])}
    ascent = optax.partition(
        {"wide": sam_optax.dual_ascent(1.0), "narrow": sam_optax.dual_ascent(0.1)},
        {"a": "wide", "b": "narrow"},
    )
    e = perturbation_of(ascent, grads, grads)
    np.testing.assert_allclose(e["a"], [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(e["b"], [0.1], rtol=1e-6)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: sam_optax.dual_ascent(-0.1), "rho must be at least 0.0, got -0.1"),
        (lambda: sam_optax.dual_ascent(float("nan")), "rho must be at least 0.0, got nan"),
        (lambda: sam_optax.dual_ascent("big"), "rho must be a number, got 'big'"),
        (lambda: sam_optax.dual_ascent(True), "rho must be a number, got True"),
        (lambda: sam_optax.dual_ascent(np.ones(1)), r"rho must be a number, got array\(\[1"),
        (lambda: sam_optax.dual_ascent(0.1, p=0.5), "p must be at least 1.0, got 0.5"),
        (lambda: sam_optax.sam(-1), "rho must be at least 0.0, got -1"),
        (lambda: sam_optax.asam(0.5, -0.01), "eta must be at least 0.0, got -0.01"),
        (lambda: sam_optax.filterwise(-1.0), "eta must be at least 0.0, got -1.0"),
    ],
)
def test_errors_when_building(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_an_integer_that_is_traced_says_what_to_do():
    for factory in (sam_optax.look_sam, sam_optax.multi_step_sam, sam_optax.eigen_sam):
        tx = optax.inject_hyperparams(factory)()
        with pytest.raises(ValueError, match=r"must be an integer.*name it in static_args"):
            jax.jit(tx.init)(jnp.ones(2))


@pytest.mark.parametrize(
    "ascent, message",
    [
        (sam_optax.dual_ascent(0.1, normalization=sam_optax.elementwise()), "params must be given"),
        (sam_optax.dual_ascent(0.1, mask=lambda p: p), "params must be given"),
        (sam_optax.dual_ascent(0.1, mask={"other": True}), "mask must have the structure"),
        (sam_optax.dual_ascent(0.1, mask={"w": "yes"}), "mask must hold booleans, got 'yes'"),
    ],
)
def test_errors_at_the_call(ascent, message):
    with pytest.raises(ValueError, match=message):
        ascent.update({"w": jnp.ones(2)}, ascent.init(None), None)


def test_an_operator_that_does_not_fit_is_an_error():
    g = {"w": jnp.ones(2)}
    for normalization, message in (
        (lambda p: {"v": 1.0}, "structure of params"),
        (lambda p: {"w": jnp.ones((3, 2))}, r"shape \(3, 2\) for a leaf of shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            perturbation_of(sam_optax.dual_ascent(0.1, normalization=normalization), g, g)
