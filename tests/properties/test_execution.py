"""One step is one step: by hand, jitted, in a scan, under vmap, in groups, from a saved state."""

import copy
import pickle

import cloudpickle
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from drawn import (
    ORDINARY,
    SIZES,
    compositions,
    examples,
    is_float,
    layout,
    methods,
    problems,
)
from hypothesis import given
from hypothesis import strategies as st
from public import WHOLE, build

import sam_optax
from sam_optax import FAMILY

# Smallest and largest sizes: a compiler may take the subnormal for 0, and by hand too.
NORMAL = [size for size in SIZES if size not in ("subnormal", "tiny")]


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if is_float(x)]


def assert_close(a, b, factor=32):
    """To some roundings of the largest entry of the tree, leaf by leaf."""
    for x, y in zip(floats(a), floats(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        rtol = factor * float(jnp.finfo(x.dtype).eps)
        x, y = (np.asarray(v, np.complex128) for v in (x, y))
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.max(np.abs(y), initial=0))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def random_methods(data, params):
    composed = data.draw(st.integers(0, 2)) == 0
    return data.draw(compositions(params=params) if composed else methods(params=params)).build()


@examples(14)
@given(st.data())
def test_by_hand_jitted_and_under_vmap_are_the_same_and_nothing_compiles_twice(data):
    problem = data.draw(problems(sizes=ORDINARY, dtypes=["float32", "bfloat16", "complex64"]))
    tx = random_methods(data, problem.params)
    arrays, state = problem.arrays(), tx.init(problem.params)

    def step(arrays, state):
        updates, state = problem.of(arrays).update(tx, state)
        return floats(updates), state

    with jax.disable_jit():
        by_hand, after = step(arrays, state)
        by_hand, after = step(arrays, after)
    jitted = jax.jit(step)
    compiled, middle = jitted(arrays, state)
    compiled, end = jitted(arrays, middle)
    assert jitted._cache_size() <= 1
    assert layout(end) == layout(state)
    assert_close(compiled, by_hand)
    assert_close(end, after)

    if not jax.tree.leaves((arrays, middle)):
        return  # nothing to map over
    two = jax.tree.map(lambda x: jnp.stack([x, x[..., ::-1] if x.ndim else x]), arrays)
    states = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), middle)
    batched = jax.jit(jax.vmap(step))(two, states)
    for i in range(2):
        own = jax.tree.map(lambda x, i=i: x[i], two)
        assert_close(jax.tree.map(lambda x, i=i: x[i], batched), jitted(own, middle))


@examples(8)
@given(st.data())
def test_a_scan_is_a_loop(data):
    problem = data.draw(problems(sizes=ORDINARY, dtypes=["float32"]))
    tx = random_methods(data, problem.params)

    def body(state, _):
        updates, state = problem.update(tx, state)
        return state, floats(updates)

    with jax.disable_jit():
        state, seen = tx.init(problem.params), []
        for _ in range(3):
            state, updates = body(state, None)
            seen.append(updates)
    end, scanned = jax.jit(lambda state: jax.lax.scan(body, state, length=3))(
        tx.init(problem.params)
    )
    assert_close(end, state)
    for t, updates in enumerate(seen):
        assert_close([x[t] for x in scanned], updates)


STATELESS = sorted(
    name
    for name in WHOLE
    if FAMILY[name].kind == "method"
    and not jax.tree.leaves(build(name).init({"w": np.ones(2, np.float32)}))
)


@examples(16)
@given(st.data())
def test_groups_on_one_device_are_a_loop_over_them(data):
    """The mean of what each group gives by itself, with its own perturbation."""
    problem = data.draw(problems(sizes=ORDINARY, dtypes=["float32", "complex64"]))
    method = data.draw(methods(names=STATELESS, params=problem.params, scheduled=False)).build()
    size, groups = data.draw(st.sampled_from([(1, 3), (2, 2), (3, 1)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = jnp.asarray(rng.uniform(0.5, 2.0, (size * groups, 2)), jnp.float32)

    def loss_fn(params, x):
        terms = [jnp.sum(jnp.abs(w) ** 2 / 2) for w in floats(params)]
        own = [jnp.sum((w * (i + 1)).real) for i, w in enumerate(floats(params))]
        return (
            jnp.mean(x[:, 0]) * sum(terms) + jnp.mean(jnp.sin(x[:, 1])) * sum(own) + jnp.zeros(())
        )

    options = {"allow_int": True}
    with jax.disable_jit():
        together = sam_optax.value_and_grad(loss_fn, method, microbatch_size=size, **options)
        alone = sam_optax.value_and_grad(loss_fn, method, **options)
        value, grads = together(problem.params, x)
        parts = [alone(problem.params, x[i : i + size]) for i in range(0, len(x), size)]
    assert_close(value, sum(v for v, _ in parts) / groups)
    means = [sum(leaves) / groups for leaves in zip(*(floats(g) for _, g in parts), strict=True)]
    assert_close(floats(grads), means)


SAVED = {
    "flax": lambda state: flax.serialization.from_bytes(state, flax.serialization.to_bytes(state)),
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "deepcopy": copy.deepcopy,
    "NumPy": lambda state: jax.tree.map(np.asarray, state),
    "leaves": lambda state: jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(state)),
}


@examples(40)
@given(st.data())
def test_a_saved_state_goes_on_the_same(data):
    problem = data.draw(problems(sizes=ORDINARY))
    tx = random_methods(data, problem.params)
    save = SAVED[data.draw(st.sampled_from(list(SAVED)))]
    with jax.disable_jit():
        _, state = problem.update(tx, tx.init(problem.params))
        again = save(jax.tree.map(lambda x: x, state))
        assert_same(again, state)
        assert_same(floats(problem.update(tx, again)[0]), floats(problem.update(tx, state)[0]))


@examples(20)
@given(st.data())
def test_a_saved_transformation_is_the_same(data):
    problem = data.draw(problems(sizes=ORDINARY))
    tx = random_methods(data, problem.params)
    again = cloudpickle.loads(cloudpickle.dumps(tx))
    with jax.disable_jit():
        results = [problem.update(t, t.init(problem.params)) for t in (tx, again)]
    assert_same(floats(results[0]), floats(results[1]))
    assert layout(results[0][1]) == layout(results[1][1])


@examples(24)
@given(st.data())
def test_the_second_door_gives_what_the_first_gives(data):
    problem = data.draw(problems(sizes=ORDINARY, dtypes=["float32", "complex64"]))
    tx = data.draw(methods(names=STATELESS, params=problem.params, scheduled=False)).build()

    def loss_fn(params):
        return sum(jnp.sum(jnp.abs(w) ** 2 / 2 + w.real) for w in floats(params)) + jnp.zeros(())

    with jax.disable_jit():
        value, grads = sam_optax.value_and_grad(loss_fn, tx, allow_int=True)(problem.params)
        other, clean, grad_fn = sam_optax.value_and_grad_fn(loss_fn, allow_int=True)(problem.params)
        updates, _ = tx.update(clean, tx.init(problem.params), problem.params, grad_fn=grad_fn)
    assert_same(value, other)
    conjugate = [x.conj() if jnp.iscomplexobj(x) else x for x in floats(updates)]
    assert_same(floats(grads), conjugate)
