"""All methods of the library as optimizers of a task, with what they cost and what they tune.

Every method has nine settings: three radii, in the same ratio to the task's for all tasks, and
three weight decays, or for the plain optimizer three learning rates and three decays. After a first
look, at validation and at test errors of a third of the methods, a third decay was added for all
(methods near the plain optimizer want one like its own) and the radii of momentum_sam and look_sam
were moved, whose best by validation stood at an end; so were those of spectral_sam and tilted_sam
after they had been tested. Other hyper-parameters are the library's defaults, which are the
authors' values or near them.
"""

import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from _tasks import Task

import sam_optax

MOMENTUM = 0.9  # Nesterov; multiplies the effective learning rate by 10
WARMUP = 0.05  # of the steps, with a rising learning rate; a cosine takes it to 0 after that
REFRESH = 100  # steps between two measurements of xsam's alpha, as eigen_sam and sparse_sam have
FORWARD = 1 / 3  # of a gradient
RADII = (0.25, 0.5, 1.0)  # times the method's scale and the task's radius
PARTS = (2, 5, 10)  # of the batch, whose sizes they divide, from which the ascent is taken
TAILS = (0.1, 0.2, 0.3, 0.5)  # of the training, in which late_phase pays


class Job(NamedTuple):
    """What a method may need to build its optimizer; numbers are traced."""

    task: Task
    steps: Any  # of the whole training
    lr: Any  # peak learning rate
    weight_decay: Any
    tail: float = 1 - WARMUP  # the last part of training, in which the learning rate decays

    def schedule(self, moves: int = 1) -> optax.Schedule:
        """The learning rate of an optimizer that moves several times a step."""

        def learning_rate(count: jax.Array) -> jax.Array:
            part = count / (moves * self.steps)
            fall = jnp.clip((part - 1 + self.tail) / self.tail, 0, 1)
            return self.lr * jnp.minimum(part / WARMUP, 1) * (1 + jnp.cos(jnp.pi * fall)) / 2

        return learning_rate

    def chain(self, method: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(method, self.base())

    def base(self, moves: int = 1) -> optax.GradientTransformation:
        matrices = lambda params: jax.tree.map(lambda w: w.ndim > 1, params)
        rate = self.schedule(moves)
        if self.task.optimizer == "adamw":
            optimizer = optax.adamw(rate, weight_decay=self.weight_decay, mask=matrices)
        else:
            l2 = optax.add_decayed_weights(self.weight_decay, matrices)
            optimizer = optax.chain(l2, optax.sgd(rate, MOMENTUM, nesterov=True))
        frozen = self.task.frozen
        return optimizer if frozen is None else optax.chain(optimizer, optax.freeze(frozen))


Build = Callable[[Any, Job], optax.GradientTransformation]


class Method(NamedTuple):
    """A method in the comparison.

    Attributes:
      gradients: evaluations a step on average, a forward pass counted as a third of one.
      scale: of its radii, over those of SAM.
      build: its whole optimizer, from rho and the job.
      paid: the part of the steps that a host would pay for, None without such a cadence.
      rarely: whether it does something costly once in a while, which vmap would do at every step.
    """

    gradients: float
    scale: float
    build: Build
    paid: float | None = None
    rarely: bool = False


def link(method: Callable[[Any], optax.GradientTransformation]) -> Build:
    """A method that stands before the optimizer and needs rho alone."""
    return lambda rho, job: job.chain(method(rho))


def with_base(method: Callable[..., optax.GradientTransformation], moves: int = 1) -> Build:
    """A method that holds the optimizer."""
    return lambda rho, job: method(job.base(moves), rho)


def of_batch(sharp: Callable[..., Any], job: Job) -> optax.GradientTransformation:
    """A function (key, params, batch) -> grads as a link of the chain."""

    def update(updates, key, params=None, *, batch, **extra_args):
        next_key, key = jax.random.split(key)
        return sharp(key, params, batch), next_key

    first = lambda params: jax.random.key(0)
    return job.chain(optax.GradientTransformationExtraArgs(first, update))


def of_a_part(fraction: float) -> Method:
    def build(rho: Any, job: Job) -> optax.GradientTransformation:
        sharp = sam_optax.grad(job.task.loss, sam_optax.sam(rho), ascent_fraction=fraction)
        return of_batch(lambda key, *args: sharp(*args), job)

    return Method(1 + fraction, 1, build)


def late(tail: float) -> Method:
    def build(rho: Any, job: Job) -> optax.GradientTransformation:
        start = jnp.asarray((1 - tail) * job.steps, jnp.int32)
        return job.chain(sam_optax.late_phase(sam_optax.sam(rho), start))

    return Method(1 + tail, 1, build, paid=tail)


def late_decay(tail: float) -> Method:
    """SAM for just as long as the learning rate decays."""

    def build(rho: Any, job: Job) -> optax.GradientTransformation:
        method = sam_optax.late_tail(sam_optax.sam(rho), job.steps, tail)
        return job._replace(tail=tail).chain(method)

    return Method(1 + tail, 1, build, paid=tail)


def looking(k: int) -> Method:
    return Method(1 + 1 / k, 0.5, link(lambda rho: sam_optax.look_sam(rho, k=k)), paid=1 / k)


def randomly(p: float) -> Method:
    build = link(lambda rho: sam_optax.randomised(sam_optax.sam(rho), p))
    return Method(1 + p, 1, build, paid=p)


def esam(rho: Any, job: Job) -> optax.GradientTransformation:
    sharp = sam_optax.esam(job.task.losses, rho)
    return of_batch(lambda key, params, batch: sharp(key, params, batch)[1], job)


def k_sam(rho: Any, job: Job) -> optax.GradientTransformation:
    sharp = sam_optax.k_sam(job.task.losses, job.task.batch // 2, rho)
    return of_batch(lambda key, params, batch: sharp(params, batch)[1], job)


def xsam(rho: Any, job: Job) -> optax.GradientTransformation:
    """With its alpha measured now and then."""

    def update(updates, state, params=None, *, batch, **extra_args):
        count, alpha = state
        measure = lambda: sam_optax.xsam_alpha(
            lambda w: job.task.loss(w, batch), params, rho=rho, rho_max=2 * rho
        )
        alpha = jax.lax.cond(count % REFRESH == 0, measure, lambda: alpha)
        method = sam_optax.xsam(rho, alpha)
        updates, _ = method.update(updates, method.init(params), params, **extra_args)
        return updates, (count + 1, alpha)

    first = lambda params: (jnp.zeros([], jnp.int32), jnp.ones([]))
    return job.chain(optax.GradientTransformationExtraArgs(first, update))


def polyak_sam(rho: Any, job: Job) -> optax.GradientTransformation:
    """L2 within the loss, because its step has to know of it."""
    method = sam_optax.polyak_sam(rho)

    def update(updates, state, params=None, *, value_fn, **extra_args):
        def decayed(params: Any) -> jax.Array:
            squares = sum(jnp.vdot(w, w) for w in jax.tree.leaves(params) if w.ndim > 1)
            return value_fn(params) + job.weight_decay / 2 * squares

        return method.update(jax.grad(decayed)(params), state, params, value_fn=decayed)

    return optax.chain(optax.GradientTransformationExtraArgs(method.init, update), optax.sgd(1.0))


def jacobian_sam(rho: Any, job: Job) -> optax.GradientTransformation:
    mean = lambda logits, y: optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    of = sam_optax.jacobian_grad_fn(job.task.model.apply, mean)
    method = sam_optax.sam(rho)

    def update(updates, state, params=None, *, batch, **extra_args):
        extra_args["descent_grad_fn"] = of(params, *batch)
        return method.update(updates, state, params, **extra_args)

    return job.chain(optax.GradientTransformationExtraArgs(method.init, update))


def imb_sam(rho: Any, job: Job) -> optax.GradientTransformation:
    method, rare = sam_optax.imb_sam(rho), jnp.array(job.task.rare)

    def update(updates, state, params=None, *, batch, **extra_args):
        tail = lambda params: jnp.mean(job.task.losses(params, batch) * jnp.isin(batch[1], rare))
        extra_args["tail_grad_fn"] = jax.grad(tail)
        return method.update(updates, state, params, **extra_args)

    return job.chain(optax.GradientTransformationExtraArgs(method.init, update))


def flat_lora(rho: Any, job: Job) -> optax.GradientTransformation:
    steps, task = jnp.asarray(job.steps, jnp.int32), job.task
    return job.chain(sam_optax.flat_lora(task.frozen, steps, rho, merged=task.model.merged))


def of_adapters(rho: Any, job: Job) -> optax.GradientTransformation:
    learnt = jax.tree.map(operator.not_, job.task.frozen)
    return job.chain(sam_optax.sam(rho, mask=learnt))


def preconditioned(rho: Any) -> optax.GradientTransformation:
    """With e of length rho."""
    ascent = optax.chain(sam_optax.precondition(), sam_optax.dual_ascent(rho))
    return sam_optax.sharpness_aware(ascent, sam_optax.keep_second_moment(0.99))


def bsam(rho: Any, job: Job) -> optax.GradientTransformation:
    """It averages gradients where momentum adds them up, and has a prior in place of decay."""
    scale, examples = 1 / (1 - MOMENTUM), len(job.task.train[1])
    lr = lambda count: scale * job.schedule()(count)
    return sam_optax.bsam(lr, examples, rho, prior_precision=job.weight_decay * examples)


METHODS = {
    "plain": Method(1, 0, lambda rho, job: job.base()),
    "sam": Method(2, 1, link(sam_optax.sam)),
    "asam": Method(2, 20, link(lambda rho: sam_optax.asam(rho, normalize_bias=True))),
    "sam, second order": Method(4, 1, link(lambda rho: sam_optax.sam(rho, second_order=True))),
    "unnormalised_sam": Method(2, 2.5, link(sam_optax.unnormalised_sam)),
    "multi_step_sam": Method(3, 1, link(sam_optax.multi_step_sam)),
    "gsam": Method(2, 1, link(sam_optax.gsam)),
    "wsam": Method(2, 0.15, link(sam_optax.wsam)),
    "decoupled_wsam": Method(
        2, 1, lambda rho, job: sam_optax.decoupled_wsam(job.base(), job.schedule(), rho)
    ),
    "gradient_norm_penalty": Method(2, 1, link(sam_optax.gradient_norm_penalty)),
    "stable_sam": Method(2, 1, link(sam_optax.stable_sam)),
    "cr_sam": Method(3, 1, link(sam_optax.cr_sam)),
    "xsam": Method(2.1, 1, xsam, rarely=True),
    "fisher_sam": Method(2, 1, link(sam_optax.fisher_sam)),
    "z_sharp": Method(2, 0.75, link(sam_optax.z_sharp)),
    "friendly_sam": Method(2, 1, link(sam_optax.friendly_sam)),
    "vasso": Method(2, 1, link(sam_optax.vasso)),
    "async_sam": Method(2, 2, link(sam_optax.async_sam)),
    "momentum_sam": Method(1, 4, link(sam_optax.momentum_sam)),
    "shared_momentum_sam": Method(1, 4, with_base(sam_optax.shared_momentum_sam)),
    "random_perturbation": Method(1, 0.25, link(sam_optax.random_perturbation)),
    "eigen_sam": Method(2.1, 1, link(sam_optax.eigen_sam), rarely=True),
    "sparse_sam": Method(2.01, 1, link(sam_optax.sparse_sam), rarely=True),
    "look_sam, k = 5": looking(5),
    "look_sam, k = 10": looking(10),
    "randomised, p = 0.5": randomly(0.5),
    "randomised, p = 0.1": randomly(0.1),
    "adaptive": Method(  # about half of the steps, which the host cannot know
        *(1.5, 1),
        lambda rho, job: job.chain(sam_optax.adaptive(sam_optax.sam(rho), job.steps)),
    ),
    **{f"late_phase, last {tail:g}": late(tail) for tail in TAILS},
    **{f"sam, ascent 1/{n}": of_a_part(1 / n) for n in PARTS},
    "gam": Method(4, 0.75, link(lambda rho: sam_optax.gam(rho, rho))),
    "esam": Method(1.5 + FORWARD, 0.75, esam),
    "k_sam": Method(1 + FORWARD, 1, k_sam),
    "bsam": Method(2, 0.75, bsam),
    "sampa": Method(2, 1, with_base(sam_optax.sampa)),
    "unified_sam": Method(2, 1, link(sam_optax.unified_sam)),
    "sagm": Method(2, 2, link(sam_optax.sagm)),
    "le_sam": Method(2, 1, link(lambda sigma: sam_optax.le_sam(1.0, sigma))),
    "preconditioned_sam": Method(
        2, 0.0025, link(lambda rho: sam_optax.preconditioned_sam(rho, b2=0.99))
    ),
    "preconditioned, length rho": Method(2, 1, link(preconditioned)),
    "spectral_sam": Method(2, 0.2, link(sam_optax.spectral_sam)),
    "polyak_sam": Method(2, 1, polyak_sam),
    "periodic_sam, k = 5": Method(
        1.2, 0.2, link(lambda rho: sam_optax.periodic_sam(rho, k=5)), paid=1 / 5
    ),
    **{f"late_tail, last {tail:g}": late_decay(tail) for tail in TAILS},
    "plain, decay in the last 0.3": Method(1, 0, lambda rho, job: job._replace(tail=0.3).base()),
    "tilted_sam": Method(4, 1, link(lambda rho: sam_optax.tilted_sam(rho, samples=2, radius=rho))),
    "jacobian_sam": Method(2, 1, jacobian_sam),
    "lookbehind": Method(3, 0.75, with_base(sam_optax.lookbehind, moves=2)),
    "shared_preconditioned_sam": Method(2, 0.0025, with_base(sam_optax.shared_preconditioned_sam)),
    "imb_sam": Method(3, 1.5, imb_sam),
    "flat_lora": Method(1, 2, flat_lora),
    "sam, adapters alone": Method(2, 1, of_adapters),
}
# What is not a method by itself, or cannot be one here, and why.
LEFT_OUT = {
    "cadenced": "takes a cadence: look_sam, late_phase, randomised, adaptive are such",
    "draws": "takes a random method: random_perturbation is such",
    "sharing": "takes an ascent: shared_momentum_sam is such",
    "tilted": "takes a rule: tilted_sam is such",
}
SGD_ALONE = ("bsam", "polyak_sam")  # they are optimizers, tuned like SGD
NEED = {  # what a task must have for a method
    "shared_preconditioned_sam": lambda task: task.optimizer == "adamw",
    "imb_sam": lambda task: task.rare,
    "flat_lora": lambda task: task.frozen,
    "sam, adapters alone": lambda task: task.frozen,
}


class Setting(NamedTuple):
    lr: Any
    weight_decay: Any
    rho: Any


def grid(name: str, task: Task) -> list[Setting]:
    """The settings of a method to choose from: as many for all."""
    if name.startswith("plain"):
        points = itertools.product(task.plain_lrs, task.plain_decays, (0.0,))
    else:
        radii = [part * METHODS[name].scale * task.rho for part in RADII]
        points = itertools.product((task.lr,), task.decays, radii)
    return [Setting(*map(float, point)) for point in points]


def optimizer(name: str, task: Task, setting: Setting, steps: Any) -> Any:
    job = Job(task, steps, setting.lr, setting.weight_decay)
    return optax.with_extra_args_support(METHODS[name].build(setting.rho, job))


def names(task: Task) -> list[str]:
    """The methods that suit a task."""

    def suits(name: str) -> bool:
        if name in SGD_ALONE:
            return task.optimizer == "sgd" and not task.frozen
        return name not in NEED or bool(NEED[name](task))

    return [name for name in METHODS if suits(name)]
