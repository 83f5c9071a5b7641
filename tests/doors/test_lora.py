"""Adapters and frozen parameters: what is perturbed, and what is trained, against NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import assert_same
from flax import nnx

import sam_optax
import sam_optax.equinox
import sam_optax.nnx

RHO = 0.3
LEARNING_RATE = 0.1


@pytest.fixture
def problem(x64):
    """W, b, A, B, x, y."""
    rng = np.random.default_rng(0)
    shapes = ((6, 4), (4,), (6, 2), (2, 4), (16, 6), (16, 4))
    return [rng.normal(size=shape) / 2 for shape in shapes]


def gradients(W, b, A, B, x, y):
    """Of mean((tanh(x (W + A B) + b) - y)^2) with respect to W, b, A and B."""
    out = np.tanh(x @ (W + A @ B) + b)
    inner = 2 * (out - y) / y.size * (1 - out**2)
    G = x.T @ inner
    return G, inner.sum(0), G @ B.T, A.T @ G


def step(problem, perturbed):
    """One step of SGD on A and B, at a point where the parameters of these places are moved."""
    *params, x, y = problem
    g = gradients(*params, x, y)
    norm = np.sqrt(sum(np.sum(g[n] ** 2) for n in perturbed))
    moved = [w + RHO * g[n] / norm if n in perturbed else w for n, w in enumerate(params)]
    _, _, dA, dB = gradients(*moved, x, y)
    return params[2] - LEARNING_RATE * dA, params[3] - LEARNING_RATE * dB


def make_model(W, b, A, B, *_):
    options = {"param_dtype": float, "rngs": nnx.Rngs(0)}
    base = nnx.Linear(*W.shape, **options)
    model = nnx.LoRA(W.shape[0], A.shape[1], W.shape[1], base_module=base, **options)
    for variable, value in ((base.kernel, W), (base.bias, b), (model.lora_a, A), (model.lora_b, B)):
        variable[...] = jnp.asarray(value)
    return model


def loss_fn(model, x, y):
    return jnp.mean((jnp.tanh(model(x)) - y) ** 2)


def is_base(params):
    is_variable = lambda x: isinstance(x, nnx.Variable)
    return jax.tree.map(lambda v: not isinstance(v, nnx.LoRAParam), params, is_leaf=is_variable)


def trained(problem, sharp, adapters=lambda grads: grads):
    model = make_model(*problem)
    optimizer = nnx.Optimizer(model, optax.sgd(LEARNING_RATE), wrt=nnx.LoRAParam)

    @nnx.jit
    def train_step(model, optimizer, x, y):
        loss, grads = sharp(model, x, y)
        optimizer.update(model, adapters(grads))
        return loss

    train_step(model, optimizer, *map(jnp.asarray, problem[-2:]))
    assert_same(*jax.device_get(([model.base_module.kernel[...]], [problem[0]])))  # is frozen
    return model.lora_a[...], model.lora_b[...]


def test_the_adapters_alone_are_perturbed(problem):
    sharp = sam_optax.nnx.value_and_grad(loss_fn, sam_optax.sam(RHO), wrt=nnx.LoRAParam)
    expected = step(problem, perturbed=(2, 3))
    assert_same(trained(problem, sharp), expected)
    assert np.abs(expected[0] - step(problem, perturbed=(0, 1))[0]).max() > 1e-4


def test_the_whole_weights_are_perturbed_and_the_adapters_trained(problem):
    """The gradient of a weight is that of its sum with the adapter."""
    method = sam_optax.sam(RHO, mask=is_base)
    sharp = sam_optax.nnx.value_and_grad(loss_fn, method)
    adapters = lambda grads: nnx.filter_state(grads, nnx.LoRAParam)
    assert_same(trained(problem, sharp, adapters), step(problem, perturbed=(0, 1)))


def test_a_chain_over_adapters(problem):
    """With memory: a schedule of rho."""
    model = make_model(*problem)
    tx = optax.chain(sam_optax.sam(optax.constant_schedule(RHO)), optax.sgd(LEARNING_RATE))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    evaluate = sam_optax.nnx.value_and_grad_fn(loss_fn, wrt=nnx.LoRAParam)
    _, grads, grad_fn = evaluate(model, *map(jnp.asarray, problem[-2:]))
    optimizer.update(model, grads, grad_fn=grad_fn)
    assert_same((model.lora_a[...], model.lora_b[...]), step(problem, perturbed=(2, 3)))


@pytest.mark.usefixtures("optimised")
def test_what_each_costs():
    """Products with the large weights: the second pass has no gradient of what is not trained."""
    size, rank, layers = 64, 4, 3
    rngs = nnx.Rngs(0)
    layer = lambda: nnx.LoRA(
        size, rank, size, base_module=nnx.Linear(size, size, rngs=rngs), rngs=rngs
    )
    model = nnx.Sequential(*(layer() for _ in range(layers)))
    x = jnp.ones((32, size))
    graph, state = nnx.split(model)

    def flops(sharp):
        def adapters(state):
            grads = sharp(nnx.merge(graph, state), x, x)
            return nnx.filter_state(grads, nnx.LoRAParam)

        analysis = jax.jit(adapters).lower(state).compile().cost_analysis()
        return analysis["flops"] / (2 * 32 * size**2)  # in large products

    plain = flops(sam_optax.nnx.grad(loss_fn, optax.identity(), wrt=nnx.LoRAParam))
    alone = flops(sam_optax.nnx.grad(loss_fn, sam_optax.sam(RHO), wrt=nnx.LoRAParam))
    whole = flops(sam_optax.nnx.grad(loss_fn, sam_optax.sam(RHO, mask=is_base)))
    both = flops(sam_optax.nnx.grad(loss_fn, sam_optax.sam(RHO)))
    # The first product with a weight that nothing moves is the same in both passes.
    assert 2 * plain - alone == pytest.approx(1, abs=0.1)
    # Here it is not, and the gradients of the weights come on top, once.
    assert whole - alone == pytest.approx(layers + 1, abs=0.3)
    assert both == pytest.approx(whole, rel=0.05)


def test_a_frozen_backbone_in_equinox(x64):
    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    frozen = jax.tree.map(lambda _: False, model)
    head = eqx.tree_at(lambda m: (m.layers[-1].weight, m.layers[-1].bias), frozen, (True, True))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)))
    loss = lambda model, x: jnp.mean(jax.vmap(model)(x) ** 2)
    grads = sam_optax.equinox.grad(loss, sam_optax.sam(RHO), filter_spec=head)(model, x)
    assert grads.layers[0].weight is None
    # The definition, with the backbone as constants.
    params, rest = eqx.partition(model, head)
    of_head = jax.grad(lambda params: loss(eqx.combine(params, rest), x))
    g = of_head(params)
    e = jax.tree.map(lambda g, norm=optax.tree.norm(g): RHO * g / norm, g)
    assert_same(grads, of_head(optax.apply_updates(params, e)))
