"""The Makefile and .ci/run where the environment says something, with a `make` that only notes."""

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
    ours = ("PIP_CONSTRAINT", "MAKE", "MFLAGS")  # and of the `make` that runs tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    if given is not None:
        environment["PIP_CONSTRAINT"] = given
    rule = 'shown: ; @echo "$${PIP_CONSTRAINT-unset}"'
    command = ["make", "--silent", "--eval", rule, "shown"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{seen}\n"
