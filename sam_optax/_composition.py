"""What a method is made of, read from the method itself.

A rule is a closure: it is made by a public function and closes over what that
function was given, rules included. So the name of the maker, and the variables
that are closed over, tell the composition, and no rule has to describe itself.
What others have made (`optax.chain`, a function of your own) is looked through
for rules, and is named where it holds none.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from sam_optax._family import FAMILY

# Whole methods that hold another one, whose composition is theirs but for this.
_AROUND = ("draws", "sharing", "tilted")
_RULES = ("filter", "ascent", "descent", "otherwise", "cadence")


class Part(NamedTuple):
    """A rule in its place.

    Attributes:
      name: of the function that made it.
      arguments: given to that function, by name, where they are not its defaults.
    """

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        given = ", ".join(f"{name}={_shown(value)}" for name, value in self.arguments.items())
        return f"{self.name}({given})"


class Composition(NamedTuple):
    """What a method is made of: each place holds its rules, in order; empty is the default.

    Attributes:
      filter: gradient to direction; the gradient itself by default.
      ascent: direction to perturbation, and what follows on it.
      descent: perturbed gradient to result; itself by default.
      cadence: whether a step pays; always by default.
      otherwise: the result of a step that does not pay; the clean gradient by default.
      around: what holds the method: several draws of it, the optimizer after it.
      own: the name of a method with an update of its own, of which the rules are parts.
    """

    filter: tuple[Part, ...] = ()
    ascent: tuple[Part, ...] = ()
    descent: tuple[Part, ...] = ()
    cadence: tuple[Part, ...] = ()
    otherwise: tuple[Part, ...] = ()
    around: tuple[Part, ...] = ()
    own: str | None = None

    def __str__(self) -> str:
        places = self._asdict().items()
        lines = [(place, f"{parts}") for place, parts in places if place == "own" and parts]
        lines += [
            (place, " -> ".join(map(str, parts)))
            for place, parts in places
            if place != "own" and parts
        ]
        return "\n".join(f"{place:9} {text}" for place, text in lines)


def composition(method: optax.GradientTransformation | Callable[..., Any]) -> Composition:
    r"""What a method is made of: its filter, ascent, descent and cadence.

    To see what an alias stands for, what two methods differ in, and for the log
    of a run.

        method = [cadence of] ([filter ->] ascent, descent)

    Args:
      method: a transformation made by this library, or a function like `esam`'s.
        Inside of `optax.chain` with an optimizer it is not found: ask before.

    Returns:
      A `Composition`. Its parts have names and arguments; printed, it is a line
      a place.

    Raises:
      TypeError: for something else.

    Example:
      >>> import optax, sam_optax
      >>> print(sam_optax.composition(sam_optax.look_sam(rho=0.1, k=3)))
      ascent    dual_ascent(rho=0.1)
      descent   keep_orthogonal()
      cadence   every(k=3)
      otherwise reuse_orthogonal(alpha=0.7)
      >>> print(sam_optax.composition(sam_optax.vasso(descent=sam_optax.surrogate_gap(0.4))))
      filter    running_average(weight=0.9)
      ascent    dual_ascent(rho=0.05)
      descent   surrogate_gap(alpha=0.4)

    References:
      Foret et al., `Sharpness-Aware Minimization
      <https://arxiv.org/abs/2010.01412>`_, 2020, algorithm 1, is the default in
      every place.

    Note:
      Runs nothing; reads the variables that the functions close over.
    """
    update = method.update if isinstance(method, optax.GradientTransformation) else method
    if not callable(update):
        raise TypeError(f"method must be a transformation or a function, got {method!r}")
    update = _own(update)
    name, inside = _maker(update), _closed_over(update)
    if name == "sharpness_aware":
        ascent = _parts(inside["ascent"])
        kinds = [FAMILY[part.name].kind if part.name in FAMILY else "" for part in ascent]
        first = kinds.index("ascent") if "ascent" in kinds else 0
        return Composition(
            filter=ascent[:first],
            ascent=ascent[first:],
            descent=_parts(inside["descent"]),
            cadence=_parts(inside["cadence"]),
            otherwise=_parts(inside["otherwise"]),
        )
    held = [x for x in _links(inside.values()) if _is_aware(x)]
    whole = composition(held[0]) if held else Composition()
    if name == "cadenced":
        return whole._replace(cadence=(*_parts(inside["cadence"]), *whole.cadence))
    if name in _AROUND:
        return whole._replace(around=(_part(update, name), *whole.around))
    if held:
        return whole._replace(own=name.strip("_"))
    rules = [part for x in _links(inside.values()) for part in _parts(x) if part.name in FAMILY]
    return Composition(ascent=tuple(rules), own=name)


def _own(link: Any) -> Any:
    """The function that does the work of a transformation's update, or of a function."""
    fn = getattr(link, "update", link)
    # What checks for required arguments stands around it.
    while _name(fn).startswith("transformation."):
        fn = _closed_over(fn)["update"]
    return fn


def _name(fn: Any) -> str:
    """As it stands in the source, whatever a decorator may have made of it."""
    return fn.__code__.co_qualname if inspect.isfunction(fn) else type(fn).__name__


def _maker(fn: Any) -> str:
    """The name of the function that made this one, or its own at the top of a module."""
    return _name(fn).partition(".")[0]


def _closed_over(fn: Any) -> dict[str, Any]:
    return dict(inspect.getclosurevars(fn).nonlocals) if inspect.isfunction(fn) else {}


def _links(values: Any) -> Iterator[Any]:
    """The transformations and functions among values, and in tuples and lists of them."""
    for value in values:
        if isinstance(value, optax.GradientTransformation) or inspect.isfunction(value):
            yield value
        elif type(value) in (tuple, list):
            yield from _links(value)


def _is_aware(link: Any) -> bool:
    """Whether a method over `sharpness_aware` is in it."""
    update = _own(link)
    if _maker(update) == "sharpness_aware":
        return True
    return any(map(_is_aware, _links(_closed_over(update).values())))


def _parts(link: Any) -> tuple[Part, ...]:
    """The rules in a transformation or a function."""
    if link is None:
        return ()
    fn = _own(link)
    name = _maker(fn)
    if name in FAMILY and FAMILY[name].kind in _RULES:
        return (_part(fn, name),)
    package = getattr(fn, "__module__", "").partition(".")[0]
    links = list(_links(_closed_over(fn).values()))
    if package not in (__package__, "optax") or "." not in _name(fn) or name in FAMILY:
        # A function of the user's, or a rule of one method alone, whose name is within it.
        return (Part(_name(fn).rpartition(".")[2].strip("_<>"), {}),)
    if fn.__module__.startswith(f"{__package__}._family."):
        return (Part(name.strip("_"), {}),)
    if links:  # a chain, or what prepares a rule
        return tuple(part for link in links for part in _parts(link))
    return () if _name(fn) == _name(optax.identity().update) else (Part(name, {}),)


def _part(fn: Callable[..., Any], name: str) -> Part:
    """A rule with the arguments that its maker was given, found by their names."""
    signature = inspect.signature(getattr(sys.modules[fn.__module__], name))
    found = _arguments(fn, set(signature.parameters), name)
    given = {
        name: found[name]
        for name, parameter in signature.parameters.items()
        if name in found
        and name not in ("method", "base")
        and not _is_default(found[name], parameter, name)
    }
    return Part(name, given)


def _arguments(fn: Any, names: set[str], maker: str) -> dict[str, Any]:
    """Variables of these names that a function closes over, by itself or by functions within."""
    inside, found = _closed_over(fn), {}
    for value in inside.values():
        if inspect.isfunction(value) and _maker(value) == maker:
            found |= _arguments(value, names, maker)
    return found | {name: value for name, value in inside.items() if name in names}


def _is_default(value: Any, parameter: inspect.Parameter, name: str) -> bool:
    if value is None or (name == "p" and np.isscalar(value) and value == 2):
        return True  # None is 2 there
    neutral = name in ("key", "ns_steps", "unit_leaves", "weight") and np.isscalar(value)
    return neutral and value == parameter.default


def _shown(value: Any) -> str:
    if isinstance(value, optax.GradientTransformation):
        return " -> ".join(map(str, _parts(value))) or "identity()"
    if callable(value):
        name = getattr(value, "__name__", type(value).__name__).strip("_<>")
        inside = {k: v for k, v in _closed_over(value).items() if isinstance(v, int | float)}
        own = ", ".join(f"{k}={v!r}" for k, v in inside.items() if v is not False)
        return "a function" if name == "lambda" else f"{name}({own})" if inside else name
    if isinstance(value, jax.Array):
        return str(value)
    return f"{value:g}" if isinstance(value, float) else repr(value)
