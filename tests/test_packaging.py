"""The result of `pip install .`: the package with its recipes and page, typed, and `mrcnn`; what
it requires, and its version. tests/package has the built files, in environments of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mrcnn_jax import __version__
from mrcnn_jax.commands import export_onnx
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs import hub, loggers

ROOT = Path(__file__).parent.parent
SOURCE = (
    "mrcnn_jax",
    "configs",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    *(path.name for path in ROOT.glob("requirements*.txt")),
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


COMMANDS = (  # and what each answers, by its first words
    ("train --config coco300 --workdir run", "error: data.root: not given"),  # the recipe is read
    (
        "train --config configs/coco300.py --workdir run",
        "error: configs/coco300.py: no such config file (the recipe is --config coco300)",
    ),
    (
        "train --config coco30 --workdir run",
        "error: coco30: no config file (*.py), and no recipe of configs/: bins, bins_depth, ",
    ),
    (
        "eval --workdir nowhere",
        "error: nowhere/config.json: no such file (is this a run's folder?)",
    ),
    ("predict nowhere.jpg --workdir nowhere", "error: nowhere.jpg: no such file or folder"),
    ("check --annotations nowhere.json --images .", "error: nowhere.json: "),
    ("check --help", "usage: mrcnn check "),
)
# All in one process, which imports everything once: script, then the commands.
CALL = """
import contextlib, io, json, runpy, sys
script, *commands = sys.argv[1:]
found = []
for command in commands:
    sys.argv = [script, *command.split()]
    status, output, errors = 0, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
    found.append([status, output.getvalue(), errors.getvalue()])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers(installed: Path) -> dict[str, tuple[int, str, str]]:
    """Exit status, output and errors of each of COMMANDS, installed, from a folder that has nothing
    of this project."""
    environment = {name: value for name, value in os.environ.items() if name != "MRCNN_DATA"}
    commands = [command for command, _ in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", CALL, str(installed / "bin" / "mrcnn"), *commands],
        env=environment | {"PYTHONPATH": str(installed), "COLUMNS": "200"},
        cwd=installed.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(commands, json.loads(done.stdout), strict=True))


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


@pytest.mark.parametrize(("command", "message"), COMMANDS, ids=lambda text: text.split(" ")[0])
def test_the_command(
    command: str,
    message: str,
    installed: Path,
    answers: dict[str, tuple[int, str, str]],
) -> None:
    assert [path.name for path in (installed / "bin").glob("mrcnn*")] == ["mrcnn"]
    status, output, errors = answers[command]
    if "--help" in command:
        assert (status, errors) == (0, "")
        assert output.startswith(message)
    else:
        assert (status, output, errors.count("\n")) == (2, "", 1)
        assert errors.startswith(message)


def requirements(file: str) -> list[tuple[Requirement, str]]:
    """The requirements of a file, each with the comment right above it."""
    found, comment = [], ""
    for line in (ROOT / file).read_text().splitlines():
        if line.startswith("#"):
            comment += line
        else:
            found.append((Requirement(line), comment))
            comment = ""
    return found


def test_the_extras(installed: Path) -> None:
    """One for each file, and each on the page that lists them."""
    (path,) = installed.glob("mrcnn_jax-*.dist-info/METADATA")
    extras = set(re.findall(r"^Provides-Extra: (.*)$", path.read_text(), re.MULTILINE))
    assert extras == {path.stem.split("-")[1] for path in ROOT.glob("requirements-*.txt")}
    page = (ROOT / "docs" / "installing.md").read_text()
    assert extras == set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))


@pytest.mark.parametrize("file", [path.name for path in ROOT.glob("requirements*.txt")])
def test_an_upper_bound_has_a_reason(file: str) -> None:
    for need, comment in requirements(file):
        for bound in need.specifier:
            reason = f"{bound.version} breaks" in comment
            assert bound.operator == ">=" or reason, f"{file}: {need}: which version breaks what?"
    assert "<" not in export_onnx.CONVERTER


def test_messages_ask_for_what_the_extras_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    brought = {f"'{need}'" for need, _ in requirements("requirements-loggers.txt")}
    assert set(loggers._PACKAGES.values()) == brought
    brought = {f"'{need}'" for need, _ in requirements("requirements-onnx.txt")}
    assert set(export_onnx.PACKAGES.values()) == brought
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    ((need, _),) = requirements("requirements-hub.txt")
    with pytest.raises(ConfigError, match=rf"pip install '{re.escape(str(need))}'"):
        hub.fetch("hf://a/b")


def test_the_version_is_the_changelogs() -> None:
    """The newest one that has a date."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## (\d\S*) - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    date = re.findall(r"^## \d\S* - (\S+)$", changelog, re.MULTILINE)[0]
    assert releases[0] == __version__
    titles = re.findall(r"^## (.*?)(?: - .*)?$", changelog, re.MULTILINE)
    assert [title for title in titles if title != "Unreleased"] == releases
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {__version__}\ndate-released: {date}\n" in citation
