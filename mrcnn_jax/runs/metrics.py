"""The numbers of a run: `metrics.jsonl`, a row a line, and TensorBoard events that are drawn from
it.

    {"stage": "rpn", "step": 20, "epoch": 1, "split": "train", "loss/total": 0.71,
    "loss/objectness": 0.42}

`step` counts the steps done within the stage. Numbers are written with as many digits as they need
to be read back the same; those that JSON has no number for are the strings "NaN", "Infinity" and
"-Infinity", which `float` understands.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from mrcnn_jax.config.schema import ConfigError
from mrcnn_jax.output import whole_file

Curve = tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]  # steps and values
_FIELDS = ("stage", "step", "epoch", "split")


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run, every value but the stage, the split, the step and the epoch a float; []
    if there are none.

    A last line that a kill cut short is left out; ConfigError names any other line that is not a
    row.
    """
    return [row for _, row in _read(workdir / "metrics.jsonl")]


class MetricsLog:
    """Appends rows to `<workdir>/metrics.jsonl` and to `<workdir>/tensorboard/<stage>/<split>`;
    close it, or use it in a `with`."""

    def __init__(self, workdir: Path) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self.path = workdir / "metrics.jsonl"
        self.events = workdir / "tensorboard"
        # Not tensorboardX.SummaryWriter: on a full disk its threads and exit handlers print
        # tracebacks of their own.
        self._writers: dict[tuple[str, str], EventsWriter] = {}
        if self.path.exists():
            _cut_last_line(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(
        self, *, stage: str, step: int, epoch: int, split: str, values: Mapping[str, Any]
    ) -> None:
        """Append a row; it has left the process when this returns. `values`: name ("loss/total") ->
        anything `float` takes."""
        row: dict[str, Any] = {
            "stage": stage,
            "step": int(step),
            "epoch": int(epoch),
            "split": split,
        }
        if row.keys() & values.keys():
            raise ValueError(
                f"{', '.join(row.keys() & values.keys())}: the name of a row's own field"
            )
        row |= {name: float(value) for name, value in values.items()}
        self._file.write(_line(row))
        self._file.flush()
        self._draw(row)

    def sync(self) -> None:
        """Wait until rows and events are on the disk: those before a checkpoint must outlive the
        machine as it does."""
        os.fsync(self._file.fileno())
        for writer in self._writers.values():
            writer.flush()

    def truncate(self, stages: Sequence[str], stage_index: int, step: int) -> None:
        """Forget all rows after step `step` of stage `stages[stage_index]`, the point that a run is
        resumed from.

        Give the checkpoint's own stage and step (its last, if it completed the stage). With the
        rows of a step written before its checkpoint, file and events are those of a run that was
        never interrupted. The file is replaced in one rename. ConfigError if a row's stage is not
        in `stages` (in the order they are trained).
        """
        kept = []
        for line, row in _read(self.path):
            if row["stage"] not in stages:
                raise ConfigError(
                    f"{self.path}: stage {row['stage']!r} is not one of this run ({', '.join(stages)})"
                )
            if (stages.index(row["stage"]), row["step"]) <= (stage_index, step):
                kept.append((line, row))
        self.close()
        with whole_file(self.path) as part, part.open("w", encoding="utf-8") as file:
            file.writelines(line for line, _ in kept)
            file.flush()
            os.fsync(file.fileno())
        self._file = self.path.open("a", encoding="utf-8")
        # Events cannot be taken back one by one: they are drawn again.
        shutil.rmtree(self.events, ignore_errors=True)
        for _, row in kept:
            self._draw(row)

    def close(self) -> None:
        self._file.close()
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self, row: dict[str, Any]) -> None:
        """A TensorBoard run a stage and split: the same tag of training and validation shares a
        chart."""
        key = (row["stage"], row["split"])
        if key not in self._writers:
            folder = self.events / key[0] / key[1]
            folder.mkdir(parents=True, exist_ok=True)
            self._writers[key] = EventsWriter(str(folder / "events"))
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name not in _FIELDS
        ]
        self._writers[key].write_event(
            Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
        )


def _line(row: dict[str, Any]) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value

    return json.dumps({name: plain(value) for name, value in row.items()}, allow_nan=False) + "\n"


def _read(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(line, row) of every whole line."""
    if not path.exists():
        return []
    rows = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                break  # cut short by a kill
            try:
                row = json.loads(line)
                rows.append(
                    (
                        line,
                        {name: row[name] for name in _FIELDS}
                        | {k: float(v) for k, v in row.items() if k not in _FIELDS},
                    )
                )
            except (ValueError, TypeError, KeyError, AttributeError):
                raise ConfigError(f"{path}: line {number} is not a row of metrics") from None
    return rows


def _cut_last_line(path: Path) -> None:
    """Remove what follows the last newline: the next row would be glued to it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a last line cut short is passed over. ConfigError as of
    `curves`."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (is this a run's folder?)") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ConfigError(f"{path}: line {number}: not JSON: {error}") from None
    return rows


def curve(rows: Mapping[int, Mapping[str, Any]], name: str) -> Curve:
    """One figure of rows by step, in the order of the steps, where it was measured."""
    points = sorted((step, row[name]) for step, row in rows.items() if row.get(name) is not None)
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values
