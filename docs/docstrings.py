"""The docstrings as Markdown: links, and examples in code blocks."""

import re
from typing import Any

import griffe

_LINK = re.compile(r"`([^`<]+?)\s*<(https?://[^>]+)>`_")


class Docstrings(griffe.Extension):
    """Turns reStructuredText links into Markdown ones, and names sections as griffe does."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            text = _LINK.sub(lambda m: f"[{' '.join(m[1].split())}]({m[2]})", obj.docstring.value)
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"^\s*Raises:\s+Nothing\.$", "", text, flags=re.MULTILINE)
