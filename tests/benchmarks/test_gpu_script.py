"""What a GPU is asked (benchmarks/gpu.sh), tried on the CPU: parts, their limits, their lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def call(out: Path, *parts: str, **variables: str) -> subprocess.CompletedProcess[str]:
    trial = {"PLATFORM": "cpu", "CANVAS": "64 64", "PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh", str(out), *parts]
    environment = os.environ | trial | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


def test_parts_are_kept_within_the_time_and_tell_how_they_ended(tmp_path: Path) -> None:
    """A training that saves when it is told to end has done so before the next part begins."""
    stub, out = tmp_path / "python", tmp_path / "out"
    stub.write_text(
        "#!/usr/bin/env bash\n"
        f"trap 'sleep 2; echo saved >{tmp_path}/saved; exit 0' TERM\n"
        'echo "{\\"flags\\": \\"$XLA_FLAGS\\"}"\n'
        "for i in {1..400}; do sleep .1; done\n"
    )
    stub.chmod(0o755)
    given = {"PYTHON": str(stub), "TOTAL": "13", "XLA_FLAGS": "--little"}
    done = call(out, "tests", PLATFORM="gpu", **given)
    assert done.returncode == 0, done.stderr
    (late,) = lines_of(out)
    assert done.stdout == (out / "gpu.jsonl").read_text()
    assert (late["part"], late["status"], late["result"]) == ("tests", 124, {"flags": ""})
    assert 9 <= late["seconds"] <= 20
    assert (tmp_path / "saved").exists()
    with tarfile.open(out / "files.tar.gz") as archive:
        assert "./tests.log" in archive.getnames()


def test_where_nothing_is_missing_it_goes_on(tmp_path: Path) -> None:
    """torch and torchvision by name alone: no other test needs them."""
    for name in ("torch", "torchvision"):
        folder = tmp_path / "site" / f"{name}-9.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9\n")
    paths = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    done = call(tmp_path / "out", "environment", **paths)
    assert done.returncode == 0, done.stderr
    (environment,) = lines_of(tmp_path / "out")
    assert (environment["part"], environment["status"]) == ("environment", 0)
    assert environment["result"]["torch"]


def test_without_a_gpu_nothing_is_timed(tmp_path: Path) -> None:
    """Nor where a part has another name, or the data are not there."""
    done = call(tmp_path, "environment", "step2", PLATFORM="gpu", JAX_PLATFORMS="cpu")
    (line,) = lines_of(tmp_path)
    assert (done.returncode, line["part"], line["status"]) == (1, "environment", 1)
    assert line["result"]["devices"] == ["cpu"]
    reason = done.stderr.splitlines()[-1].removeprefix("missing: ").split(", ")
    assert reason[-1] == "a gpu (JAX has the cpu)"
    assert set(reason[:-1]) <= {"torch", "torchvision"}  # all else is installed for the tests
    for part, message in (
        ("step", "step: no such part (environment step2 prediction1 tests own "),
        ("own", "MRCNN_DATA: no coco300 in /no"),
    ):
        done = call(tmp_path, "environment", part, MRCNN_DATA="/no")
        assert done.returncode == 2
        assert done.stderr.startswith(message)
    assert len(lines_of(tmp_path)) == 1
