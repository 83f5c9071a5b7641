"""Networks with BatchNorm: what every measure and landscape takes of them, and what it refuses."""

import inspect
import subprocess
import sys

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sam_optax import landscape, sharpness

KEY = jax.random.key(0)
MEASURES = {
    name: getattr(module, name)
    for module in (sharpness, landscape)
    for name in module.__all__
    if {"loss_fn", "data"} <= inspect.signature(getattr(module, name)).parameters.keys()
}
OPTIONS = {"key": KEY, "m": 4, "distances": [0.0, 1.0], "positions": [0, 1], "x": [0], "y": [1]}


def measure(name, loss_fn, solutions, data, **options):
    """Calls a measure with as many of three solutions as it takes."""
    parameters = inspect.signature(MEASURES[name]).parameters
    if "params" in parameters:
        trees = solutions[:1]
    elif "first" in parameters:
        trees = solutions[:2]
    else:
        trees = [solutions]
    options = {k: v for k, v in OPTIONS.items() if k in parameters} | options
    return MEASURES[name](loss_fn, *trees, data, **options)


def cross_entropy(logits, labels):
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return nn.Dense(2)(nn.tanh(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
        self.last = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.tanh(self.norm(self.first(x))))


def batch():
    rng = np.random.default_rng(0)
    return 3 * rng.normal(size=(8, 4)), np.arange(8) % 2


def trained(tree, seed):
    """Arrays of a tree in the widest dtype, moved from where initialisation put them."""
    rng = np.random.default_rng(seed)
    moved = lambda a: jnp.asarray(a + 0.3 * rng.uniform(size=np.shape(a)), float)
    return jax.tree.map(lambda a: moved(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def linen():
    """The wrong loss and three trees, the right loss and three trees."""
    model = Linen()
    wrong = [trained(model.init(KEY, batch()[0], train=False), seed) for seed in range(3)]
    stats = wrong[0]["batch_stats"]
    apply = lambda variables, b: cross_entropy(model.apply(variables, b[0], train=False), b[1])
    right = lambda params, b: apply({"params": params, "batch_stats": stats}, b)
    return apply, wrong, right, [variables["params"] for variables in wrong]


def nnx_state():
    models = [Nnx(nnx.Rngs(0)) for _ in range(3)]
    for seed, model in enumerate(models):
        model.eval()
        nnx.update(model, trained(nnx.state(model), seed))
    graph = nnx.graphdef(models[0])
    wrong = lambda state, b: cross_entropy(nnx.merge(graph, state)(b[0]), b[1])
    graph_of_params, _, rest = nnx.split(models[0], nnx.Param, ...)
    right = lambda params, b: cross_entropy(nnx.merge(graph_of_params, params, rest)(b[0]), b[1])
    states = [nnx.state(model) for model in models]
    return wrong, states, right, [nnx.state(model, nnx.Param) for model in models]


def nnx_module():
    _, states, right, params = nnx_state()
    models = [Nnx(nnx.Rngs(0)) for _ in range(3)]
    for model, state in zip(models, states, strict=True):
        model.eval()
        nnx.update(model, state)
    return lambda model, b: cross_entropy(model(b[0]), b[1]), models, right, params


def nnx_graph_and_state():
    _, models, right, params = nnx_module()
    wrong = lambda split, b: cross_entropy(nnx.merge(*split)(b[0]), b[1])
    return wrong, [nnx.split(model) for model in models], right, params


def frozen_linen():
    wrong, trees, right, params = linen()
    return wrong, [flax.core.freeze(tree) for tree in trees], right, params


def nnx_pure_dict():
    """Arrays alone, known by their names."""
    _, states, right, params = nnx_state()
    graph = nnx.graphdef(nnx_module()[1][0])

    def wrong(pure, b):
        state = jax.tree.map(lambda x: x, states[0])
        nnx.replace_by_pure_dict(state, pure)
        return cross_entropy(nnx.merge(graph, state)(b[0]), b[1])

    return wrong, [nnx.to_pure_dict(state) for state in states], right, params


NETWORKS = (linen, frozen_linen, nnx_state, nnx_module, nnx_graph_and_state, nnx_pure_dict)


def without_statistics(tree):
    """The mask that leaves BatchNorm's statistics out."""
    if isinstance(tree, dict | flax.core.FrozenDict):
        return type(tree)({name: name == "params" for name in tree})
    is_variable = lambda v: isinstance(v, nnx.Variable)
    return jax.tree.map(lambda v: not isinstance(v, nnx.BatchStat), tree, is_leaf=is_variable)


def test_every_measure_is_found():
    assert {"one_step", "summary", "hessian_eigenvalues", "plane_through"} <= set(MEASURES)
    assert len(MEASURES) == 13


@pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MEASURES)
def test_statistics_are_refused_as_parameters(name, network):
    wrong, trees, *_ = network()
    split = r"nnx\.split\(model, nnx\.Param" if "nnx" in network.__name__ else '"batch_stats": s'
    with pytest.raises(ValueError, match=f"params must not hold BatchNorm statistics.*{split}"):
        measure(name, wrong, trees, batch())


@pytest.mark.parametrize("name", ["interpolate", "plane_through", "trajectory_plane"])
def test_statistics_are_refused_in_any_of_several_solutions(name):
    for network in (linen, nnx_state):
        wrong, trees, _, params = network()
        for i in range(2 if name == "interpolate" else 3):
            solutions = [*params[:i], trees[i], *params[i + 1 :]]
            with pytest.raises(ValueError, match="must not hold BatchNorm statistics"):
                measure(name, wrong, solutions, batch())


@pytest.mark.parametrize("network", [linen, nnx_state], ids=["linen", "nnx"])
@pytest.mark.parametrize("name", MEASURES)
def test_the_split_in_the_message_is_taken(name, network):
    *_, right, params = network()
    result = measure(name, right, params, batch())
    for value in vars(result).values():
        if isinstance(value, float | np.ndarray) and np.size(value):
            assert np.isfinite(value).all()


@pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)
def test_the_eigenvalues_are_those_of_the_hessian_in_the_parameters(x64, network):
    wrong, (tree, *_), right, (params, *_) = network()
    w, unravel = jax.flatten_util.ravel_pytree(params)
    H = jax.jit(jax.hessian(lambda w: right(unravel(w), batch())))(w)
    expected = np.linalg.eigvalsh(H)
    options = {"key": KEY, "tolerance": 1e-13}
    found = sharpness.hessian_eigenvalues(right, params, batch(), **options)
    np.testing.assert_allclose(found.top, expected[::-1][:5], rtol=1e-9)
    np.testing.assert_allclose(found.bottom[0], expected[0], rtol=1e-9)
    # A mask that leaves the statistics where they are says the same of the whole.
    if network not in (nnx_graph_and_state, nnx_pure_dict):
        found = sharpness.hessian_eigenvalues(
            wrong, tree, batch(), mask=without_statistics, **options
        )
        np.testing.assert_allclose(found.top, expected[::-1][:5], rtol=1e-9)


def test_a_tree_with_a_key_of_that_name_is_free_under_a_mask():
    params = {"w": jnp.ones(2), "batch_stats": jnp.ones(2), "counts": {"batch_stats": 3}}
    loss_fn = lambda w, x: jnp.mean(x) * jnp.sum(w["w"] ** 2 * w["batch_stats"])
    mask = {"w": True, "batch_stats": False, "counts": True}  # integers are never chosen
    found = sharpness.hessian_eigenvalues(loss_fn, params, jnp.ones(4), key=KEY, mask=mask)
    np.testing.assert_allclose(found.top, [2.0], rtol=1e-6)
    rays = landscape.rays(loss_fn, params, jnp.ones(4), key=KEY, distances=[0.0, 1.0], mask=mask)
    assert rays.values.shape == (10, 2)
    with pytest.raises(ValueError, match=r"got them at \['batch_stats'\]"):
        sharpness.one_step(loss_fn, params, jnp.ones(4))


def test_parameters_that_share_a_name_with_statistics_are_free():
    loss_fn = lambda w, x: jnp.mean(x) * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(w))
    gaussian = {"mean": jnp.ones(2), "var": jnp.ones(2)}
    heads = {"mean": {"bias": jnp.ones(2)}, "var": {"bias": jnp.ones(2)}, "scale": jnp.ones(2)}
    for params in (gaussian, {**gaussian, "kernel": jnp.ones(2)}, heads, (1.0, jnp.ones(2))):
        sharpness.one_step(loss_fn, params, jnp.ones(4))


def test_a_module_without_batch_norm_may_be_measured_whole():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    losses = [
        (lambda model, b: cross_entropy(model(b[0]), b[1]), model),
        (lambda params, b: cross_entropy(nnx.merge(graph, params)(b[0]), b[1]), params),
    ]
    tops = [sharpness.hessian_eigenvalues(f, w, batch(), key=KEY, count=1).top for f, w in losses]
    np.testing.assert_allclose(*tops, rtol=1e-6)


def test_flax_is_not_imported_for_the_question():
    code = (
        "import sys, jax.numpy as jnp; from sam_optax import sharpness, landscape;"
        "sharpness.one_step(lambda w, x: jnp.sum(w * x), jnp.ones(2), jnp.ones((1, 2)));"
        "assert 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
