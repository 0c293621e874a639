"""benchmarks/kill_and_resume.py: a few of the kills that it makes by the hundred, and that it would
tell if they did harm."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.kill_and_resume import differences, get_config, killed_run
from mrcnn_jax.config.schema import Config

ROOT = Path(__file__).parents[2]


def test_a_killed_run_ends_with_the_bits_of_one_that_was_left_alone(
    tiny_run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--config",
        str(ROOT / "tests" / "tiny.py"),
        "--workdir",
        str(run),
    ]
    command += [
        "--data.root",
        str(tiny_config.data.root),
        "--data.cache",
        str(tiny_config.data.cache),
        "--save-every-steps",
        "2",
    ]
    killed, failed = killed_run(command, run, tmp_path / "log", ["start", "save"], seed=0)
    assert failed == 0
    assert killed.total() == 2
    assert killed["start"] >= 1
    assert differences(run, tiny_run, tiny_config) == []


def test_a_start_that_fails_and_a_run_that_ends_too_soon_are_counted(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for status in (0, 1):
        command = [
            sys.executable,
            "-c",
            f"print('training programs to compile', flush=True); raise SystemExit({status})",
        ]
        assert killed_run(command, tmp_path, tmp_path / "log", ["save"], seed=0) == ({}, status)


def test_what_differs_is_found(tiny_run: Path, tiny_config: Config, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    first, second = run / "checkpoints" / "00000012-rpn", run / "checkpoints" / "00000018-box"
    assert differences(run, tiny_run, tiny_config) == []
    shutil.rmtree(second / "model")
    shutil.copytree(first / "model", second / "model")
    meta = second / "meta.json"
    meta.write_text(meta.read_text() + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    found = differences(run, tiny_run, tiny_config)
    assert found[:2] == ["metrics.jsonl", str(meta)]
    assert found[2:]
    assert all(line.startswith("00000018-box: params/box_head/") for line in found[2:])
    shutil.rmtree(first)
    assert differences(run, tiny_run, tiny_config) == [
        "metrics.jsonl",
        "the stages' last checkpoints",
    ]


def test_the_benchmark_has_many_stage_changes() -> None:
    config = get_config()
    assert len(config.stages) >= 10
    assert len({stage.name for stage in config.stages}) == len(config.stages)
