"""Methods of 2025 and 2026 that no table of trajectories holds: random ones, other inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_family as fam
import numpy_reference as ref
import optax
import pytest
from checks import assert_exact as assert_close

import sam_optax

jax_loss = functools.partial(ref.loss, jnp)
PARAMS, BATCH = ref.network()


# Over the spectral norm.


@pytest.mark.parametrize("normalised", [False, True])
def test_spectral_ascent_attains_the_dual_norm(x64, normalised):
    """<g, e> is rho times the sum of singular values, and no e of that norm does better."""
    rng = np.random.default_rng(0)
    shapes = {"tall": (9, 4), "wide": (3, 7), "conv": (3, 2, 5), "b": (6,), "scalar": ()}
    w, g = ({k: rng.normal(size=s) for k, s in shapes.items()} for _ in range(2))
    T = {k: np.abs(x) + 0.1 if normalised and x.ndim > 1 else 1.0 for k, x in w.items()}
    normalization = sam_optax.elementwise(0.1) if normalised else None
    ascent = sam_optax.spectral_ascent(0.3, 10, normalization=normalization)
    e, _ = ascent.update(g, ascent.init(w), w)
    best = 0.0
    for k, x in g.items():
        inside = e[k] / T[k]
        if x.ndim > 1:
            matrix = lambda x: np.reshape(x, (-1, x.shape[-1]))
            norm = np.linalg.norm(matrix(inside), 2)
            best += np.linalg.svd(matrix(T[k] * x), compute_uv=False).sum()
        else:
            norm = np.linalg.norm(inside)
            best += np.linalg.norm(T[k] * x)
        np.testing.assert_allclose(norm, 0.3, rtol=1e-9)
    np.testing.assert_allclose(fam.dot(g, e), 0.3 * best, rtol=1e-9)


def test_spectral_ascent_leaves_singular_directions_without_gradient_alone():
    u, v = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0][:, :2].T
    g = {"w": jnp.asarray(np.outer(u, v), jnp.float32), "zero": jnp.zeros((3, 3))}
    for scale in (1.0, 1e-30, 1e30):
        ascent = sam_optax.spectral_ascent(0.5)
        e, _ = ascent.update(jax.tree.map(lambda x, s=scale: s * x, g), ascent.init(g))
        # What rounding has put into the other directions grows some hundredfold.
        assert_close(e["w"], 0.5 * np.outer(u, v), rtol=0, atol=2e-4)
        assert not e["zero"].any()


def test_spectral_ascent_by_its_masks():
    g = {"a": jnp.ones((2, 2)), "b": jnp.eye(2)}
    mask, matrices = {"a": False, "b": True}, {"a": True, "b": False}
    ascent = sam_optax.spectral_ascent(1.0, mask=mask, matrices=matrices)
    e, _ = ascent.update(g, ascent.init(g))
    assert_close(e, {"a": np.zeros((2, 2)), "b": np.eye(2) / np.sqrt(2)}, rtol=1e-6)
    for matrices, message in (({"c": True}, "matrices must have"), (True, "matrices must mark")):
        bad = sam_optax.spectral_ascent(1.0, matrices=matrices)
        with pytest.raises(ValueError, match=message):
            bad.update({"w": jnp.ones(2)}, bad.init(g))


# Random ones: their own draws are read off the points.


def test_tilted_sam_weighs_the_gradients_of_its_draws(x64):
    rho, radius, tilt, samples = 0.2, lambda t: 0.3 + 0.1 * t, 3.0, 3
    tx = sam_optax.tilted_sam(rho, tilt, samples, radius)
    w, state, starts = PARAMS, tx.init(PARAMS), []
    for t, seed in enumerate((0, 1, 2)):
        batch, points = ref.network(seed)[1], []

        def grad_fn(w, batch=batch, points=points):
            points.append(jax.tree.map(np.asarray, w))
            return ref.gradient(points[-1], batch)

        value_fn = functools.partial(jax_loss, batch=batch)
        out, state = tx.update(grad_fn(w), state, w, grad_fn=grad_fn, value_fn=value_fn)
        points = points[1:]  # after the caller's
        assert len(points) == 2 * samples
        for start, end in zip(points[::2], points[1::2], strict=True):
            noise = fam.add(start, -1, w)
            np.testing.assert_allclose(fam.norm(noise), radius(t), rtol=1e-9)
            starts.append(np.concatenate([noise[k].ravel() for k in w]) / radius(t))
            assert_close(end, fam.add(start, rho, fam.unit(ref.gradient(start, batch))))
        weights = np.exp([tilt * ref.loss(np, end, batch) for end in points[1::2]])
        weights /= weights.sum()
        expected = fam.scaled(0, w)
        for weight, end in zip(weights, points[1::2], strict=True):
            expected = fam.add(expected, weight, ref.gradient(end, batch))
        assert_close(out, expected)
        w = fam.add(w, -0.1, jax.tree.map(np.asarray, out))
    cosines = np.array(starts) @ np.array(starts).T - np.eye(len(starts))
    assert np.abs(cosines).max() < 0.8  # 21 dimensions: no two draws are alike


def test_tilted_needs_the_loss_of_its_draws():
    noisy = sam_optax.sharpness_aware(sam_optax.gaussian_ascent(0.1))
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=r"must hold one keep_loss .* got 0"):
        sam_optax.tilted(noisy, 2).update(w, noisy.init(w), w, grad_fn=lambda w: w)
    tx = sam_optax.tilted_sam()
    with pytest.raises(ValueError, match="value_fn must be given"):
        tx.update(w, tx.init(w), w, grad_fn=lambda w: w)


def test_flat_lora_puts_noise_on_the_frozen_rows_alone(x64):
    rng, steps, rho = np.random.default_rng(0), 4, lambda t: 0.5 + 0.1 * t
    params = {
        "W": rng.normal(size=(60, 50)) * (1 + np.arange(50)),
        "A": rng.normal(size=(60, 2)),
        "B": rng.normal(size=(2, 50)),
        "bias": rng.normal(size=50),  # frozen, but no matrix
    }
    frozen = {"W": True, "A": False, "B": False, "bias": True}
    merged = lambda p: {**p, "W": p["W"] + p["A"] @ p["B"]}
    loss = lambda p: jnp.sum(jnp.sin(merged(p)["W"])) + jnp.sum(p["bias"] ** 2)
    tx = sam_optax.flat_lora(frozen, steps, rho, merged=merged)
    state, drawn, seen = tx.init(params), [], []

    def grad_fn(p):
        seen.append(p)
        return jax.grad(loss)(p)

    for t in range(steps + 2):
        out, state = tx.update(params, state, params, grad_fn=grad_fn)
        at = jax.tree.map(np.asarray, seen[-1])
        assert len(seen) == t + 1 and not out["W"].any() and not out["bias"].any()
        slope = np.cos(at["W"] + at["A"] @ at["B"])
        assert_close(out["A"], slope @ params["B"].T)
        assert_close(out["B"], params["A"].T @ slope)
        for k in ("A", "B", "bias"):
            np.testing.assert_array_equal(at[k], params[k])
        row = np.sqrt((merged(params)["W"] ** 2).mean(axis=0))
        ramp = (1 - np.cos(np.pi * min(t / steps, 1))) / 2
        if t == 0:
            np.testing.assert_array_equal(at["W"], params["W"])
        else:
            drawn.append(((at["W"] - params["W"]) / (rho(t) * ramp * row)).ravel())
    for i, x in enumerate(drawn):
        error = 1 / np.sqrt(x.size)
        assert abs(x.mean()) < 4 * error and abs(x.var() - 1) < 4 * np.sqrt(2) * error
        assert all(abs(x @ y) < 5 * np.sqrt(x.size) for y in drawn[:i])


def test_flat_lora_says_what_does_not_fit():
    params = {"W": jnp.ones((2, 2)), "A": jnp.ones(2)}
    for arguments, message in (
        ({"frozen": {"V": True}}, "mask must have the structure of params"),
        ({"frozen": True, "merged": lambda p: p["W"]}, "the result of merged must have"),
    ):
        tx = sam_optax.flat_lora(steps=3, **arguments)
        with pytest.raises(ValueError, match=message):
            tx.update(params, tx.init(params), params, grad_fn=lambda p: p)


# Model and loss apart.


def model_fn(params, x):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return (hidden @ params["w2"].reshape(-1, 1) + params["b2"])[:, 0]


def loss_fn(outputs, y):
    return jnp.mean((outputs - y) ** 2)


def numpy_functional(w, batch, e):
    """The reference's gradient at w + e with the errors at w."""
    x, y = batch
    outputs = lambda w: (np.tanh(x @ w["w1"] + w["b1"]) @ w["w2"].reshape(-1, 1) + w["b2"])[:, 0]
    moved = fam.add(w, 1, e)
    # Targets that make the errors at the moved point those at w.
    return ref.gradient(moved, (x, outputs(moved) - outputs(w) + y))


def test_jacobian_sam_follows_its_equation(x64):
    sharp = jax.jit(
        sam_optax.jacobian_sam(model_fn, loss_fn, sam_optax.sam(0.4)), static_argnums=()
    )
    w = PARAMS
    for seed in range(4):
        batch = ref.network(seed)[1]
        loss, grads = sharp(w, *batch)
        np.testing.assert_allclose(loss, ref.loss(np, w, batch), rtol=1e-12)
        e = fam.scaled(0.4, fam.unit(ref.gradient(w, batch)))
        assert_close(grads, numpy_functional(w, batch, e))
        w = fam.add(w, -0.1, jax.tree.map(np.asarray, grads))


def test_jacobian_sam_of_any_method_and_of_groups(x64):
    """GSAM's descent sees it, and each group of examples has its own."""
    sharp = sam_optax.jacobian_sam(model_fn, loss_fn, sam_optax.gsam(0.4, alpha=0.3))
    g = ref.gradient(PARAMS, BATCH)
    g_s = numpy_functional(PARAMS, BATCH, fam.scaled(0.4, fam.unit(g)))
    assert_close(sharp(PARAMS, *BATCH)[1], fam.add(g_s, -0.3, fam.orthogonal(g, g_s)))

    sharp = sam_optax.jacobian_sam(model_fn, loss_fn, sam_optax.sam(0.4), microbatch_size=4)
    halves = [tuple(a[i : i + 4] for a in BATCH) for i in (0, 4)]
    parts = [
        numpy_functional(PARAMS, h, fam.scaled(0.4, fam.unit(ref.gradient(PARAMS, h))))
        for h in halves
    ]
    assert_close(
        jax.jit(sharp)(PARAMS, *BATCH)[1], fam.scaled(0.5, fam.add(*parts[:1], 1, parts[1]))
    )


def test_jacobian_sam_of_a_linear_model_is_the_plain_gradient(x64):
    w, x, y = PARAMS["b1"], BATCH[0] @ np.ones((3, 4)), BATCH[1]
    linear = lambda w, x: x @ w
    _, grads = sam_optax.jacobian_sam(linear, loss_fn, sam_optax.sam(0.7))(w, x, y)
    assert_close(grads, jax.grad(lambda w: loss_fn(linear(w, x), y))(w))


def test_functional_gradients_of_complex_parameters(x64):
    z, x = jnp.array([1.0 + 2.0j, -1.0j]), jnp.array([[1.0, 2.0], [0.5, -1.0]])
    model, loss = lambda z, x: x @ z**2, lambda f: jnp.sum(jnp.abs(f) ** 4)
    at = sam_optax.jacobian_grad_fn(model, loss)(z, x)
    clean = jax.grad(lambda z: loss(model(z, x)))(z)
    assert_close(at(z), jnp.conj(clean))
    direction = jnp.conj(clean)
    e = 0.3 * direction / jnp.linalg.norm(direction)
    _, grads = sam_optax.jacobian_sam(model, loss, sam_optax.sam(0.3))(z, x)
    assert_close(jnp.conj(grads), at(z + e))


def test_a_descent_of_its_own_has_no_aux_to_tell():
    other = lambda *_: {"descent_grad_fn": lambda w: w}
    sharp = sam_optax.value_and_grad(
        lambda w: (jnp.sum(w), w), has_aux=True, aux_from="perturbed", extra_args=other
    )
    with pytest.raises(ValueError, match=r'aux_from must be "clean" where .* got .perturbed'):
        sharp(jnp.ones(2))


def test_imb_sam_names_the_input_that_it_lacks():
    tx, w = sam_optax.imb_sam(), jnp.ones(2)
    with pytest.raises(ValueError, match="tail_grad_fn must be given"):
        tx.update(w, tx.init(w), w, grad_fn=lambda w: w)
    own = {"grad_fn": lambda w: w, "tail_grad_fn": lambda w: w}
    with pytest.raises(ValueError, match="descent_grad_fn must be left out"):
        tx.update(w, tx.init(w), w, **own, descent_grad_fn=lambda w: w)
    with pytest.raises(ValueError, match="the result of tail_grad_fn must have the structure"):
        tx.update(w, tx.init(w), w, **own | {"tail_grad_fn": lambda w: {"w": w}})


# The rest.


def test_late_tail_pays_for_the_last_part():
    for steps, fraction in ((10, 0.57), (7, 0.3), (5, 0.0), (5, 1.0)):
        tx, g = sam_optax.late_tail(sam_optax.sam(1.0), steps, fraction), jnp.ones(1)

        def body(state, _, tx=tx, g=g):
            out, state = tx.update(g, state, g, grad_fn=lambda w: w)
            return state, out[0] == 2

        _, paid = jax.lax.scan(body, tx.init(g), length=steps)
        np.testing.assert_array_equal(paid, np.arange(steps) >= steps - round(fraction * steps))


def test_sharing_is_a_chain(x64):
    """With what reads nothing of the optimizer's; momentum and second moment are tested there."""
    method, base = sam_optax.vasso(0.3), optax.adamw(0.1)
    shared, chained = sam_optax.sharing(method, base), optax.chain(method, base)
    w, states = PARAMS, [shared.init(PARAMS), chained.init(PARAMS)]
    for seed in range(3):
        grad_fn = functools.partial(ref.gradient, batch=ref.network(seed)[1])
        at = lambda w, grad_fn=grad_fn: grad_fn(jax.tree.map(np.asarray, w))
        (one, states[0]), (other, states[1]) = (
            tx.update(grad_fn(w), state, w, grad_fn=at)
            for tx, state in zip((shared, chained), states, strict=True)
        )
        assert_close(one, other)
        w = fam.add(w, 1, jax.tree.map(np.asarray, one))
    with pytest.raises(TypeError, match="base must be a GradientTransformation"):
        sam_optax.sharing(method, optax.sgd)


@pytest.mark.parametrize("name", ["polyak_sam", "keep_loss", "jacobian_sam", "gsam, both"])
@pytest.mark.usefixtures("optimised")
def test_losses_and_clean_gradients_of_a_point_visited_anyway_are_free(name):
    """XLA finds them there: two gradients are paid for."""
    params = {"w": jnp.ones((32, 32)), "v": jnp.ones((32, 32))}
    model = lambda w, x: jnp.sin(jnp.sin(x @ w["w"]) @ w["v"])
    loss = lambda w, x: jnp.mean(model(w, x) ** 2)
    keep = sam_optax.sam(0.1, descent=sam_optax.keep_loss())

    def kept(params, x):  # it has a state, so it is used by hand
        evaluate = lambda w: jax.grad(loss)(w, x)
        value_fn = functools.partial(loss, x=x)
        return keep.update(
            evaluate(params), keep.init(params), params, grad_fn=evaluate, value_fn=value_fn
        )

    both = lambda params, x: {"descent_grad_fn": lambda w: jax.grad(loss)(w, x)}
    step = {
        "polyak_sam": sam_optax.grad(loss, sam_optax.polyak_sam()),
        "keep_loss": kept,
        "jacobian_sam": sam_optax.jacobian_sam(model, lambda f: jnp.mean(f**2)),
        "gsam, both": sam_optax.grad(loss, sam_optax.gsam(), extra_args=both),
    }[name]
    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    x = jnp.ones((4096, 32))
    ratio = flops(step, params, x) / flops(jax.grad(loss), params, x)
    assert 1.9 < ratio < 2.2, ratio


def test_a_step_that_is_not_finite_leaves_the_second_moment_as_it_is():
    keep = sam_optax.keep_second_moment(0.5)
    state = keep.update(jnp.full(2, 3.0), keep.init(jnp.zeros(2)))[1]
    for bad in (jnp.nan, jnp.inf):
        out, after = keep.update(jnp.array([1.0, bad]), state)
        np.testing.assert_array_equal(after.nu, state.nu)
        assert not np.isfinite(out).all()
