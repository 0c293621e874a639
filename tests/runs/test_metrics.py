"""metrics.jsonl and its events: what is written is read back, and a resumed file is the
uninterrupted one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs.loggers import TensorBoard
from mrcnn_jax.runs.metrics import MetricsLog, append_timing, read_metrics, read_timing

STAGES = ("rpn", "box", "mask")
ROW = '{"stage": "rpn", "step": 1, "epoch": 0, "split": "train"}'


def write(log: MetricsLog, stage: str, step: int) -> None:
    log.write(
        stage=stage,
        step=step,
        epoch=step // 2,
        split="train",
        values={"loss/total": 1 / (step + 3), "loss/box": step},
    )
    if step % 2 == 0:
        log.write(
            stage=stage, step=step, epoch=step // 2, split="val", values={"loss/total": 0.1 * step}
        )


def drawn(workdir: Path) -> MetricsLog:
    """The log of a run, with events."""
    log = MetricsLog(workdir)
    log.add([TensorBoard(workdir / "tensorboard")])
    return log


def events(workdir: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(stage/split, tag) -> [(step, value)], from the record framing by hand: length u64, CRC u32,
    event, CRC u32."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for path in sorted(workdir.glob("tensorboard/*/*/events*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                run = path.parent.relative_to(workdir / "tensorboard").as_posix()
                found.setdefault((run, value.tag), []).append((event.step, value.simple_value))
    return found


def test_rows_are_on_disk_at_once_and_round_trip(tmp_path: Path) -> None:
    values = [0.1, 1 / 3, 5e-324, -0.0, 1.7976931348623157e308, float(np.float32(0.1))]
    log = MetricsLog(tmp_path / "run")
    for step, value in enumerate(values):
        log.write(stage="rpn", step=step, epoch=0, split="train", values={"loss/total": value})
        rows = read_metrics(tmp_path / "run")  # the log is still open
        assert len(rows) == step + 1
        assert rows[-1] == {
            "stage": "rpn",
            "step": step,
            "epoch": 0,
            "split": "train",
            "loss/total": value,
        }
        assert math.copysign(1, rows[-1]["loss/total"]) == math.copysign(1, value)
    log.close()


def test_jax_and_numpy_scalars_are_taken(tmp_path: Path) -> None:
    import jax.numpy as jnp

    with MetricsLog(tmp_path) as log:
        log.write(
            stage="rpn",
            step=1,
            epoch=0,
            split="train",
            values={"a": jnp.float32(0.1), "b": np.int64(3), "c": np.float64(0.1)},
        )
    (row,) = read_metrics(tmp_path)
    assert (row["a"], row["b"], row["c"]) == (float(np.float32(0.1)), 3.0, 0.1)


def test_numbers_that_json_lacks_stay_json(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(
            stage="rpn",
            step=1,
            epoch=0,
            split="train",
            values={"a": math.nan, "b": math.inf, "c": -math.inf},
        )

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


def test_a_value_may_not_take_the_name_of_a_field(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="step"):
        log.write(stage="rpn", step=1, epoch=0, split="train", values={"step": 2})


@pytest.mark.parametrize(
    ("stage_index", "step"), [(0, 0), (0, 3), (0, 5), (1, 0), (1, 2), (1, 5), (2, 1)]
)
def test_a_resumed_run_has_the_rows_and_events_of_an_uninterrupted_one(
    tmp_path: Path, stage_index: int, step: int
) -> None:
    everything = [(stage, s) for stage in STAGES for s in range(1, 6)]
    with drawn(tmp_path / "whole") as log:
        for stage, s in everything:
            write(log, stage, s)
    with drawn(tmp_path / "cut") as log:
        for stage, s in everything[:12]:  # killed after step 2 of the third stage
            write(log, stage, s)
    with MetricsLog(tmp_path / "cut") as log:
        log.truncate(STAGES, stage_index, step)
        log.add([TensorBoard(tmp_path / "cut" / "tensorboard")])
        for stage, s in everything:
            if (STAGES.index(stage), s) > (stage_index, step):
                write(log, stage, s)
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (
        tmp_path / "whole/metrics.jsonl"
    ).read_bytes()
    assert events(tmp_path / "cut") == events(tmp_path / "whole")


def test_rows_of_a_validation_that_is_repeated_are_removed(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (2, 4):
            write(log, "rpn", step)
        kept = read_metrics(tmp_path)
        log.truncate(STAGES, 0, 4, validated=False)
    assert kept[-1]["split"] == "val"
    assert read_metrics(tmp_path) == kept[:-1]


def test_events_hold_the_values(tmp_path: Path) -> None:
    with drawn(tmp_path) as log:
        for step in range(1, 5):
            write(log, "box", step)
    found = events(tmp_path)
    assert [step for step, _ in found["box/train", "loss/total"]] == [1, 2, 3, 4]
    np.testing.assert_allclose(
        [value for _, value in found["box/val", "loss/total"]], [0.2, 0.4], rtol=1e-6
    )


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_last_line_cut_short_is_dropped(tmp_path: Path, cut: int) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (1, 3):
            write(log, "rpn", step)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    with MetricsLog(
        tmp_path
    ) as log:  # without truncate: the next row must not be glued to the half one
        write(log, "rpn", 3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 3]


@pytest.mark.parametrize(
    "line",
    [
        '{"stage": "rpn"}',
        '{"stage": "rpn", "step',
        "[]",
        ROW[:-1] + ', "loss/total": null}',
        ROW[:-1] + ', "loss/total": true}',
        ROW[:-1] + ', "loss/total": "1.5"}',
        ROW[:-1] + f', "loss/total": {10**400}}}',
        ROW[:-1] + f', "loss/total": {"[" * 100_000}}}',
        ROW[:-1] + f', "loss/total": {"1" * 5000}}}',
        ROW.replace("rpn", "r\udcffpn"),
        ROW.replace('"rpn"', "7"),
        ROW.replace(": 1", ': "1"'),
        "\0" * 50,
    ],
    ids=lambda line: line[:60],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    text = f"{ROW}\n{line}\n{ROW}\n".encode(errors="surrogateescape")
    (tmp_path / "metrics.jsonl").write_bytes(text)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 is not a row of metrics$"):
        read_metrics(tmp_path)


def test_a_foreign_stage_is_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        write(log, "joint", 1)
        with pytest.raises(ConfigError, match="'joint'"):
            log.truncate(STAGES, 0, 0)
    assert len(read_metrics(tmp_path)) == 1


def test_a_folder_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nowhere/metrics\.jsonl: no such file \(is this a run's"
    ):
        read_metrics(tmp_path / "nowhere")


def test_rows_and_events_are_on_the_disk_after_a_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(os.fstat(number).st_ino), real(number))
    )
    with drawn(tmp_path) as log:
        write(log, "rpn", 2)
        assert synced == []
        log.sync()
        files = [tmp_path / "metrics.jsonl", *tmp_path.glob("tensorboard/*/*/events*")]
        assert len(files) == 3
        assert sorted(synced) == sorted(path.stat().st_ino for path in files)
        assert len(events(tmp_path)) == 3


# -- times -----------------------------------------------------------------------------------------

TIMES = {"stage": "rpn", "epoch": 1, "steps": 5, "seconds": 2.5, "waited_seconds": 0}


def test_times_are_read_back_without_a_line_cut_short(tmp_path: Path) -> None:
    append_timing(tmp_path, TIMES)
    append_timing(tmp_path, TIMES | {"steps": 0})  # stopped before the first step
    path = tmp_path / "timing.jsonl"
    path.write_bytes(path.read_bytes() + b'{"stage": "r')
    append_timing(tmp_path, TIMES | {"epoch": 2})
    assert read_timing(tmp_path) == [TIMES, TIMES | {"epoch": 2}]


@pytest.mark.parametrize(
    ("name", "value"), [("steps", "5"), ("seconds", None), ("seconds", [1]), ("stage", 3)]
)
def test_a_broken_row_of_times_is_named(tmp_path: Path, name: str, value: Any) -> None:
    append_timing(tmp_path, TIMES)
    append_timing(tmp_path, TIMES | {name: value})
    with pytest.raises(ConfigError, match=r"timing\.jsonl: line 2 is not a row of timing$"):
        read_timing(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere/timing\.jsonl: no such file"):
        read_timing(tmp_path / "nowhere")


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        full = open("/dev/full", "w")  # noqa: SIM115
        log._file.close()
        log._file = full
        with pytest.raises(OSError, match="No space left") as error:
            write(log, "rpn", 1)
        assert error.value.filename == str(log.path)
        with contextlib.suppress(OSError):
            full.close()


def test_loggers_are_closed_whatever_fails(tmp_path: Path) -> None:
    """As where the disk is full when the file is closed."""
    closed: list[tuple[int, bool]] = []

    class Broken:
        def __init__(self, number: int) -> None:
            self.number = number

        def close(self, *, failed: bool) -> None:
            closed.append((self.number, failed))
            raise OSError("cannot be closed")

    log = MetricsLog(tmp_path)
    log.loggers = (Broken(0), Broken(1))  # type: ignore[assignment]
    with pytest.raises(OSError, match="cannot be closed"):
        log.close(failed=True)
    assert closed == [(0, True), (1, True)]
    assert log._file.closed
