"""Formulas as MathML, which browsers draw themselves: no script, nothing to load."""

import html
import re
from typing import Any

import latex2mathml.converter

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
    re.DOTALL,
)


def on_page_content(content: str, **_: Any) -> str:
    """Replaces what pymdownx.arithmatex marks."""

    def drawn(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(match[2]), display=display)

    return _FORMULA.sub(drawn, content)
