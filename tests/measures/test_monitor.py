"""The monitor at the edges of its range; its equations are tested with the Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax
from sam_optax import sharpness


def seen_by_monitor(clean, perturbed, rho=0.05):
    """What the monitor keeps of a step with these two gradients, and the perturbation."""
    tx = sam_optax.sharpness_aware(sam_optax.dual_ascent(rho), sharpness.monitor())
    params = jax.tree.map(jnp.zeros_like, clean)

    @jax.jit
    def step(clean, perturbed):
        _, state = tx.update(clean, tx.init(params), params, grad_fn=lambda w: perturbed)
        return state.descent

    return step(clean, perturbed)


def expected_of(clean, perturbed, rho=0.05):
    g, g_s = (
        np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])
        for tree in (clean, perturbed)
    )
    e = rho * g / np.linalg.norm(g)
    return sharpness.MonitorState(
        sharpness=(g + g_s) @ e / 2,
        first_order=g @ e,
        curvature=(g_s - g) @ e / (e @ e),
        cosine=g @ g_s / (np.linalg.norm(g) * np.linalg.norm(g_s)),
        gradient_norm=np.linalg.norm(g),
    )


@pytest.mark.parametrize(
    "dtype, scale, tolerance",
    [
        *[(jnp.float32, scale, 2e-5) for scale in (1e-25, 1e-30, 1.0, 1e25, 1e35)],
        (jnp.bfloat16, 1e25, 2e-5),
        (jnp.bfloat16, 1e-25, 2e-5),
        (jnp.float16, 1.0, 1e-3),  # e itself is rounded to float16
        (jnp.float16, 1e-4, 1e-3),
        (jnp.float16, 1e4, 1e-3),
    ],
)
def test_all_figures_are_right_and_finite_wherever_float32_holds_them(dtype, scale, tolerance):
    rng = np.random.default_rng(0)
    draw = lambda: {"a": jnp.asarray(scale * rng.normal(size=(3, 4)), dtype), "n": None}
    clean, change = draw(), draw()
    perturbed = jax.tree.map(lambda g, c: (g + 0.3 * c).astype(dtype), clean, change)
    seen, expected = seen_by_monitor(clean, perturbed), expected_of(clean, perturbed)
    rounding = 4e-3 if dtype == jnp.bfloat16 else tolerance  # of e to bfloat16
    for field, value in seen._asdict().items():
        assert value.dtype == jnp.float32
        exact = field in ("cosine", "gradient_norm")
        np.testing.assert_allclose(
            value, getattr(expected, field), rtol=2e-5 if exact else 4 * rounding, err_msg=field
        )


def test_a_small_curvature_is_not_lost_in_the_difference_of_two_slopes():
    """g_s - g first, as in float64; two slopes rounded to float32 differ by noise."""
    clean = {"a": jnp.asarray(np.random.default_rng(0).normal(size=1000), jnp.float32)}
    perturbed = jax.tree.map(lambda g: g * (1 + 2.0**-20), clean)
    seen, expected = seen_by_monitor(clean, perturbed), expected_of(clean, perturbed)
    np.testing.assert_allclose(seen.curvature, expected.curvature, rtol=1e-5)


def test_zero_gradients_and_what_is_not_finite():
    zero, one = {"a": jnp.zeros(2)}, {"a": jnp.ones(2)}
    with jax.debug_nans(True):
        for pair in ((zero, zero), (zero, one), (one, zero)):
            seen = seen_by_monitor(*pair)
            assert np.isfinite(list(seen)).all()
            assert seen.cosine == 0
    assert np.isnan(seen_by_monitor({"a": jnp.array([jnp.nan, 1.0])}, one).cosine)


def test_integer_leaves_are_not_seen():
    params = {"a": jnp.array([3.0, 4.0]), "n": jnp.arange(2)}
    loss = lambda w: jnp.sum(w["a"] ** 2)
    tx = sam_optax.sharpness_aware(sam_optax.dual_ascent(0.1), sharpness.monitor())
    grad_fn = jax.grad(loss, allow_int=True)
    _, state = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    np.testing.assert_allclose(optax.tree.get(state, "sharpness"), 1.01, rtol=1e-5)
