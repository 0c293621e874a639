"""A run's numbers: rows of `metrics.jsonl`, and TensorBoard events drawn from the same rows.

    {"stage": "rpn", "step": 20, "epoch": 1, "split": "train", "loss/total": 0.71,
     "loss/rpn_objectness": 0.42}

`step` counts the steps done within the stage, from 1. Numbers have as many digits as they need to
be read back unchanged; those that JSON lacks are the strings "NaN", "Infinity" and "-Infinity",
which `float` reads.
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

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import whole_file

Row = dict[str, Any]
_FIELDS = ("stage", "step", "epoch", "split")


def read_metrics(workdir: Path) -> list[Row]:
    """Read the rows of a run in the order in which they were written.

    Returns:
        stage, split: str; step, epoch: int; all other values: float. A last line that a kill cut
        short is left out.

    Raises:
        ConfigError: there is no such file, or a line of it is not a row.
    """
    return [row for _, row in _read(workdir / "metrics.jsonl")]


class MetricsLog:
    """Appends rows to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard/<stage>/<split>`.

    Close it, or use it in a `with`.
    """

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
        """Append a row; when this returns, it has left the process.

        Args:
            stage: name of the stage.
            step: steps done within the stage.
            epoch: number of the epoch within the stage, from 1.
            split: "train" or "val".
            values: name ("loss/total") -> anything that `float` takes.

        Raises:
            ValueError: a value has the name of one of the fields above.
        """
        row: Row = {"stage": stage, "step": int(step), "epoch": int(epoch), "split": split}
        if taken := row.keys() & values.keys():
            raise ValueError(f"{', '.join(taken)}: is the name of a field of every row")
        row |= {name: float(value) for name, value in values.items()}
        self._file.write(_line(row))
        self._file.flush()
        self._draw(row)

    def sync(self) -> None:
        """Wait until rows and events are on the disk: they must be as safe as the checkpoint."""
        os.fsync(self._file.fileno())
        for writer in self._writers.values():
            writer.flush()

    def truncate(self, stages: Sequence[str], stage_index: int, step: int) -> None:
        """Remove all rows after the checkpoint from which a run is resumed.

        If the rows of a step are written before its checkpoint, file and events become those of a
        run that was never interrupted. The file is replaced in one rename.

        Args:
            stages: names of the run's stages in the order of training.
            stage_index: the checkpoint's stage.
            step: the checkpoint's step within that stage.

        Raises:
            ConfigError: a row's stage is not in `stages`.
        """
        kept = []
        for line, row in _read(self.path):
            if row["stage"] not in stages:
                raise ConfigError(
                    f"{self.path}: stage {row['stage']!r} is not one of this run's: "
                    f"{', '.join(stages)}"
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

    def _draw(self, row: Row) -> None:
        """Add events, in a TensorBoard run for each stage and split so that splits share charts."""
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


def _line(row: Row) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value

    return json.dumps({name: plain(value) for name, value in row.items()}, allow_nan=False) + "\n"


def _read(path: Path) -> list[tuple[str, Row]]:
    """(line, row) of every complete line."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (is this a run's folder?)") from None
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # cut short by a kill
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            values = {name: float(row[name]) for name in row if name not in _FIELDS}
            rows.append((line, {name: row[name] for name in _FIELDS} | values))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError(f"{path}: line {number} is not a row of metrics") from None
    return rows


def _cut_last_line(path: Path) -> None:
    """Remove what follows the last newline: the next row would be glued to it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
