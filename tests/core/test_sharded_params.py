"""Parameters sharded over a mesh: same numbers, no gathers of its own, shardings kept."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sam_optax

LAYOUTS = {
    # Every array cut along its first axis, the batch too, over the same devices.
    "fsdp": ((8,), ("data",), {"in": P("data"), "out": P("data"), "bias": P("data")}, P("data")),
    # Columns of one layer and rows of the next, the batch over the other axis.
    "tensor parallel": (
        *((2, 4), ("data", "model")),
        *({"in": P(None, "model"), "out": P("model"), "bias": P("model")}, P("data")),
    ),
}
METHODS = {
    "sam": sam_optax.sam(0.2),
    "asam": sam_optax.asam(0.5),
    "filterwise": sam_optax.asam(0.5, normalization=sam_optax.filterwise),
    "p = inf": sam_optax.sam(0.2, p=math.inf),
}


def loss_fn(params, x):
    hidden = jnp.tanh(x @ params["in"] + params["bias"])
    return jnp.mean((hidden @ params["out"]) ** 2)


def problem():
    rng = np.random.default_rng(0)
    shapes = {"in": (16, 32), "out": (32, 8), "bias": (32,)}
    params = {name: jnp.asarray(rng.normal(size=shape) / 4) for name, shape in shapes.items()}
    return params, jnp.asarray(rng.normal(size=(64, 16)))


def placed(layout, params, x):
    shape, names, specs, batch = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    return jax.device_put(params, shardings), jax.device_put(x, NamedSharding(mesh, batch))


def gathered(compiled):
    """Elements that the collectives other than reductions of a program produce."""
    lines = re.findall(r"= (\(?[a-z]\d+\[.*?) (?:all-gather|all-to-all)(?:-start)?\(", compiled)
    shapes = [shape for line in lines for shape in re.findall(r"\[([\d,]+)\]", line)]
    return sum(math.prod(map(int, shape.split(","))) for shape in shapes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_same_numbers_and_shardings(x64, layout, method):
    params, x = problem()
    expected = jax.jit(sam_optax.grad(loss_fn, METHODS[method]))(params, x)
    params, x = placed(layout, params, x)
    tx = optax.chain(METHODS[method], optax.sgd(1.0, momentum=0.9))

    def step(params, state, x):
        grad_fn = lambda p: jax.grad(loss_fn)(p, x)
        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

    updates, state = jax.jit(step)(params, tx.init(params), x)
    check = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-15)
    jax.tree.map(lambda u, g: check(u, -g), updates, expected)
    momentum = optax.tree.get(state, "trace")
    for name, w in params.items():
        assert updates[name].sharding.is_equivalent_to(w.sharding, w.ndim)
        assert momentum[name].sharding.is_equivalent_to(w.sharding, w.ndim)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["sam", "filterwise"])
def test_the_perturbation_is_sharded_and_its_norm_runs_over_all_shards(x64, layout, method):
    params, x = placed(layout, *problem())
    normalization = sam_optax.filterwise() if method == "filterwise" else None
    shardings = jax.tree.map(lambda w: w.sharding, params)
    ascent = sam_optax.dual_ascent(0.3, normalization=normalization)

    @jax.jit
    def perturbation(params, x):
        gradient = jax.grad(loss_fn)(params, x)
        # The layout of optimizers; without one the compiler chooses the gradient's freely.
        gradient = jax.lax.with_sharding_constraint(gradient, shardings)
        return ascent.update(gradient, ascent.init(params), params)[0]

    e = perturbation(params, x)
    for name, w in params.items():
        assert e[name].sharding.is_equivalent_to(w.sharding, w.ndim)
    scale = normalization(params) if normalization else jax.tree.map(jnp.ones_like, params)
    relative = jax.tree.map(lambda a, t: np.asarray(a) / np.asarray(t), e, scale)
    total = sum(np.sum(a**2) for a in jax.tree.leaves(relative))
    assert np.sqrt(total) == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("optimised")
def test_no_parameters_are_gathered_beyond_what_two_gradients_gather(layout, method):
    """SAM evaluates two gradients; its own arithmetic moves scalars (and filter norms) alone."""
    params, x = placed(layout, *problem())

    def elements(f):
        return gathered(jax.jit(f).lower(params, x).compile().as_text())

    plain = elements(jax.grad(loss_fn))
    assert (plain > 0) == (layout == "fsdp")  # the count sees what is there
    assert elements(sam_optax.grad(loss_fn, METHODS[method])) <= 2 * plain
