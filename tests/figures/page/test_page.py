"""The page's HTML against what its texts try to do."""

from __future__ import annotations

import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_cases import NAMES, case, data_of

from mrcnn_jax.figures import page
from mrcnn_jax.figures.page import render
from mrcnn_jax.output import printable_values


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return data_of(*case())


class _Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of those with an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text: str) -> None:
        name = self.elements[-1][1].get("id") if self.elements else None
        if name:
            self.texts[name] = self.texts.get(name, "") + text


def test_no_text_of_the_data_becomes_markup(data: dict[str, Any]) -> None:
    """With names that are markup the page has the elements it has without them, and the names
    arrive whole, but for control characters."""
    hostile, plain = _Elements(render(data)), _Elements(render({}))
    assert hostile.elements == plain.elements
    assert json.loads(hostile.texts["data"]) == json.loads(json.dumps(printable_values(data)))
    assert NAMES[3] in [one["name"] for one in json.loads(hostile.texts["data"])["classes"]]
    assert data["config"] == {
        "name": NAMES[3],
        "model": {"scales": [16, 32], "high": "Infinity"},
        "stages": [{"name": "rpn"}],
    }


def test_the_file_names_nothing_outside_itself(data: dict[str, Any]) -> None:
    text = render(data)
    assert not re.search(
        r"https?:|wss?:|@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|document\.write",
        text,
    )
    elements = _Elements(text).elements
    assert not [attributes for _, attributes in elements if "src" in attributes]
    links = [
        attributes["href"] for tag, attributes in elements if "href" in attributes or tag == "link"
    ]
    assert links
    assert all(link and link.startswith("#") for link in links)
    policy = next(
        a["content"]
        for tag, a in elements
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_the_page_is_packaged() -> None:
    """Its files are found beside the code in a checkout; an installed package has those that are
    named."""
    folder = Path(page.__file__).parent
    named = tomllib.loads((folder.parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    assert sorted(named["mrcnn_jax.figures.page"]) == sorted(
        file.name for file in folder.iterdir() if file.suffix not in (".py", "")
    )


def test_control_characters_do_not_reach_the_page() -> None:
    page = render({"heading": {"run": "a\x1b[2J\u202eb\n"}})
    assert r"a\\x1b[2J\\u202eb\\n" in page  # escaped twice: as text, and as JSON
    assert not {"\x1b", "\u202e"} & set(page)
