"""The family against transcriptions of the equations, its invariants, reductions and costs."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy_family as fam
import numpy_reference as ref
import optax
import public
import pytest
from checks import assert_exact as assert_close
from flax import nnx

import sam_optax

jax_loss = functools.partial(ref.loss, jnp)
PARAMS = ref.network()[0]
BATCHES = [ref.network(seed)[1] for seed in range(6)]
SGD = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9))

# Name, arguments (those of the transcription too), further gradients at each step of a period.
CASES = [
    ("unnormalised_sam", {"rho": 0.3}, [1]),
    ("multi_step_sam", {"rho": 0.4, "steps": 3}, [3]),
    ("multi_step_sam", {"rho": 0.4, "steps": 3, "step_size": 0.3}, [3]),
    ("gsam", {"rho": 0.3, "alpha": 0.4}, [1]),
    ("wsam", {"rho": 0.3, "gamma": 0.7}, [1]),
    ("gradient_norm_penalty", {"rho": 0.3, "alpha": 0.6}, [1]),
    ("look_sam", {"rho": 0.3, "k": 3, "alpha": 0.7}, [1, 0, 0]),
    ("friendly_sam", {"rho": 0.3, "sigma": 0.8, "lmbda": 0.6}, [1]),
    ("vasso", {"rho": 0.3, "theta": 0.6}, [1]),
    ("momentum_sam", {"rho": 0.3, "momentum": 0.8}, [1]),
    ("cr_sam", {"rho": 0.3, "gamma": 0.2, "beta": 0.3}, [2]),
    ("xsam", {"rho": 0.3, "alpha": 0.6}, [1]),
    ("xsam", {"rho": 0.3, "alpha": lambda t: 1.1 + 0.2 * t}, [1]),
    ("fisher_sam", {"rho": 0.3, "eta": 2.0}, [1]),
    ("stable_sam", {"rho": 0.3}, [1]),
    ("z_sharp", {"rho": 0.2, "quantile": 0.5}, [1]),
    ("z_sharp", {"rho": 0.2, "quantile": 0.9}, [1]),
    ("async_sam", {"rho": 0.3}, [1]),
    ("sparse_sam", {"rho": 0.3, "sparsity": 0.42, "every": 2}, [1]),
    ("unified_sam", {"rho": 0.3, "lmbda": 0.4}, [1]),
    ("unified_sam", {"rho": 0.3, "lmbda": lambda t: 0.2 * t}, [1]),
    ("sagm", {"rho": 0.3, "alpha": 0.1}, [1]),
    ("le_sam", {"rho": 0.3, "sigma": 0.5}, [1]),
    ("le_sam", {"rho": 0.3, "sigma": lambda t: 0.1 * (1 + t)}, [1]),
    ("preconditioned_sam", {"rho": 0.05, "b2": 0.9, "eps": 1e-3}, [1]),
    ("spectral_sam", {"rho": 0.3, "ns_steps": 8}, [1]),
    ("polyak_sam", {"rho": 0.3, "bound": 0.2, "lowest": 0.1}, [1]),
    ("periodic_sam", {"rho": 0.1, "k": 3}, [1, 0, 0]),
    ("imb_sam", {"rho": 0.3}, [3]),
]
FIRST = {case[0]: case for case in reversed(CASES)}
SCHEDULED = [(n, {**kw, "rho": lambda t: 0.1 + 0.1 * t}, c) for n, kw, c in FIRST.values()]
# Every perturbed point is at distance rho, but where there is no direction yet.
ON_THE_SPHERE = {"gsam", "wsam", "gradient_norm_penalty", "look_sam", "friendly_sam", "vasso"}
ON_THE_SPHERE |= {"momentum_sam", "cr_sam", "xsam", "stable_sam", "async_sam"}
ON_THE_SPHERE |= {"polyak_sam"}
AT_REST_FIRST = {"momentum_sam", "async_sam"}
# These depend on the scale of the loss.
OF_THE_SCALE = {"unnormalised_sam", "fisher_sam", "unified_sam", "sagm", "le_sam", "polyak_sam"}
OF_THE_SCALE |= {"preconditioned_sam"}


def build(name, **arguments):
    return getattr(sam_optax, name)(**arguments)


def run(method, params=PARAMS, batches=BATCHES, loss=jax_loss, base=SGD, other=None):
    """Parameters after each jitted step, and the points at which it called grad_fn.

    other(batch) is what descent_grad_fn sees, if it is given.
    """
    tx, seen = optax.chain(method, base), []

    @jax.jit
    def step(params, state, batch):
        def grad_fn(w):
            jax.debug.callback(lambda w: seen.append(jax.tree.map(np.array, w)), w)
            return jax.grad(loss)(w, batch)

        def tail_grad_fn(w):
            jax.debug.callback(lambda w: seen.append(jax.tree.map(np.array, w)), w)
            part, share = fam.rare(batch)
            return jax.tree.map(lambda g: share * g, jax.grad(loss)(w, part))

        clean, extra = jax.grad(loss)(params, batch), {"tail_grad_fn": tail_grad_fn}
        descended = batch if other is None else other(batch)
        extra["value_fn"] = functools.partial(loss, batch=descended)
        if other is not None:
            extra["descent_grad_fn"] = lambda w: jax.grad(loss)(w, descended)
        updates, state = tx.update(clean, state, params, grad_fn=grad_fn, **extra)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state, path, points = tx.init(params), [], []
    for batch in batches:
        before = len(seen)
        params, state = step(params, state, batch)
        jax.block_until_ready(params)
        jax.effects_barrier()
        path.append(jax.tree.map(np.array, params))
        points.append(sorted(seen[before:], key=first_entry))
    return path, points


def first_entry(tree):
    return jax.tree.leaves(tree)[-1].ravel()[0]


def in_order(points):
    return [sorted(p, key=first_entry) for p in points]


@pytest.mark.parametrize(
    "name, arguments, evaluations",
    CASES + SCHEDULED,
    ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)] + [f"{c[0]}-schedule" for c in SCHEDULED],
)
def test_trajectory_points_and_cost_are_those_of_the_equations(x64, name, arguments, evaluations):
    batches = BATCHES[: 6 if len(evaluations) > 1 or not callable(arguments["rho"]) else 4]
    path, points = run(build(name, **arguments), batches=batches)
    assert [len(p) for p in points] == (evaluations * 6)[: len(batches)]
    expected, at = fam.trajectory(PARAMS, batches, getattr(fam, name), arguments)
    assert_close(path, expected)
    assert_close(points, in_order(at))
    if name in ON_THE_SPHERE:
        rho = arguments["rho"]
        for t, (w, seen) in enumerate(zip([PARAMS, *path], points, strict=False)):
            radius = rho(t) if callable(rho) else rho
            radius *= not (name in AT_REST_FIRST and t == 0)
            for point in seen:
                np.testing.assert_allclose(fam.norm(fam.add(point, -1, w)), radius, rtol=1e-10)


APART = {name: case[:2] for name, case in FIRST.items() if name != "imb_sam"}


@pytest.mark.parametrize("name, arguments", APART.values(), ids=APART)
def test_with_other_examples_for_the_descent(x64, name, arguments):
    """The perturbed gradient, and all that a difference takes with it, are of descent_grad_fn."""
    other = lambda batch: (batch[0][::-1], batch[1])
    path, _ = run(build(name, **arguments), batches=BATCHES[:4], other=other)
    expected, _ = fam.trajectory(PARAMS, BATCHES[:4], getattr(fam, name), arguments, other=other)
    assert_close(path, expected)


SAM = sam_optax.sam(0.3)
REDUCTIONS = [
    ("multi_step_sam", {"rho": 0.3, "steps": 1}, SAM),
    ("multi_step_sam", {"rho": 0.3, "steps": 1, "step_size": 0.9}, SAM),
    ("gsam", {"rho": 0.3, "alpha": 0.0}, SAM),
    ("wsam", {"rho": 0.3, "gamma": 0.5}, SAM),
    ("wsam", {"rho": 0.3, "gamma": 0.0}, None),
    ("gradient_norm_penalty", {"rho": 0.3, "alpha": 1.0}, SAM),
    ("gradient_norm_penalty", {"rho": 0.3, "alpha": 0.0}, None),
    ("look_sam", {"rho": 0.3, "k": 1}, SAM),
    ("friendly_sam", {"rho": 0.3, "sigma": 0.0}, SAM),
    ("vasso", {"rho": 0.3, "theta": 1.0}, SAM),
    ("cr_sam", {"rho": 0.3, "gamma": 0.0, "beta": 0.0}, SAM),
    ("xsam", {"rho": 0.3, "alpha": 1.0}, SAM),
    ("fisher_sam", {"rho": 0.3, "eta": 0.0}, SAM),
    ("eigen_sam", {"rho": 0.3, "alpha": 0.0}, SAM),
    ("sparse_sam", {"rho": 0.3, "sparsity": 0.0}, SAM),
    ("randomised", {"method": SAM, "probability": 1.0}, SAM),
    ("randomised", {"method": SAM, "probability": 0.0}, None),
    ("late_phase", {"method": SAM, "start": 0}, SAM),
    ("late_phase", {"method": SAM, "start": 9}, None),
    ("random_perturbation", {"std": 0.0}, None),
    ("eigen_sam", {"rho": 0.0}, None),
    ("unified_sam", {"rho": 0.3, "lmbda": 1.0}, SAM),
    ("sagm", {"rho": 0.0, "alpha": 0.0}, None),
    ("le_sam", {"rho": 0.3, "sigma": 1e9}, SAM),
    ("le_sam", {"rho": 0.3, "sigma": 0.0}, None),
    ("periodic_sam", {"rho": 0.3, "k": 1}, SAM),
    ("late_tail", {"method": SAM, "steps": 9, "fraction": 1.0}, SAM),
    ("late_tail", {"method": SAM, "steps": 9, "fraction": 0.0}, None),
    ("tilted_sam", {"rho": 0.3, "radius": 0.0}, SAM),
    ("tilted_sam", {"rho": 0.0, "radius": 0.0}, None),
    *[
        (name, {**arguments, "rho": 0.0}, None)
        for name, arguments, _ in FIRST.values()
        if name not in ("sagm", "polyak_sam")
    ],
]


def test_invariant_9_reductions_to_sam_and_to_the_base_optimizer(x64):
    gradient, wrong = jax.jit(jax.grad(jax_loss)), {}
    points = [jax.tree.map(jnp.asarray, ref.network(seed)[0]) for seed in (0, 1)]

    def results(method):
        state = method.init(points[0])
        for w, batch in zip(points, BATCHES, strict=False):
            grad_fn = functools.partial(gradient, batch=batch)
            more = {"tail_grad_fn": grad_fn, "value_fn": functools.partial(jax_loss, batch=batch)}
            out, state = method.update(grad_fn(w), state, w, grad_fn=grad_fn, **more)
            yield out

    plain, sam = list(map(gradient, points, BATCHES[:2])), list(results(SAM))
    for name, arguments, target in REDUCTIONS:
        for out, expected in zip(
            results(build(name, **arguments)), sam if target else plain, strict=True
        ):
            off = max(np.max(np.abs(out[k] / expected[k] - 1)) for k in out)
            if not off < 1e-12:
                wrong[name] = (arguments, off)
    assert not wrong


def test_stateless_methods_work_in_the_functional_door_with_a_traced_rho(x64):
    stateless = {
        name: arguments
        for name, arguments, _ in FIRST.values()
        if name != "imb_sam" and not jax.tree.leaves(build(name, **arguments).init(PARAMS))
    }
    assert {"gsam", "wsam", "cr_sam", "xsam", "multi_step_sam", "z_sharp"} <= set(stateless)

    @jax.jit
    def gradients(rho):
        return {
            name: sam_optax.grad(jax_loss, build(name, **{**arguments, "rho": rho}))(
                jax.tree.map(jnp.asarray, PARAMS), BATCHES[0]
            )
            for name, arguments in stateless.items()
        }

    grad = functools.partial(ref.gradient, batch=BATCHES[0])
    for name, out in gradients(0.25).items():
        arguments = {**stateless[name], "rho": 0.25}
        memory = {"t": 0, "value": functools.partial(ref.loss, np, batch=BATCHES[0])}
        assert_close(out, getattr(fam, name)(PARAMS, grad(PARAMS), grad, memory, **arguments))


@pytest.mark.parametrize("name", sorted({*FIRST, "eigen_sam"} - OF_THE_SCALE - {"imb_sam"}))
def test_the_scale_of_the_loss_passes_through(name):
    """Powers of two, far outside where float32 squares are finite; norms round otherwise there."""
    method = build(name, **FIRST[name][1]) if name in FIRST else sam_optax.eigen_sam()
    w = jax.tree.map(jnp.float32, SIDES)

    @jax.jit
    def results(scale):
        state, outs = method.init(w), []
        for factor in (1.0, -0.5, 2.0):
            loss = lambda w, factor=factor: curved(jnp, w, factor * hessian(0)[0])
            grad_fn = lambda w, loss=loss: jax.tree.map(lambda g: scale * g, jax.grad(loss)(w))
            out, state = method.update(grad_fn(w), state, w, grad_fn=grad_fn)
            outs.append(jax.tree.map(lambda x: x / scale, out))
        return outs

    for scale in (2.0**100, 2.0**-100):
        assert_close(results(scale), results(1.0), rtol=1e-5, atol=0)


# Invariants on quadratics.


def quadratic(seed=0, n=6):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n))
    return jnp.asarray(root @ root.T), jnp.asarray(rng.normal(size=n))


def test_invariant_5_gradient_norm_penalty_is_its_gradient_on_a_quadratic(x64):
    H, w = quadratic()
    loss = lambda w: 0.5 * w @ H @ w
    penalised = lambda w: loss(w) + 0.3 * 0.7 * jnp.linalg.norm(jax.grad(loss)(w))
    out = sam_optax.grad(loss, sam_optax.gradient_norm_penalty(0.3, alpha=0.7))(w)
    np.testing.assert_allclose(out, jax.grad(penalised)(w), rtol=1e-12)


def test_invariant_6_gsam_descends_along_what_is_orthogonal_to_g_s(x64):
    H, w = quadratic()
    loss = lambda w: 0.25 * jnp.sum(w**4) + 0.5 * w @ H @ w
    g, g_s = jax.grad(loss)(w), sam_optax.grad(loss, sam_optax.sam(0.5))(w)
    perpendicular = (g_s - sam_optax.grad(loss, sam_optax.gsam(0.5, alpha=0.6))(w)) / 0.6
    assert abs(perpendicular @ g_s) < 1e-12 * (g_s @ g_s)
    np.testing.assert_allclose(perpendicular @ g, perpendicular @ perpendicular, rtol=1e-10)


def test_invariant_7_cr_sam_on_a_quadratic(x64):
    H, w = quadratic()
    loss = lambda w: 0.5 * w @ H @ w
    g = H @ w
    change = 0.3 * H @ g / jnp.linalg.norm(g)
    for gamma, beta in [(0.9, 0.0), (0.0, 0.4), (0.9, 0.4)]:
        out = sam_optax.grad(loss, sam_optax.cr_sam(0.3, gamma=gamma, beta=beta))(w)
        np.testing.assert_allclose(out, g + change + beta * 2 * change, rtol=1e-12)


def test_invariant_8_momentum_sam_is_nesterov_for_the_radius_of_its_look_ahead(x64):
    lr, mu = 0.1, 0.8
    ahead, _ = run(optax.identity(), base=optax.sgd(lr, momentum=mu, nesterov=True))
    ahead, v, radii = [PARAMS, *ahead], fam.scaled(0, PARAMS), []
    for y, batch in zip(ahead, BATCHES, strict=False):
        radii.append(lr * mu * fam.norm(v))
        v = fam.add(ref.gradient(y, batch), mu, v)
    method = sam_optax.momentum_sam(lambda t: jnp.asarray(radii)[t], momentum=mu)
    _, points = run(method, base=optax.sgd(lr, momentum=mu))
    assert_close([p[0] for p in points], ahead[:-1])


MOMENTA = {
    "sgd": (optax.sgd(0.1, momentum=0.8), 0.8),
    "nesterov": (optax.sgd(0.1, momentum=0.8, nesterov=True), 0.8),
    "decoupled decay": (
        optax.chain(optax.trace(0.8), optax.add_decayed_weights(0.1), optax.scale(-0.1)),
        0.8,
    ),
    "adamw": (optax.adamw(0.1, b1=0.7, weight_decay=0.1), 0.7),
    "inject_hyperparams": (optax.inject_hyperparams(optax.adam)(0.1, b1=0.7), 0.7),
}


@pytest.mark.parametrize("name", MOMENTA)
def test_shared_momentum_sam_is_momentum_sam_before_its_base(x64, name):
    """Adam's momentum is another multiple of the same sum."""
    (base, momentum), batches = MOMENTA[name], (BATCHES * 2)[:10]
    rho = lambda t: 0.3 + 0.1 * t
    expected, at = run(sam_optax.momentum_sam(rho, momentum), batches=batches, base=base)
    shared = sam_optax.shared_momentum_sam(base, rho)
    path, points = run(optax.identity(), batches=batches, base=shared)
    assert_close(path, expected)
    assert_close(points, at)
    assert all(len(p) == 1 for p in points)
    sizes = lambda tx: sum(x.size for x in jax.tree.leaves(tx.init(PARAMS)))
    assert sizes(shared) == sizes(base) + 1  # the count of rho's schedule


@pytest.mark.parametrize("p", [1, 1.5, 2, np.inf])
def test_momentum_sam_is_its_rules_to_the_bit(p):
    """It turns e where the filter turns the momentum."""
    mask = {k: k != "w1" for k in PARAMS}
    options = {"p": p, "normalization": sam_optax.elementwise(), "mask": mask}
    ascent = optax.chain(sam_optax.along_momentum(), sam_optax.dual_ascent(0.3, **options))
    rules = sam_optax.sharpness_aware(ascent, sam_optax.keep_momentum(0.9))
    expected, at = run(rules)
    path, points = run(sam_optax.momentum_sam(0.3, 0.9, **options))
    jax.tree.map(np.testing.assert_array_equal, (path, points), (expected, at))


def first_update(tx, params=PARAMS):
    return tx.update(params, tx.init(params), params, grad_fn=lambda w: w)


def test_what_reads_the_memory_of_the_optimizer_says_what_it_looked_for():
    momentum, moment = sam_optax.shared_momentum_sam, sam_optax.shared_preconditioned_sam
    several = optax.chain(optax.trace(0.9), optax.adam(0.1))
    for make, base, number in (
        *((momentum, optax.sgd(0.1), 0), (momentum, several, 2), (moment, optax.sgd(0.1), 0)),
        (moment, optax.chain(optax.adam(0.1), optax.adam(0.1)), 2),
    ):
        fields = "momentum, trace, mu" if make is momentum else "nu"
        with pytest.raises(ValueError, match=rf"base must .*{fields} .*got {number} of"):
            first_update(make(base))
    part = optax.masked(optax.adam(0.1), {k: k == "w1" for k in PARAMS})
    for make in (momentum, moment):
        with pytest.raises(ValueError, match=r"structure of params .*got 1 of"):
            first_update(make(part))
    # A parameter that is called so is none.
    named = {"mu": jnp.ones(2), "trace": jnp.ones(2), "nu": jnp.ones(2)}
    first_update(momentum(optax.sgd(0.1, momentum=0.9)), named)
    first_update(moment(optax.adam(0.1)), named)


def test_shared_preconditioned_sam_is_preconditioned_sam_before_its_base(x64):
    for base in (optax.adam(0.1, b2=0.8), optax.inject_hyperparams(optax.adamw)(0.1, b2=0.8)):
        rho = lambda t: 0.05 + 0.01 * t
        expected, at = run(sam_optax.preconditioned_sam(rho, 0.8, 1e-3), base=base)
        shared = sam_optax.shared_preconditioned_sam(base, rho, 1e-3)
        path, points = run(optax.identity(), base=shared)
        assert_close(path, expected)
        assert_close(points, at)
        sizes = lambda tx: sum(x.size for x in jax.tree.leaves(tx.init(PARAMS)))
        assert sizes(shared) == sizes(base) + 1  # the count of rho's schedule


def test_xsam_where_the_angle_vanishes_and_the_search_for_alpha(x64):
    w = jnp.array([2.0])
    for alpha in (0.0, 0.5, 1.7):
        out = sam_optax.grad(lambda w: jnp.sum(w**2), sam_optax.xsam(0.1, alpha=alpha))(w)
        np.testing.assert_allclose(out, [4.2], rtol=1e-12)
    value_fn = lambda w: jax_loss(w, BATCHES[0])
    g = ref.gradient(PARAMS, BATCHES[0])
    g_s = fam.sam(PARAMS, g, functools.partial(ref.gradient, batch=BATCHES[0]), {}, 0.2)
    found = set()
    for grid in (np.linspace(0, 2, 21), np.linspace(0, 0.7, 8), np.array([0.3, 0.1])):
        losses = [
            value_fn(fam.add(PARAMS, 0.5, fam.slerp(fam.unit(g), fam.unit(g_s), a))) for a in grid
        ]
        best = sam_optax.xsam_alpha(
            value_fn, PARAMS, rho=0.2, rho_max=0.5, candidates=jnp.asarray(grid)
        )
        np.testing.assert_allclose(best, grid[np.argmax(losses)], rtol=1e-12)
        found.add(float(best))
    assert len(found) > 1


def test_rho_from_learning_rate_is_linear_and_never_negative():
    schedule = sam_optax.rho_from_learning_rate(
        lambda count: 0.1 * count, rho_min=0.1, rho_max=0.6, lr_min=0.2, lr_max=0.7
    )
    np.testing.assert_allclose(
        [schedule(t) for t in (0, 1, 2, 4, 7)], [0, 0, 0.1, 0.3, 0.6], atol=1e-6
    )
    with pytest.raises(ValueError, match=r"lr_max must .*0\.1"):
        sam_optax.rho_from_learning_rate(
            lambda count: 0.1, rho_min=0.2, rho_max=0.6, lr_min=0.1, lr_max=0.1
        )


def test_z_sharp_falls_back_to_the_global_norm_where_nothing_stands_out(x64):
    params = {"flat": jnp.ones((3, 2)), "one": jnp.ones((1, 1)), "b": jnp.ones(2)}
    g = {"flat": jnp.full((3, 2), 2.0), "one": jnp.full((1, 1), 3.0), "b": jnp.array([1.0, -4.0])}
    tx = sam_optax.z_sharp(0.2)
    with jax.debug_nans(True):
        point, _ = jax.jit(lambda g: tx.update(g, tx.init(g), params, grad_fn=lambda w: w))(g)
    assert_close(fam.add(point, -1, params), fam.scaled(0.2, fam.unit(g)))


# Eigen-SAM on quadratics, whose top eigenvector is known.

SIDES = {"a": np.ones((2, 2)), "b": np.array([1.0, -1.0, 0.5])}


def curved(xp, w, H):
    x = xp.concatenate([w["a"].ravel(), w["b"]])
    return 0.5 * x @ H @ x + xp.sum(x)


def curved_gradient(w, H):
    g = H @ np.concatenate([w["a"].ravel(), w["b"]]) + 1
    return {"a": g[:4].reshape(2, 2), "b": g[4:]}


def hessian(seed):
    """The eigenvalue of largest magnitude is negative."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(7, 7)))
    return q @ np.diag([-3.0, 1.5, 1.0, 0.5, 0.2, -0.1, 0.0]) @ q.T, q[:, 0]


@pytest.mark.parametrize("rho", [0.3, lambda t: 0.1 + 0.1 * t])
def test_eigen_sam_follows_its_equation_with_the_eigenvector_of_the_last_refresh(x64, rho):
    curvatures = [hessian(seed) for seed in range(7)]

    def rule(w, g, grad, memory, rho, alpha, every):
        if memory["t"] % every == 0:
            v = curvatures[memory["t"]][1]
            memory["v"] = {"a": v[:4].reshape(2, 2), "b": v[4:]}
        return grad(fam.add(w, 1, fam.eigen_perturbation(g, memory["v"], rho, alpha)))

    arguments, batches = {"rho": rho, "alpha": 0.4, "every": 3}, [c[0] for c in curvatures]
    method = sam_optax.eigen_sam(**arguments, power_steps=60)
    path, points = run(method, SIDES, batches, functools.partial(curved, jnp))
    expected, at = fam.trajectory(SIDES, batches, rule, arguments, gradient=curved_gradient)
    assert_close(path, expected, rtol=1e-9)
    assert_close([p[-1:] for p in points[1:3]], at[1:3], rtol=1e-9)
    counts = [len(p) for p in points]
    assert [counts[t] for t in (1, 2, 4, 5)] == [1, 1, 1, 1]
    assert 1 < counts[0] == counts[3] == counts[6] <= 61


def test_eigen_sam_starts_the_power_iteration_where_the_last_one_ended(x64):
    H, v = hessian(0)
    method = sam_optax.eigen_sam(0.3, alpha=0.4, every=1, power_steps=3)
    path, points = run(method, SIDES, [H] * 20, functools.partial(curved, jnp))
    v = {"a": v[:4].reshape(2, 2), "b": v[4:]}
    off = []
    for w, seen in zip([SIDES, *path], points, strict=False):
        e = fam.eigen_perturbation(curved_gradient(w, H), v, 0.3, 0.4)
        off.append(min(fam.norm(fam.add(fam.add(p, -1, w), -1, e)) for p in seen))
    assert off[0] > 1e-4 and off[-1] < 1e-10


# Methods with a key, and cadences.


def test_random_perturbation_averages_gradients_under_noise_of_the_filters_size(x64):
    rng, samples, std = np.random.default_rng(0), 2, lambda t: 0.02 * (1 + t)
    shapes = {"a": (40, 30), "twin": (40, 30), "b": (1500,), "conv": (3, 3, 10, 12)}
    params = {k: rng.normal(size=s) * (1 + np.arange(s[-1])) for k, s in shapes.items()}
    loss = lambda w, scale: scale * sum(jnp.sum(jnp.cos(x)) for x in w.values())
    method = sam_optax.random_perturbation(std, samples=samples)
    path, points = run(method, params, [1.0, 2.0], loss, optax.sgd(1.0))
    drawn = []
    for t, (w, after, seen) in enumerate(zip([params, *path], path, points, strict=False)):
        assert len(seen) == samples
        mean = {k: -(1 + t) * sum(np.sin(p[k]) for p in seen) / samples for k in w}
        assert_close(after, fam.add(w, -1, mean), rtol=1e-12)
        for point in seen:
            noise = {}
            for k in w:
                axes = tuple(range(w[k].ndim - 1)) if w[k].ndim > 1 else 0
                size = np.sqrt((w[k] ** 2).sum(axes, keepdims=True))
                noise[k] = ((point[k] - w[k]) / (std(t) * size)).ravel()
            drawn += noise.values()
    for x in drawn:
        error = 1 / np.sqrt(x.size)
        assert abs(x.mean()) < 4 * error
        assert abs(x.var() - 1) < 4 * np.sqrt(2) * error
        assert abs((x**4).mean() - 3) < 4 * np.sqrt(96) * error
    for i, x in enumerate(drawn):  # leaves, samples and steps are independent
        for y in drawn[:i]:
            n = min(x.size, y.size)
            assert abs(np.dot(x[:n], y[:n])) < 5 * np.sqrt(n)


def test_low_pass_filtering_sgd_by_a_chain(x64):
    """As its docstring says: parts of the batch, each with noise of its own, one step of all."""
    parts, loss = [1.0, 2.0, 3.0], lambda w, x: jnp.sum(jnp.sin(w["a"]) * x)
    params = {"a": np.ones((4, 3))}
    sgd = optax.MultiSteps(optax.sgd(0.1), len(parts)).gradient_transformation()
    path, points = run(sam_optax.random_perturbation(0.1), params, parts, loss, sgd)
    assert_close(path[:2], [params, params])
    noisy = [seen[0]["a"] for seen in points]
    assert all(np.any(a != b) for a, b in itertools.pairwise(noisy))
    mean = np.mean([x * np.cos(w) for x, w in zip(parts, noisy, strict=True)], axis=0)
    # The average of Optax counts in float32.
    assert_close(path[2], {"a": params["a"] - 0.1 * mean}, rtol=1e-7)


def test_random_perturbation_is_reproduced_by_its_key():
    method, w = functools.partial(sam_optax.random_perturbation, 0.1), jnp.ones((3, 2))
    step = jax.jit(lambda state: method().update(w, state, w, grad_fn=lambda w: w))
    first, again, other = (step(method(key=key).init(w)) for key in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(step(first[1])[0], step(again[1])[0])
    assert np.all(first[0] != other[0]) and np.all(first[0] != step(first[1])[0])


def decisions(method, gradients):
    """Whether each step of a run paid."""

    @jax.jit
    def scan(state):
        def body(state, g):
            out, state = method.update(g, state, g, grad_fn=lambda w: jnp.full_like(w, -1.0))
            return state, out == -1

        return jax.lax.scan(body, state, gradients)[1]

    return np.asarray(scan(method.init(gradients[0])))


def test_randomised_pays_with_the_probability_given():
    method, g, p = functools.partial(sam_optax.randomised, SAM), jnp.ones(2000), 0.3
    paid = decisions(method(probability=p, key=1), g)
    assert abs(paid.mean() - p) < 4 * np.sqrt(p * (1 - p) / g.size)
    assert abs((paid[1:] & paid[:-1]).mean() - p**2) < 4 * p / np.sqrt(g.size)
    np.testing.assert_array_equal(paid, decisions(method(probability=p, key=1), g))
    assert np.any(paid != decisions(method(probability=p, key=2), g))
    scheduled = decisions(method(probability=lambda t: jnp.where(t < 7, 0.0, 1.0)), g[:20])
    np.testing.assert_array_equal(scheduled, np.arange(20) >= 7)


def test_adaptive_pays_where_the_gradient_stands_out():
    g, memory = np.random.default_rng(0).lognormal(size=300), {}
    expected = [
        fam.ae_sam_pays({"g": x}, memory, 0.8, 0.5 - 1.2 * min(t / 200, 1)) for t, x in enumerate(g)
    ]
    method = sam_optax.adaptive(SAM, 200, decay=0.8, c_start=0.5, c_end=-0.7)
    np.testing.assert_array_equal(decisions(method, jnp.asarray(g)), expected)
    assert np.mean(expected[:100]) < 0.4 < 0.6 < np.mean(expected[200:])


@pytest.mark.parametrize("name", ["randomised", "late_phase", "adaptive"])
def test_cadences_leave_the_state_of_the_method_alone_on_skipped_steps(x64, name):
    arguments = {"rho": lambda t: 0.1 + 0.1 * t, "theta": 0.6}
    vasso, memory, batches = sam_optax.vasso(**arguments), {}, BATCHES + BATCHES[::-1]
    if name == "randomised":
        method = sam_optax.randomised(vasso, probability=0.5)
    elif name == "late_phase":
        method = sam_optax.late_phase(vasso, 4)
    else:
        method = sam_optax.adaptive(vasso, 12)
    path, points = run(method, batches=batches)
    paid = [len(p) for p in points]
    assert set(paid) == {0, 1}

    def pays(step, g):
        if name == "adaptive":
            return fam.ae_sam_pays(g, memory, 0.9, 1 - 2 * step / 12)
        return step >= 4 if name == "late_phase" else paid[step]

    expected, at = fam.trajectory(PARAMS, batches, fam.vasso, arguments, pays)
    assert_close(path, expected)
    assert_close(points, at)


@pytest.mark.parametrize(
    "name, gradients",
    [("momentum_sam", 1), ("random_perturbation", 1), ("sam", 2), ("async_sam", 2), ("cr_sam", 3)],
)
@pytest.mark.usefixtures("optimised")
def test_compiled_cost_in_gradients_with_the_clean_one_included(name, gradients):
    method = build(name)
    params = {"w": jnp.ones((32, 32)), "v": jnp.ones((32, 32))}
    loss = lambda w, x: jnp.mean(jnp.sin(jnp.sin(x @ w["w"]) @ w["v"]) ** 2)

    def step(params, state, x):
        grad_fn = jax.grad(functools.partial(loss, x=x))
        return method.update(grad_fn(params), state, params, grad_fn=grad_fn)

    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    x = jnp.ones((4096, 32))
    ratio = flops(step, params, method.init(params), x) / flops(jax.grad(loss), params, x)
    assert gradients - 0.05 < ratio < gradients + 0.15


@pytest.mark.parametrize("name, gradients", [("sam", 2), ("cr_sam", 3), ("gam", 4)])
@pytest.mark.usefixtures("optimised")
def test_compiled_cost_through_the_functional_door(name, gradients):
    """It gives descent_grad_fn, but XLA finds the same gradient at the same point again."""
    params = {"w": jnp.ones((32, 32)), "v": jnp.ones((32, 32))}
    loss = lambda w, x: jnp.mean(jnp.sin(jnp.sin(x @ w["w"]) @ w["v"]) ** 2)
    flops = lambda f, *args: jax.jit(f).lower(*args).compile().cost_analysis()["flops"]
    x = jnp.ones((4096, 32))
    sharp = sam_optax.value_and_grad(loss, build(name))
    ratio = flops(sharp, params, x) / flops(jax.grad(loss), params, x)
    assert gradients - 0.05 < ratio < gradients + 0.15


NAN = float("nan")


@pytest.mark.parametrize(
    "name, argument, values",
    [
        *[(name, "rho", [-0.1, NAN]) for name in [*FIRST, "eigen_sam"]],
        ("multi_step_sam", "steps", [0, 1.5]),
        ("multi_step_sam", "step_size", [-0.1]),
        ("gsam", "alpha", [-1.0, NAN]),
        ("wsam", "gamma", [-0.1, 1.0, NAN]),
        ("gradient_norm_penalty", "alpha", [-1.0]),
        ("look_sam", "k", [0, 2.5]),
        ("look_sam", "alpha", [-1.0]),
        ("friendly_sam", "sigma", [-1.0]),
        ("friendly_sam", "lmbda", [-0.1, 1.0]),
        ("vasso", "theta", [0.0, 1.1, NAN]),
        ("momentum_sam", "momentum", [-0.1, 1.0]),
        ("cr_sam", "gamma", [-1.0]),
        ("cr_sam", "beta", [-1.0]),
        ("fisher_sam", "eta", [-1.0]),
        ("eigen_sam", "alpha", [-1.0]),
        ("eigen_sam", "every", [0, 1.5]),
        ("eigen_sam", "power_steps", [0, 1.5]),
        ("z_sharp", "quantile", [-0.1, 1.0]),
        ("random_perturbation", "std", [-1.0]),
        ("random_perturbation", "samples", [0, 1.5]),
        ("sparse_sam", "sparsity", [-0.1, 1.0]),
        ("sparse_sam", "every", [0, 1.5]),
        ("randomised", "probability", [-0.1, 1.1, NAN]),
        ("late_phase", "start", [-1, 1.5]),
        ("adaptive", "steps", [0, 1.5]),
        ("adaptive", "decay", [-0.1, 1.0]),
        ("unified_sam", "lmbda", [-0.1, 1.1, NAN]),
        ("sagm", "alpha", [-1.0]),
        ("le_sam", "sigma", [-1.0]),
        ("limit_rise", "sigma", [-1.0, NAN]),
        ("sum_of", "weight", [NAN]),
        ("preconditioned_sam", "b2", [-0.1, 1.0]),
        ("preconditioned_sam", "eps", [-1.0]),
        ("shared_preconditioned_sam", "eps", [-1.0]),
        ("spectral_sam", "ns_steps", [-1, 1.5]),
        ("polyak_sam", "bound", [-1.0, 0.0, NAN]),
        ("polyak_sam", "lowest", [NAN]),
        ("periodic_sam", "k", [0, 2.5]),
        ("tilted_sam", "samples", [0, 1.5]),
        ("tilted_sam", "radius", [-1.0]),
        ("tilted_sam", "tilt", [NAN]),
        ("tilted", "count", [0]),
        ("flat_lora", "rho", [-0.1]),
        ("flat_lora", "steps", [0, 1.5]),
        ("late_tail", "steps", [0, 1.5]),
        ("late_tail", "fraction", [-0.1, 1.1]),
    ],
)
def test_errors_name_the_argument_the_rule_and_the_value(name, argument, values):
    required = {k: v for k, v in public.ARGUMENTS.get(name, {}).items() if k != argument}
    for value in values:
        with pytest.raises(ValueError, match=f"{argument} must .*{value}"):
            build(name, **required, **{argument: value})


# Normalization layers of Flax models.


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3,))(x)
        x = nn.BatchNorm(use_running_average=True)(x)
        x = nn.GroupNorm(2, name="bn1")(x)
        x = nn.Dense(4)(x)
        return nn.Dense(1)(nn.LayerNorm()(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3,), rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.norms = nnx.List([nnx.GroupNorm(4, 2, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)])
        self.head = nnx.Linear(4, 1, rngs=rngs)


def test_normalization_mask_finds_the_normalization_layers_of_flax():
    shapes = jax.eval_shape(Linen().init, jax.random.key(0), jnp.ones((2, 6, 3)))["params"]
    mask = sam_optax.normalization_mask(shapes)
    assert jax.tree.structure(mask) == jax.tree.structure(shapes)
    for name, layer in mask.items():
        assert set(layer.values()) == {name in ("BatchNorm_0", "bn1", "LayerNorm_0")}

    tx, zeros = sam_optax.sam(0.5, mask=sam_optax.normalization_mask), optax.tree.zeros_like(shapes)
    step = jax.jit(lambda g: tx.update(g, tx.init(g), zeros, grad_fn=lambda w: w)[0])
    e = step(optax.tree.ones_like(zeros))
    jax.tree.map(lambda x, m: np.testing.assert_array_equal(x != 0, m), e, mask)
    np.testing.assert_allclose(optax.tree.norm(e), 0.5, rtol=1e-6)

    state = nnx.state(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))), nnx.Param)
    mask = jax.tree.leaves(sam_optax.normalization_mask(state))
    names = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert mask == ["bn" in name or "norms" in name for name in names]
