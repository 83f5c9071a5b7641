"""Numbers on Markdown pages are those of the JSON that they name."""

import importlib
import json

import pytest
from scripts import ROOT

pytestmark = pytest.mark.examples  # it tests a script, not the library


@pytest.fixture
def quote(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("quote")


@pytest.fixture
def root(tmp_path):
    pages = {"Times": [["step", "ms"], ["plain", "1.25"], ["a|b", "2.50 (2.4-2.6)"]]}
    (tmp_path / "r.json").write_text(json.dumps({"pages": pages}))
    return tmp_path


def test_all_pages_quote_what_their_json_says(quote):
    for page in quote.pages():
        text = page.read_text()
        new, faults = quote.quoted(text)
        assert not faults, (page, faults)
        assert new == text, f"{page}: run python benchmarks/quote.py"


def test_committed_results_say_when_where_and_under_what_load():
    files = sorted(ROOT.glob("*/results/*.json"))
    for file in files:
        found = json.loads(file.read_text())
        # Counts of a compiled program and times, in one file, have their own circumstances.
        for part in [found] if "date" in found else found.values():
            load = set() if part is found.get("volumes") else {"load"}
            assert {"date", "versions", "device", "cores"} | load <= set(part), file
        assert file.stat().st_size < 300_000, file


def test_a_table_is_written_anew(quote, root):
    begin, end = "<!-- quote r.json: Times -->\n", "<!-- end -->"
    new, faults = quote.quoted(f"before\n{begin}| step | ms |\n| plain | 1.26 |\n{end}\n", root)
    rows = "| step | ms |\n| --- | ---: |\n| plain | 1.25 |\n| a\\|b | 2.50 (2.4-2.6) |\n"
    assert (new, faults) == (f"before\n{begin}\n{rows}\n{end}\n", [])
    assert quote.quoted(new, root) == (new, [])


@pytest.mark.parametrize(
    "text, fault",
    [
        ("It takes 1.25 ms.", None),
        ("It takes 2.4 or 2.6 ms, on 2 cores, in jax 0.10.2.", None),
        ("It takes 1.26 ms.", "1.26 is in no table of r.json"),
        ("It keeps 90 % of it.", "90 is in no table of r.json"),
    ],
)
def test_numbers_in_prose_stand_in_a_table(quote, root, text, fault):
    quoted = f"<!-- quote r.json -->\n{text}\n<!-- end -->\n"
    assert quote.quoted(quoted, root) == (quoted, [fault] if fault else [])


@pytest.mark.parametrize(
    "text, fault",
    [
        ("<!-- quote r.json: Other -->\n<!-- end -->", "has no table 'Other', but"),
        ("<!-- quote none.json: Times -->\n<!-- end -->", "none.json is not there"),
        ("<!-- quote r.json: Times -->\n| 1 |\n", "a quote has no end"),
    ],
)
def test_quotes_that_lead_nowhere(quote, root, text, fault):
    new, faults = quote.quoted(text, root)
    assert new == text and len(faults) == 1 and fault in faults[0]
