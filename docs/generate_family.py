"""The pages of the family, made from the code: run by mkdocs-gen-files, or by itself.

    python docs/generate_family.py site/family     # writes them into a folder

Nothing is typed here that the code knows: compositions are read from the
methods, equations, sources and costs from their docstrings, memories from
their states.
"""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sam_optax
from sam_optax import FAMILY, Composition

WHOLE = ("method", "wrapper", "optimizer", "examples", "door")
# Arguments of those that have required ones.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adaptive": {"method": sam_optax.sam(), "steps": 100},
    "bsam": {"learning_rate": 0.1, "data_size": 1000},
    "cadenced": {"method": sam_optax.sam(), "when": sam_optax.every(5)},
    "decoupled_wsam": {"base": optax.sgd(0.1), "learning_rate": 0.1},
    "draws": {"method": sam_optax.sharpness_aware(sam_optax.gaussian_ascent()), "count": 2},
    "esam": {"loss_fn": lambda params, *batch: None},
    "flat_lora": {"frozen": True, "steps": 100},
    "jacobian_sam": {"model_fn": lambda params, x: x, "loss_fn": lambda outputs: outputs},
    "k_sam": {"loss_fn": lambda params, *batch: None, "k": 8},
    "late_phase": {"method": sam_optax.sam(), "start": 50},
    "late_tail": {"method": sam_optax.sam(), "steps": 100},
    "lookbehind": {"base": optax.sgd(0.1)},
    "randomised": {"method": sam_optax.sam()},
    "sampa": {"base": optax.sgd(0.1)},
    "shared_momentum_sam": {"base": optax.sgd(0.1, momentum=0.9)},
    "shared_preconditioned_sam": {"base": optax.adam(0.1)},
    "sharing": {"method": sam_optax.sam(), "base": optax.sgd(0.1)},
    "tilted": {
        "method": sam_optax.sharpness_aware(sam_optax.gaussian_ascent(), sam_optax.keep_loss()),
        "count": 2,
    },
}
KINDS = {
    "filter": "Filters: a gradient into a direction, before an ascent in `optax.chain`",
    "ascent": "Ascents: a direction into the perturbation",
    "descent": "Descents: the perturbed gradient into what the optimizer sees; they chain",
    "otherwise": "At the steps that a cadence does not pay for",
    "cadence": "Cadences: whether a step pays",
}
INTRODUCTION = """# The family

A method is `[a cadence] of ([a filter ->] an ascent, a descent)`. Every place takes an ordinary
Optax transformation, and a published method is an alias over such rules. This page is made from
the code: `sam_optax.composition(method)` reads the same from any method, yours too.

G is one forward and backward pass, F a forward pass, B the size of the batch. Methods without
memory go into `sam_optax.value_and_grad` or a chain, those with memory into a chain. Optimizers
take the base optimizer, or are one. `esam`, `k_sam` and `jacobian_sam` are functions like
`value_and_grad`. All whose ascent is `dual_ascent` take `p`, `normalization` and `mask`: GSAM over
ASAM's ascent is `gsam(0.5, normalization=elementwise())`.

Start with `sam`. What others cost and gained in one fair comparison stands with the experiments.
What is not here as a name, and why, is told in [recipes](recipes.md).
"""


def whole_methods() -> list[str]:
    return [name for name, member in FAMILY.items() if member.kind in WHOLE]


def built(name: str) -> Any:
    return getattr(sam_optax, name)(**ARGUMENTS.get(name, {}))


class Doc:
    """The parts of a docstring in the library's form."""

    def __init__(self, name: str):
        text = inspect.getdoc(getattr(sam_optax, name)) or ""
        heads = r"(Args|Returns|Raises|Example|References|Note):\n"
        before, *rest = re.split(rf"^{heads}", text, flags=re.M)
        self.sections = dict(zip(rest[::2], map(inspect.cleandoc, rest[1::2]), strict=True))
        self.first, _, more = before.partition("\n")
        blocks = re.split(r"\n\n+", more.strip("\n"))
        is_code = lambda block: block.startswith("    ")
        self.equations = [inspect.cleandoc(block) for block in filter(is_code, blocks)]
        self.blocks = [(is_code(b), inspect.cleandoc(b)) for b in blocks if b.strip()]

    @property
    def cost(self) -> str:
        """The first sentence of the note."""
        sentence = re.split(r"(?<=[^\d])[.;](?=\s|$)", flat(self.sections.get("Note", "")))[0]
        return sentence.strip() or "-"

    @property
    def source(self) -> str:
        """Who wrote it, linked."""
        text = flat(self.sections.get("References", ""))
        if same := re.match(r"As for `(\w+)`", text):
            return Doc(same[1]).source
        found = re.search(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", text)
        if not found:
            return re.split(r"[,:(]", text)[0].strip("` ")
        return f"[{found[1]}](https://arxiv.org/abs/{found[1]})"


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def markdown(text: str) -> str:
    """Links of reStructuredText as Markdown's; two colons of an equation stay."""
    text = re.sub(r"`([^`<]+?)\s*<(https?://[^>]+)>`_", lambda m: f"[{flat(m[1])}]({m[2]})", text)
    # Names of the family lead to their pages.
    return re.sub(r"`(\w+)`", lambda m: link(m[1]) if m[1] in FAMILY else m[0], text)


def link(name: str) -> str:
    return f"[`{name}`]({name}.md)"


def cell(text: str) -> str:
    """Bars are escaped but in code, where Markdown would show the backslash."""
    return re.sub(r"(`[^`]*`)|\|", lambda m: m[1] or r"\|", text).replace("\n", "<br>")


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def table(*heads: str) -> str:
    return row(*heads) + row(*("---" for _ in heads))


def rules(parts: Any) -> str:
    """The rules of a place."""
    return cell(" → ".join(f"`{part}`" for part in parts)) or ""


def memory(name: str) -> str:
    """What the state holds, by the names of its fields."""
    method = built(name)
    if not isinstance(method, optax.GradientTransformation):
        return "-"
    params = {"w": jnp.zeros((3, 3))}
    whole, scalars = [], []
    for path, leaf in jax.tree_util.tree_leaves_with_path(method.init(params)):
        fields = [entry.name for entry in path if hasattr(entry, "name")]
        is_copy = jnp.size(leaf) == 9
        label = fields[-1] if fields else ("memory" if is_copy else "count")
        (whole if is_copy else scalars).append(label)
    copies = [f"{label} (a copy)" for label in dict.fromkeys(whole)]
    return ", ".join([*copies, *dict.fromkeys(scalars)]) or "-"


def alike() -> list[list[str]]:
    """Groups of methods whose rules have the same names in the same places."""
    groups: dict[Any, list[str]] = {}
    for name in whole_methods():
        found = composition(name)
        if not found.own:
            places = [tuple(map(shape, place)) for place in found[:-1]]
            groups.setdefault(tuple(places), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def shape(part: Any) -> str:
    """A rule without its numbers and operators; the rules within it count."""
    return re.sub(r"(=-?[\d.e-]+|, normalization=\w+(\([^)]*\))?)", "", str(part))


def composition(name: str) -> Composition:
    return sam_optax.composition(built(name))


def index() -> str:
    text = INTRODUCTION + "\n## What each does\n\n"
    text += table("method", "equation", "source", "cost", "memory of its own")
    for name in whole_methods():
        doc = Doc(name)
        lines = [re.sub(r"`|(?<=\S) +(?= )", "", line) for line in doc.equations[0].splitlines()]
        equation = cell("<br>".join(f"`{line}`" for line in lines))
        text += row(link(name), equation, doc.source, cell(doc.cost), cell(memory(name)))
    text += "\n## What each is made of\n\nAn empty place is the default: no filter, the perturbed "
    text += "gradient as the result, a payment at every step.\n\n"
    text += table("method", "filter", "ascent", "descent", "cadence", "around it")
    for name in whole_methods():
        found = composition(name)
        cadence = rules(found.cadence)
        if found.otherwise:
            cadence += f", otherwise {rules(found.otherwise)}"
        around = rules(found.around)
        if found.own:
            around = "an update of its own over these rules"
        places = map(rules, (found.filter, found.ascent, found.descent))
        text += row(link(name), *places, cadence, around)
    text += (
        "\n## Which differ by their numbers alone\n\nThe same rules in the same places, with other "
    )
    text += "numbers or another operator T:\n\n"
    for names in alike():
        text += f"* {', '.join(map(link, names))}\n"
    text += "\n## The rules\n\nEach is a transformation with a public name; "
    text += "`sam_optax.sharpness_aware` puts them together.\n"
    for kind, heading in KINDS.items():
        text += f"\n### {heading}\n\n" + table("rule", "what it does")
        for name, member in FAMILY.items():
            if member.kind == kind:
                text += row(link(name), cell(markdown(Doc(name).first)))
    return text


def page(name: str) -> str:
    """One name: its docstring, and what it is made of."""
    doc, fn = Doc(name), getattr(sam_optax, name)
    text = f"# {name}\n\n{markdown(doc.first)}\n\n```python\n{signature(name, fn)}\n```\n"
    for is_code, block in doc.blocks:
        text += f"\n```text\n{block}\n```\n" if is_code else f"\n{markdown(block)}\n"
    if FAMILY[name].kind in WHOLE:
        made = str(composition(name)) or "the default in every place"
        text += f"\n## Made of\n\n```text\n{made}\n```\n"
    titles = {"Args": "Arguments", "Note": "Cost and remarks"}
    for section, body in doc.sections.items():
        text += f"\n## {titles.get(section, section)}\n\n"
        if section == "Example":
            text += f"```pycon\n{body}\n\n```\n"
        elif section == "Args":
            text += arguments(body)
        else:
            text += f"{markdown(body)}\n"
    return text + "\n[All methods](index.md)\n"


def signature(name: str, fn: Callable[..., Any]) -> str:
    def shown(parameter: inspect.Parameter) -> inspect.Parameter:
        default = parameter.default
        if isinstance(default, optax.GradientTransformation):
            default = Literal(str(sam_optax.composition(default).ascent[0]))
        return parameter.replace(annotation=inspect.Parameter.empty, default=default)

    parameters = inspect.signature(fn).parameters.values()
    return f"sam_optax.{name}{inspect.Signature(list(map(shown, parameters)))}"


class Literal(str):
    """A default that is shown as it is."""

    def __repr__(self) -> str:
        return str(self)


def arguments(body: str) -> str:
    items = re.split(r"^(?=[*\w]+: )", body, flags=re.M)
    lines = []
    for item in filter(str.strip, items):
        name, _, text = item.partition(": ")
        lines.append(f"* `{name.lstrip('*')}`: {markdown(flat(text))}\n")
    return "".join(lines)


def pages() -> dict[str, str]:
    """Name of the file -> its text."""
    return {"index.md": index(), **{f"{name}.md": page(name) for name in FAMILY}}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in pages().items():
        (folder / path).write_text(text)
elif __name__ == "<run_path>":  # as mkdocs-gen-files runs it
    import mkdocs_gen_files

    for path, text in pages().items():
        with mkdocs_gen_files.open(f"family/{path}", "w") as file:
            file.write(text)
