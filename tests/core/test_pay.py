"""The host's word: pay= in place of a cadence's lax.cond, and what the host would say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sam_optax
import sam_optax.nnx
from sam_optax import sharpness

SAM = sam_optax.sam(0.3)
VASSO = sam_optax.vasso(lambda count: 0.1 + 0.05 * count, theta=0.6)
aware = functools.partial(sam_optax.sharpness_aware, sam_optax.dual_ascent(0.3))
EVERY, CHANCE = sam_optax.every(3), sam_optax.with_probability(0.5, key=2)
LARGE = sam_optax.when_large(12, c_start=0.5)
METHODS = {
    "every": aware(when=EVERY),
    "from_step": aware(when=sam_optax.from_step(4)),
    "with_probability": aware(when=CHANCE),
    "a function of the step": aware(when=lambda count: count % 4 == 1),
    "cadenced": sam_optax.cadenced(VASSO, EVERY),
    "look_sam": sam_optax.look_sam(0.3, k=3),
    "late_phase": sam_optax.late_phase(VASSO, 4),
    "randomised": sam_optax.randomised(VASSO, 0.4, key=1),
    "randomised, schedule": sam_optax.randomised(SAM, lambda t: jnp.where(t < 5, 0.0, 0.8)),
    "late_phase of randomised": sam_optax.late_phase(sam_optax.randomised(SAM), 3),
    "gsam over asam, monitored": sam_optax.sharpness_aware(
        sam_optax.dual_ascent(0.5, normalization=sam_optax.elementwise()),
        optax.chain(sam_optax.surrogate_gap(0.4), sharpness.monitor()),
        when=sam_optax.every(2),
    ),
}
# These look at the gradient, so the host decides with it in hand.
BY_GRADIENT = {
    "when_large": aware(when=LARGE),
    "adaptive": sam_optax.adaptive(VASSO, 12, c_start=0.5),
}
ALL = METHODS | BY_GRADIENT
# The method, and the cadence that its name stands for.
FORETOLD = {
    "every": (METHODS["every"], EVERY),
    "a function of the step": (METHODS["a function of the step"], lambda count: count % 4 == 1),
    "look_sam": (METHODS["look_sam"], EVERY),
    "late_phase": (METHODS["late_phase"], sam_optax.from_step(4)),
    "randomised": (METHODS["randomised"], sam_optax.with_probability(0.4, key=1)),
    "by inject_hyperparams": (
        aware(when=sam_optax.from_step(2)),
        optax.inject_hyperparams(sam_optax.from_step)(start=2),
    ),
}

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(4, 3)), "float32"), "b": jnp.zeros(3)}
BATCHES = [jnp.asarray(2 * RNG.random() * RNG.normal(size=(8, 4)), "float32") for _ in range(12)]


def loss_fn(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"] - 1) ** 2)


def with_base(method):
    return optax.chain(method, optax.sgd(0.1, momentum=0.9))


def step_of(tx, door="grad_fn", seen=None):
    def step(params, state, x, pay=None):
        value, grads, grad_fn = sam_optax.value_and_grad_fn(loss_fn)(params, x)
        if door == "value_fn":
            extra = {"value_fn": functools.partial(loss_fn, x=x)}
        else:
            extra = {"grad_fn": lambda w: (seen is not None and seen.append(1), grad_fn(w))[1]}
        updates, state = tx.update(grads, state, params, **extra, pay=pay)
        return optax.apply_updates(params, updates), state, value

    return step


def assert_identical(a, b):
    """To the last bit, dtypes and shapes with it."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape, x.weak_type) == (y.dtype, y.shape, y.weak_type)
        np.testing.assert_array_equal(x, y)


def large(state, grads):
    """The decision of when_large, by the cadence itself and its memory in the state."""
    pay, _ = LARGE.update(grads, state[0].cadence)
    return bool(pay)


@pytest.mark.parametrize("door", ["grad_fn", "value_fn"])
@pytest.mark.parametrize("name", ALL)
def test_training_by_the_host_is_the_traced_one_to_the_last_bit(name, door):
    tx = with_base(ALL[name])
    traced = jax.jit(step_of(tx, door))
    by_host = jax.jit(step_of(tx, door), static_argnames="pay")
    params, state = PARAMS, tx.init(PARAMS)
    there, there_state, said = params, state, []
    for x in BATCHES:
        if name in BY_GRADIENT:
            said.append(large(state, jax.grad(loss_fn)(params, x)))
        else:
            said.append(sam_optax.pays(state))
        params, state, value = by_host(params, state, x, pay=said[-1])
        there, there_state, expected = traced(there, there_state, x)
        assert_identical((params, state, value), (there, there_state, expected))
    assert set(said) == {True, False}
    assert by_host._cache_size() <= 2


def count(jaxpr, name, within=None):
    """Operations of a kind, in all or inside of another kind, wherever a call leads."""
    total = 0
    for equation in jaxpr.eqns:
        kind = equation.primitive.name
        total += kind == name and within is None
        inside = None if kind == within else within
        for inner in jax.tree.leaves(equation.params):
            total += count(inner, name, inside) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize("name", ALL)
def test_the_program_of_the_hosts_word_has_one_branch(name):
    """No cond but that of the norm, and no product of a gradient that is not paid for."""

    def program(tx, pay=None):
        calls.clear()
        step = functools.partial(step_of(tx, seen=calls), pay=pay)
        return jax.make_jaxpr(step)(PARAMS, jax.eval_shape(tx.init, PARAMS), BATCHES[0]).jaxpr

    calls, tx = [], with_base(ALL[name])
    plain = count(program(with_base(optax.identity())), "dot_general")
    for pay, gradients in ((True, 2), (False, 1)):
        jaxpr = program(tx, pay)
        assert count(jaxpr, "dot_general") == gradients * plain
        assert count(jaxpr, "dot_general", within="cond") == 0
        assert len(calls) == gradients - 1
    traced = program(tx)
    assert count(traced, "dot_general", within="cond") == plain
    assert count(traced, "cond") > count(jaxpr, "cond")


def test_nnx():
    """optimizer.update passes the word on, and its state tells it."""

    def run(by_host):
        model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        tx = with_base(sam_optax.look_sam(0.3, k=3))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @functools.partial(nnx.jit, static_argnames="pay")
        def step(model, optimizer, x, pay):
            loss_fn = lambda model, x: jnp.mean(jnp.tanh(model(x) - 1) ** 2)
            value, grads, grad_fn = sam_optax.nnx.value_and_grad_fn(loss_fn)(model, x)
            optimizer.update(model, grads, grad_fn=grad_fn, pay=pay)
            return value

        for x in BATCHES:
            said.append(sam_optax.pays(optimizer.opt_state) if by_host else None)
            step(model, optimizer, x, pay=said[-1])
        return jax.tree.leaves(nnx.state((model, optimizer)))

    said = []
    assert_identical(run(by_host=True), run(by_host=False))
    assert said == [t % 3 == 0 for t in range(12)] + [None] * 12


def test_pays_finds_the_cadence_wherever_a_state_is_kept():
    late = sam_optax.late_phase(SAM, 2)
    chained = with_base(late)
    hyper = optax.inject_hyperparams(sam_optax.late_phase, static_args="method")(SAM, start=2)
    labels = {"w": "sharp", "b": "plain"}
    homes = {
        "method": (late, 1),
        "chain": (chained, 1),
        "MultiSteps": (optax.MultiSteps(chained, 2), 2),
        "inject_hyperparams": (hyper, 1),
        "apply_if_finite": (optax.apply_if_finite(chained, 3), 1),
        "a cadence by inject_hyperparams": (
            aware(when=optax.inject_hyperparams(sam_optax.from_step)(start=2)),
            1,
        ),
        "a part": (optax.partition({"sharp": optax.sgd(1.0), "plain": late}, labels), 1),
    }
    for home, (tx, calls) in homes.items():
        tx = optax.with_extra_args_support(tx) if hasattr(tx, "_fields") else tx
        state, said = tx.init(PARAMS), []
        for _ in range(4):
            said.append(sam_optax.pays(state))
            for _ in range(calls):
                grad_fn = lambda w: w
                _, state = tx.update(PARAMS, state, PARAMS, grad_fn=grad_fn)
        assert said == [False, False, True, True], home
    two = jax.vmap(chained.init)(jax.tree.map(lambda w: jnp.stack([w, w]), PARAMS))
    assert sam_optax.pays(two) is False


def test_several_cadences_share_one_word():
    """Where they do not agree the step has to decide by itself; what stands still is not asked."""
    third, second = sam_optax.every(3), sam_optax.every(2)

    def word(*methods):
        tx, said = optax.chain(*methods), []
        step = jax.jit(lambda state: tx.update(PARAMS, state, PARAMS, grad_fn=lambda w: w)[1])
        state = tx.init(PARAMS)
        for _ in range(7):
            said.append(sam_optax.pays(state))
            state = step(state)
        return said

    side_by_side = word(sam_optax.cadenced(SAM, third), sam_optax.cadenced(SAM, second))
    assert side_by_side == [True, False, None, None, None, False, True]
    # The inner one counts the steps that the outer one pays for.
    nested = word(sam_optax.cadenced(sam_optax.cadenced(SAM, second), third))
    assert nested == [True, False, False, None, False, False, True]
    late = word(sam_optax.late_phase(sam_optax.look_sam(k=2), 3))
    assert late == [False, False, False, True, None, True, None]
    # An average in the ascent runs on, so its cadence is asked as well.
    ascent = sam_optax.cadenced(sam_optax.dual_ascent(0.3), second)
    within = sam_optax.sharpness_aware(ascent, when=third)
    assert word(within) == side_by_side
    assert word(sam_optax.late_phase(sam_optax.adaptive(SAM, 9), 9)) == [False] * 7


@pytest.mark.parametrize("name", ["look_sam", "late_phase", "adaptive"])
def test_the_word_is_a_boolean_known_when_traced(name):
    tx = ALL[name]
    state = tx.init(PARAMS)
    update = lambda pay: tx.update(PARAMS, state, PARAMS, grad_fn=lambda w: w, pay=pay)
    for bad in (1, 0, "yes", 0.5, jnp.asarray(True)):
        with pytest.raises(ValueError, match="pay must be True, False or None, got"):
            update(bad)
    with pytest.raises(ValueError, match=r"pay must be .* name it in static_argnames"):
        jax.jit(update)(True)
    assert_identical(update(np.True_), update(True))


@pytest.mark.parametrize("name", FORETOLD)
def test_payments_tell_ahead_what_the_states_tell(name):
    method, when = FORETOLD[name]
    update = jax.jit(functools.partial(method.update, grad_fn=lambda w: w))
    state, said = method.init(PARAMS), []
    for _ in range(12):
        said.append(sam_optax.pays(state))
        _, state = update(PARAMS, state, PARAMS)
    told = sam_optax.payments(when, 12)
    assert told.tolist() == said and {*said} == {True, False}
    out, _ = method.update(PARAMS, state, PARAMS, grad_fn=lambda w: w, pay=told[0])
    assert jax.tree.structure(out) == jax.tree.structure(PARAMS)


def test_errors_of_payments():
    with pytest.raises(ValueError, match=r"steps must .*0"):
        sam_optax.payments(EVERY, 0)
    with pytest.raises(ValueError, match=r"must have a field pays .*WhenLargeState"):
        sam_optax.payments(LARGE, 3)


def test_errors_of_pays():
    for stateless in (SAM, optax.adam(0.1), aware()):
        with pytest.raises(ValueError, match="opt_state must hold a method with a cadence"):
            sam_optax.pays(stateless.init(PARAMS))
    memory = optax.GradientTransformation(lambda params: jnp.zeros([]), lambda g, s, w: (True, s))
    for unknown in (sam_optax.adaptive(SAM, 9), aware(when=memory)):
        with pytest.raises(ValueError, match="must have a field pays"):
            sam_optax.pays(unknown.init(PARAMS))
    state = sam_optax.look_sam().init(PARAMS)
    with pytest.raises(ValueError, match=r"ask pays outside of jax\.jit"):
        jax.jit(sam_optax.pays)(state)


def test_a_hyperparameter_that_changes_counts_at_once_in_the_step():
    """And one step later for the host, which the step before has told."""
    tx = optax.inject_hyperparams(sam_optax.late_phase, static_args="method")(SAM, start=9)
    state = tx.init(PARAMS)
    state.hyperparams["start"] = jnp.asarray(0)
    assert sam_optax.pays(state) is False
    out, state = tx.update(PARAMS, state, PARAMS, grad_fn=lambda w: optax.tree.scale(2.0, w))
    assert jnp.all(out["w"] != PARAMS["w"])
    assert sam_optax.pays(state) is True
