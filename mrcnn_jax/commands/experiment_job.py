"""The experiments' pieces of work, and which of them are done.

All of it is on disk, so that a job that is started again knows it too.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date

import jax

from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.commands.variants import Chain, StageRun
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.json_values import is_number, read_json, short
from mrcnn_jax.output import write_file
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.training.loop import train
from mrcnn_jax.training.resume import refuse_another_config


@dataclass
class Record:
    """The job's notes on a run, beside the run's own files: <run>/experiment.json."""

    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    evaluated: str | None = None
    """SHA-256 of the manifest of the checkpoint that eval/ is of."""
    date: str | None = None
    """Of the evaluation."""

    @classmethod
    def of(cls, run: StageRun) -> Record:
        """The notes on a run; ConfigError if their file is damaged."""
        path = run.folder / "experiment.json"
        if not path.exists():
            return cls()
        values, known = read_json(path), dataclasses.asdict(cls())
        for name, value in values.items():
            texts = name in ("evaluated", "date")
            if name not in known or not (
                value is None or isinstance(value, str) if texts else is_number(value)
            ):
                raise ConfigError(
                    f"{path}: {short(name)}: {short(value)}: damaged; without this file the run is "
                    "evaluated again"
                )
        return cls(**values)

    def save(self, run: StageRun) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2)
        write_file(run.folder / "experiment.json", text + "\n")


@dataclass(frozen=True)
class Piece:
    """A run to train, or to evaluate."""

    run: StageRun
    evaluation: bool = False

    def __str__(self) -> str:
        stage = self.run.stage
        epochs = f"stage {stage.name}, {stage.epochs:g} epoch{'s' * (stage.epochs > 1)}"
        return f"{self.run.title}: {'evaluation' if self.evaluation else epochs}"

    @property
    def amounts(self) -> dict[str, float]:
        """Kind of work -> how often it is in it; an epoch with several losses is one of each."""
        stage = self.run.stage
        return {"evaluation": 1} if self.evaluation else dict.fromkeys(stage.losses, stage.epochs)


class Job:
    """Does pieces of work, and knows which of them are done."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        """ConfigError if the folder of a run of `chains` holds a run of another config."""
        self.ends: dict[StageRun, Meta | None] = {}
        """The checkpoint that completes a run, None if it is not complete."""
        for run in dict.fromkeys(run for chain in chains for run in chain.runs):
            refuse_another_config(run.config, run.folder)
            self.ends[run] = _end(run)

    def done(self, piece: Piece) -> bool:
        end = self.ends[piece.run]
        if end is None or not piece.evaluation:
            return end is not None
        return (
            Record.of(piece.run).evaluated == _fingerprint(piece.run, end)
            and (piece.run.folder / "eval" / "metrics.json").exists()
        )

    def work(self, piece: Piece) -> None:
        run = piece.run
        with _timed(piece):
            if piece.evaluation:
                evaluation.run(evaluation.Arguments(workdir=run.folder))
            else:
                train(run.config, run.folder)
        self.ends[run] = end = _end(run)
        if piece.evaluation and end is not None:
            evaluated, today = _fingerprint(run, end), date.today().isoformat()
            replace(Record.of(run), evaluated=evaluated, date=today).save(run)

    def seconds_left(self, pieces: Sequence[Piece]) -> float | None:
        """How long `pieces` will take, by those that are done; None if one of a kind is missing."""
        known: dict[str, list[float]] = {}
        for run, end in self.ends.items():
            record = Record.of(run)
            if end is not None and len(run.stage.losses) == 1:
                seconds = record.training_seconds / run.stage.epochs
                known.setdefault(run.stage.losses[0], []).append(seconds)
            if record.evaluated is not None:
                known.setdefault("evaluation", []).append(record.evaluation_seconds)
        amounts = [amount for piece in pieces for amount in piece.amounts.items()]
        if not known.keys() >= {kind for kind, _ in amounts}:
            return None
        return sum(statistics.mean(known[kind]) * amount for kind, amount in amounts)


def _end(run: StageRun) -> Meta | None:
    meta = Checkpoints(run.folder, keep=1).latest()
    return meta if meta is not None and meta.stage_complete else None


def _fingerprint(run: StageRun, meta: Meta) -> str:
    """Of a checkpoint: its manifest holds the sums of all of its files."""
    manifest = run.folder / "checkpoints" / meta.name / "manifest.json"
    return hashlib.sha256(manifest.read_bytes()).hexdigest()


@contextmanager
def _timed(piece: Piece) -> Iterator[None]:
    """Adds the seconds of a piece, even of one that is stopped, to its run's record, and frees its
    memory."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds, record = time.perf_counter() - started, Record.of(piece.run)
        if piece.evaluation:
            record.evaluation_seconds += seconds
        else:
            record.training_seconds += seconds
        if piece.run.folder.is_dir():
            record.save(piece.run)
        jax.clear_caches()  # the programs of this piece, which no other one runs
        gc.collect()
