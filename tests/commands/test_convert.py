"""The converters as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from exports import (
    PICTURES,
    as_voc,
)

ROOT = Path(__file__).parents[2]


def test_the_command(tmp_path: Path) -> None:
    options = as_voc(tmp_path, PICTURES)
    command = [
        sys.executable,
        "-m",
        "mrcnn_jax.commands.convert",
        "voc",
        str(tmp_path),
        "--out",
        str(options.out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("kept 3 images, 5 objects, 0 crowds\n")
    files = f"--annotations {options.out} --images {tmp_path / 'JPEGImages'}"
    assert f"    python -m mrcnn_jax.commands.check {files}\n" in done.stdout
    (tmp_path / "Annotations" / "a.xml").write_text("")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "Annotations" / "a.xml") in done.stderr
