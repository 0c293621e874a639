"""What a GPU is asked (benchmarks/gpu.sh), tried on the CPU: parts, their limits, their lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(out: Path, *parts: str, **variables: str) -> list[dict[str, Any]]:
    """The lines of gpu.jsonl after a run of these parts."""
    trial = {"PLATFORM": "cpu", "CANVAS": "64 64", "PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh", str(out), *parts]
    environment = os.environ | trial | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (out / "gpu.jsonl").read_text().splitlines()
    assert done.stdout.splitlines() == lines[-len(parts) :]
    return [json.loads(line) for line in lines]


def test_parts_are_kept_within_the_time_and_tell_how_they_ended(tmp_path: Path) -> None:
    (environment,) = run(tmp_path / "out", "environment")
    assert (environment["part"], environment["status"]) == ("environment", 0)
    assert environment["result"]["devices"] == ["cpu"]

    first, late = run(tmp_path / "out", "prediction1", TOTAL="10")
    assert first == environment
    assert (late["part"], late["status"], late["result"]) == ("prediction1", 124, None)
    assert 9 <= late["seconds"] <= 20
    assert (tmp_path / "out" / "prediction1.log").exists()
