"""Properties of the ascent rules on random trees: the equation of `dual_ascent`, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import NORMALIZATIONS, ORDERS, examples, is_float, masks, problems
from hypothesis import given
from hypothesis import strategies as st

import sam_optax

# Below these sizes an entry of a half precision e, or the T g of a tiny g, is rounded to nothing.
SIZES = ["ordinary", "small", "large", "huge", "at the limit", "tiny"]


@pytest.fixture(autouse=True)
def by_hand():
    with jax.disable_jit():
        yield


def wide(x):
    return np.asarray(x, np.complex128 if jnp.iscomplexobj(x) else np.float64)


def norm(leaves, p):
    """The p-norm of all entries, near the limits of float64 too."""
    entries = np.concatenate([np.abs(x).ravel() for x in leaves] or [np.zeros(1)])
    top = entries.max(initial=0.0)
    if top == 0 or math.isinf(p):
        return top
    return top * np.sum((entries / top) ** p) ** (1 / p)


@examples(80)
@given(st.data())
def test_the_perturbation_has_length_rho_and_raises_the_loss_most(data):
    problem = data.draw(problems(sizes=SIZES, dtypes=["float32", "bfloat16", "complex64"]))
    is_the_equation(data, problem, 2e-5)


@examples(30)
@given(st.data())
def test_the_perturbation_in_64_bits(x64, data):
    """To 1e-12, of which the numbers of float32 would miss seven digits."""
    problem = data.draw(problems(sizes=SIZES, dtypes=["float64", "complex128"]))
    is_the_equation(data, problem, 1e-12)


def is_the_equation(data, problem, rounding):
    p, name = data.draw(st.sampled_from(ORDERS)), data.draw(st.sampled_from(list(NORMALIZATIONS)))
    mask = data.draw(masks(problem.params))
    rho = data.draw(st.sampled_from([0.0, 1e-3, 0.5, 100.0]))
    ascent = sam_optax.dual_ascent(rho, p=p, normalization=NORMALIZATIONS[name], mask=mask)
    params, grads = problem.params, problem.gradient
    e, _ = ascent.update(grads, ascent.init(params), params)

    p = 2.0 if p is None else p
    operator = NORMALIZATIONS[name] or (lambda w: jax.tree.map(lambda x: jnp.ones(()), w))
    T = jax.tree.map(lambda t, w: np.broadcast_to(t, w.shape), operator(params), params)
    if callable(mask):
        chosen = mask(params)
    elif mask is None or isinstance(mask, bool):
        chosen = jax.tree.map(lambda w: mask is not False, params)
    else:
        chosen = mask
    rows = zip(*map(jax.tree.leaves, (params, chosen, T, grads, e)), strict=True)
    perturbed = []
    for w, on, t, g, move in rows:
        if on and is_float(w) and w.size:
            perturbed.append((wide(t), wide(g), wide(move)))
        else:
            assert not np.any(move)
    eps = max((float(jnp.finfo(x.dtype).eps) for x in problem.perturbable()), default=0.0)
    # An entry that underflows in e is lost, of which T^-1 would tell.
    scaled = [np.where(t > 0, m / np.where(t > 0, t, 1), 0) for t, g, m in perturbed]
    v = [t * g for t, g, m in perturbed]
    limits = jnp.finfo(jnp.float32)
    if norm(v, math.inf) < 4 * limits.tiny:  # the docstring says so
        return
    assert all(not m[t == 0].any() for t, g, m in perturbed)
    assert norm(scaled, p) == pytest.approx(rho, rel=8 * eps + rounding)
    if any((np.abs(x[x != 0]) < limits.tiny).any() for x in v):
        return  # what a device takes for 0 has no sign, which is all that counts for p = inf
    q = 1 if math.isinf(p) else math.inf if p == 1 else p / (p - 1)
    top = max(np.abs(x).max() for x in v)
    gain = sum(np.sum((np.conj(x / top) * s).real) for x, s in zip(v, scaled, strict=True))
    best = rho * norm([x / top for x in v], q)
    assert gain == pytest.approx(best, rel=8 * eps + rounding)


@examples(30)
@given(st.data())
def test_the_scale_of_the_loss_is_no_matter(data):
    """Gradients a power of two larger give the same perturbation, bit for bit."""
    problem = data.draw(problems(sizes=["ordinary"], dtypes=["float32", "complex64"]))
    p, name = data.draw(st.sampled_from(ORDERS)), data.draw(st.sampled_from(list(NORMALIZATIONS)))
    factor = data.draw(st.sampled_from([2.0**k for k in (-60, -7, 15, 60)]))
    ascent = sam_optax.dual_ascent(0.1, p=p, normalization=NORMALIZATIONS[name])
    scaled = jax.tree.map(lambda g: g * factor if is_float(g) else g, problem.gradient)
    results = [
        ascent.update(grads, ascent.init(problem.params), problem.params)[0]
        for grads in (problem.gradient, scaled)
    ]
    close = lambda a, b: np.testing.assert_allclose(wide(a), wide(b), rtol=1e-6)
    jax.tree.map(lambda a, b: close(a, b) if is_float(a) else None, *results)


@examples(20)
@given(st.data())
def test_a_traced_hyperparameter_is_the_number(data):
    problem = data.draw(problems(sizes=SIZES))
    p, rho = data.draw(st.sampled_from([1.0, 1.5, 2.0, 3.0, math.inf])), 0.1

    def e(rho, p):
        ascent = sam_optax.dual_ascent(rho, p=p)
        return ascent.update(problem.gradient, ascent.init(problem.params), problem.params)[0]

    known = e(rho, p)
    with jax.disable_jit(False):
        traced = jax.jit(lambda rho, p: keep_floats(e(rho, p)))(rho, p)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            wide(a), wide(b), rtol=2e-5 + 4 * float(jnp.finfo(a.dtype).eps)
        ),
        keep_floats(known),
        traced,
    )


def keep_floats(tree):
    return [x for x in jax.tree.leaves(tree) if is_float(x)]
