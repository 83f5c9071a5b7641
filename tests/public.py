"""Every public function that returns a transformation, built and in its place."""

import inspect

import optax

import sam_optax
from sam_optax import FAMILY

# Arguments of those that have required ones; a new method with defaults needs no entry.
ARGUMENTS = {
    "adaptive": {"method": sam_optax.sam(), "steps": 10},
    "bsam": {"learning_rate": 0.1, "data_size": 100},
    "cadenced": {"method": sam_optax.sam(), "when": sam_optax.every(2)},
    "decoupled_wsam": {"base": optax.sgd(0.1), "learning_rate": 0.1},
    "draws": {"method": sam_optax.sharpness_aware(sam_optax.gaussian_ascent(0.1)), "count": 2},
    "dual_ascent": {"rho": 0.1},
    "every": {"k": 2},
    "extrapolate": {"weight": 0.5},
    "fisher_ascent": {"rho": 0.1},
    "flat_lora": {"frozen": False, "steps": 10},
    "from_step": {"start": 1},
    "in_turn": {"first": sam_optax.dual_ascent(0.1), "second": sam_optax.dual_ascent(0.1)},
    "late_phase": {"method": sam_optax.sam(), "start": 1},
    "late_tail": {"method": sam_optax.sam(), "steps": 2},
    "limit_rise": {"ascent": sam_optax.dual_ascent(0.1), "sigma": 0.02},
    "lookbehind": {"base": optax.sgd(0.1)},
    "multi_step": {"ascent": sam_optax.dual_ascent(0.1)},
    "pmean": {"axis_name": "batch"},
    "precondition": {"eps": 0.01},  # or rounding would be divided by next to nothing
    "preconditioned_sam": {"eps": 0.01},
    "proportional_ascent": {"rho": 0.1},
    "randomised": {"method": sam_optax.sam()},
    "running_average": {"weight": 0.5},
    "sampa": {"base": optax.sgd(0.1)},
    "shared_momentum_sam": {"base": optax.sgd(0.1, momentum=0.9)},
    "shared_preconditioned_sam": {"base": optax.adam(0.1, eps=0.01), "eps": 0.01},
    "sharing": {"method": sam_optax.sam(), "base": optax.sgd(0.1)},
    "sharpness_aware": {"ascent": sam_optax.dual_ascent(0.1)},
    "spectral_ascent": {"rho": 0.1},
    "stateless": {"fn": lambda updates, clean: updates},
    "sum_of": {"first": sam_optax.dual_ascent(0.1), "second": sam_optax.proportional_ascent(0.1)},
    "tilted": {
        "method": sam_optax.sharpness_aware(sam_optax.gaussian_ascent(0.1), sam_optax.keep_loss()),
        "count": 2,
    },
    "when_large": {"steps": 10},
}


def own_inputs(grad_fn, value_fn):
    """What any method may take beside grad_fn."""
    return {"previous_grad_fn": grad_fn, "tail_grad_fn": grad_fn, "value_fn": value_fn}


def exported():
    """Public functions that return a transformation."""
    for name in sam_optax.__all__:
        public = getattr(sam_optax, name)
        if inspect.isfunction(public):
            returned = str(inspect.signature(public).return_annotation)
            if "GradientTransformation" in returned:
                yield name


METHODS = sorted(exported())
UNMAPPED = [name for name in METHODS if name != "pmean"]
# Whole methods that need no more than the doors give: rules stand in them.
WHOLE = [
    name
    for name, (kind, needs, _) in FAMILY.items()
    if kind in ("method", "wrapper", "optimizer") and not {"value_fn", "tail_grad_fn"} & set(needs)
]


def as_method(name, rule):
    """A rule in its place in the simplest method; methods as they are."""
    ascent, aware = sam_optax.dual_ascent(0.1), sam_optax.sharpness_aware
    of_rule = "descent" if name == "stateless" else "method"  # by ARGUMENTS a descent
    kind, needs, _ = FAMILY.get(name, (of_rule, (), True))
    if kind == "filter":
        keepers = [getattr(sam_optax, need)() for need in needs]
        return aware(optax.chain(rule, ascent), optax.chain(*keepers) if keepers else None)
    if kind == "ascent":
        return aware(rule)
    if kind == "descent":
        return aware(ascent, rule)
    if kind == "otherwise":
        keep = sam_optax.keep_orthogonal()
        return aware(ascent, keep, when=sam_optax.every(2), otherwise=rule)
    return aware(ascent, when=rule) if kind == "cadence" else rule


def build(name, **overrides):
    return as_method(name, getattr(sam_optax, name)(**ARGUMENTS.get(name, {}), **overrides))
