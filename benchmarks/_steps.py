"""Training steps to compare: step(carry, x, y) returns (carry, loss of the clean pass).

A carry is (params, optimizer state, BatchNorm statistics, count of steps); it goes in donated and
comes out, as in a real loop. All steps get the same losses, optimizers and dropout keys.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from _models import Problem

import sam_optax

RHO = 0.05
LEARNING_RATE = 1e-4  # so low that thousands of steps leave the problem as it is
NEARBY = 1e-6  # the floor's second gradient is taken this fraction of the first one away
BATCH = (3, 4)  # x and y among the arguments of the losses
PARTS = (2, 4, 8)  # of the batch, from which the ascent is taken
CYCLE = 5  # steps in a turn: whole cycles of look_sam(k=5)

OPTIMIZERS = {
    "sgd": lambda: optax.sgd(LEARNING_RATE, momentum=0.9),
    "adamw": lambda: optax.adamw(LEARNING_RATE),
}


class Step(NamedTuple):
    step: Callable[..., Any]
    carry: Any
    calls: int = 1  # of step that make one step of training


def through_first_door(problem: Problem, tx: optax.GradientTransformation, rule: Callable) -> Step:
    """A step whose gradient comes from rule(loss_fn), a stand-in for jax.value_and_grad."""

    def step(carry, x, y):
        params, state, stats, count = carry
        key = jax.random.fold_in(jax.random.key(0), count)
        (loss, stats), grads = rule(problem.loss_fn)(params, stats, key, x, y)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state, stats, count + 1), loss

    return Step(step, first_carry(problem, tx))


def through_second_door(
    problem: Problem,
    tx: optax.GradientTransformation,
    calls: int = 1,
    loss_from: Literal["clean", "perturbed"] = "clean",
    takes: tuple[str, ...] = ("grad_fn",),
) -> Step:
    """A step whose optimizer holds the method and takes a function for gradients.

    A method that needs no clean gradient pays a forward pass for the clean loss; with `loss_from`
    "perturbed", loss and statistics are those of the last pass that it makes itself. A host that
    decides in place of a cadence compiles the step with `pay` given.
    """

    def step(carry, x, y, pay=None):
        params, state, stats, count = carry
        key = jax.random.fold_in(jax.random.key(0), count)
        outputs = []

        @jax.jit  # traced once, used twice
        def evaluate(params):
            return jax.value_and_grad(problem.loss_fn, has_aux=True)(params, stats, key, x, y)

        def grad_fn(params, *_):
            output, grads = evaluate(params)
            outputs.append(output)
            return grads

        extra = dict.fromkeys(takes, grad_fn) | ({} if pay is None else {"pay": pay})
        if "value_fn" in takes:
            extra["value_fn"] = lambda params: evaluate(params)[0][0]
        updates, state = tx.update(grad_fn(params), state, params, **extra)
        loss, stats = outputs[0 if loss_from == "clean" else -1]
        return (optax.apply_updates(params, updates), state, stats, count + 1), loss

    return Step(step, first_carry(problem, tx), calls)


def first_carry(problem: Problem, tx: optax.GradientTransformation) -> Any:
    """Abstract for an abstract problem, else arrays of its own that can be donated."""
    params, stats = problem.params, problem.stats
    if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
        state, count = jax.eval_shape(tx.init, params), jax.ShapeDtypeStruct((), jnp.int32)
    else:
        state, count = tx.init(params), jnp.zeros([], jnp.int32)
    return params, state, stats, count


def plain(loss_fn: Callable) -> Callable:
    return jax.value_and_grad(loss_fn, has_aux=True)


def floor(loss_fn: Callable) -> Callable:
    """Two gradients at different points and nothing else: no norm, no guard."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def two_gradients(params, *args):
        out, grads = value_and_grad(params, *args)
        nearby = jax.tree.map(lambda w, g: w + NEARBY * g, params, grads)
        return out, value_and_grad(nearby, *args)[1]

    return two_gradients


def by_hand(loss_fn: Callable) -> Callable:
    """SAM in three lines, without guards."""
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def sam(params, *args):
        out, grads = value_and_grad(params, *args)
        scale = RHO / optax.tree.norm(grads)
        perturbed = jax.tree.map(lambda w, g: w + scale * g, params, grads)
        return out, value_and_grad(perturbed, *args)[1]

    return sam


def sharp(method: optax.GradientTransformation, **options: Any) -> Callable:
    return lambda loss_fn: sam_optax.value_and_grad(loss_fn, method, has_aux=True, **options)


def contrib_sam(base: optax.GradientTransformation, opaque: bool) -> optax.GradientTransformation:
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
    return optax.contrib.sam(base, ascent, opaque_mode=opaque)


def comparison(problem: Problem, optimizer: str) -> dict[str, Callable[[], Step]]:
    """Name -> builder of the step, for what is compared on every subject."""
    base = OPTIMIZERS[optimizer]()
    first = lambda rule: lambda: through_first_door(problem, base, rule)
    second = lambda tx, calls=1: lambda: through_second_door(problem, tx, calls)
    chained = lambda method: second(optax.chain(method, base))
    return {
        "plain": first(plain),
        "floor": first(floor),
        "floor again": first(floor),  # differs from 1 by what this machine cannot resolve
        "by hand": first(by_hand),
        "optax.contrib.sam, opaque": second(contrib_sam(base, True)),
        "optax.contrib.sam, transparent": second(contrib_sam(base, False), calls=2),
        "sam": first(sharp(sam_optax.sam(RHO))),
        "sam, chain": chained(sam_optax.sam(RHO)),
        "asam": first(sharp(sam_optax.asam(0.5))),
        **{
            f"sam, ascent 1/{n}": first(
                sharp(
                    sam_optax.sam(RHO),
                    ascent_fraction=1 / n,
                    batch_argnums=BATCH,
                    aux_from="ascent",
                )
            )
            for n in PARTS
        },
        "sam, ascent 1/4, clean loss": first(  # and clean statistics: a forward pass more
            sharp(sam_optax.sam(RHO), ascent_fraction=1 / 4, batch_argnums=BATCH)
        ),
        "sam, ascent bfloat16": first(
            sharp(sam_optax.sam(RHO), ascent_dtype=jnp.bfloat16, aux_from="ascent")
        ),
        "shared_momentum_sam": lambda: through_second_door(  # for bases that have a momentum
            problem, sam_optax.shared_momentum_sam(base), loss_from="perturbed"
        ),
        "momentum_sam, chain": lambda: through_second_door(
            problem, optax.chain(sam_optax.momentum_sam(), base), loss_from="perturbed"
        ),
        "look_sam, chain": cadences(problem, optimizer)["look_sam"],
    }


# What pays at some steps only: the method, and its cadence for a host that decides.
CADENCES = {
    "look_sam": (sam_optax.look_sam(RHO, k=CYCLE), sam_optax.every(CYCLE)),
    "late_phase": (  # before the start
        sam_optax.late_phase(sam_optax.sam(RHO), start=1_000_000),
        sam_optax.from_step(1_000_000),
    ),
    "randomised": (sam_optax.randomised(sam_optax.sam(RHO)), sam_optax.with_probability()),
}


def cadences(problem: Problem, optimizer: str) -> dict[str, Callable[[], Step]]:
    """Name -> builder of the step of a method that pays at some steps only."""
    base = OPTIMIZERS[optimizer]()

    def chained(method: optax.GradientTransformation) -> Callable[[], Step]:
        return lambda: through_second_door(problem, optax.chain(method, base))

    return {name: chained(method) for name, (method, _) in CADENCES.items()}
