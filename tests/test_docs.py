"""What docs/ says of the code: the places that it names are there, and its example prints what it
says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("architecture.md", "extending.md")
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_places_that_a_page_names_exist(page: str) -> None:
    """`file.py`, `name` in it; `module.name` of a module of mrcnn_jax/training/; and links."""
    text = CODE.sub("", (ROOT / "docs" / page).read_text())
    places = [
        (ROOT / path, name)
        for path, name in re.findall(r"`((?:mrcnn_jax|tests)/[\w/]+\.py)`,\s+`([\w.]+)`", text)
    ]
    of_training = re.findall(r"`(stages|step|optimizer)\.(\w+)`", text)
    places += [(ROOT / "mrcnn_jax/training" / f"{module}.py", name) for module, name in of_training]
    assert len(places) > 7
    for path, name in places:
        assert re.search(rf"\b{name.split('.')[-1]}\b", path.read_text()), (
            f"{page}: {path.relative_to(ROOT)} has no {name}"
        )
    for target, anchor in re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", text):
        headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / target).read_text(), re.MULTILINE)
        assert not anchor or anchor in {
            heading.lower().replace(" ", "-") for heading in headings
        }, f"{page}: {target}#{anchor}"


def test_the_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    code = CODE.findall((ROOT / "docs" / "architecture.md").read_text())[-1]
    exec(compile(code, "architecture.md", "exec"), {})
    expected = re.findall(r"^print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == expected
    assert len(expected) == 2
