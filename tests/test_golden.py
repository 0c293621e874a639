"""Every preset is as tests/golden/ has it."""

from __future__ import annotations

import difflib

import golden
import pytest

PRESETS = golden.presets()
UPDATE = "if the change is meant, run `python -m tests.golden` and commit what it writes"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_unchanged(name: str) -> None:
    for end, text in golden.texts(PRESETS[name]).items():
        path = golden.FOLDER / f"{name}.{end}"
        old = path.read_text() if path.exists() else ""
        lines = (part.splitlines(keepends=True) for part in (old, text))
        diff = "".join(
            difflib.unified_diff(*lines, fromfile=f"tests/golden/{path.name}", tofile="now", n=1)
        )
        assert not diff, f"{UPDATE}\n{diff}"


def test_every_file_belongs_to_a_preset() -> None:
    expected = {f"{name}.{end}" for name in PRESETS for end in ("config.json", "parameters.txt")}
    assert {path.name for path in golden.FOLDER.iterdir()} == expected, UPDATE
