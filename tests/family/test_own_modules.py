"""Methods with a module of their own: transcriptions of the authors' code, invariants, cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as ref
import optax
import pytest
from checks import assert_exact as assert_close
from jax.sharding import AxisType, PartitionSpec
from numpy_family import add, dot, norm, scaled, unit

import sam_optax
from sam_optax import _numerics, bsam, decoupled_wsam, esam, gam, k_sam, lookbehind, sampa

LR, MOMENTUM, DECAY, STEPS = 0.05, 0.9, 0.01, 7

jax_loss = functools.partial(ref.loss, jnp)
jax_gradient = jax.grad(jax_loss)


def base(lr=LR):
    return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(lr, momentum=MOMENTUM))


class NumpySGD:
    """SGD as PyTorch has it: momentum, and weight decay added to the gradient."""

    def __init__(self, params):
        self.velocity = scaled(0.0, params)

    def way(self, w, g, lr=LR):
        return scaled(-lr, add(add(g, DECAY, w), MOMENTUM, self.velocity))

    def step(self, w, g, lr=LR):
        self.velocity = add(add(g, DECAY, w), MOMENTUM, self.velocity)
        return add(w, -lr, self.velocity)


ADAPTIVE = sam_optax.elementwise(0.0, normalize_bias=True)


def ascent(w, g, adaptive):
    """The direction of SAM, or of the adaptive form of several authors' code: w^2 g/||w g||."""
    if not adaptive:
        return unit(g)
    size = norm({k: w[k] * g[k] for k in w})
    return {k: w[k] ** 2 * g[k] / (size or 1) for k in w}


def batches(count=STEPS):
    """Another batch at every step, alike to the first in its shapes."""
    return [ref.network(seed)[1] for seed in range(count)]


def other(batch):
    """Other examples, for descent_grad_fn."""
    return batch[0][::-1], batch[1]


def train(tx, params, data=None, apart=False):
    """The optimizer in a jitted step over a list of batches; apart: the descent sees others."""

    @jax.jit
    def step(params, state, previous, batch):
        grad_fn = lambda params: jax_gradient(params, batch)
        previous_grad_fn = lambda params: jax_gradient(params, previous)
        extra = {"grad_fn": grad_fn, "previous_grad_fn": previous_grad_fn}
        if apart:
            extra["descent_grad_fn"] = lambda params: jax_gradient(params, other(batch))
        updates, state = tx.update(grad_fn(params), state, params, **extra)
        return optax.apply_updates(params, updates), state

    tx = optax.with_extra_args_support(tx)
    data = batches() if data is None else data
    params = jax.tree.map(jnp.asarray, params)
    state, previous = tx.init(params), data[0]
    for batch in data:
        params, state = step(params, state, previous, batch)
        previous = batch
    return params


# GAM


@pytest.mark.parametrize(
    "beta0, apart, adaptive",
    [(0.3, False, False), (1.6, False, False), (0.3, True, False), (0.3, False, True)],
)
def test_gam_follows_the_authors_code(x64, beta0, apart, adaptive):
    """Apart: g1 and g3 of the descent from other examples, the direction of w1 from the batch."""
    w, _ = ref.network()
    start, sgd = w, NumpySGD(w)
    r, r_inner, beta1, gamma = 0.2, 0.05, 0.6, 0.3
    for batch in batches():
        below = other(batch) if apart else batch
        g0 = ref.gradient(w, batch)
        near = add(w, r_inner, ascent(w, g0, adaptive))
        g1 = ref.gradient(near, below)
        growth = add(ref.gradient(near, batch), -1, g0)
        w1 = add(w, r, ascent(w, growth, adaptive))
        g2 = ref.gradient(w1, batch)
        g3 = ref.gradient(add(w1, r_inner, ascent(w1, g2, adaptive)), below)
        pro_m = add(g0, abs(1 - beta0), g2)
        grad = add(scaled(beta1, g1), 1 - beta1, g3)
        cosine = dot(pro_m, grad) / (norm(grad) * norm(pro_m))
        vertical = add(pro_m, -cosine * norm(pro_m) / norm(grad), grad)
        w = sgd.step(w, add(grad, -gamma, vertical))
    operator = ADAPTIVE if adaptive else None
    tx = optax.chain(gam(r, r_inner, beta0, beta1, gamma, normalization=operator), base())
    assert_close(train(tx, start, apart=apart), w)


def test_gam_on_an_isotropic_quadratic(x64):
    """All points lie on one ray, so that the decomposition has nothing to subtract."""
    c, r, r_inner, beta1 = 3.0, 0.2, 0.05, 0.6
    w = jnp.array([3.0, -4.0])
    out = sam_optax.grad(
        lambda w: 0.5 * c * jnp.sum(w**2), gam(r, r_inner, beta1=beta1, gamma=0.7)
    )(w)
    np.testing.assert_allclose(out, c * (5 + r_inner + (1 - beta1) * r) * w / 5, rtol=1e-12)


def test_gam_reduces_to_sam_and_subtracts_an_orthogonal_part(x64):
    params, batch = jax.tree.map(jnp.asarray, ref.network())

    @jax.jit
    def run(*arguments):
        return sam_optax.grad(jax_loss, gam(*arguments))(params, batch)

    sam = sam_optax.grad(jax_loss, sam_optax.sam(0.1))(params, batch)
    assert_close(run(0.3, 0.1, 0.5, 1.0, 0.0), sam)
    assert_close(run(0.0, 0.1, 0.5, 0.4, 0.0), sam)
    A = run(0.3, 0.1, 0.5, 0.6, 0.0)
    rest = optax.tree.sub(run(0.3, 0.1, 0.5, 0.6, 0.5), A)
    assert optax.tree.norm(rest) > 0.01 * optax.tree.norm(A)
    assert abs(optax.tree.vdot(rest, A)) < 1e-12


# Decoupled WSAM


@pytest.mark.parametrize("apart", [False, True])
def test_decoupled_wsam_follows_the_authors_code(x64, apart):
    """Apart: the ascent alone is of the batch, all that is descended of other examples."""
    w, _ = ref.network()
    start, sgd = w, NumpySGD(w)
    rho, gamma = 0.1, 0.8
    rate = lambda t: LR / (1 + t)
    for t, batch in enumerate(batches()):
        below = other(batch) if apart else batch
        perturbed, g = add(w, rho, unit(ref.gradient(w, batch))), ref.gradient(w, below)
        sharpness = add(ref.gradient(perturbed, below), -1, g)
        w = add(sgd.step(w, g, rate(t)), -rate(t) * gamma / (1 - gamma), sharpness)
    assert_close(train(decoupled_wsam(base(rate), rate, rho, gamma), start, apart=apart), w)


def test_decoupled_wsam_reductions(x64):
    """Weight 0 is the base optimizer, to the last bit; weight 1 on plain SGD is SAM."""
    params, batch = jax.tree.map(jnp.asarray, ref.network())
    g = jax_gradient(params, batch)
    for optimizer in (base(), optax.adamw(LR)):
        tx = decoupled_wsam(optimizer, LR, 0.1, gamma=0.0)
        updates, _ = tx.update(g, tx.init(params), params, value_fn=lambda w: jax_loss(w, batch))
        plain, _ = optimizer.update(g, optimizer.init(params), params)
        jax.tree.map(np.testing.assert_array_equal, updates, plain)
    sam = train(optax.chain(sam_optax.sam(0.1), optax.sgd(LR)), params)
    assert_close(train(decoupled_wsam(optax.sgd(LR), LR, 0.1, gamma=0.5), params), sam)


def test_decoupled_wsam_keeps_sharpness_out_of_the_moments(x64):
    params, batch = jax.tree.map(jnp.asarray, ref.network())
    tx, adam = decoupled_wsam(optax.adam(LR), LR, 0.5, 0.9), optax.adam(LR)
    g = jax_gradient(params, batch)
    _, state = tx.update(g, tx.init(params), params, grad_fn=lambda w: jax_gradient(w, batch))
    assert_close(state.base, adam.update(g, adam.init(params), params)[1])


# Lookbehind


@pytest.mark.parametrize("k, alpha, eta", [(1, 0.5, None), (3, 0.5, 0.01), (2, None, None)])
@pytest.mark.parametrize("apart", [False, True])
def test_lookbehind_follows_the_authors_code(x64, k, alpha, eta, apart):
    w, _ = ref.network()
    start, sgd, rho = w, NumpySGD(w), 0.1
    for batch in batches():
        slow = fast = high = w
        ways = []
        for _ in range(k):
            T = {n: np.ones_like(v) for n, v in w.items()}
            if eta is not None:
                T = ref.operator("elementwise", high, eta, False)
            high = add(high, 1, ref.ascent(ref.gradient(high, batch), T, rho, 2.0))
            fast = sgd.step(fast, ref.gradient(high, other(batch) if apart else batch))
            ways.append(add(fast, -1, slow))
        first_way, way = ways[0], ways[-1]
        for n in w:
            cosine = (way[n] * first_way[n]).sum() / np.sqrt(
                (way[n] ** 2).sum() * (first_way[n] ** 2).sum()
            )
            kept = (1 + cosine) / 2 if alpha is None else alpha
            w = {**w, n: kept * fast[n] + (1 - kept) * slow[n]}
    normalization = None if eta is None else sam_optax.elementwise(eta)
    tx = lookbehind(base(), rho, k, alpha, normalization=normalization)
    assert_close(train(tx, start, apart=apart), w)


def test_lookbehind_reductions(x64):
    params, _ = ref.network()
    sam = train(optax.chain(sam_optax.sam(0.1), base()), params)
    assert_close(train(lookbehind(base(), 0.1, k=1, alpha=1.0), params), sam)
    assert_close(train(lookbehind(base(), 0.1, k=3, alpha=0.0), params), params)
    # Without ascent all k gradients are those at slow, and SGD takes k equal steps.
    sgd = train(optax.sgd(LR), params)
    assert_close(train(lookbehind(optax.sgd(LR), 0.0, k=2, alpha=0.5), params), sgd)


# SAMPa


@pytest.mark.parametrize("apart", [False, True])
def test_sampa_follows_the_authors_code(x64, apart):
    """With weight decay in y at the first step too, where the authors have no momentum yet."""
    w, _ = ref.network()
    start, sgd = w, NumpySGD(w)
    rho, lmbda = 0.1, 0.3
    u, previous = scaled(0.0, w), batches()[0]
    for batch in batches():
        p = ref.gradient(add(w, rho, unit(u)), previous)
        y = add(w, 1, sgd.way(w, u))
        q = ref.gradient(y, other(batch) if apart else batch)
        w = sgd.step(w, add(scaled(1 - lmbda, p), lmbda, q))
        u, previous = ref.gradient(y, batch), batch
    assert_close(train(sampa(base(), rho, lmbda), start, apart=apart), w)


def test_sampa_reductions(x64):
    params, _ = ref.network()
    data = batches()
    delayed = train(base(), params, [data[0], *data[:-1]])
    assert_close(train(sampa(base(), rho=0.0, lmbda=0.0), params), delayed)
    # On one batch and with steps that vanish, p is SAM's gradient from the second step on.
    params, batch = jax.tree.map(jnp.asarray, ref.network())
    tx, small = sampa(optax.sgd(1e-9), rho=0.1, lmbda=0.0), 1e-9
    grad_fn = lambda w: jax_gradient(w, batch)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params, grad_fn=grad_fn, previous_grad_fn=grad_fn)
    sam = sam_optax.grad(lambda w: jax_loss(w, batch), sam_optax.sam(0.1))(params)
    assert_close(optax.tree.scale(-1 / small, updates), sam, rtol=1e-6, atol=1e-8)


# bSAM


def numpy_bsam(w, data, key, *, apart=False, groups=1, lr=0.1, N=200.0, rho=0.05, b1=0.9, b2=0.8):
    """Every batch is split into groups with their own noise and their own perturbation."""
    delta, damping = 4.0 / N, 0.1
    gm, s = scaled(0.0, w), {n: np.full_like(v, 0.7) for n, v in w.items()}
    for batch in data:
        key, draw = jax.random.split(key)
        parts = []
        for i, (x, y) in enumerate(zip(*(np.split(a, groups) for a in batch), strict=True)):
            own = jax.random.fold_in(draw, i) if groups > 1 else draw
            noise = _numerics.random_normal(own, jax.tree.map(jnp.asarray, w))
            noisy = {n: w[n] + np.sqrt(1 / (N * s[n])) * np.asarray(noise[n]) for n in w}
            grad = ref.gradient(noisy, (x, y))
            below = other((x, y)) if apart else (x, y)
            perturbed = ref.gradient({n: w[n] + rho * grad[n] / s[n] for n in w}, below)
            parts.append((perturbed, {n: np.sqrt(s[n] * grad[n] ** 2) for n in w}))
        grad = {n: np.mean([a[n] for a, _ in parts], axis=0) for n in w}
        h = {n: np.mean([b[n] for _, b in parts], axis=0) for n in w}
        gm = {n: b1 * gm[n] + (1 - b1) * (grad[n] + delta * w[n]) for n in w}
        w = {n: w[n] - lr * gm[n] / s[n] for n in w}
        s = {n: b2 * s[n] + (1 - b2) * (h[n] + damping + delta) for n in w}
    return w


BSAM = {"learning_rate": 0.1, "data_size": 200.0, "rho": 0.05, "b2": 0.8}
BSAM_REST = {"prior_precision": 4.0, "damping": 0.1, "scale": 0.7, "key": 3}


@pytest.mark.parametrize("apart", [False, True])
def test_bsam_follows_the_authors_code(x64, apart):
    params, _ = ref.network()
    expected = numpy_bsam(params, batches(), jax.random.key(3), apart=apart)
    assert_close(train(bsam(**BSAM, **BSAM_REST), params, apart=apart), expected)


@pytest.mark.parametrize("kind", ["vmap", "shard_map"])
def test_bsam_over_groups_follows_the_authors_code(x64, kind):
    params, _ = ref.network()
    expected = numpy_bsam(params, batches(), jax.random.key(3), groups=2)
    tx = bsam(**BSAM, **BSAM_REST, axis_name="groups")

    def step(params, state, x, y):
        grad_fn = lambda params: jax_gradient(params, (x, y))
        updates, state = tx.update(params, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    step = over_groups(kind, step, whole=2)
    w = jax.tree.map(jnp.asarray, params)
    state = tx.init(w)
    for batch in batches():
        w, state = step(w, state, *batch)
    assert_close(w, expected)


def over_groups(kind, fn, whole):
    """The function over 2 groups of examples; its first arguments and all results are shared."""
    if kind == "shard_map":
        mesh = jax.make_mesh((2,), ("groups",), (AxisType.Auto,), devices=jax.devices()[:2])
        shared, split = PartitionSpec(), PartitionSpec("groups")
        specs = (*[shared] * whole, split, split)
        return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=shared))
    mapped = jax.vmap(fn, (*[None] * whole, 0, 0), out_axes=None, axis_name="groups")

    def run(*args):
        parts = [jnp.reshape(a, (2, len(a) // 2, *a.shape[1:])) for a in args[whole:]]
        return mapped(*args[:whole], *parts)

    return jax.jit(run)


def test_bsam_at_rate_zero_learns_the_precision_alone(x64):
    params, batch = jax.tree.map(jnp.asarray, ref.network())
    tx = bsam(**{**BSAM, "learning_rate": 0.0}, **BSAM_REST)
    state = tx.init(params)
    grad_fn = lambda w: jax_gradient(w, batch)
    updates, new = tx.update(params, state, params, grad_fn=grad_fn)
    assert_close(updates, optax.tree.zeros_like(params))
    assert all((a > 0).all() and (a != 0.7).all() for a in jax.tree.leaves(new.scale))


def test_bsam_with_no_gradient_settles_at_the_prior(x64):
    """s at damping + delta; w decays by delta/s a step, as with decoupled weight decay."""
    params = jnp.array([1.0, -2.0])
    tx = bsam(0.1, 100.0, b1=0.0, b2=0.0, prior_precision=20.0, damping=0.3)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params, grad_fn=jnp.zeros_like)
    np.testing.assert_allclose(state.scale, 0.5, rtol=1e-12)
    np.testing.assert_allclose(updates, -0.1 * 0.2 / 0.5 * params, rtol=1e-12)


def test_the_noise_of_bsam_comes_from_the_key_in_its_state(x64):
    """The state survives being written as plain arrays, and the noise goes on from there."""
    params, _ = ref.network()
    points = []

    def run(tx, steps, state=None):
        w = jax.tree.map(jnp.asarray, params)
        state = tx.init(w) if state is None else state
        points.clear()
        for _ in range(steps):
            _, state = tx.update(
                w, state, w, grad_fn=lambda w: points.append(w["b1"]) or optax.tree.zeros_like(w)
            )
        return state, np.stack(points[::2])

    # Where s rests without a gradient, so that only the noise tells the points apart.
    rest = {**BSAM_REST, "scale": 4.0 / 200.0 + 0.1}
    tx = bsam(**BSAM, **rest)
    _, noisy = run(tx, 4)
    assert not np.isclose(noisy[:-1], noisy[1:]).any()
    np.testing.assert_array_equal(run(tx, 4)[1], noisy)
    assert not np.isclose(run(bsam(**BSAM, **{**rest, "key": 4}), 4)[1], noisy).any()
    half, _ = run(tx, 2)
    leaves, treedef = jax.tree.flatten(half)
    stored = [np.asarray(leaf) for leaf in leaves]
    restored = jax.tree.unflatten(treedef, [jnp.asarray(leaf) for leaf in stored])
    np.testing.assert_array_equal(run(tx, 2, restored)[1], noisy[2:])


# ESAM and K-SAM


def losses_of(xp, params, x, y):
    """The loss of `numpy_reference`, example by example."""
    hidden = xp.tanh(x @ params["w1"] + params["b1"])
    return ((hidden @ params["w2"].reshape(-1, 1) + params["b2"])[:, 0] - y) ** 2


losses_fn = functools.partial(losses_of, jnp)


def train_by_examples(sharp, params):
    tx = base()

    @jax.jit
    def step(params, state, key, x, y):
        loss, grads = sharp(key, params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params, values = jax.tree.map(jnp.asarray, params), []
    state = tx.init(params)
    for t, batch in enumerate(batches()):
        params, state, loss = step(params, state, jax.random.key(t), *batch)
        values.append(loss)
    return params, values


@pytest.mark.parametrize(
    "beta, gamma, chosen, adaptive",
    [(0.6, 0.5, 4, False), (0.4, 0.2, 2, False), (0.5, 1.0, 8, False), (0.6, 0.5, 4, True)],
)
def test_esam_follows_the_authors_code(x64, beta, gamma, chosen, adaptive):
    """But for the number of examples, which is K and not K - 1, and the mask of step one."""
    w, _ = ref.network()
    start, sgd, rho, values = w, NumpySGD(w), 0.2, []
    for t, (x, y) in enumerate(batches()):
        kept = np.asarray(jax.random.bernoulli(jax.random.key(t), beta, (4,)))
        g = ref.gradient(w, (x, y))
        g = {n: g[n] * kept[i] for i, n in enumerate(sorted(g))}
        perturbed = add(w, rho / beta, ascent(w, g, adaptive))
        before, after = losses_of(np, w, x, y), losses_of(np, perturbed, x, y)
        index = np.argsort(before - after)[:chosen]
        w = sgd.step(w, ref.gradient(perturbed, (x[index], y[index])))
        values.append(before.mean())
    sharp = esam(losses_fn, rho, beta, gamma, normalization=ADAPTIVE if adaptive else None)
    end, losses = train_by_examples(sharp, start)
    assert_close(end, w)
    assert_close(losses, values)


@pytest.mark.parametrize("k", [1, 3])
def test_k_sam_follows_the_paper(x64, k):
    w, _ = ref.network()
    start, sgd, rho, values = w, NumpySGD(w), 0.2, []
    for x, y in batches():
        losses = losses_of(np, w, x, y)
        index = np.argsort(losses)[-k:]
        part = (x[index], y[index])
        w = sgd.step(w, ref.gradient(add(w, rho, unit(ref.gradient(w, part))), part))
        values.append(losses.mean())
    sharp = k_sam(losses_fn, k, rho)
    end, losses = train_by_examples(lambda key, *args: sharp(*args), start)
    assert_close(end, w)
    assert_close(losses, values)


def test_all_tensors_and_all_examples_are_sam(x64):
    params, (x, y) = jax.tree.map(jnp.asarray, ref.network())
    expected = sam_optax.value_and_grad(lambda w: jax_loss(w, (x, y)), sam_optax.sam(0.2))(params)
    assert_close(esam(losses_fn, 0.2, 1.0, 1.0)(jax.random.key(0), params, x, y), expected)
    assert_close(k_sam(losses_fn, 8, 0.2)(params, x, y), expected)


def test_esam_perturbs_a_part_of_the_tensors_by_rho_over_beta(x64):
    params, (x, y) = jax.tree.map(jnp.asarray, ref.network())
    points, moved = [], []

    def recorded(w, x, y):
        points.append(w)
        return losses_fn(w, x, y)

    for seed in range(8):
        points.clear()
        esam(recorded, 0.2, 0.5, 0.5)(jax.random.key(seed), params, x, y)
        e = optax.tree.sub(points[1], params)
        moved.append([bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(e)])
        np.testing.assert_allclose(optax.tree.norm(e), 0.4 * any(moved[-1]), rtol=1e-12)
    assert 0.2 < np.mean(moved) < 0.8 and len(np.unique(moved, axis=0)) > 2


@pytest.mark.parametrize("kind", ["vmap", "shard_map"])
def test_per_example_methods_over_devices(x64, kind):
    """Each device perturbs and chooses for itself, as a loop over the groups does."""
    params, (x, y) = jax.tree.map(jnp.asarray, ref.network())
    key = jax.random.key(1)
    for method in (functools.partial(k_sam, k=2), functools.partial(esam, gamma=0.5)):
        arguments = (key, params) if method.func is esam else (params,)
        alone = [method(losses_fn)(*arguments, x[i : i + 4], y[i : i + 4]) for i in (0, 4)]
        expected = jax.tree.map(lambda a, b: (a + b) / 2, *alone)
        mapped = over_groups(kind, method(losses_fn, axis_name="groups"), len(arguments))
        assert_close(mapped(*arguments, x, y), expected)


def test_aux_of_per_example_methods_is_that_of_the_clean_pass():
    params, (x, y) = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), ref.network())
    with_aux = lambda w, x, y, *, shift: (losses_fn(w, x, y) + shift, (w["b2"], jnp.mean(x)))
    for call in (
        functools.partial(esam(with_aux, 0.5, has_aux=True), jax.random.key(0)),
        k_sam(with_aux, 3, 0.5, has_aux=True),
    ):
        (loss, aux), grads = jax.jit(call)(params, x, y, shift=jnp.ones(()))
        np.testing.assert_allclose(loss, jax_loss(params, (x, y)) + 1, rtol=1e-5)
        assert_close(aux, (params["b2"], jnp.mean(x)), rtol=1e-6)
        assert jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize(
    "build, sizes",
    [
        (lambda loss: functools.partial(esam(loss, gamma=0.5), jax.random.key(0)), [8, 8, 4]),
        (lambda loss: functools.partial(esam(loss, gamma=0.2), jax.random.key(0)), [8, 8, 2]),
        (lambda loss: functools.partial(esam(loss, gamma=1.0), jax.random.key(0)), [8, 8]),
        (lambda loss: k_sam(loss, 3), [8, 3, 3]),
    ],
)
def test_examples_evaluated_by_per_example_methods(build, sizes):
    params, (x, y) = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), ref.network())
    calls = []

    def counted(w, x, y):
        jax.debug.callback(lambda: calls.append(len(x)), ordered=False)
        return losses_fn(w, x, y)

    step = jax.jit(build(counted))
    for _ in range(2):
        calls.clear()
        jax.block_until_ready(step(params, x, y))
        jax.effects_barrier()
        assert sorted(calls) == sorted(sizes)
    assert step._cache_size() <= 1


def test_per_example_methods_at_a_stationary_point():
    with jax.debug_nans(True):
        flat = lambda w, x: jnp.sum(w**2) * x
        for call in (functools.partial(esam(flat), jax.random.key(0)), k_sam(flat, 2)):
            loss, grads = jax.jit(call)(jnp.zeros(3), jnp.ones(4))
            assert loss == 0 and (grads == 0).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w, x: k_sam(losses_fn, 0), "k must be at least 1, got 0"),
        (lambda w, x: k_sam(losses_fn, 2.5), "k must be an integer .*got 2.5"),
        (lambda w, x: k_sam(lambda w, x: x * w, 9)(w, x), "k must be at most .* 8, got 9"),
        (lambda w, x: k_sam(jnp.dot, 2)(x, x), r"one loss per example, got shape \(\)"),
        (lambda w, x: k_sam(lambda w, x, z: x, 2)(w, x, w), r"examples on axis 0 .* shape \(\)"),
        (lambda w, x: k_sam(losses_fn, 2, rho=lambda t: 0.1), "rho must be a number or a traced"),
        (lambda w, x: esam(losses_fn, rho=-1.0), "rho must be at least 0.0, got -1.0"),
        (lambda w, x: esam(losses_fn, beta=0.0), r"beta must be in \(0, 1\], got 0.0"),
        (lambda w, x: esam(losses_fn, gamma=1.5), r"gamma must be in \(0, 1\], got 1.5"),
        (lambda w, x: gam(gamma=-1.0), "gamma must be at least 0.0, got -1.0"),
        (lambda w, x: lookbehind(base(), k=0), "k must be at least 1, got 0"),
        (lambda w, x: lookbehind(base(), alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
        (lambda w, x: decoupled_wsam(base(), LR, gamma=1.0), r"gamma must be in \[0, 1\), got"),
        (lambda w, x: sampa(base(), lmbda=2.0), r"lmbda must be in \[0, 1\], got 2.0"),
        (lambda w, x: bsam(0.1, 0), r"data_size must be in \(0, inf\), got 0"),
        (lambda w, x: bsam(0.1, 10, rho=-1.0), "rho must be at least 0.0, got -1.0"),
        (
            lambda w, x: sampa(base()).update(w, sampa(base()).init(w), w, grad_fn=jnp.cos),
            "previous_grad_fn must be given",
        ),
        (lambda w, x: gam().update(w, gam().init(w), w), "grad_fn or value_fn must be given"),
        (lambda w, x: gam().update(w, gam().init(w), grad_fn=jnp.cos), "params must be given"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones(()), jnp.ones(8))


# The contract of an optimizer


OPTIMIZERS = {
    "gam": (gam, 3),
    "decoupled_wsam": (lambda **kw: decoupled_wsam(optax.adam(LR), LR, **kw), 1),
    "lookbehind": (lambda **kw: lookbehind(base(), k=3, **kw), 3),
    "lookbehind by cosine": (lambda **kw: lookbehind(base(), k=2, alpha=None, **kw), 2),
    "sampa": (lambda **kw: sampa(base(), **kw), 2),
    "bsam": (lambda **kw: bsam(0.1, 100.0, **kw), 2),
}


def small_problem(dtype):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}
    params, x = jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, rng.normal(size=(5, 4))))
    loss = lambda w: jnp.mean(jnp.tanh(x @ w["w"] + w["b"]) ** 2)
    return {**params, "none": None}, jax.grad(loss)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "dtype, rho", [(jnp.bfloat16, 0.1), (jnp.float32, optax.linear_schedule(0.1, 0.2, 3))]
)
def test_cost_state_and_dtypes_are_stable_and_nothing_recompiles(name, dtype, rho):
    """Evaluations are counted beside the gradient given."""
    build, evaluations = OPTIMIZERS[name]
    tx, calls = build(rho=rho), []
    params, gradient = small_problem(dtype)
    layout = functools.partial(
        jax.tree.map, lambda x: (jnp.shape(x), jnp.result_type(x), jax.typeof(x).weak_type)
    )

    def grad_fn(w):
        jax.debug.callback(lambda: calls.append(1))
        return gradient(w)

    @jax.jit
    def step(params, state):
        return tx.update(
            gradient(params), state, params, grad_fn=grad_fn, previous_grad_fn=grad_fn, unknown=1
        )

    state = tx.init(params)
    assert layout(jax.eval_shape(tx.init, params)) == layout(state)
    for _ in range(3):
        calls.clear()
        updates, new = step(params, state)
        jax.block_until_ready(updates)
        jax.effects_barrier()
        assert len(calls) == evaluations
        assert layout(updates) == layout(params) and layout(new) == layout(state)
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
        params, state = optax.apply_updates(params, updates), new
    assert step._cache_size() <= 1


@pytest.mark.parametrize("name", ["sampa", "bsam"])
@pytest.mark.usefixtures("optimised")
def test_a_gradient_given_but_not_used_costs_nothing(name):
    tx, x = OPTIMIZERS[name][0](), jnp.ones((16, 16))
    gradient = jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w)))

    def flops(given):
        def step(w, state, x):
            grad_fn = lambda w: gradient(w, x)
            return tx.update(given(w, x), state, w, grad_fn=grad_fn, previous_grad_fn=grad_fn)

        return jax.jit(step).lower(x, tx.init(x), x).compile().cost_analysis()["flops"]

    assert flops(gradient) == flops(lambda w, x: w)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_zero_gradient_gives_no_nan_and_a_nan_is_not_hidden(name):
    params, _ = small_problem(jnp.float32)
    tx = OPTIMIZERS[name][0]()

    @jax.jit
    def step(value):
        fill = lambda w: jax.tree.map(lambda a: jnp.full_like(a, value), w)
        updates, _ = tx.update(
            fill(params), tx.init(params), params, grad_fn=fill, previous_grad_fn=fill
        )
        return updates

    with jax.debug_nans(True):
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(step(0.0)))
    assert all(np.isnan(u).all() for u in jax.tree.leaves(step(jnp.nan)))


def test_concrete_arrays_as_arguments_inside_of_jit():
    """Of what is no transformation; those are in the contract."""
    params, (x, y) = jax.tree.map(jnp.asarray, ref.network())
    losses = functools.partial(losses_of, jnp)
    arrays = {n: jnp.asarray(v) for n, v in {"rho": 0.1, "k": 2, "beta": 0.7, "gamma": 0.4}.items()}

    def both(rho, k, beta, gamma):
        key = jax.random.key(0)
        return (
            k_sam(losses, k, rho)(params, x, y),
            esam(losses, rho, beta, gamma)(key, params, x, y),
            sam_optax.xsam_alpha(lambda w: jnp.mean(losses(w, x, y)), params, rho=rho),
            sam_optax.rho_from_learning_rate(
                lambda count: 0.1, rho_min=rho, rho_max=beta, lr_min=rho, lr_max=beta
            )(0),
        )

    assert_close(jax.jit(lambda: both(**arrays))(), both(0.1, 2, 0.7, 0.4), rtol=1e-5, atol=1e-6)
