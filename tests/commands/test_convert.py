"""The converters as a command."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
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
        "mrcnn_jax",
        "convert",
        "voc",
        str(tmp_path),
        "--out",
        str(options.out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("kept 3 images, 5 objects, 0 crowds\n")
    files = f"--annotations {options.out} --images {tmp_path / 'JPEGImages'}"
    assert f"    python -m mrcnn_jax check {files}\n" in done.stdout
    (tmp_path / "Annotations" / "a.xml").write_text("")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "Annotations" / "a.xml") in done.stderr


def test_a_data_set_is_cut_into_tiles(
    mrcnn: Callable[..., int], tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the command that it prints checks the result; a mistake is one line."""
    file, images, out = tiny.annotations(tiny_data, "val"), tiny_data / "images", tmp_path / "out"
    words = ("convert", "tile", file, "--images", images, "--out", out, "--tile", 64)
    assert mrcnn(*words) == 0
    told, check = capsys.readouterr().out.splitlines()[-2:]
    assert told.startswith("8 images: ")
    assert told.endswith(f" tiles in {out}; to check:")
    assert mrcnn(*re.split("mrcnn(?:_jax)? ", check)[1].split()) == 0
    assert f"kept {told.split()[2]} images, " in capsys.readouterr().out
    assert mrcnn(*words) == 2
    assert capsys.readouterr().err == f"error: --out: {out}: is there already (name a new folder)\n"
