"""Flips single bits of a run's folder, its built data sets and an exported file, and reads them.

    python tools/bit_flips.py runs/a [--exported model.jaxexport] [--flips 100] [--seed 0]

Each flip of one random bit must be refused in one line (a ConfigError; of an exported file, a
ValueError), be told in a warning (an older checkpoint is used), or change nothing of what is read.
Anything else is listed, and the exit status is 1. The folder is copied; it must hold an evaluation.
Flip i of a kind of file is a pure function of (seed, kind, i).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package need not be installed

from mrcnn_jax.commands.eval import read_rows
from mrcnn_jax.commands.model_card import model_card
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import to_dict
from mrcnn_jax.inference.exported import checked
from mrcnn_jax.runs.arrays import flatten
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.logs import TIMING
from mrcnn_jax.runs.run import Run, load_run, open_data


@dataclass(frozen=True)
class Kind:
    """Files that are read in one way."""

    pattern: str
    """Of their names in the run's folder."""
    read: Callable[[Path, Run], Any]
    """What a user gets of the folder, from the run as it was before the flip."""


def _loaded(folder: Path, _: Run) -> Any:
    run = load_run(folder)
    leaves = {path: np.asarray(leaf).tobytes() for path, leaf in flatten(run.variables).items()}
    return to_dict(run.config), run.meta, leaves


def _resumed(folder: Path, run: Run) -> Any:
    Checkpoints(folder, keep=1).refuse_incomplete()
    return _loaded(folder, run)


def _data(folder: Path, run: Run) -> Any:
    split = open_data(run, folder, "val")
    digest = hashlib.sha256()
    for index in range(len(split.source)):
        record = split.source[index]
        digest.update(repr([record["image"], record["upright"], record["file_name"]]).encode())
        objects = {name: np.asarray(value).tolist() for name, value in record["objects"].items()}
        digest.update(repr(objects).encode())
    return split.dataset.images, split.plans, digest.hexdigest()


def _timing(folder: Path, run: Run) -> Any:
    Checkpoints(folder, keep=1).refuse_damaged_log(run.meta, TIMING)
    return (folder / TIMING).read_bytes()


def _card(folder: Path, run: Run) -> Any:
    return model_card(run, folder)


def _exported(folder: Path, _: Run) -> Any:
    return checked(folder / EXPORTED)


EXPORTED = "exported"
_NEWEST = "checkpoints/{newest}/"
KINDS = {
    "config.json": Kind("config.json", _loaded),
    "metrics.jsonl": Kind("metrics.jsonl", lambda folder, run: read_rows(folder, run.meta)),
    "timing.jsonl": Kind("timing.jsonl", _timing),
    "commands.txt": Kind("commands.txt", _card),
    "checkpoint: config, logs": Kind(_NEWEST + "[!m]*.json", _loaded),
    "checkpoint: meta.json": Kind(_NEWEST + "meta.json", _loaded),
    "checkpoint: manifest.json": Kind(_NEWEST + "manifest.json", _resumed),
    "checkpoint: arrays": Kind(_NEWEST + "*/**/*", _loaded),
    "eval/metrics.json": Kind("eval/metrics.json", _card),
    "eval/manifest.json": Kind("eval/manifest.json", _card),
    "eval/detections.json": Kind("eval/detections.json", _card),
    "data: images.json": Kind("data/instances_val*/images.json", _data),
    "data: records": Kind("data/instances_val*/records/*.array_record*", _data),
    "data: features.json": Kind("data/instances_val*/records/features.json", _data),
    "data: dataset_info.json": Kind("data/instances_val*/records/dataset_info.json", _data),
    "exported file": Kind(EXPORTED, _exported),
}


@dataclass
class Result:
    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    """Kind -> outcome -> how many flips."""
    failures: list[str] = field(default_factory=list)
    """A line for each flip that was silent or ended in another exception."""


def flip_all(folder: Path, kinds: dict[str, Kind], *, flips: int, seed: int) -> Result:
    """Flips bits in place, one at a time, and sets each back.

    Args:
        folder: a run's folder.
        kinds: by name; those without files are left out.
        flips: how many of each kind.
        seed: of the places.
    """
    result = Result()
    run = load_run(folder)
    for number, (name, kind) in enumerate(kinds.items()):
        pattern = kind.pattern.format(newest=run.meta.name)
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        files = [path for path in files if path.stat().st_size > 0]
        if not files:
            continue
        expected, outcomes = kind.read(folder, run), Counter[str]()
        for index in tqdm(range(flips), desc=name, leave=False, disable=None):
            rng = np.random.default_rng((seed, number, index))
            path = files[rng.integers(len(files))]
            whole = path.read_bytes()
            place, bit = int(rng.integers(len(whole))), int(rng.integers(8))
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            outcome = _outcome(kind, folder, run, expected)
            path.write_bytes(whole)
            outcomes[outcome.partition(":")[0]] += 1
            if outcome.startswith(("silent", "error")):
                where = f"{path.relative_to(folder)}, bit {bit} of byte {place}"
                result.failures.append(f"{name}: {where}: {outcome}")
        result.outcomes[name] = outcomes
    return result


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _outcome(kind: Kind, folder: Path, run: Run, expected: Any) -> str:
    warnings, logger = _Warnings(), logging.getLogger("mrcnn_jax")
    logger.addHandler(warnings)
    logger.propagate = False
    try:
        found = kind.read(folder, run)
    except ConfigError as error:
        return "refused" if "\n" not in str(error) else f"error: not one line: {error}"
    except ValueError as error:
        refused = kind.read is _exported and "\n" not in str(error)
        return "refused" if refused else f"error: {error!r:.200}"
    except Exception as error:
        return f"error: {error!r:.200}"
    finally:
        logger.removeHandler(warnings)
        logger.propagate = True
    if found == expected:
        return "nothing changed"
    return "told" if warnings.lines else "silent"


@dataclass(frozen=True)
class Arguments:
    run: tyro.conf.Positional[Path]
    """The folder of a run that was evaluated."""
    exported: Path | None = None
    """What the export command made of it."""
    flips: int = 100
    """How many bits are flipped in each kind of file."""
    seed: int = 0
    """Seed of their places."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python tools/bit_flips.py", description=__doc__)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = shutil.copytree(arguments.run, Path(temporary) / "run")
        if arguments.exported is not None:
            shutil.copy(arguments.exported, folder / EXPORTED)
        open_data(load_run(folder), folder, "val")  # built if it is not there
        result = flip_all(folder, KINDS, flips=arguments.flips, seed=arguments.seed)
    print("\n".join(result.failures), file=sys.stderr, end="\n" if result.failures else "")
    for name, outcomes in result.outcomes.items():
        print(f"{name:32} {', '.join(f'{n} {what}' for what, n in sorted(outcomes.items()))}")
    seconds = round(time.perf_counter() - start, 1)
    print(
        json.dumps({"seed": arguments.seed, "failures": len(result.failures), "seconds": seconds})
    )
    sys.exit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
