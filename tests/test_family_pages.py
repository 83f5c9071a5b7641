"""The pages of the family, made from the code."""

import re
import runpy
import sys
import types

import optax
import public
import pytest
from scripts import ROOT

import sam_optax
from sam_optax import FAMILY

SCRIPT = ROOT / "docs" / "generate_family.py"


@pytest.fixture(scope="module")
def script():
    return types.SimpleNamespace(**runpy.run_path(str(SCRIPT), run_name="family_pages"))


@pytest.fixture(scope="module")
def pages(script):
    return script.pages()


def test_every_name_has_a_page_and_every_method_a_row_of_each_table(script, pages):
    assert set(pages) == {"index.md", *(f"{name}.md" for name in FAMILY)}
    _, does, made, _, rules = re.split(r"^## ", pages["index.md"], flags=re.M)
    for name, member in FAMILY.items():
        row = f"| [`{name}`]({name}.md) |"
        if member.kind in script.WHOLE:
            assert row in does and row in made and row not in rules
        else:
            assert row in rules and row not in does


def test_links_lead_somewhere(pages):
    written = {path.name for path in (ROOT / "docs" / "family").glob("*.md")}
    for text in pages.values():
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert target in pages.keys() | written, target


def test_every_row_says_something(pages):
    """An equation, a source and a cost, and tables that Markdown reads as such."""
    for line in pages["index.md"].splitlines():
        if line.startswith("| "):
            assert not re.search(r"`[^`]*\\\|[^`]*`", line), (
                line
            )  # would be shown with its backslash
            cells = re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "code", line))[1:-1]
            assert len(cells) in (2, 5, 6)
            if len(cells) == 5:
                assert all(cell.strip() for cell in cells), line
                assert line.count("`") % 2 == 0, line


def test_a_page_tells_equation_arguments_and_composition(pages):
    text = pages["gsam.md"]
    assert "sam_optax.gsam(rho=0.05, alpha=0.4, *, p=None" in text
    assert "out = g_s - alpha (g - <g, u> u)" in text
    assert "descent   surrogate_gap(alpha=0.4)" in text
    assert "* `alpha`: weight of the orthogonal part" in text
    assert "](https://arxiv.org/abs/2203.08065)" in text
    assert not re.search(r"`_|<https", "".join(pages.values()))  # reStructuredText


def test_methods_that_differ_by_their_numbers_alone(script):
    groups = {tuple(names) for names in script.alike()}
    assert {
        ("gradient_norm_penalty", "wsam"),
        ("asam", "sam"),
        ("late_phase", "late_tail"),
    } <= groups
    assert not any({"gsam", "sam"} <= set(names) for names in groups)


def test_it_runs_alone_and_within_mkdocs(pages, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "alone")])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert {p.name: p.read_text() for p in (tmp_path / "alone").iterdir()} == pages

    (tmp_path / "family").mkdir()
    plugin = types.ModuleType("mkdocs_gen_files")
    plugin.open = lambda path, mode: (tmp_path / path).open(mode)
    monkeypatch.setitem(sys.modules, "mkdocs_gen_files", plugin)
    runpy.run_path(str(SCRIPT))
    assert {p.name: p.read_text() for p in (tmp_path / "family").iterdir()} == pages


# What they are made from.


def test_compositions_are_those_of_the_aliases():
    made = lambda method: str(sam_optax.composition(method)).replace("\n", "; ")
    assert made(sam_optax.sam(0.1)) == "ascent    dual_ascent(rho=0.1)"
    assert made(sam_optax.asam(0.5, p=3.0, mask=False)) == (
        "ascent    dual_ascent(rho=0.5, p=3, normalization=elementwise(eta=0.01), mask=False)"
    )
    assert made(sam_optax.sparse_sam(every=7)) == (
        "ascent    dual_ascent(rho=0.05) -> largest_entries(sparsity=0.5, every=7)"
    )
    assert made(sam_optax.friendly_sam(descent=sam_optax.renormalise())) == (
        "filter    without_average(sigma=1, decay=0.9); ascent    dual_ascent(rho=0.05); "
        "descent   renormalise()"
    )
    inside = sam_optax.randomised(sam_optax.look_sam(rho=lambda count: 0.1), 0.3)
    assert made(inside) == (
        "ascent    dual_ascent(rho=a function); descent   keep_orthogonal(); "
        "cadence   with_probability(probability=0.3) -> every(k=5); "
        "otherwise reuse_orthogonal(alpha=0.7)"
    )
    assert made(sam_optax.tilted_sam(samples=2)).endswith("around    tilted(count=2, tilt=1)")


def test_compositions_of_ones_own():
    def halved(updates):
        return updates

    ascent = optax.chain(sam_optax.stateless(halved), optax.clip(1.0), sam_optax.dual_ascent(0.1))
    method = sam_optax.sharpness_aware(ascent, when=lambda count: count > 3)
    found = sam_optax.composition(method)
    assert [part.name for part in found.filter] == ["halved", "clip"]
    assert found.ascent == (sam_optax.Part("dual_ascent", {"rho": 0.1}),)
    assert [part.name for part in found.cadence] == ["lambda"] and not found.descent
    with pytest.raises(TypeError, match="method must be a transformation or a function, got 3"):
        sam_optax.composition(3)


@pytest.mark.parametrize(
    "name", [n for n, m in FAMILY.items() if m.kind not in ("method", "wrapper", "optimizer")]
)
def test_every_rule_is_found_by_its_name_in_its_place(name):
    if FAMILY[name].kind in ("examples", "door"):
        assert sam_optax.composition(sam_optax.esam(lambda w: w)).own == "esam"
        return
    found = sam_optax.composition(public.build(name))
    place = FAMILY[name].kind
    assert name in {part.name for part in getattr(found, place)}
