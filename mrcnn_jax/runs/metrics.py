"""A run's numbers: rows of `metrics.jsonl`, which loggers are given too, and times.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import named, whole_file
from mrcnn_jax.runs.loggers import Logger
from mrcnn_jax.runs.logs import METRICS, TIMING

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
    return [row for _, row in _read(workdir / METRICS)]


class MetricsLog:
    """Appends rows to `<workdir>/metrics.jsonl` and gives them to the loggers.

    Close it, or use it in a `with`.
    """

    def __init__(self, workdir: Path) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self.path = workdir / METRICS
        self.loggers: tuple[Logger, ...] = ()
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
        with named(self.path):
            self._file.write(_line(row))
            self._file.flush()
            for logger in self.loggers:
                _log(logger, row)

    def sync(self) -> None:
        """Wait until rows and events are on the disk: they must be as safe as the checkpoint."""
        os.fsync(self._file.fileno())
        for logger in self.loggers:
            logger.sync()

    def truncate(
        self, stages: Sequence[str], stage_index: int, step: int, *, validated: bool = True
    ) -> None:
        """Remove all rows after the checkpoint from which a run is resumed; before `add`.

        If the rows of a step are written before its checkpoint, the file becomes that of a run that
        was never interrupted. It is replaced in one rename.

        Args:
            stages: names of the run's stages in the order of training.
            stage_index: the checkpoint's stage.
            step: the checkpoint's step within that stage.
            validated: keep the validation rows of that step; else they are written again.

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
            place = stages.index(row["stage"]), row["step"], row["split"] == "val"
            if place <= (stage_index, step, validated):
                kept.append(line)
        self._file.close()
        with whole_file(self.path) as part, part.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        self._file = self.path.open("a", encoding="utf-8")

    def add(self, loggers: Sequence[Logger]) -> None:
        """Gives rows to loggers, and the earlier ones to those that can begin anew.

        Raises:
            ConfigError: the file cannot be read.
        """
        self.loggers = (*self.loggers, *loggers)
        rows = _read(self.path)
        for logger in loggers:
            if logger.restart():
                for _, row in rows:
                    _log(logger, row)

    def close(self, *, failed: bool = False) -> None:
        """Close the file and the loggers, whatever one of them raises; `failed`: the run was
        stopped."""
        with ExitStack() as stack:
            for logger in reversed(self.loggers):
                stack.callback(logger.close, failed=failed)
            stack.callback(self._file.close)  # first: the last that is entered is left first

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(failed=kind is not None)


def _log(logger: Logger, row: Row) -> None:
    prefix = f"{row['stage']}/{row['split']}/"
    values = {f"{prefix}{name}": row[name] for name in row if name not in _FIELDS}
    logger.log(row["step"], values)


def _line(row: Row) -> str:
    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value

    return json.dumps({name: plain(value) for name, value in row.items()}, allow_nan=False) + "\n"


def append_timing(workdir: Path, row: Row) -> None:
    """Append a row to `timing.jsonl`: a part of an epoch, its steps and seconds.

    Times are kept apart from metrics.jsonl, which is the same to the bit however often a run was
    interrupted.
    """
    path = workdir / TIMING
    if path.exists():
        _cut_last_line(path)
    with named(path), path.open("ab") as file:
        file.write(f"{json.dumps(row)}\n".encode())


def read_timing(workdir: Path) -> list[Row]:
    """Read the rows of `append_timing`.

    Returns:
        stage: str; epoch and steps (at least 1): int; seconds and waited_seconds: float.

    Raises:
        ConfigError: there is no such file, or a line of it is not a row.
    """
    path = workdir / TIMING
    rows = [_parsed(path, number, line, _timing) for number, line in _lines(path)]
    return [row for row in rows if row["steps"] > 0]


def _timing(row: Row) -> Row:
    stage, epoch, steps = row["stage"], row["epoch"], row["steps"]
    if not (type(stage) is str and type(epoch) is type(steps) is int):
        raise ValueError
    seconds = {name: _number(row[name]) for name in ("seconds", "waited_seconds")}
    return {"stage": stage, "epoch": epoch, "steps": steps} | seconds


def _read(path: Path) -> list[tuple[bytes, Row]]:
    """(line, row) of every complete line."""
    return [(line, _parsed(path, number, line, _metrics)) for number, line in _lines(path)]


def _metrics(row: Row) -> Row:
    fields = {name: row[name] for name in _FIELDS}
    if [type(value) for value in fields.values()] != [str, int, int, str]:
        raise ValueError
    return fields | {name: _number(row[name]) for name in row if name not in _FIELDS}


def _number(value: Any) -> float:
    if type(value) in (int, float) or value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    raise ValueError


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """(number, line) of every line; a last one that a kill cut short is left out."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (is this a run's folder?)") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    return list(enumerate(lines, start=1))


def _parsed(path: Path, number: int, line: bytes, parse: Callable[[Row], Row]) -> Row:
    try:
        return parse(json.loads(line.decode(), parse_constant=_number))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        what = "metrics" if parse is _metrics else "timing"
        raise ConfigError(f"{path}: line {number} is not a row of {what}") from None


def _cut_last_line(path: Path) -> None:
    """Remove what follows the last newline: the next row would be glued to it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
