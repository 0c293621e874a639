"""The site of `make docs`: Sphinx reads the repository's pages where they lie, so the links between
them are the ones that GitHub and editors follow. A link or anchor that leads nowhere fails the
build, and so does a page that would load something from another host."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import mmdr
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent

project = "mrcnn_jax"
author = "The mrcnn_jax authors"
release = re.findall(r'__version__ = "(.*)"', (ROOT / "mrcnn_jax/__init__.py").read_text())[0]
extensions = ["myst_parser"]
root_doc = "README"
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
include_patterns = ["*.md", "docs/*.md", "docs/*.ipynb", "benchmarks/*.md"]
exclude_patterns = [".*", "build", "data", "dist", "runs"]
highlight_language = "none"  # of indented blocks, which are commands
myst_heading_anchors = 6  # with the names that GitHub gives them
myst_fence_as_directive = ["mermaid"]
html_theme = "furo"
html_title = f"{project} {release}"
html_show_copyright = html_show_sphinx = html_copy_source = html_use_index = False

# What a browser fetches by itself, unlike a link.
FETCHED = re.compile(
    r"""<(?!a\b)\w[^>]*\s(?:src|srcset|href|data)=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|(?:@import\s+|url\()["']?((?:https?:)?//[^"'\s)]+)"""
)


def contents(index: str) -> str:
    """The table of contents: docs/README.md, then each of its headings with its links."""
    trees = [["docs/README"]]
    for section in index.split("\n## ")[1:]:
        heading, _, rows = section.partition("\n")
        links = re.findall(r"\]\(([\w./]+)\)", rows)
        pages = [f"docs/{link}".replace("docs/../", "").rpartition(".")[0] for link in links]
        trees.append([f":caption: {heading}", *pages])
    return "".join("\n".join(["", "```{toctree}", ":hidden:", *tree, "```", ""]) for tree in trees)


def notebook_page(notebook: dict[str, Any]) -> str:
    """The cells of a notebook, and what they printed and drew, in Markdown."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                image = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="Drawn by this cell" src="data:image/png;base64,{image}">')
            else:
                printed = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{printed.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


class Mermaid(SphinxDirective):
    """A diagram, drawn now: in the browser it would need a script."""

    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        svg = mmdr.render("\n".join(self.content)).svg()
        (width,) = re.findall(r'<svg [^>]*viewBox="\S+ \S+ (\S+) \S+"', svg)
        data = base64.b64encode(svg.encode()).decode()
        image = f'<img alt="Diagram" width="{width}" src="data:image/svg+xml;base64,{data}"'
        return [nodes.raw("", f'<p>{image} style="background: white"></p>', format="html")]


def on_source(app: Sphinx, name: str, source: list[str]) -> None:
    if name == root_doc:
        source[0] += contents((Path(app.srcdir) / "docs/README.md").read_text())
    if Path(app.env.doc2path(name)).suffix == ".ipynb":
        source[0] = notebook_page(json.loads(source[0]))


def on_end(app: Sphinx, error: Exception | None) -> None:
    if error:
        return
    site = Path(app.outdir)
    for path in (*site.rglob("*.html"), *site.rglob("*.css")):
        for match in FETCHED.finditer(path.read_text()):
            where = path.relative_to(site)
            raise ExtensionError(f"{where}: loads {match[1] or match[2]} from another host")
    shutil.copy(site / f"{root_doc}.html", site / "index.html")  # what servers look for


def setup(app: Sphinx) -> None:
    app.add_directive("mermaid", Mermaid)
    app.connect("source-read", on_source)
    app.connect("build-finished", on_end)
