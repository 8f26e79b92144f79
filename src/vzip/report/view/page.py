"""The page itself: one file that asks nothing of any server, whatever the texts in it say."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

# What ends or opens something in HTML, inside JSON's strings as JSON's own escapes. All else that is not ASCII is
# escaped anyway, U+2028 and half surrogate pairs among it.
_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&'"})


def render(content: Mapping[str, Any], title: str) -> str:
    """The HTML page of a content (``build_content``).

    Texts of data sets and models reach the browser as JSON alone, which its script puts into the page as text. Scripts
    and styles run by their digest (Content-Security-Policy), so that nothing else does, and nothing is asked of a host.
    """
    folder = resources.files("vzip.report.view")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    parts = {
        "title": html.escape(title),
        "style": style,
        "script": script,
        "data": data_block(content),
        "policy": f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)};"
        " base-uri 'none'; form-action 'none'",
    }
    template = folder.joinpath("page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def data_block(content: Mapping[str, Any]) -> str:
    """JSON that may stand in a ``script`` element: ASCII, without ``<``, ``>``, ``&`` and ``'``."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
