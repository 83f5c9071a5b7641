"""Keeps the numbers of Markdown pages equal to those of the JSON that they come from.

    python benchmarks/quote.py            # writes the quoted tables of all pages anew
    python benchmarks/quote.py --check    # says what differs, and fails if anything does

A table, between two comments, is written from a JSON's "pages", which hold titles and cells:

    <!-- quote benchmarks/results/benchmarks.json: Step time of SAM -->
    <!-- end -->

Without a title, every number of the text between the comments must stand in a table of that JSON:

    <!-- quote experiments/results/compare_mnist.json -->
    momentum_sam costs 1.06 of a plain step.
    <!-- end -->

Such numbers are those with a decimal point or a percent sign. Paths are from the repository's root.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs", "experiments/RESULTS.md")
QUOTE = re.compile(
    r"(?P<open><!-- quote (?P<path>[^\s:]+)(?:: (?P<title>.+?))? -->\n)"
    r"(?P<body>.*?)(?P<close><!-- end -->)",
    re.DOTALL,
)
ANY_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?")
NUMBER = re.compile(r"(?<![\w.])(?:\d+\.\d+(?![\w.]*\d)|\d+(?=\s?%))")


def pages(root: Path = ROOT) -> Iterator[Path]:
    """The Markdown files that may quote."""
    for name in PAGES:
        path = root / name
        yield from sorted(path.rglob("*.md")) if path.is_dir() else [path] * path.exists()


def markdown(cells: list[list[str]]) -> str:
    """A table; columns of numbers to the right."""
    header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    number = lambda cell: cell in ("", "-") or cell.lstrip("-")[:1].isdigit()
    rule = ["---:" if all(map(number, column)) else "---" for column in zip(*rows, strict=True)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, rule, *rows))


def quoted(text: str, root: Path = ROOT) -> tuple[str, list[str]]:
    """The text with its tables written anew, and what is wrong with its other quotes."""
    faults: list[str] = []

    def anew(match: re.Match[str]) -> str:
        path, title, body = match["path"], match["title"], match["body"]
        file = root / path
        if not file.exists():
            faults.append(f"{path} is not there")
            return match[0]
        tables = json.loads(file.read_text()).get("pages", {})
        if title is None:
            cells = [cell for table in tables.values() for row in table for cell in row]
            known = {number for cell in cells for number in ANY_NUMBER.findall(cell)}
            missing = [number for number in NUMBER.findall(body) if number not in known]
            faults.extend(f"{number} is in no table of {path}" for number in missing)
            return match[0]
        if title not in tables:
            faults.append(f"{path} has no table {title!r}, but {sorted(tables)}")
            return match[0]
        return f"{match['open']}\n{markdown(tables[title])}\n{match['close']}"

    new = QUOTE.sub(anew, text)
    if len(QUOTE.findall(text)) != text.count("<!-- quote "):
        faults.append("a quote has no end, or is not alone on its line")
    return new, faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    failed = False
    for page in pages():
        text = page.read_text()
        new, faults = quoted(text)
        faults += ["its tables are not those of the JSON"] * (args.check and new != text)
        if not args.check and new != text:
            page.write_text(new)
            print(f"{page.relative_to(ROOT)}: tables written anew")
        for fault in faults:
            print(f"{page.relative_to(ROOT)}: {fault}", file=sys.stderr)
        failed |= bool(faults)
    sys.exit(failed)


if __name__ == "__main__":
    main()
