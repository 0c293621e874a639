"""The page of an evaluation: one HTML file that opens from disk, without a network or a server.

Its data is in it as JSON; page.js inserts every text as text, never as markup. A content security
policy allows the file's own style, script and images, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from mrcnn_jax.output import printable_values


def render(data: Mapping[str, Any]) -> str:
    """Render the HTML of `page.contents.report_data`."""
    files = resources.files(__name__)
    page, style, script = (
        (files / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    # Without "<" no text of the data can end its element or open another.
    text = json.dumps(printable_values(data), allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    )
    # The data comes last, so that no placeholder in it is filled.
    for place, content in (
        ("{{policy}}", policy),
        ("{{style}}", style),
        ("{{script}}", script),
        ("{{data}}", text),
    ):
        page = page.replace(place, content)
    return page


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
