"""Kills a training run at random instants and resumes it until it is done.

    python benchmarks/kill_and_resume.py [--kills 200] [--seed 0] [--workdir DIR]

A tiny network is trained twice, in processes of their own: once left alone, once killed (kill -9)
and started again by the same command. A fifth of the kills each is aimed at the start of the
process (imports, data set, restoring), at a save, and at the change to the next stage; the others
fall anywhere after the start. A line per kill goes to stderr; the last line is JSON: `kills`, what
they interrupted (`during`), `unrecoverable` starts (that failed by themselves), whether
metrics.jsonl and the parameters, optimiser state and metadata at the end of every stage are
`bit_equal`, and `seconds`. Exit status 0 if all kills were made, all starts succeeded and all bits
are equal.

This file is also the config of the run: many short stages, so that many kills hit their changes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package need not be installed

from mrcnn_jax.config.files import load_config_file  # noqa: E402
from mrcnn_jax.config.schema import Config  # noqa: E402

ROUNDS = 5  # of the three stages
READY = b"training programs to compile"  # train.py prints this when all is restored
MOMENTS = ("start", "save", "stage change", "training", "training")


def get_config() -> Config:
    config = load_config_file(ROOT / "tests" / "tiny.py")
    stages = tuple(
        replace(stage, name=f"{stage.name}{i}", epochs=12)
        for i in range(ROUNDS)
        for stage in config.stages
    )
    return replace(
        config, name="kill_and_resume", stages=stages, save_every_steps=5, validate_every_epochs=6
    )


def killed_run(
    command: Sequence[str], workdir: Path, log: Path, moments: Sequence[str], *, seed: int
) -> tuple[Counter[str], int]:
    """Starts a run again and again, kills it once at each of `moments`, then lets it finish.

    A kill aimed at one moment may come too late and hit another.

    Args:
        command: command that trains in `workdir`.
        workdir: the run's folder.
        log: file for its output.
        moments: some of MOMENTS.
        seed: seed of the instants.

    Returns:
        What the kills interrupted, and how many starts failed by themselves. There are fewer kills
        than moments if the run finished before, or a start failed.
    """
    rng = random.Random(seed)
    killed: Counter[str] = Counter()
    # Seconds until READY, as last measured: how fast the machine is now. At first less than the
    # imports take.
    start_up = 1.0
    for moment in [*moments, "none"]:
        begun, since = time.monotonic(), time.time()
        # Unbuffered, for READY.
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        kill_at = begun + rng.uniform(0, start_up) if moment == "start" else None
        ready = False
        while process.poll() is None and (kill_at is None or time.monotonic() < kill_at):
            if not ready and READY in log.read_bytes():
                ready = True
                start_up = time.monotonic() - begun
                if moment == "training":
                    kill_at = time.monotonic() + rng.uniform(0, start_up)
                elif moment == "stage change":  # unless there is one before
                    kill_at = time.monotonic() + start_up
            if moment == "save" and kill_at is None and ready and _saving(workdir, since):
                kill_at = time.monotonic() + rng.uniform(0, 0.03 * start_up)
            elif moment == "stage change" and ready and _between_stages(workdir):
                kill_at = time.monotonic() + rng.uniform(0, 0.3 * start_up)
                moment = "decided"
            time.sleep(0.005)
        process.kill()
        status = process.wait()
        if status == 0:
            return killed, 0
        if status != -signal.SIGKILL:
            print(log.read_text(errors="replace"), file=sys.stderr)
            return killed, 1
        what = (
            "start"
            if not ready
            else "save"
            if _saving(workdir, since)
            else "stage change"
            if _between_stages(workdir)
            else "training"
        )
        killed[what] += 1
        print(
            f"kill {killed.total()}: {what}, {time.monotonic() - begun:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    raise AssertionError("a run that is left alone ends")


def _saving(workdir: Path, since: float) -> bool:
    """Returns whether a checkpoint begun after `since` was still being written."""
    for hidden in (workdir / "checkpoints").glob(".*"):
        try:
            if hidden.stat().st_mtime >= since:
                return True
        except FileNotFoundError:  # it has its name
            continue
    return False


def _between_stages(workdir: Path) -> bool:
    """Returns whether a stage's last checkpoint exists, but no step of the next is recorded."""
    try:
        meta = json.loads(max((workdir / "checkpoints").glob("*/meta.json")).read_text())
    except (ValueError, FileNotFoundError):  # there is none, or it is just being replaced
        return False
    last = (workdir / "metrics.jsonl").read_text().rsplit("\n", 2)[-2]
    return bool(meta["stage_complete"] and json.loads(last)["stage"] == meta["stage"])


def differences(run: Path, reference: Path, config: Config) -> list[str]:
    """Lists what is not bit-equal in the folders of two finished runs."""
    import numpy as np
    import orbax.checkpoint as ocp

    found = (
        []
        if (run / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
        else ["metrics.jsonl"]
    )
    ends = [
        {meta.parent.name: meta for meta in sorted(folder.glob("checkpoints/*/meta.json"))}
        for folder in (run, reference)
    ]
    complete = [
        {name for name, meta in end.items() if json.loads(meta.read_text())["stage_complete"]}
        for end in ends
    ]
    if complete[0] != complete[1] or len(complete[0]) != len(config.stages):
        return [*found, "the stages' last checkpoints"]
    reader = ocp.PyTreeCheckpointer()
    for name in sorted(complete[0]):
        ours, theirs = (end[name] for end in ends)
        found += [str(ours)] if ours.read_bytes() != theirs.read_bytes() else []
        for item in ("model", "training"):
            a, b = (reader.restore(meta.parent / item) for meta in (ours, theirs))
            paths = sorted(a.keys() | b.keys())
            same = [
                p in a and p in b and np.asarray(a[p]).tobytes() == np.asarray(b[p]).tobytes()
                for p in paths
            ]
            found += [
                f"{name}: {path}" for path, equal in zip(paths, same, strict=True) if not equal
            ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workdir",
        type=Path,
        help="for data, both runs and the compilation cache; by default removed afterwards",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.workdir or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        from mrcnn_jax.datasets.shapes import write_shapes

        write_shapes(folder / "data", train=11, val=8)
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--config",
            __file__,
            "--data.root",
            str(folder / "data"),
            "--workdir",
        ]
        started = time.monotonic()
        reference, run = folder / "reference", folder / "run"
        subprocess.run(
            [*command, str(reference)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        alone = time.monotonic() - started
        moments = random.Random(arguments.seed).choices(MOMENTS, k=arguments.kills)
        killed, unrecoverable = killed_run(
            [*command, str(run)], run, folder / "log", moments, seed=arguments.seed
        )
        different = (
            ["the run did not end"] if unrecoverable else differences(run, reference, get_config())
        )
        seconds = time.monotonic() - started
    for name in different:
        print(f"differs: {name}", file=sys.stderr)
    result = {
        "kills": killed.total(),
        "during": dict(sorted(killed.items())),
        "seed": arguments.seed,
        "unrecoverable": unrecoverable,
        "bit_equal": not different,
        "seconds_alone": round(alone, 1),
        "seconds": round(seconds, 1),
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result))
    sys.exit(0 if killed.total() == arguments.kills and not unrecoverable and not different else 1)


if __name__ == "__main__":
    main()
