"""Any filter x any ascent x any descent x any cadence: the whole product against NumPy.

One program holds all rules: in each place of `sharpness_aware` stands a switch over the rules of
that kind, so that thousands of compositions cost one compilation. Some of them are built as a user
would, too.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_family as fam
import numpy_reference as ref
import optax
import pytest

import sam_optax
from sam_optax import sharpness
from sam_optax._rules import transformation

STEPS, RATE = 3, 0.1
PARAMS = ref.network()[0]
BATCHES = [ref.network(seed)[1] for seed in range(STEPS)]
elementwise = functools.partial(ref.operator, "elementwise", eta=0.01, normalize_bias=False)
GAUSSIAN = sam_optax.gaussian_ascent(0.05, key=3)
NOISE = sam_optax.gaussian_noise(key=4)


# Each rule of the library, and NumPy's: filters (g, memory, w, grad) -> d.


def running_average(g, memory, w, grad):
    memory["average"] = fam.add(fam.scaled(0.4, memory.get("average", g)), 0.6, g)
    return memory["average"]


def without_average(g, memory, w, grad):
    first, m = "without" not in memory, memory.get("without", g)
    memory["without"] = fam.add(fam.scaled(0.6, m), 0.4, g)
    return g if first else fam.add(g, -0.8, m)


def previous(g, memory, w, grad):
    old, memory["previous"] = memory.get("previous", fam.scaled(0, g)), g
    return old


def largest_scores(g, memory, w, grad):
    unfiltered = fam.scaled(fam.norm(g), fam.unit(g))
    kept = fam.z_sharp_perturbation(g, 1.0, 0.5)  # of unit leaves: which entries are kept
    return {k: np.where(kept[k] != 0, unfiltered[k], 0) if g[k].ndim > 1 else g[k] for k in g}


def largest_entries(g, memory, w, grad):
    entries = np.sort(np.concatenate([np.abs(g[k]).ravel() for k in g]))
    least = entries[entries.size - round(entries.size * 0.6)]
    return {k: np.where(np.abs(g[k]) >= least, g[k], 0) for k in g}


def along_momentum(g, memory, w, grad):
    return fam.scaled(-1, memory["momentum"])


def toward_eigenvector(g, memory, w, grad):
    v = memory.setdefault("vector", START)
    for _ in range(2):
        product = fam.add(grad(fam.add(w, 1e-5, v)), -1, grad(fam.add(w, -1e-5, v)))
        v = fam.unit(product)
    memory["vector"], u = v, fam.unit(g)
    lean = fam.add(v, -fam.dot(v, u), u)
    return fam.add(u, 0.3 * np.sign(fam.dot(g, v)), lean)


def precondition(g, memory, w, grad):
    return fam.divided(g, memory["nu"], 0.01)


EIGENVECTOR = sam_optax.toward_eigenvector(0.3, every=1, power_steps=2, key=1)
FILTERS = {
    "none": (optax.identity(), lambda g, memory, w, grad: g),
    "running_average": (sam_optax.running_average(0.6), running_average),
    "without_average": (sam_optax.without_average(0.8, 0.6), without_average),
    "previous": (sam_optax.previous(), previous),
    "largest_scores": (sam_optax.largest_scores(0.5), largest_scores),
    "largest_entries": (sam_optax.largest_entries(0.4, every=1), largest_entries),
    "along_momentum": (sam_optax.along_momentum(), along_momentum),
    "toward_eigenvector": (EIGENVECTOR, toward_eigenvector),
    "precondition": (sam_optax.precondition(0.01), precondition),
    "gaussian_noise": (NOISE, lambda g, memory, w, grad: memory["normal"](w)),
}


# Ascents (d, w, grad, memory) -> e.


def multi_step(d, w, grad, memory):
    e = fam.scaled(0.2, fam.unit(d))
    e = fam.add(e, 0.2, fam.unit(grad(fam.add(w, 1, e))))
    return fam.scaled(min(1, 0.3 / max(fam.norm(e), 1e-30)), e)


def fisher_ascent(d, w, grad, memory):
    T = {k: 1 / np.sqrt(1 + 2 * d[k] ** 2) for k in d}
    return ref.ascent(d, T, 0.3, 2.0) if fam.norm(d) else d


def dual(d, T, p=2.0):
    return ref.ascent(d, T, 0.3, p) if fam.norm(d) else d


def in_turn(d, w, grad, memory):
    e = fam.scaled(0.2, d)
    return fam.add(e, 0.3, fam.unit(grad(fam.add(w, 1, e))))


def limit_rise(d, w, grad, memory):
    e = fam.scaled(0.3, fam.unit(d))
    rise = fam.dot(d, e)
    return fam.scaled(0.2 / rise, e) if rise > 0.2 else e


ASCENTS = {
    "dual_ascent": (sam_optax.dual_ascent(0.3), lambda d, w, *_: dual(d, fam.ones(w))),
    "dual_ascent, p = 1.5": (
        sam_optax.dual_ascent(0.3, p=1.5),
        lambda d, w, *_: dual(d, fam.ones(w), 1.5),
    ),
    "dual_ascent, elementwise": (
        sam_optax.dual_ascent(0.3, normalization=sam_optax.elementwise()),
        lambda d, w, *_: dual(d, elementwise(w)),
    ),
    "proportional_ascent": (
        sam_optax.proportional_ascent(0.3),
        lambda d, *_: fam.scaled(0.3, d),
    ),
    "multi_step": (sam_optax.multi_step(sam_optax.dual_ascent(0.2), 2, 0.3), multi_step),
    "fisher_ascent": (sam_optax.fisher_ascent(0.3, 2.0), fisher_ascent),
    # Random: NumPy takes the draws of the library for its own.
    "gaussian_ascent": (GAUSSIAN, lambda d, w, grad, memory: memory["noise"](w)),
    "sum_of": (
        sam_optax.sum_of(sam_optax.dual_ascent(0.3), sam_optax.proportional_ascent(0.1), -0.5),
        lambda d, *_: fam.add(fam.scaled(0.3, fam.unit(d)), -0.05, d),
    ),
    "in_turn": (
        sam_optax.in_turn(sam_optax.proportional_ascent(0.2), sam_optax.dual_ascent(0.3)),
        in_turn,
    ),
    "limit_rise": (sam_optax.limit_rise(sam_optax.dual_ascent(0.3), 0.2), limit_rise),
    "spectral_ascent": (
        sam_optax.spectral_ascent(0.3, 8),
        lambda d, *_: fam.spectral_perturbation(d, 0.3) if fam.norm(d) else d,
    ),
}


# Descents (g_s, g, e, w, grad) -> out.


def surrogate_gap(g_s, g, e, w, grad):
    return fam.add(g_s, -0.4, fam.orthogonal(g, g_s))


def curvature(g_s, g, e, w, grad):
    minus = grad(fam.add(w, -1, e))
    return {k: g_s[k] + 0.2 * (g_s[k] + minus[k] - 2 * g[k]) + 0.3 * (g_s[k] - minus[k]) for k in g}


def arc(g_s, g, e, w, grad):
    start = fam.unit(e if fam.norm(e) else g)
    return fam.scaled(fam.norm(g_s), fam.slerp(start, fam.unit(g_s), 0.6))


def polyak_step(g_s, g, e, w, grad):
    gain = ref.loss(np, fam.add(w, 1, e), grad.keywords["batch"]) - 0.1 - fam.dot(g_s, e)
    return fam.scaled(min(max(gain, 0) / fam.dot(g_s, g_s), 0.5), g_s)


DESCENTS = {
    "none": (optax.identity(), lambda g_s, *_: g_s),
    "surrogate_gap": (sam_optax.surrogate_gap(0.4), surrogate_gap),
    "extrapolate": (
        sam_optax.extrapolate(2.0),
        lambda g_s, g, *_: fam.add(g, 2, fam.add(g_s, -1, g)),
    ),
    "renormalise": (
        sam_optax.renormalise(),
        lambda g_s, g, *_: fam.scaled(fam.norm(g), fam.unit(g_s)),
    ),
    "curvature": (sam_optax.curvature(0.2, 0.3), curvature),
    "arc": (sam_optax.arc(0.6), arc),
    "keep_orthogonal": (sam_optax.keep_orthogonal(), lambda g_s, *_: g_s),
    "surrogate_gap, monitor": (
        optax.chain(sam_optax.surrogate_gap(0.4), sharpness.monitor()),
        surrogate_gap,
    ),
    "polyak_step": (sam_optax.polyak_step(0.5, 0.1), polyak_step),
    "keep_loss": (sam_optax.keep_loss(), lambda g_s, *_: g_s),
}


# Cadences (t, g, memory) -> whether to pay. Chance is the library's own.


@functools.cache
def chances():
    cadence = sam_optax.with_probability(0.5, key=5)
    state, drawn = cadence.init(None), []
    for _ in range(STEPS):
        pay, state = cadence.update(None, state)
        drawn.append(bool(pay))
    return drawn


CADENCES = {
    "always": (lambda count: count >= 0, lambda t, g, memory: True),
    "every": (sam_optax.every(2), lambda t, g, memory: t % 2 == 0),
    "from_step": (sam_optax.from_step(1), lambda t, g, memory: t >= 1),
    "with_probability": (
        sam_optax.with_probability(0.5, key=5),
        lambda t, g, memory: chances()[t],
    ),
    "when_large": (
        sam_optax.when_large(10, decay=0.8, c_start=0.5, c_end=-0.5),
        lambda t, g, memory: fam.ae_sam_pays(g, memory, 0.8, 0.5 - t / 10),
    ),
}
PLACES = (FILTERS, ASCENTS, DESCENTS, CADENCES)
# Any of the first rules with any others, and each of the later ones with all of these.
LATER = {"precondition", "gaussian_noise", "sum_of", "in_turn", "limit_rise", "spectral_ascent"}
LATER |= {"polyak_step", "keep_loss"}
PRODUCT = [names for names in itertools.product(*PLACES) if len(LATER & set(names)) <= 1]

# Gradients of rules, beside the caller's and the one at w + e. The eigenvector's refresh linearises
# one; those of an ascent that is not paid for are dropped by the compiler, but not their counter.
OF_RULES = {"multi_step": 1, "toward_eigenvector": 1, "in_turn": 1}
IF_PAID = {"curvature": 1}


def test_every_rule_of_the_library_is_in_the_product():
    kinds = ("filter", "ascent", "descent", "cadence")
    places = [set(itertools.chain(*(n.split(", ") for n in place))) for place in PLACES]
    for kind, place in zip(kinds, places, strict=True):
        rules = {name for name, member in sam_optax.FAMILY.items() if member.kind == kind}
        keepers = {"keep_momentum", "keep_second_moment"}  # these are in every composition
        assert rules - keepers <= place


def by_numpy(names, grad_at=ref.gradient):
    """Results and numbers of gradients of all steps."""
    filtered, ascend, descend, pays = (
        place[name][1] for place, name in zip(PLACES, names, strict=True)
    )
    w, outs, counts = dict(PARAMS), [], []
    memory = {"momentum": fam.scaled(0, w), "nu": fam.scaled(0, w)}
    memory |= {"noise": draws_of(GAUSSIAN), "normal": draws_of(NOISE)}
    cadence = {}
    for t, batch in enumerate(BATCHES):
        grad = functools.partial(grad_at, batch=batch)
        g = grad(w)
        memory["t"] = t
        e = ascend(filtered(g, memory, w, grad), w, grad, memory)
        count = sum(OF_RULES.get(name, 0) for name in names)
        if pays(t, g, cadence):
            count += 1 + sum(IF_PAID.get(name, 0) for name in names)
            g_s = grad(fam.add(w, 1, e))
            memory["momentum"] = fam.add(g_s, 0.8, memory["momentum"])
            memory["nu"] = {k: 0.9 * memory["nu"][k] + 0.1 * g_s[k] ** 2 for k in w}
            out = descend(g_s, g, e, w, grad)
        else:
            out = g
        counts.append(count)
        outs.append(out)
        w = fam.add(w, -RATE, out)
    return outs, counts


def draws_of(rule):
    """The draws of one run: a random rule's own, from its own state."""
    state = rule.init(PARAMS)

    def noise(w):
        nonlocal state
        e, state = rule.update(None, state, jax.tree.map(jnp.asarray, w))
        return jax.tree.map(np.asarray, e)

    return noise


def kept(descent):
    """The descent after those that keep what filters read."""
    return optax.chain(sam_optax.keep_momentum(0.8), sam_optax.keep_second_moment(0.9), descent)


def switch(place, rules, index):
    """All rules of a kind as one; which of them is at work is data."""
    rules = [optax.with_extra_args_support(sam_optax._cadence.cadence_of(r)) for r in rules]

    def update(updates, state, params=None, **extra):
        def branch(i):
            def run():
                out, own = rules[i].update(updates, state[i], params, **extra)
                return out, tuple(own if i == j else s for j, s in enumerate(state))

            return run

        return jax.lax.switch(extra["chosen"][index], [branch(i) for i in range(len(rules))])

    return transformation(lambda params: tuple(r.init(params) for r in rules), update)


def switched():
    filters, ascents, descents, cadences = (
        switch(place, [rule for rule, _ in place.values()], i) for i, place in enumerate(PLACES)
    )
    return sam_optax.sharpness_aware(optax.chain(filters, ascents), kept(descents), when=cadences)


CALLS, TRACES = [], []


def run(tx, chosen):
    """Results of all steps of one composition, as one program."""
    TRACES.append(1)

    def loss_fn(w, batch):
        return ref.loss(jnp, w, batch)

    def body(carry, batch):
        w, state = carry

        def grad_fn(w):
            jax.debug.callback(lambda: CALLS.append(1))
            return jax.grad(loss_fn)(w, batch)

        g = jax.grad(loss_fn)(w, batch)
        value_fn = functools.partial(loss_fn, batch=batch)
        out, state = tx.update(g, state, w, grad_fn=grad_fn, value_fn=value_fn, chosen=chosen)
        return (jax.tree.map(lambda w, g: w - RATE * g, w, out), state), out

    w = jax.tree.map(jnp.asarray, PARAMS)
    batches = jax.tree.map(lambda *xs: jnp.stack(xs), *BATCHES)
    return jax.lax.scan(body, (w, tx.init(w)), batches)[1]


@pytest.fixture(scope="module")
def wide():
    jax.config.update("jax_enable_x64", True)
    global START
    START = jax.tree.map(np.asarray, EIGENVECTOR.init(jax.tree.map(jnp.asarray, PARAMS)).vector)
    yield
    jax.config.update("jax_enable_x64", False)


def assert_same(names, outs, calls):
    """The finite differences of the eigenvector's oracle are good to nine digits."""
    expected, counts = by_numpy(names)
    assert calls == sum(counts), names
    for t, out in enumerate(expected):
        for k, g in out.items():
            np.testing.assert_allclose(outs[k][t], g, rtol=1e-6, atol=1e-8, err_msg=str(names))


def counted(step, *args):
    CALLS.clear()
    outs = jax.device_get(step(*args))
    jax.effects_barrier()
    return outs, len(CALLS)


def test_the_whole_product(wide):
    assert len(PRODUCT) == (8 * 7 * 8 + 2 * 7 * 8 + 8 * 4 * 8 + 8 * 7 * 2) * 5
    step = jax.jit(functools.partial(run, switched()))
    TRACES.clear()
    for names in PRODUCT:
        chosen = [list(place).index(n) for place, n in zip(PLACES, names, strict=True)]
        assert_same(names, *counted(step, jnp.asarray(chosen)))
    assert len(TRACES) == 1


@pytest.mark.parametrize("names", PRODUCT[:: len(PRODUCT) // 12], ids=" x ".join)
def test_compositions_as_they_are_written(wide, names):
    """The same without the switches."""
    filtered, ascent, descent, when = (
        place[name][0] for place, name in zip(PLACES, names, strict=True)
    )
    method = sam_optax.sharpness_aware(
        optax.chain(filtered, ascent),
        kept(descent),
        when=when,
    )
    assert_same(names, *counted(jax.jit(functools.partial(run, method)), None))
