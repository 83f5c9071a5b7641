"""The public face: names, docstrings, the examples."""

import importlib.metadata
import inspect
import re
import subprocess
import sys

import pytest
from scripts import EXAMPLES, ROOT, SEVERAL_DEVICES, run_example

import sam_optax
import sam_optax.averaging
import sam_optax.averaging.nnx
import sam_optax.draw
import sam_optax.equinox
import sam_optax.landscape
import sam_optax.nnx
import sam_optax.sharpness

# A leading underscore marks what examples share; programs/test_experiments.py runs experiments.
ONE_DEVICE = [p for p in sorted(EXAMPLES.glob("[!_]*.py")) if p.stem not in SEVERAL_DEVICES]
MODULES = (
    *(sam_optax, sam_optax.averaging, sam_optax.averaging.nnx, sam_optax.draw),
    *(sam_optax.equinox, sam_optax.landscape, sam_optax.nnx, sam_optax.sharpness),
)
FUNCTIONS = [
    (module, name)
    for module in MODULES
    for name in getattr(module, "__all__", ("value_and_grad", "grad", "value_and_grad_fn"))
    if inspect.isfunction(getattr(module, name))
]


def test_names_are_sorted_and_real():
    assert list(sam_optax.__all__) == sorted(sam_optax.__all__)
    assert all(hasattr(sam_optax, name) for name in sam_optax.__all__)
    assert (ROOT / "sam_optax" / "py.typed").exists()


def test_version_stands_in_one_place():
    assert importlib.metadata.version("sam-optax") == sam_optax.__version__
    assert sam_optax.__version__ not in (ROOT / "pyproject.toml").read_text()


def test_the_core_needs_jax_and_optax_alone():
    required = importlib.metadata.requires("sam-optax") or []
    core = {re.split(r"[^\w-]", r)[0] for r in required if "extra ==" not in r}
    assert core == {"jax", "optax"}
    code = (
        # Older versions of Optax bring chex along themselves.
        "import sys, jax, optax; before = set(sys.modules); import sam_optax; "
        "assert not {'flax', 'chex', 'equinox', 'matplotlib'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_family_of_the_readme_is_the_table():
    """Every method has a row, and the rows of methods with inputs of their own name them."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)[`(](.*)$", text[text.index("## The family") :], re.M)
    shown = {name for name, _ in rows}
    whole = ("method", "wrapper", "optimizer", "examples")
    named = {name for name, member in sam_optax.FAMILY.items() if member.kind in whole}
    assert named - {"cadenced", "draws"} <= shown, named - shown
    rules = set(sam_optax.FAMILY) - named
    assert not {name for name in rules if f"`{name}`" not in text}


@pytest.mark.parametrize("module, name", FUNCTIONS, ids=lambda x: getattr(x, "__name__", x))
def test_docstrings_say_all(module, name):
    doc = inspect.getdoc(getattr(module, name)) or ""
    parameters = inspect.signature(getattr(module, name)).parameters
    sections = ("Returns:", "Raises:", "Example:", ">>>", "References:")
    for section in (*sections, "Args:") if parameters else sections:
        assert section in doc, f"{name} lacks {section}"
    assert doc.splitlines()[0].endswith(".")
    for parameter in parameters:
        assert re.search(rf"^\s*\**{parameter}: ", doc, re.M), (
            f"{name} does not describe {parameter}"
        )


@pytest.mark.examples
@pytest.mark.parametrize("path", ONE_DEVICE, ids=lambda path: path.stem)
def test_examples_run_with_small_settings(path, tmp_path):
    run_example(path, tmp_path)
