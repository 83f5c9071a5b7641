"""The generic method: what ascent, descent and cadence see, what is paid for, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sam_optax


def loss_fn(w):
    return jnp.sum(w["a"] ** 4) + jnp.sum(w["a"] * w["b"])


PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5, 0.25])}
GRADS = jax.grad(loss_fn)(PARAMS)


def sharp_gradient(rho=0.1):
    return sam_optax.grad(loss_fn, sam_optax.sam(rho))(PARAMS)


def assert_equal(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), a, b)


def recorder(seen):
    """A link that keeps what it was called with."""

    def update(updates, state, params=None, **extra):
        seen.append((updates, params, extra))
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_ascent_and_descent_see_what_the_design_says():
    ascent, descent, after = [], [], []
    tx = optax.chain(
        sam_optax.sharpness_aware(
            optax.chain(recorder(ascent), sam_optax.dual_ascent(0.1)), recorder(descent)
        ),
        recorder(after),
    )
    grad_fn = jax.grad(loss_fn)
    tx.update(GRADS, tx.init(PARAMS), PARAMS, grad_fn=grad_fn, value=1.5, anything="passes")
    (updates, params, extra), (perturbed, _, given), (_, _, rest) = ascent[0], descent[0], after[0]
    assert_equal(updates, GRADS)
    assert params is PARAMS
    assert_equal(extra["grad_fn"](PARAMS), GRADS)
    assert_equal(perturbed, sharp_gradient())
    assert_equal(given["clean"], GRADS)
    assert_equal(grad_fn(optax.apply_updates(PARAMS, given["perturbation"])), perturbed)
    for seen in (extra, given, rest):
        assert seen["value"] == 1.5 and seen["anything"] == "passes"
    assert "clean" not in rest and rest["grad_fn"] is grad_fn


def test_value_fn_serves_in_place_of_grad_fn():
    tx = sam_optax.sam(0.1)
    out, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, value_fn=loss_fn)
    assert_equal(out, sharp_gradient())


def test_ascent_gradient_may_come_from_elsewhere():
    """Another batch or precision for the ascent: only the direction of the updates counts."""
    tx = sam_optax.sam(0.1)
    lower = jax.tree.map(lambda g: (100 * g).astype(jnp.bfloat16), GRADS)
    out, _ = tx.update(lower, tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss_fn))
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2), out, sharp_gradient())


def test_descent_may_see_other_examples_than_the_ascent():
    seen = []

    def other(w):
        seen.append(w)
        return jax.tree.map(jnp.ones_like, w)

    tx = sam_optax.sam(0.1)
    out, _ = tx.update(
        GRADS, tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss_fn), descent_grad_fn=other
    )
    assert len(seen) == 1
    assert_equal(out, jax.tree.map(jnp.ones_like, PARAMS))


def count_evaluations(tx, steps, jit=True):
    """Calls of grad_fn at run time, step by step."""
    calls = []

    def grad_fn(w):
        jax.debug.callback(lambda: calls.append(1))
        return jax.grad(loss_fn)(w)

    def step(grads, state, params):
        return tx.update(grads, state, params, grad_fn=grad_fn)

    step = jax.jit(step) if jit else step
    state, counts, outs = tx.init(PARAMS), [], []
    for _ in range(steps):
        before = len(calls)
        out, state = step(GRADS, state, PARAMS)
        jax.block_until_ready(out)
        jax.effects_barrier()
        counts.append(len(calls) - before)
        outs.append(out)
    return counts, outs


@pytest.mark.parametrize("jit", [True, False])
def test_a_skipped_step_evaluates_nothing_and_gives_the_clean_gradient(jit):
    ascent = sam_optax.dual_ascent(0.1)
    tx = sam_optax.sharpness_aware(ascent, when=lambda count: count % 3 == 1)
    counts, outs = count_evaluations(tx, 6, jit)
    assert counts == [0, 1, 0, 0, 1, 0]
    for paid, out in zip(counts, outs, strict=True):
        assert_equal(out, sharp_gradient() if paid else GRADS)


def test_every_step_is_paid_for_once_without_cadence():
    assert count_evaluations(sam_optax.sam(0.1), 3)[0] == [1, 1, 1]


def test_cadence_with_memory_is_a_transformation():
    """Here: pay when the gradient has grown; the memory is the last norm."""

    def update(updates, last, params=None, **extra):
        size = optax.tree.norm(updates)
        return size > last, size

    cadence = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([]), update)
    tx = sam_optax.sharpness_aware(sam_optax.dual_ascent(0.1), when=cadence)
    assert count_evaluations(tx, 3)[0] == [1, 0, 0]


def test_memory_of_the_ascent_goes_on_in_skipped_steps():
    """A schedule of rho is a schedule of training steps, whatever the cadence."""
    ascent = sam_optax.dual_ascent(lambda count: jnp.asarray([0.0, 0.3, 0.6, 0.9])[count])
    seen = []
    descent = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros([]),
        lambda updates, state, params=None, *, perturbation, **extra: (
            updates,
            optax.tree.norm(perturbation),
        ),
    )
    tx = sam_optax.sharpness_aware(ascent, descent, when=lambda count: count % 2 == 1)
    state = tx.init(PARAMS)
    for _ in range(4):
        _, state = tx.update(GRADS, state, PARAMS, value_fn=loss_fn)
        seen.append(float(state.descent))
    np.testing.assert_allclose(seen, [0, 0.3, 0.3, 0.9], rtol=1e-6)


def test_otherwise_shares_the_memory_of_descent():
    """As in LookSAM: what descent stores, otherwise reuses."""
    descent = optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None, *, clean, **extra: (
            updates,
            optax.tree.sub(updates, clean),
        ),
    )
    otherwise = optax.GradientTransformationExtraArgs(
        lambda params: pytest.fail("its init is never called"),
        lambda updates, state, params=None, **extra: (optax.tree.add(updates, state), state),
    )
    tx = sam_optax.sharpness_aware(
        sam_optax.dual_ascent(0.1), descent, when=lambda count: count == 0, otherwise=otherwise
    )
    counts, outs = count_evaluations(tx, 3)
    assert counts == [1, 0, 0]
    for out in outs:
        assert_equal(out, sharp_gradient())


def test_cadence_with_an_ascent_gradient_of_lower_precision():
    tx = sam_optax.sharpness_aware(sam_optax.dual_ascent(0.1), when=lambda count: count > 0)
    lower = jax.tree.map(lambda g: g.astype(jnp.bfloat16), GRADS)
    state = tx.init(PARAMS)
    for _ in range(2):
        out, state = tx.update(lower, state, PARAMS, grad_fn=jax.grad(loss_fn))
        assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype(jnp.float32)}


@pytest.mark.usefixtures("optimised")
def test_clean_gradient_costs_nothing_when_unused():
    """A method that ignores the clean gradient compiles to one evaluation under jit."""
    ignores = sam_optax.sharpness_aware(
        optax.stateless(lambda updates, params: jax.tree.map(lambda w: 0.01 * w, params))
    )
    weight = jnp.ones((64, 64))

    def step(tx, w, x):
        grad_fn = jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) @ weight))
        return tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]

    def flops(tx):
        w, x = jnp.ones((64, 64)), jnp.ones((64, 64))
        return jax.jit(lambda w, x: step(tx, w, x)).lower(w, x).compile().cost_analysis()["flops"]

    assert flops(ignores) < 0.6 * flops(sam_optax.sam(0.1))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"params": None, "grad_fn": jax.grad(loss_fn)}, "params must be given to update"),
        ({"params": PARAMS}, "grad_fn or value_fn must be given to update"),
        (
            {"params": PARAMS, "grad_fn": lambda w: (jax.grad(loss_fn)(w), 0.0)},
            r"grad_fn must return the gradients alone, without a value or aux, got PyTreeDef",
        ),
        (
            {"params": PARAMS, "grad_fn": jax.value_and_grad(loss_fn)},
            r"grad_fn must return the gradients alone, without a value or aux, got PyTreeDef",
        ),
        (
            {"params": PARAMS, "grad_fn": lambda w: (0.0, 0.0)},
            r"structure.*first difference at \['a'\] of shape \(2,\), got \[0\]",
        ),
        (
            {"params": PARAMS, "grad_fn": lambda w, step: jax.grad(loss_fn)(w)},
            r"grad_fn must take params alone.*got a function of \(w, step\)",
        ),
        (
            {"params": PARAMS, "value_fn": lambda w, batch: loss_fn(w)},
            r"value_fn must take params alone.*got a function of \(w, batch\)",
        ),
        (
            {
                "params": PARAMS,
                "grad_fn": jax.grad(loss_fn),
                "descent_grad_fn": jax.grad(lambda w, batch: loss_fn(w)),
            },
            r"descent_grad_fn must take params alone.*got a function of \(w, batch\)",
        ),
        (
            {
                "params": PARAMS,
                "grad_fn": jax.grad(loss_fn),
                "descent_grad_fn": lambda w: {"a": w["a"]},
            },
            r"the result of descent_grad_fn must have the structure",
        ),
        (
            {"params": PARAMS},
            r"TrainState.apply_gradients.*tx.update.*sam_optax.value_and_grad",
        ),
        (
            {"params": PARAMS, "grad_fn": lambda w: {"a": w["a"], "c": w["b"]}},
            r"first difference at \['b'\] of shape \(2,\), got \['c'\]",
        ),
        (
            {"params": PARAMS, "grad_fn": lambda w: {"a": w["a"]}},
            r"first difference at \['b'\] of shape \(2,\), got no further leaf",
        ),
        (
            {"params": PARAMS, "grad_fn": lambda w: {"a": w["a"], "b": jnp.ones(3)}},
            r"first difference at \['b'\] of shape \(2,\), got \['b'\] of shape \(3,\)",
        ),
        (
            {"params": PARAMS, "grad_fn": lambda w: list(w.values())},
            r"first difference at \['a'\] of shape \(2,\), got \[0\]",
        ),
    ],
)
def test_errors_at_the_call(kwargs, message):
    tx = sam_optax.sam(0.1)
    with pytest.raises(ValueError, match=message):
        tx.update(GRADS, tx.init(PARAMS), **kwargs)


def test_nonfinite_gradients_reach_the_guards_and_spare_the_memory():
    """apply_if_finite after sam skips the step; every state a select may keep is unchanged."""
    tx = optax.chain(sam_optax.sam(0.1), optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 5))
    state = tx.init(PARAMS)
    _, state = tx.update(GRADS, state, PARAMS, grad_fn=jax.grad(loss_fn))
    bad = {"a": jnp.array([jnp.inf, 1.0]), "b": jnp.ones(2)}
    updates, new = tx.update(bad, state, PARAMS, grad_fn=jax.grad(loss_fn))
    assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert_equal(new[1].inner_state, state[1].inner_state)
    assert new[1].total_notfinite == 1


def test_params_are_never_changed():
    before = jax.tree.map(np.array, PARAMS)
    sharp_gradient(1.0)
    jax.tree.map(np.testing.assert_array_equal, PARAMS, before)


def test_sam_inside_of_masked_or_partition_says_where_to_put_it():
    for tx in (
        optax.masked(sam_optax.sam(0.1), {"a": True, "b": False}),
        optax.partition(
            {"sam": sam_optax.sam(0.1), "not": optax.identity()}, {"a": "sam", "b": "not"}
        ),
    ):
        for given in (
            {"grad_fn": jax.grad(loss_fn)},  # fails inside
            {"value_fn": loss_fn},
            {"grad_fn": lambda w: GRADS},  # another structure
        ):
            message = "optax.masked.*put the method before.*mask=, got optax.MaskedNode at .*'b'"
            with pytest.raises(ValueError, match=message):
                tx.update(GRADS, tx.init(PARAMS), PARAMS, **given)


def needs(name):
    """A rule whose update cannot do without one keyword argument."""
    source = f"lambda updates, state, params=None, *, {name}, **extra: (updates, state)"
    return optax.GradientTransformationExtraArgs(lambda params: (), eval(source))


@pytest.mark.parametrize("place", ["ascent", "descent", "when", "otherwise"])
def test_an_argument_that_a_rule_needs_and_does_not_get_is_named(place):
    never = lambda count: count < 0
    parts = {"ascent": sam_optax.dual_ascent(0.1), place: needs("spectrum")}
    tx = sam_optax.sharpness_aware(**({"when": never} | parts))
    with pytest.raises(ValueError, match="spectrum must be given to update"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss_fn))


def test_a_rule_that_needs_the_loss_says_so_where_only_its_gradient_is_given():
    tx = sam_optax.sharpness_aware(sam_optax.dual_ascent(0.1), needs("value_fn"))
    tx.update(GRADS, tx.init(PARAMS), PARAMS, value_fn=loss_fn)
    with pytest.raises(ValueError, match="value_fn must be given to update"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss_fn))


def test_rules_get_the_gradient_function_of_their_own_point():
    """Ascent that of grad_fn, descent that of descent_grad_fn, and it can tell."""
    ascent, descent = [], []
    rules = optax.chain(recorder(ascent), sam_optax.dual_ascent(0.1)), recorder(descent)
    tx = sam_optax.sharpness_aware(*rules)
    other = lambda w: jax.tree.map(lambda x: 2 * x, w)
    given = {"grad_fn": jax.grad(loss_fn), "descent_grad_fn": other}
    tx.update(GRADS, tx.init(PARAMS), PARAMS, **given)
    tx.update(GRADS, tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss_fn))
    assert_equal(ascent[0][2]["grad_fn"](PARAMS), GRADS)
    assert_equal(descent[0][2]["grad_fn"](PARAMS), other(PARAMS))
    assert_equal(descent[0][2]["descent_grad_fn"](PARAMS), other(PARAMS))
    assert_equal(descent[1][2]["grad_fn"](PARAMS), GRADS)
    assert descent[1][2]["descent_grad_fn"] is None


def test_a_gradient_function_that_wears_the_signature_of_another_is_taken():
    """functools.wraps tells the signature of what is wrapped, the loss of a batch."""

    @functools.wraps(lambda w, batch: loss_fn(w))
    def grad_fn(w):
        return jax.grad(loss_fn)(w)

    tx = sam_optax.sam(0.1)
    out, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, grad_fn=grad_fn)
    assert_equal(out, sharp_gradient())


def test_an_error_of_the_loss_stays_its_own():
    tx = sam_optax.sam(0.1)
    with pytest.raises(TypeError, match="mine"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, grad_fn=lambda w: fail())


def fail():
    raise TypeError("mine")
