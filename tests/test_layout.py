"""Imports run one way: structures, config <- ops <- models <- training, evaluation <- scripts; the
data road knows no model."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mrcnn_jax"
COMMANDS = [PACKAGE / "data" / "check.py"]  # draws what it has checked; it is run, never imported
FORBIDDEN = {  # folder -> what its files may not import
    "ops": ("models", "training", "evaluation", "data", "weights", "visualization"),
    "models": ("training", "evaluation", "data", "weights", "visualization"),
    "data": ("models", "training", "evaluation", "weights", "visualization"),
}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_lower_layers_do_not_know_the_upper_ones(folder: str) -> None:
    files = [path for path in (PACKAGE / folder).rglob("*.py") if path not in COMMANDS]
    assert len(files) > 3
    for path in files:
        wrong = {
            name
            for name in _imports(path)
            for upper in FORBIDDEN[folder]
            if f"{name}.".startswith(f"mrcnn_jax.{upper}.")
        }
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_nothing_imports_a_script() -> None:
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert {"train", "eval", "predict"} <= scripts
    commands = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in COMMANDS}
    for path in PACKAGE.rglob("*.py"):
        assert not scripts & {name.split(".")[0] for name in _imports(path)}, path
        assert not commands & _imports(path), path
