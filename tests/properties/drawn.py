"""What the properties are tried on: random trees, gradients, hyper-parameters and methods.

One example of hypothesis is a handful of small choices and a seed; NumPy makes the numbers from
the seed, so that a failure shrinks to a small tree that can be read.

    pytest tests/properties                                # some hundred cases, always the same
    HYPOTHESIS_PROFILE=thorough pytest tests/properties    # 10,000, others each time
    HYPOTHESIS_PROFILE=shrink pytest tests/properties      # the first, made small if one fails
"""

import dataclasses
import inspect
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from public import ARGUMENTS, UNMAPPED, as_method, own_inputs

import sam_optax
from sam_optax import FAMILY

# How many times the examples of the normal run; the thorough one has 10,000 in all.
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "normal")
TIMES = {"normal": 1, "shrink": 1, "thorough": 15}[PROFILE]
_SHARED: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}


def examples(number):
    """Settings for a property with this number of examples in the normal run."""
    # Shrinking takes minutes where every try is compiled.
    phases = list(Phase) if PROFILE == "shrink" else [Phase.explicit, Phase.generate]
    return settings(
        max_examples=number * TIMES,
        derandomize=PROFILE != "thorough",
        phases=phases,
        **_SHARED,
    )


class Pair(NamedTuple):
    """A container that the user defines."""

    first: Any
    second: Any


class Leaf(NamedTuple):
    """What is drawn in place of an array."""

    shape: tuple[int, ...]
    dtype: str


FLOATS = ["float32", "float16", "bfloat16", "complex64"]
DOUBLES = ["float64", "complex128", "float32", "bfloat16"]  # where JAX has 64 bits
OTHERS = ["int32", "bool", "uint8", "int8"]
# Few, so that programs of one operation are compiled once for many examples.
SHAPES = [(2, 3), (3,), (), (1,), (2, 1, 2)]


def leaves(dtypes=FLOATS):
    """Arrays of all kinds, more often those that are perturbed."""
    floating = st.builds(Leaf, st.sampled_from(SHAPES), st.sampled_from(dtypes))
    empty = st.builds(Leaf, st.sampled_from([(0,), (0, 2)]), st.sampled_from(dtypes + OTHERS))
    other = st.builds(Leaf, st.sampled_from(SHAPES[:3]), st.sampled_from(OTHERS))
    return st.one_of(floating, floating, floating, other, empty, st.none())


def trees(dtypes=FLOATS):
    """Nested containers of a few leaves; a lone leaf and a tree without one too."""

    def containers(inner):
        return st.one_of(
            st.dictionaries(st.sampled_from(["a", "b", "scale"]), inner, max_size=3),
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.builds(Pair, inner, inner),
        )

    # Not None alone, which Optax takes for params that are not given.
    return st.recursive(leaves(dtypes), containers, max_leaves=5).filter(lambda t: t is not None)


def is_leaf(x):
    return isinstance(x, Leaf)


def is_float(x):
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


# Sizes of gradients, clipped to what the dtype of a leaf can hold.
SIZES = {
    "ordinary": 1.0,
    "small": 1e-4,
    "tiny": 1e-37,
    "subnormal": 1e-41,
    "large": 1e4,
    "huge": 1e30,
    "at the limit": 2e38,
    "zero": 0.0,
}
ORDINARY = ["ordinary", "small", "large"]


@dataclasses.dataclass
class Problem:
    """Parameters, and a loss of which every gradient is known: g + c (w - w_0).

    Attributes:
      params: the tree w_0.
      gradient: the tree g, the gradient there; that of integers as drawn.
      curvature: c, at least 0.
    """

    params: Any
    gradient: Any
    curvature: float = 1.0

    def grad_fn(self, w):
        def leaf(g, w, start):
            if not is_float(start):
                return g
            return g + (self.curvature * (w - start)).astype(start.dtype)

        return jax.tree.map(leaf, self.gradient, w, self.params)

    def value_fn(self, w):
        """The loss of which grad_fn is the gradient, in float32."""

        def leaf(g, w, start):
            if not is_float(start):
                return jnp.zeros(())
            g, move = (jnp.asarray(x, jnp.result_type(x, "float32")) for x in (g, w - start))
            linear, square = jnp.real(jnp.conj(g) * move), jnp.abs(move) ** 2
            return jnp.sum(linear + self.curvature * square / 2).astype("float32")

        terms = jax.tree.map(leaf, self.gradient, w, self.params)
        return sum(jax.tree.leaves(terms), jnp.zeros(()))

    def arrays(self):
        """What of it a jitted function may take: gradients of integers, float0, stay outside."""
        return self.params, [g for g in jax.tree.leaves(self.gradient) if is_float(g)]

    def of(self, arrays):
        """The problem with other arrays."""
        params, gradient = arrays[0], iter(arrays[1])
        return Problem(
            params,
            jax.tree.map(lambda g: next(gradient) if is_float(g) else g, self.gradient),
            self.curvature,
        )

    def update(self, tx, state, params=None, **extra):
        """One update of a transformation, with all that any of them needs."""
        params = self.params if params is None else params
        given = own_inputs(self.grad_fn, self.value_fn) | {"grad_fn": self.grad_fn, "value": 1.0}
        given |= extra
        return tx.update(self.grad_fn(params), state, params, **given)

    def perturbable(self):
        return [x for x in jax.tree.leaves(self.params) if is_float(x) and x.size]


def numbers(rng, leaf, size):
    limits = jnp.finfo(leaf.dtype)
    size = np.clip(size, float(limits.smallest_subnormal), float(limits.max) / 8) if size else 0.0
    draw = lambda: rng.uniform(0.25, 2.0, leaf.shape) * rng.choice([-1.0, 1.0], leaf.shape)
    x = draw() + (1j * draw() if leaf.dtype.startswith("complex") else 0)
    return jnp.asarray(size * x, leaf.dtype)


@st.composite
def problems(draw, sizes=tuple(SIZES), dtypes=FLOATS, zeros=True, tree=None):
    """A Problem with parameters near 1, and some zero, and a gradient of some size."""
    specification = draw(trees(dtypes) if tree is None else tree)
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    size = draw(st.sampled_from([*sizes, "mixed"]))
    as_zeros = draw(st.booleans())

    def param(leaf):
        if leaf.dtype in OTHERS:
            return jnp.asarray(rng.integers(0, 2, leaf.shape), leaf.dtype)
        x = numbers(rng, leaf, 1.0)
        return jnp.where(rng.uniform(size=leaf.shape) < 0.2, 0, x) if zeros else x

    def gradient(leaf):
        if leaf.dtype in OTHERS:
            shape = leaf.shape
            return jnp.zeros(shape, leaf.dtype) if as_zeros else np.zeros(shape, jax.dtypes.float0)
        own = sizes[rng.integers(len(sizes))] if size == "mixed" else size
        return numbers(rng, leaf, SIZES[own])

    params, grads = (jax.tree.map(f, specification, is_leaf=is_leaf) for f in (param, gradient))
    return Problem(params, grads, draw(st.sampled_from([1.0, 0.0])))


# --- hyper-parameters ---

ORDERS = [None, 1.0, 1.5, 2.0, 3.0, math.inf]
NORMALIZATIONS = {
    "none": None,
    "elementwise": sam_optax.elementwise(0.01),
    "elementwise(0)": sam_optax.elementwise(0.0, normalize_bias=True),
    "filterwise": sam_optax.filterwise(0.01, normalize_bias=True),
    "filterwise(0)": sam_optax.filterwise(0.0),
    "layerwise": sam_optax.layerwise(0.0, normalize_bias=True),
    "a user's, of numbers": lambda params: jax.tree.map(lambda w: 0.3, params),
    "a user's, of columns": lambda params: jax.tree.map(
        lambda w: 1.0 + jnp.arange(np.shape(w)[-1], dtype="float32") if np.ndim(w) else 2.0, params
    ),
}


def masks(tree):
    """None, a function of params, a tree of booleans, a prefix of one."""
    bits = st.lists(st.booleans(), min_size=9, max_size=9)

    def full(bits):
        bits = iter(bits * 4)
        return jax.tree.map(lambda _: next(bits), tree)

    return st.one_of(
        st.none(),
        st.just(lambda params: jax.tree.map(lambda w: w.ndim > 1, params)),
        st.just(False) if jax.tree.leaves(tree) else st.none(),
        st.builds(full, bits),
    )


# Bounds of numbers that the arguments of methods may take; a name not found here keeps its default.
RANGES = {
    "alpha": (0.0, 1.0),
    "b1": (0.0, 0.9),
    "beta": (0.1, 1.0),
    "damping": (0.1, 1.0),
    "decay": (0.0, 0.9),
    "eta": (0.0, 1.0),
    "gamma": (0.0, 0.9),
    "lmbda": (0.0, 0.9),
    "momentum": (0.0, 0.9),
    "probability": (0.0, 1.0),
    "quantile": (0.0, 0.9),
    "rho": (0.0, 0.5),
    "sigma": (0.0, 1.0),
    "sparsity": (0.0, 0.9),
    "std": (0.0, 0.1),
    "theta": (0.1, 1.0),
}
COUNTS = {"k": (1, 3), "every": (1, 3), "power_steps": (1, 2), "samples": (1, 2)}


def is_schedulable(parameter):
    return "Schedule" in str(parameter.annotation)


@dataclasses.dataclass
class Method:
    """A transformation of the library, and how it was made, to read in a failure."""

    name: str
    arguments: dict[str, Any]

    def build(self, **changed):
        factory = getattr(sam_optax, self.name)
        return as_method(self.name, factory(**(self.arguments | changed)))

    @property
    def parameters(self):
        return set(inspect.signature(getattr(sam_optax, self.name)).parameters)

    @property
    def uses_clean(self):
        return self.name not in FAMILY or FAMILY[self.name].uses_clean


@st.composite
def methods(draw, names=tuple(UNMAPPED), params=None, scheduled=True):
    """Any exported transformation with any arguments."""
    name = draw(st.sampled_from(names))
    parameters = inspect.signature(getattr(sam_optax, name)).parameters
    arguments = dict(ARGUMENTS.get(name, {}))
    for argument, parameter in parameters.items():
        known = argument in arguments and not isinstance(arguments[argument], float)
        if known or not draw(st.booleans()):
            continue
        if argument in RANGES:
            low, high = RANGES[argument]
            value = draw(st.sampled_from([low, high, (low + high) / 2]))
            if scheduled and is_schedulable(parameter) and draw(st.booleans()):
                arguments[argument] = optax.linear_schedule(value, low, 3)
            else:
                arguments[argument] = value
        elif argument in COUNTS:
            arguments[argument] = draw(st.integers(*COUNTS[argument]))
        elif argument == "p":
            arguments[argument] = draw(st.sampled_from(ORDERS))
        elif argument == "mask":
            arguments[argument] = draw(masks(params))
        elif argument == "normalization" and name != "asam":
            arguments[argument] = NORMALIZATIONS[draw(st.sampled_from(list(NORMALIZATIONS)))]
    return Method(name, arguments)


OF_KIND = {
    kind: sorted(n for n in UNMAPPED if n in FAMILY and FAMILY[n].kind == kind)
    for kind in ("filter", "ascent", "descent", "cadence", "wrapper")
}


@st.composite
def compositions(draw, params=None):
    """[cadence of] ([filters ->] ascent, descents), of the rules that are exported."""
    rule = lambda kind, **kw: draw(methods(names=tuple(OF_KIND[kind]), params=params, **kw))
    filters = [rule("filter") for _ in range(draw(st.integers(0, 2)))]
    ascent, descents = rule("ascent"), [rule("descent") for _ in range(draw(st.integers(0, 2)))]
    if ascent.name == "gaussian_ascent" and draw(st.booleans()):
        filters = []
    keepers = {need for m in filters for need in FAMILY[m.name].needs if need in FAMILY}
    descents = [m for m in descents if m.name not in keepers]
    descents += [Method(name, {}) for name in sorted(keepers)]
    cadence = rule("cadence") if draw(st.booleans()) else None
    make = lambda m: getattr(sam_optax, m.name)(**m.arguments)

    def build():
        method = sam_optax.sharpness_aware(
            optax.chain(*map(make, filters), make(ascent)),
            optax.chain(optax.identity(), *map(make, descents)),
            when=make(cadence) if cadence else None,
        )
        return method

    names = [*filters, ascent, *descents, *([cadence] if cadence else [])]
    return Composition(build, names)


@dataclasses.dataclass
class Composition:
    """A method put together from rules."""

    build: Any
    parts: list[Method]

    def kinds(self):
        return {FAMILY[part.name].kind for part in self.parts}


def layout(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), jax.typeof(x).weak_type), tree)
