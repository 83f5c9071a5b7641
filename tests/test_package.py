"""The public face: names, docstrings, the examples."""

import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib

import jax
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


def test_the_import_brings_nothing_but_itself():
    """Within milliseconds of JAX and Optax: no module of theirs, or of Python, that they lack."""
    code = (
        "import sys, jax, optax; before = set(sys.modules); import sam_optax; "
        "more = {name for name in set(sys.modules) - before if name.split('.')[0] != 'sam_optax'}; "
        "assert not more, more"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_run_says_what_to_try():
    done = subprocess.run(
        [sys.executable, "-m", "sam_optax"], capture_output=True, text=True, check=True
    )
    assert f"sam_optax {sam_optax.__version__} with jax {jax.__version__}" in done.stdout
    assert "cpu:0" in done.stdout
    scripts = re.findall(r"^  python (\S+)", done.stdout, re.M)
    assert len(scripts) == 3 and all((ROOT / script).exists() for script in scripts)
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Source"] in done.stdout and urls["Documentation"] in done.stdout
    site = (ROOT / "mkdocs.yml").read_text()
    assert (
        f"repo_url: {urls['Source']}\n" in site and f"site_url: {urls['Documentation']}\n" in site
    )


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
