"""Times programs side by side, each in a process of its own.

They are called in turn, so that a machine that gets slower does so for all of them. At each turn a
program runs twice, and the second time counts. A benchmark hands `compare` its sides by name
("ours", and forms of the peer); a side whose libraries cannot be imported is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
# The package need not be installed; seeded weights and the peer are shared with the tests.
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

OURS = "ours"


@dataclass
class Side:
    """The runs that a process times, by name, each of which returns when its result is there."""

    runs: Mapping[str, Callable[[], object]]
    facts: dict[str, Any] = field(default_factory=dict)
    """A function among them is called at the end, when the peak of memory is known."""


Build = Callable[[argparse.Namespace], Side]


@dataclass
class Times:
    """Seconds of one side by run and round, and facts."""

    seconds: dict[str, list[float]]
    facts: dict[str, Any]


def parser(doc: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Makes a parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help="how often each side is timed")
    made.add_argument("--only", nargs="+", help="sides to time, by default all")
    made.add_argument("--side", help=argparse.SUPPRESS)  # in the process of a side
    return made


def compare(sides: Mapping[str, Build], arguments: argparse.Namespace) -> dict[str, Times]:
    """Times every side that can be built.

    In the process of a side it serves that one, and does not return.
    """
    if arguments.side:
        _serve(sides[arguments.side], arguments)
    with tempfile.TemporaryDirectory() as cache:
        # Compilation is timed with an empty cache, then with what that left in it.
        processes: dict[str, subprocess.Popen[str]] = {}
        for name in sides:
            if arguments.only and name not in arguments.only:
                continue
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            process = processes[name] = start("--side", name, cache=Path(cache), **pipes)
            reply = _ask(process, None)  # one builds at a time
            if "missing" in reply:
                print(f"{name}: {reply['missing']}", file=sys.stderr)
                process.wait()
                del processes[name]
        times = {name: Times({}, {}) for name in processes}
        runs = {name: _ask(process, "runs")["runs"] for name, process in processes.items()}
        for number in range(arguments.rounds):
            for run in dict.fromkeys(run for names in runs.values() for run in names):
                for name, process in processes.items():
                    if run in runs[name]:
                        seconds = _ask(process, run)["seconds"]
                        print(
                            f"round {number + 1}  {run:24} {name:26} {seconds:9.4f} s",
                            file=sys.stderr,
                            flush=True,
                        )
                        times[name].seconds.setdefault(run, []).append(seconds)
        for name, process in processes.items():
            times[name].facts = _ask(process, "facts")
            process.communicate()
    return times


def ratios(times: Mapping[str, Times], run: str) -> dict[str, Any]:
    """Returns medians of a run, and `ratio`: seconds of the peer's fastest form over ours.

    `ratio` is one of medians, `ratio_of_minima` of minima; `ratio_range` spans those of the rounds.
    """
    row: dict[str, Any] = {
        f"{name}_seconds": round(median(t.seconds[run]), 5)
        for name, t in times.items()
        if run in t.seconds
    }
    ours = times[OURS].seconds[run]
    peers = {name: t.seconds[run] for name, t in times.items() if name != OURS and run in t.seconds}
    if peers:
        best = min(peers.values(), key=median)
        by_round = [theirs / mine for theirs, mine in zip(best, ours, strict=True)]
        row |= {
            "ratio": round(median(best) / median(ours), 3),
            "ratio_of_minima": round(min(map(min, peers.values())) / min(ours), 3),
            "ratio_range": [round(min(by_round), 3), round(max(by_round), 3)],
        }
    return row


def start(*options: str, cache: Path, **pipes: Any) -> subprocess.Popen[str]:
    """Starts this benchmark in another process.

    Args:
        options: added to the command line.
        cache: folder of the compilation cache, which takes every program.
        pipes: arguments of `subprocess.Popen`.
    """
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # sides share a GPU's memory
    command = [sys.executable, *sys.argv, *options]
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def _ask(process: subprocess.Popen[str], what: str | None) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    if what is not None:
        process.stdin.write(f"{what}\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        sys.exit(f"error: a side ended with status {process.wait()}")
    reply: dict[str, Any] = json.loads(line)
    return reply


def _serve(build: Build, arguments: argparse.Namespace) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    try:
        side = build(arguments)
    except ImportError as error:
        _reply(replies, {"missing": str(error)})
        sys.exit()
    building = {f"building_{name}": value for name, value in peak_memory().items()}
    _forget_peak()
    if known := {name: fact for name, fact in side.facts.items() if not callable(fact)}:
        print(json.dumps({"side": arguments.side} | known), flush=True)  # in case time runs out
    _reply(replies, {})
    for line in sys.stdin:
        what = line.rstrip("\n")
        if what == "runs":
            _reply(replies, {"runs": list(side.runs)})
        elif what == "facts":
            peaks = building | peak_memory()
            values = {name: fact() if callable(fact) else fact for name, fact in side.facts.items()}
            _reply(replies, values | peaks)
        else:
            side.runs[what]()  # some kernels take the memory of a process that waits away
            started = time.perf_counter()
            side.runs[what]()
            _reply(replies, {"seconds": time.perf_counter() - started})
    sys.exit()


def _reply(replies: IO[str], values: Mapping[str, Any]) -> None:
    replies.write(json.dumps(values) + "\n")
    replies.flush()


def _forget_peak() -> None:
    """Gives back what building a side needed, its compiler above all, and measures anew."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # not every kernel has it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> dict[str, int]:
    """Returns this process's peak memory in MiB: the GPU's if it used one, else resident."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return {"peak_mib": torch.cuda.max_memory_allocated() // 2**20}
    if jax is not None and jax.default_backend() == "gpu":
        return {"peak_mib": jax.devices()[0].memory_stats()["peak_bytes_in_use"] // 2**20}
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        "peak_mib": next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
    }


def machine(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Returns where and how a row of results was measured; `names` are options to include."""
    return {name: getattr(arguments, name) for name in names} | {
        "rounds": arguments.rounds,
        "cores": len(os.sched_getaffinity(0)),
    }
