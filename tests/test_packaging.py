"""What `pip install .` gives: the package with its recipes and page, typed, and the commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mrcnn_jax import __version__

ROOT = Path(__file__).parent.parent
SOURCE = (
    "mrcnn_jax",
    "configs",
    "pyproject.toml",
    "setup.py",
    "requirements.txt",
    "requirements-cuda.txt",
    "requirements-dev.txt",
    "README.md",
    "LICENSE",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package in a folder of its own, without what it depends on; nothing is asked of the
    network."""
    folder = tmp_path_factory.mktemp("install")
    source = folder / "source"
    source.mkdir()
    for name in SOURCE:  # a copy: the build leaves folders beside its source
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run(
        [*command, "--target", str(folder / "site"), str(source)], check=True, cwd=folder
    )
    return folder / "site"


def call(installed: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """An installed command, from a folder that has nothing of this project."""
    environment = {name: value for name, value in os.environ.items() if name != "MRCNN_DATA"}
    return subprocess.run(
        [sys.executable, str(installed / "bin" / command[0]), *command[1:]],
        env=environment | {"PYTHONPATH": str(installed), "COLUMNS": "200"},
        cwd=installed.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_files(installed: Path) -> None:
    package = installed / "mrcnn_jax"
    code = {
        path.relative_to(ROOT)
        for path in (ROOT / "mrcnn_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {
        path for path in code if not (installed / path).is_file()
    } == set()  # py.typed and the page among them
    assert {path.name for path in (ROOT / "configs").glob("*.py")} == {
        path.name for path in (package / "configs").glob("*.py")
    }
    assert (installed / f"mrcnn_jax-{__version__}.dist-info").is_dir()


def test_a_recipe_is_found_by_its_name(installed: Path) -> None:
    done = call(installed, "mrcnn-train", "--config", "coco300", "--workdir", "run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(
        "error: data.root: not given"
    )  # it is read: the data are what is missing
    done = call(installed, "mrcnn-train", "--config", "coco30", "--workdir", "run")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: coco30: no config file (*.py), and no recipe of configs/: coco300, "
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("mrcnn-eval", "--workdir", "nowhere"),
            "error: nowhere/config.json: no such file (is this a run's folder?)",
        ),
        (
            ("mrcnn-predict", "nowhere.jpg", "--workdir", "nowhere"),
            "error: nowhere.jpg: no such file or folder",
        ),
        (
            ("mrcnn-check", "--annotations", "nowhere.json", "--images", "."),
            "error: nowhere.json: ",
        ),
        (("mrcnn-check", "--help"), "usage: mrcnn-check "),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_the_other_commands(command: tuple[str, ...], message: str, installed: Path) -> None:
    done = call(installed, *command)
    assert (done.stderr or done.stdout).startswith(message)
    assert done.returncode == (0 if "--help" in command else 2)
