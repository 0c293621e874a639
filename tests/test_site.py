"""The site of docs/conf.py, built of a few small pages: what it shows and what it refuses."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="Sphinx is not installed: see `make docs`")

DOCS = Path(__file__).parent.parent / "docs"
PIXEL = base64.b64encode(b"\x89PNG of a figure").decode()
NOTEBOOK = {
    "cells": [
        {"cell_type": "markdown", "source": ["# Notebook\n", "\n", "[a page](page.md#a-1--2)"]},
        {
            "cell_type": "code",
            "source": ["print(6 * 7)"],
            "outputs": [
                {"output_type": "stream", "text": ["42\n"]},
                {"output_type": "display_data", "data": {"image/png": [f"{PIXEL}\n"]}},
                {"output_type": "execute_result", "data": {"text/plain": ["(1, 2)"]}},
            ],
        },
    ]
}
PAGES = {
    "README.md": "# Start\n\n[notebook](docs/tutorial.ipynb), [licence](LICENSE)\n",
    "LICENSE": "free\n",
    "CHANGELOG.md": "# Changelog\n",
    "docs/README.md": "# Index\n\n## Using it\n\n| | |\n|---|---|\n| [p](page.md) | ? |\n"
    "| [n](tutorial.ipynb) | ? |\n\n## Rest\n\n| | |\n|---|---|\n"
    "| [c](../CHANGELOG.md) | ? |\n",
    "docs/page.md": "# Page\n\n## A 1 + 2\n\n```mermaid\nflowchart LR\n  A[one] --> B[two]\n```\n",
    "docs/tutorial.ipynb": json.dumps(NOTEBOOK),
}


def build(folder: Path, pages: dict[str, str]) -> tuple[int, str]:
    """Exit status and errors of the build into folder/site."""
    source = folder / "source"
    for name, text in pages.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", str(DOCS)]
    done = subprocess.run(
        [*command, str(source), str(folder / "site")], capture_output=True, text=True
    )
    return done.returncode, done.stderr


def test_what_it_shows(tmp_path: Path) -> None:
    assert build(tmp_path, PAGES) == (0, "")
    site = tmp_path / "site"
    first = (site / "index.html").read_text()
    assert first == (site / "README.html").read_text()
    shown = re.findall(r'<a class="reference internal" href="([\w/]+\.html)">(.*?)</a>', first)
    assert shown[:4] == [
        ("docs/README.html", "Index"),
        ("docs/page.html", "Page"),
        ("docs/tutorial.html", "Notebook"),
        ("CHANGELOG.html", "Changelog"),
    ]
    assert [path.read_text() for path in site.glob("_downloads/*/LICENSE")] == ["free\n"]
    notebook = (site / "docs" / "tutorial.html").read_text()
    (anchor,) = re.findall(r'href="page.html#(a.*?)"', notebook)
    assert f'<section id="{anchor}">' in (site / "docs" / "page.html").read_text()
    assert f'src="data:image/png;base64,{PIXEL}"' in notebook
    printed = [
        re.sub(r"<.*?>", "", text) for text in re.findall(r"<pre>(.*?)</pre>", notebook, re.S)
    ]
    assert printed == ["print(6 * 7)\n", "42\n", "(1, 2)\n"]
    page = (site / "docs" / "page.html").read_text()
    assert re.search(r'<img alt="Diagram" width="[\d.]+" src="data:image/svg\+xml;base64,', page)


def test_what_leads_nowhere_is_refused(tmp_path: Path) -> None:
    page = "# Page\n\n## A 1 + 2\n\n[a](none.md)\n\n[a](tutorial.ipynb#no)\n\n![a](none.png)\n"
    status, errors = build(tmp_path, PAGES | {"docs/page.md": page, "docs/new.md": "# New\n"})
    assert status != 0
    found = dict(re.findall(r"source/(docs/.*?): WARNING: (.*)", errors))
    assert found.keys() == {"docs/page.md:5", "docs/page.md:7", "docs/page.md:9", "docs/new.md"}
    assert "none.md" in found["docs/page.md:5"]
    assert "'no'" in found["docs/page.md:7"]
    assert "none.png" in found["docs/page.md:9"]
    assert "toctree" in found["docs/new.md"]


def test_what_another_host_would_serve_is_refused(tmp_path: Path) -> None:
    page = PAGES["docs/page.md"] + '\n<img alt="" src="https://example.org/a.png">\n'
    status, errors = build(tmp_path, PAGES | {"docs/page.md": page})
    assert status != 0
    assert "docs/page.html: loads https://example.org/a.png from another host" in errors
