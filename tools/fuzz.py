"""Fuzzes what reads people's files: child processes are given damaged ones and compare.

    python tools/fuzz.py [--annotations 10000] [--images 5000] [--runs 500] [--converters 2000]
        [--depth 2000] [--seed 0] [--limit 10]

Each case begins as a whole file, folder or export whose right value is known, and is damaged in a
known or in a random way (tools/kinds). It ends well if the right value is read, or one line refuses
the file, or a report, a warning or a printed line tells that something is wrong. Failures are a
wrong value in silence, a crash of the process, more than `--limit` seconds, and any other
exception: they are listed, and the exit status is 1. Case i of a kind is a pure function of
(seed, i).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the package need not be installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tools.kinds import annotations, converters, depth, images, runs
from tools.kinds.mutations import WrongError

Kind = Literal["annotations", "images", "depth", "runs", "converters"]
Outcome = Callable[[Any, Path], str]

KINDS: dict[Kind, Any] = {
    "annotations": annotations,
    "images": images,
    "depth": depth,
    "runs": runs,
    "converters": converters,
}
MEMORY = 4 << 30  # bytes that a case may take beyond what its process has at its start
START = 300.0  # seconds that a process may take to start


# -- a child process -------------------------------------------------------------------------------


def serve(connection: Connection, seed: int, outcomes: dict[Kind, Outcome] | None = None) -> None:
    """A child process: answers the number of a case with its outcome, until it is sent None.

    Args:
        connection: to the parent.
        seed: of the cases.
        outcomes: functions of a case and a prepared folder; by default, those of the kinds.
    """
    warnings.simplefilter("ignore")
    outcomes = outcomes or {kind: module.outcome for kind, module in KINDS.items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in outcomes:
            KINDS[kind].prepare(folder)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(
            resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY)
        )
        connection.send("ready")
        while (case := connection.recv()) is not None:
            kind, index = case
            try:
                connection.send(outcomes[kind](KINDS[kind].case(seed, index), folder))
            except WrongError as error:
                connection.send(f"wrong: {error}")
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                connection.send(f"error: {type(error).__name__}: {error} ({where})")
            shutil.rmtree(folder / "cache", ignore_errors=True)


# -- the parent ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    outcomes: dict[str, int]  # how often a case ended well, by "kind: outcome"
    failures: list[str]  # one line for each crash, hang, unexpected error and wrong answer


def run(
    cases: Sequence[tuple[Kind, int]],
    *,
    seed: int,
    limit: float,
    processes: int,
    target: Callable[..., None] = serve,
) -> Result:
    """Runs cases in child processes.

    Args:
        cases: kind and number of each.
        seed: of the cases.
        limit: seconds that a case may take.
        processes: how many run at once.
        target: what a child process runs.
    """
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    with tqdm(total=len(cases), unit="case", disable=None, leave=False) as bar:

        def work(own: Sequence[tuple[Kind, int]]) -> None:
            child = None
            for kind, index in own:
                if child is None:
                    child = _Child(seed, target)
                outcome = child.outcome(kind, index, limit)
                if outcome.startswith(("crash", "hang", "error", "wrong")):
                    failures.append(f"{kind} {index}: {outcome}")
                else:
                    outcomes[f"{kind}: {outcome}"] += 1
                if outcome.startswith(("crash", "hang")):
                    child.kill()
                    child = None
                bar.update()
            if child is not None:
                child.end()

        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(work, [cases[i::processes] for i in range(processes)]))
    return Result(dict(sorted(outcomes.items())), sorted(failures))


class _Child:
    def __init__(self, seed: int, target: Callable[..., None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, seed), daemon=True)
        self.process.start()
        theirs.close()
        if not self.connection.poll(START):
            raise RuntimeError(f"a child process did not start in {START} s")
        self.connection.recv()

    def outcome(self, kind: Kind, index: int, limit: float) -> str:
        try:
            self.connection.send((kind, index))
            found = self.connection.poll(limit)
            return self.connection.recv() if found else f"hang: over {limit} s"
        except (EOFError, OSError):
            self.process.join()
            return f"crash: exit status {self.process.exitcode}"

    def end(self) -> None:
        self.connection.send(None)
        self.process.join()
        self.connection.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass(frozen=True)
class Arguments:
    annotations: int = 10_000
    """Number of damaged annotation files."""
    images: int = 5_000
    """Number of damaged images."""
    depth: int = 2_000
    """Number of damaged depth maps."""
    runs: int = 500
    """Number of damaged folders of runs."""
    converters: int = 2_000
    """Number of damaged exports of annotation tools."""
    seed: int = 0
    """Seed of the cases."""
    limit: float = 10.0
    """Seconds that a case may take."""
    processes: int = 2
    """How many child processes run at once."""


def main() -> None:
    arguments = tyro.cli(Arguments, prog="python tools/fuzz.py", description=__doc__)
    cases = [(kind, i) for kind in KINDS for i in range(getattr(arguments, kind))]
    start = time.perf_counter()
    result = run(cases, seed=arguments.seed, limit=arguments.limit, processes=arguments.processes)
    print("\n".join(result.failures), file=sys.stderr, end="\n" if result.failures else "")
    found = {"seed": arguments.seed, **result.outcomes, "failures": len(result.failures)}
    print(json.dumps(found | {"seconds": round(time.perf_counter() - start, 1)}))
    sys.exit(1 if result.failures else 0)


if __name__ == "__main__":
    main()
