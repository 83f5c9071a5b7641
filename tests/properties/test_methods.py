"""Properties of every exported transformation, and of random compositions, on random trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import (
    DOUBLES,
    ORDINARY,
    Problem,
    compositions,
    examples,
    is_float,
    layout,
    methods,
    problems,
)
from hypothesis import given
from hypothesis import strategies as st
from public import own_inputs

import sam_optax


@pytest.fixture(autouse=True)
def by_hand():
    """Operation by operation, which needs no program for each example."""
    with jax.disable_jit():
        yield


def copied(tree):
    return jax.tree.map(np.array, tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def like(leaf, update):
    """Shape and dtype of an update: of an integer leaf, 0 or float0 of its shape."""
    assert np.shape(update) == np.shape(leaf)
    if is_float(leaf):
        assert update.dtype == leaf.dtype
    elif update.dtype != jax.dtypes.float0:
        assert not np.any(update)


def all_finite(tree):
    return all(
        np.isfinite(np.asarray(x, complex)).all() for x in jax.tree.leaves(tree) if is_float(x)
    )


def keeps_the_contract(problem, method):
    tx = method.build()
    state = tx.init(problem.params)
    before = copied((problem.params, problem.gradient, state))
    outline = layout(state)
    assert layout(jax.eval_shape(tx.init, problem.params)) == outline
    for _ in range(2):
        updates, state = problem.update(tx, state)
        jax.tree.map(like, problem.params, updates)
        assert layout(state) == outline
    assert_same((problem.params, problem.gradient, tx.init(problem.params)), before)


@examples(90)
@given(st.data())
def test_a_step_keeps_structure_dtypes_state_and_what_it_was_given(data):
    problem = data.draw(problems())
    keeps_the_contract(problem, data.draw(methods(params=problem.params)))


@examples(30)
@given(st.data())
def test_a_step_keeps_them_in_64_bits(x64, data):
    problem = data.draw(problems(dtypes=DOUBLES))
    keeps_the_contract(problem, data.draw(methods(params=problem.params)))


@examples(40)
@given(st.data())
def test_ordinary_gradients_give_finite_updates_and_memory(data):
    problem = data.draw(problems(sizes=ORDINARY))
    tx = data.draw(methods(params=problem.params)).build()
    state = tx.init(problem.params)
    for _ in range(2):
        updates, state = problem.update(tx, state)
        assert all_finite(updates)
        assert all_finite(state)


# What a step hands on is not the gradient of that step, or is made of no gradient given.
LATE = {"async_sam", "previous", "sampa"}


@examples(80)
@given(st.data())
def test_a_nonfinite_gradient_shows_and_is_not_remembered(data):
    """In one entry of one leaf, in the clean pass, the others or all, after a good step."""
    problem = data.draw(problems(sizes=ORDINARY))
    method = data.draw(methods(params=problem.params))
    places = [x for x in jax.tree.leaves(problem.gradient) if is_float(x) and x.size]
    if not places:
        return
    tx, good = method.build(), problem.grad_fn
    _, state = problem.update(tx, tx.init(problem.params))
    bad, which = (
        data.draw(st.sampled_from([np.nan, np.inf, -np.inf])),
        data.draw(st.sampled_from(["clean", "perturbed", "both"])),
    )
    place = places[data.draw(st.integers(0, len(places) - 1))]
    poisoned = lambda x: x.at[(0,) * x.ndim].set(bad) if x is place else x
    gradient = jax.tree.map(poisoned, problem.gradient)
    sick = Problem(problem.params, gradient, problem.curvature).grad_fn
    clean, other = (sick if which in (name, "both") else good for name in ("clean", "perturbed"))
    extra = own_inputs(other, problem.value_fn) | {"grad_fn": other, "value": 1.0}
    updates, after = tx.update(clean(problem.params), state, problem.params, **extra)
    perturbs = method.arguments.get("mask") is None
    sees = which == "both" or (which == "clean" and perturbs and method.uses_clean)
    if sees and method.name not in LATE:
        assert not all_finite(updates)
    # The base optimizer's memory is the base optimizer's: apply_if_finite has it whole.
    if sam_optax.FAMILY.get(method.name, ("method",))[0] != "optimizer":
        assert all_finite(after)


@examples(40)
@given(st.data())
def test_a_zero_gradient_moves_nothing(data):
    problem = data.draw(problems(sizes=["zero"]))
    problem.curvature = 1.0
    method = data.draw(methods(params=problem.params))
    if not method.uses_clean or method.name in ("draws", "tilted"):  # of random perturbations
        return
    tx, points = method.build(), []

    def grad_fn(w):
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(w)):
            points.append(copied(w))  # of a Hessian-vector product nothing is seen
        return problem.grad_fn(w)

    state = tx.init(problem.params)
    for _ in range(2):
        updates, state = problem.update(tx, state, grad_fn=grad_fn, previous_grad_fn=grad_fn)
        assert all(not np.any(x) for x in jax.tree.leaves(updates) if is_float(x))
    for point in points:
        assert_same(point, copied(problem.params))


# Kinds of which rho = 0 has to leave the gradient given, to rounding of the sizes that they divide
# by and multiply with again.
@examples(50)
@given(st.data())
def test_a_radius_of_zero_is_the_base_optimizer(data):
    problem = data.draw(problems(sizes=[*ORDINARY, "huge"]))
    method = data.draw(methods(params=problem.params, scheduled=False))
    kind = sam_optax.FAMILY.get(method.name, ("parts",))[0]
    radii = [n for n in ("rho", "std") if n in method.parameters]
    if kind != "method" or method.name == "gam" or not radii:
        return
    method.arguments[radii[0]] = 0.0
    updates, _ = problem.update(method.build(), method.build().init(problem.params))

    def close(update, gradient):
        if is_float(update):
            rtol = 16 * float(jnp.finfo(update.dtype).eps)
            wide = (np.asarray(x, np.complex128) for x in (update, gradient))
            atol = rtol * float(np.max(np.abs(np.asarray(gradient, complex)), initial=0))
            np.testing.assert_allclose(*wide, rtol=rtol, atol=atol)

    jax.tree.map(close, updates, problem.gradient)


@examples(60)
@given(st.data())
def test_a_random_composition_keeps_the_contract(data):
    problem = data.draw(problems(sizes=ORDINARY))
    composition = data.draw(compositions(params=problem.params))
    tx = composition.build()
    state = tx.init(problem.params)
    before, outline = copied((problem.params, problem.gradient)), layout(state)
    for _ in range(2):
        updates, state = problem.update(tx, state)
        jax.tree.map(like, problem.params, updates)
        assert layout(state) == outline
        assert all_finite((updates, state))
    assert_same((problem.params, problem.gradient), before)


@examples(40)
@given(st.data())
def test_all_of_a_composition_may_be_paid_for_or_not_by_the_host(data):
    """pay= has the branch that the cadence would have chosen."""
    problem = data.draw(problems(sizes=ORDINARY))
    composition = data.draw(compositions(params=problem.params))
    if "cadence" not in composition.kinds():
        return
    tx = composition.build()
    state = tx.init(problem.params)
    for _ in range(2):
        decided = problem.update(tx, state)
        told = [problem.update(tx, state, pay=pay) for pay in (True, False)]
        assert any(same(decided, other) for other in told)
        state = decided[1]


def same(a, b):
    try:
        assert_same(copied(a), copied(b))
    except AssertionError:
        return False
    return True
