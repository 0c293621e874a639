"""The Makefile and .ci/run where the environment says or lacks something, with programs that only
note how they are called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTES = """#!/bin/sh
echo "$(basename $0) $*" >> "$NOTED"
"""


def without_ours() -> dict[str, str]:
    """The environment without our constraints, and without the `make` that runs tests."""
    ours = ("PIP_CONSTRAINT", "MAKE", "MFLAGS")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.mark.parametrize(("given", "venv"), [({}, ".venv"), ({"VENV": "other/env"}, "other/env")])
@pytest.mark.parametrize("unshare", [True, False])
def test_ci_makes_all_in_the_environment_that_is_named(
    tmp_path: Path, given: dict[str, str], venv: str, unshare: bool
) -> None:
    """Whether the machine has `unshare` or not."""
    (tmp_path / "clone" / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", tmp_path / "clone" / ".ci")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("make", "unshare") if unshare else ("make",):
        (tools / name).write_text(NOTES)
        (tools / name).chmod(0o755)
    for name in ("sh", "bash", "dirname", "basename"):
        (tools / name).symlink_to(shutil.which(name) or name)
    noted = tmp_path / "noted"
    environment = {"PATH": str(tools), "NOTED": str(noted)} | given
    done = subprocess.run(
        ["bash", tmp_path / "clone" / ".ci" / "run"], env=environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    docs = ["make docs"]
    if unshare:
        docs = ["unshare --map-root-user --net true", "unshare --map-root-user --net make docs"]
    assert noted.read_text().splitlines() == [
        f"make {venv}/.installed-docs",
        *docs,
        "make --jobs=2 --output-sync=line lint test",
        "make --jobs=2 --output-sync=line package gpu-compile",
        "make optional",
    ]


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("constraints.txt", f"{ROOT}/constraints.txt"),
        ("constraints.txt https://a.b/c.txt", f"{ROOT}/constraints.txt https://a.b/c.txt"),
        (None, "unset"),
    ],
)
def test_constraints_hold_in_other_folders(given: str | None, seen: str) -> None:
    """Tests call pip where the file's name leads nowhere."""
    environment = without_ours()
    if given is not None:
        environment["PIP_CONSTRAINT"] = given
    rule = 'shown: ; @echo "$${PIP_CONSTRAINT-unset}"'
    command = ["make", "--silent", "--eval", rule, "shown"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{seen}\n"


# A part of a call of an environment's program that fails, and what the target says then.
@pytest.mark.parametrize(
    ("target", "broken", "told"),
    [
        ("optional", "pip install --quiet -r requirements-hub.txt", ""),
        ("optional", "pip install --quiet --no-deps timm", ""),
        ("optional", "python -c import huggingface_hub", ""),
        ("gpu-compile", "pip install --quiet --no-deps --target", "nothing was compiled"),
        ("gpu-compile", "python -c import jaxlib", ""),
        ("parity", "python -c import torch, torchvision", "nothing was compared"),
        ("optional", "nothing", ""),
        ("gpu-compile", "nothing", ""),
        ("parity", "nothing", ""),
    ],
)
def test_targets_fail_without_what_they_test(
    tmp_path: Path, target: str, broken: str, told: str
) -> None:
    """They ended with status 0, and no test had run."""
    (tmp_path / "bin").mkdir()
    for name in ("pip", "python"):
        program = tmp_path / "bin" / name
        program.write_text(f'{NOTES}case "$(basename $0) $*" in *"{broken}"*) exit 1;; esac\n')
        program.chmod(0o755)
    for name in (".made", ".installed", ".installed-dev"):
        (tmp_path / name).touch()
    noted = tmp_path / "noted"
    done = subprocess.run(
        ["make", target, f"VENV={tmp_path}"],
        cwd=ROOT,
        env=without_ours() | {"NOTED": str(noted)},
        capture_output=True,
        text=True,
    )
    tested = "python -m pytest" in noted.read_text()
    assert (done.returncode == 0) == tested == (broken == "nothing"), done.stderr
    assert told in done.stdout
