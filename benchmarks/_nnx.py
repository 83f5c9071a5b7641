"""The MLP as an NNX module: a plain step and one of `sam_optax.nnx.value_and_grad`.

Modules are split and merged inside of one jitted function of arrays, as the Flax documentation
advises for speed, so that Python's part of `nnx.jit` is in neither time.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _models import Problem
from _steps import RHO, Step
from flax import nnx

import sam_optax.nnx


class MLP(nnx.Module):
    def __init__(self, sizes: tuple[int, ...], rngs: nnx.Rngs):
        shapes = itertools.pairwise(sizes)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in shapes])

    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def steps(problem: Problem, base: optax.GradientTransformation) -> dict[str, Any]:
    """Name -> builder of the step, for the MLP of `_models`."""
    kernels = [w for w in jax.tree.leaves(problem.params) if w.ndim == 2]
    sizes = (kernels[0].shape[0], *(w.shape[1] for w in kernels))

    def loss_fn(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    def build(value_and_grad: Any) -> Step:
        model = MLP(sizes, nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, base, wrt=nnx.Param)
        graph, state = nnx.split((model, optimizer))

        def step(carry, x, y):
            model, optimizer = nnx.merge(graph, carry)
            loss, grads = value_and_grad(model, x, y)
            optimizer.update(model, grads)
            return nnx.state((model, optimizer)), loss

        return Step(step, jax.tree.map(jnp.asarray, state))

    return {
        "plain, NNX": lambda: build(nnx.value_and_grad(loss_fn)),
        "sam, NNX": lambda: build(sam_optax.nnx.value_and_grad(loss_fn, sam_optax.sam(RHO))),
    }
