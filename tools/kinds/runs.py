"""Folders of runs, in which one file is damaged: what is read is what was saved, or one line says
what is wrong, or a warning names it."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import save_config, to_dict
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.logs import METRICS, TIMING
from mrcnn_jax.runs.metrics import append_timing, read_metrics, read_timing
from mrcnn_jax.runs.run import load_weights
from mrcnn_jax.runs.state import TrainState
from tools.kinds.mutations import WrongError, one_line

RUN = Path(__file__).parents[2] / "tests" / "fixtures" / "run_v1"
DAMAGES = ("a bit", "a byte", "cut off", "empty", "zeros", "missing", "garbage", "a folder")


@dataclass(frozen=True)
class Case:
    damage: str
    place: float
    """Which of the run's files, from 0 to 1."""
    at: float
    """Where in the file, from 0 to 1."""
    bit: int

    @property
    def content(self) -> bytes:
        return repr(self).encode()


def case(seed: int, index: int) -> Case:
    """Case number `index`."""
    rng = np.random.default_rng((seed, 2, index))
    place, at = rng.random(2)
    # A bit is the damage that is most easily overlooked.
    damage = DAMAGES[0] if rng.random() < 0.5 else DAMAGES[rng.integers(1, len(DAMAGES))]
    return Case(damage, float(place), float(at), int(rng.integers(8)))


def prepare(folder: Path) -> None:
    """Writes a whole run, as this version does, with the weights and metrics of a kept one."""
    whole, loaded = folder / "whole_run", load_weights(RUN)["raw"]
    whole.mkdir()
    shutil.copy(RUN / "metrics.jsonl", whole)
    (whole / "commands.txt").write_text("mrcnn train --config shapes --workdir run\n")
    row = {"stage": "rpn", "epoch": 1, "steps": 2, "seconds": 1.5, "waited_seconds": 0.25}
    append_timing(whole, row)
    nothing = {"opt_state": (), "step": jnp.int32(0), "key": jnp.zeros(2, jnp.uint32)}
    state = TrainState(**loaded.variables, **nothing)
    Checkpoints(whole, keep=1).save(state, loaded.meta, loaded.config)
    save_config(loaded.config, whole / "config.json")


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _read(run: Path) -> dict[str, Any]:
    """All that commands read of a run."""
    loaded = load_weights(run)
    raw = loaded["raw"]
    for log in (METRICS, TIMING):
        Checkpoints(run, keep=1).refuse_damaged_log(raw.meta, log)
    return {
        "checkpoint": raw.meta,
        "config": to_dict(raw.config),
        "weights": [leaf.tobytes() for leaf in jax.tree.leaves(raw.variables)],
        "metrics": read_metrics(run),
        "timing": read_timing(run),
    }


@functools.cache
def _right(folder: Path) -> dict[str, Any]:
    return _read(folder / "whole_run")


def files(run: Path) -> list[Path]:
    """The run's files; small ones come as often as large ones, and the arrays of the optimiser,
    which only a resumed training reads, not at all."""
    return sorted(p for p in run.rglob("*") if p.is_file() and "training" not in p.parts)


def damage(path: Path, case: Case) -> None:
    """Damages a file as the case says."""
    data = bytearray(path.read_bytes())
    at = int(case.at * len(data))
    match case.damage:
        case "a bit" if data:
            data[at] ^= 1 << case.bit
        case "a byte" if data:
            data[at] = (data[at] + 1 + case.bit) % 256
        case "cut off":
            del data[at:]
        case "empty":
            data.clear()
        case "zeros":
            data[at:] = bytes(len(data) - at)
        case "garbage":
            data[:] = np.random.default_rng(at).bytes(len(data))
    path.unlink()
    if case.damage == "a folder":
        path.mkdir()
    elif case.damage != "missing":
        path.write_bytes(data)


def outcome(case: Case, folder: Path) -> str:
    """How a case ends; WrongError if it ends badly."""
    right, run, warnings = _right(folder), folder / "run", _Warnings()
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder / "whole_run", run)
    found = files(run)
    path = found[int(case.place * len(found))]
    name = path.relative_to(run)
    damage(path, case)
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, [warnings]
    try:
        read = _read(run)
    except ConfigError as error:
        return one_line(error)
    finally:
        root.handlers = handlers
    wrong = [
        what
        for what in right
        if json.dumps(read[what], default=str) != json.dumps(right[what], default=str)
    ]
    if not wrong:
        return "right"
    if warnings.lines:
        return "told"
    log = {"metrics.jsonl": "metrics", "timing.jsonl": "timing"}.get(path.name)
    if wrong == [log] and read[log] == right[log][: len(read[log])]:
        return "as after a kill"
    raise WrongError(
        f"{name}: {case.damage} at {case.at:.3f}: another {wrong[0]}, and nothing tells"
    )
