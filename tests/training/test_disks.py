"""A disk that is full, read-only or damaged ends a run as it should, and a freed one resumes it."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from whole_runs import ENDS, arrays, assert_same_bits

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.training import loop


def test_the_checkpoints_must_find_room_before_the_first_step(
    tiny_run: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three stages' last ones, two between and one being written, of the sizes of what a finished
    run holds."""
    sizes = [
        sum(leaf.nbytes for leaf in arrays(tiny_run / "checkpoints" / name).values())
        for name in ENDS
    ]
    needed = sum(sizes) + 3 * max(sizes)
    usage = shutil.disk_usage(tmp_path)
    compiled = "something was compiled"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "initialise", lambda *_, **__: pytest.fail(compiled))
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(
            ConfigError,
            match=r"run: its checkpoints need \d MiB of disk, and \d MiB are free "
            r"\(--keep-checkpoints is 2\)",
        ):
            loop.train(tiny_config, tmp_path / "run")
        assert not (tmp_path / "run" / "config.json").exists()
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
        with pytest.raises(pytest.fail.Exception, match=compiled):
            loop.train(tiny_config, tmp_path / "run")
    # A run that has its checkpoints needs less.
    run = shutil.copytree(tiny_run, tmp_path / "done")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * max(sizes)))
    loop.train(tiny_config, run)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of orbax's threads, after they failed
def test_a_disk_that_fills_up_ends_the_run_and_a_freed_one_resumes_it(
    tiny_run: Path,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: Any,
) -> None:
    """The second save may write no file of more than 50,000 bytes: the system itself refuses."""
    run, saves = tmp_path / "run", 0
    real = Checkpoints.save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self: Checkpoints, *arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            real(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(cli.Failure) as error:
            loop.train(replace(tiny_config, save_every_steps=2), run)
    assert str(error.value) == (
        f"{run}/checkpoints/00000004-rpn: {os.strerror(errno.EFBIG)} "
        "(the same command goes on from the last checkpoint)"
    )
    # A thread of orbax may still write under the hidden name, which the next run removes.
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left - {".00000004-rpn"} == {"00000002-rpn"}
    (run / "checkpoints" / ".00000004-rpn").mkdir(exist_ok=True)
    stop_at(3)
    with pytest.raises(cli.Stopped, match="stage rpn, step 5 is saved"):
        loop.train(tiny_config, run)
    assert not (run / "checkpoints" / ".00000004-rpn").exists()
    assert (tiny_run / "metrics.jsonl").read_text().startswith((run / "metrics.jsonl").read_text())


def test_folders_that_cannot_be_written_are_refused(tiny_config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run: cannot be written to: Not a directory$"):
        loop.train(tiny_config, tmp_path / "file" / "run")
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(mount)], capture_output=True, check=False
    ).returncode:
        pytest.skip("the read-only half: this user may not mount")
    try:
        with pytest.raises(
            ConfigError, match=r"mount/run: cannot be written to: Read-only file system$"
        ):
            loop.train(tiny_config, mount / "run")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_damaged_checkpoint_is_passed_over_with_a_message(
    tiny_run: Path,
    tiny_config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    harmed = max(
        (run / "checkpoints" / "00000024-mask" / "model").rglob("*"),
        key=lambda path: path.stat().st_size * path.is_file(),
    )
    content = bytearray(harmed.read_bytes())
    content[len(content) // 2] ^= 16
    harmed.write_bytes(content)
    loop.train(tiny_config, run)
    # Other libraries may log as well.
    (record,) = [record for record in caplog.records if "damaged" in record.getMessage()]
    assert (
        record.getMessage()
        == f"{harmed}: damaged: not the bytes that were saved (SHA-256 differs): skipped"
    )
    assert "resumed from stage box, step 6" in capsys.readouterr().out
    assert_same_bits(run, tiny_run)
