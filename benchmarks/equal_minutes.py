"""Box and mask AP at equal CPU minutes: what `mrcnn train` does by itself, beside torchvision.

    export MRCNN_DATA=...        # holds coco300/, coco_mini/ and weights/
    python benchmarks/equal_minutes.py --data coco300 --minutes 15 --seeds 0 1 2 [--side ours] \\
        [--workdir DIR] [--label NAME -- --data.batch-size 4 ...]

Both sides have the same images, ImageNet ResNet-50, short and long side, and two cores:
- ours: `train.py FOLDER --weights FILE --minutes M --seed S` in a process of its own, with an empty
  compilation cache, then eval.py. Options after `--` are given to train.py, under a --label.
- torchvision: maskrcnn_resnet50_fpn with its defaults, by its reference recipe (peer_recipe.py):
  batches of 2 of similar aspect ratio, SGD .0025 with momentum .9 and weight decay 1e-4, a warm-up
  of at most an epoch, a tenth of the rate after 16/26 of the training and another after 22/26,
  flips. Images are read by one thread that runs ahead.

The budget is process time (user and system, of all threads, from the start of a process: imports,
reading, compilation). Ours is steered by the clock, so it trains first. torchvision then trains
until it has used exactly what our training of that seed used, without what our validation in
between used; and its schedule follows the share of that budget. Neither side's evaluation counts.
torchvision is not trained again for another --label.

--data takes coco300, coco_mini (its three classes, 300 training images) or any folder that
`mrcnn train` recognises. The same command again leaves out what is there; a run that was stopped
begins anew, since its time is lost. The last line is JSON: AP by seed, mean, standard deviation
(`_spread`) and ratio, and the minutes that both sides used. Without torch, ours is trained alone.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import accuracy_vs_torchvision as equal_steps
import peer_recipe
import sides

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json
from mrcnn_jax.output import write_file

TORCHVISION, OURS = "torchvision", "ours"
CORES = 2
TIMES = "times.json"  # of a run whose training is over
VALIDATION = "validation.json"
WEIGHTS = Path("weights") / "pqf_resnet50_large.npz"
COCO_MINI = {"train": "train_3cls.json", "val": "val_3cls.json"}


def shared(path: Path) -> Path:
    """Returns a path under $MRCNN_DATA; ConfigError if there is none."""
    root = os.environ.get("MRCNN_DATA")
    if root is None:
        raise ConfigError(f"{path}: $MRCNN_DATA is not set")
    if not Path(root, path).exists():
        raise ConfigError(f"{Path(root, path)}: not found")
    return Path(root, path).resolve()


def data_folder(name: str, workdir: Path) -> Path:
    """Returns the folder that train.py is given.

    For coco_mini, which holds several annotation files, one with those of three classes is made in
    `workdir`.
    """
    if name == "coco300":
        return shared(Path(name))
    if name != "coco_mini":
        if not Path(name).is_dir():
            raise ConfigError(f"--data: {name}: no such folder (or coco300, coco_mini)")
        return Path(name).resolve()
    source, made = shared(Path(name)), workdir.absolute() / name
    (made / "annotations").mkdir(parents=True, exist_ok=True)
    for role, file in COCO_MINI.items():
        copy = made / "annotations" / f"{role}.json"
        if not copy.exists():  # a new one would be checked anew
            write_file(copy, (source / "annotations" / file).read_bytes())
    if not (made / "images").exists():
        (made / "images").symlink_to(source / "images")
    return made


def run_folder(arguments: argparse.Namespace, seed: int, side: str) -> Path:
    name = arguments.label if side == OURS else side
    data = f"{Path(arguments.data).resolve().name}-{arguments.minutes:g}"
    return Path(arguments.workdir).absolute() / data / f"seed{seed}" / name


def asked(arguments: argparse.Namespace, side: str) -> dict[str, Any]:
    """Returns what defines a run of a side beside its seed and budget."""
    found = {"data": str(arguments.folder), "minutes": arguments.minutes}
    found["weights"] = str(arguments.weights)
    return found if side == TORCHVISION else found | {"options": arguments.options}


def times_of(arguments: argparse.Namespace, seed: int, side: str) -> dict[str, Any] | None:
    """Returns what a training took, None if it is not over.

    Raises:
        ConfigError: it had other options.
    """
    path = run_folder(arguments, seed, side) / TIMES
    if not path.exists():
        return None
    times: dict[str, Any] = json.loads(path.read_text())
    if times["asked"] != asked(arguments, side):
        raise ConfigError(
            f"{path}: made with other options: {times['asked']} (choose another --workdir"
            f"{' or --label' if side == OURS else ''})"
        )
    return times


# -- in the parent process -------------------------------------------------------------------------


def call(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """Runs a command, whose output goes to stderr; it ends with this process.

    Returns:
        (seconds by the clock, seconds of process time of it and of its own children).
    """

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    started, before = time.perf_counter(), used()
    process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=sys.stderr)
    try:
        process.wait()
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - started, used() - before


def child(arguments: argparse.Namespace, seed: int, side: str) -> list[str]:
    """Returns the command of a side's process."""
    own = ["--child", side, "--seed", str(seed)]
    return [sys.executable, str(Path(__file__).resolve()), *own, *arguments.words]


def train_ours(arguments: argparse.Namespace, seed: int) -> None:
    """Trains and evaluates our side, as far as that is not done."""
    folder = run_folder(arguments, seed, OURS)
    on_cpu = {"JAX_PLATFORMS": "cpu"}
    if times_of(arguments, seed, OURS) is None:
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory() as empty:
            compiled = {"JAX_COMPILATION_CACHE_DIR": empty}
            seconds, process_seconds = call(child(arguments, seed, OURS), on_cpu | compiled)
        validation = json.loads((folder / VALIDATION).read_text())
        rows = map(json.loads, (folder / "timing.jsonl").read_text().splitlines())
        times = {
            "asked": asked(arguments, OURS),
            "steps": sum(row["steps"] for row in rows),
            "process_seconds": process_seconds - validation["process_seconds"],
            "seconds": seconds - validation["seconds"],
            "validation_process_seconds": validation["process_seconds"],
        }
        write_file(folder / TIMES, json.dumps(times))
    if not metrics_file(folder).exists():
        command = [sys.executable, str(sides.ROOT / "eval.py"), "--workdir", str(folder)]
        call([*command, "--report-images", "0"], on_cpu)


def train_torchvision(arguments: argparse.Namespace, seed: int) -> None:
    """Trains and evaluates torchvision's side, unless that is done."""
    folder = run_folder(arguments, seed, TORCHVISION)
    if times_of(arguments, seed, TORCHVISION) is not None:
        return
    if times_of(arguments, seed, OURS) is None:
        raise ConfigError(
            f"--side torchvision: {run_folder(arguments, seed, OURS)}: ours has not been trained, "
            "whose process time is the budget"
        )
    shutil.rmtree(folder, ignore_errors=True)
    call(child(arguments, seed, TORCHVISION), {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"})


def metrics_file(folder: Path) -> Path:
    return folder / "eval" / "metrics.json"


# -- in the process of a side ----------------------------------------------------------------------


def ours(arguments: argparse.Namespace) -> None:
    """Runs train.py as a user does, and notes what validation uses of it."""
    from mrcnn_jax.training.watch import Watch

    folder = run_folder(arguments, arguments.seed, OURS)
    used = {"seconds": 0.0, "process_seconds": 0.0}
    end_epoch: Callable[..., dict[str, float]] = Watch.end_epoch

    @functools.wraps(end_epoch)
    def timed(*values: Any, **named: Any) -> dict[str, float]:
        started, before = time.perf_counter(), time.process_time()
        found = end_epoch(*values, **named)
        used["seconds"] += time.perf_counter() - started
        used["process_seconds"] += time.process_time() - before
        return found

    Watch.end_epoch = timed
    given = {"workdir": folder, "weights": arguments.weights, "seed": arguments.seed}
    given["minutes"] = f"{arguments.minutes:g}"
    script = str(sides.ROOT / "train.py")
    options = [word for name, value in given.items() for word in (f"--{name}", f"{value}")]
    sys.argv = [script, str(arguments.folder), *options, *arguments.options]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if folder.is_dir():
            write_file(folder / VALIDATION, json.dumps(used))


def torchvision(arguments: argparse.Namespace) -> None:
    """Trains torchvision's side in the process time that ours had, and evaluates it."""
    times = times_of(arguments, arguments.seed, OURS)
    assert times is not None
    our_folder = run_folder(arguments, arguments.seed, OURS)
    config = load_config_json(our_folder / "config.json")
    folder = run_folder(arguments, arguments.seed, TORCHVISION)
    done = peer_recipe.run(
        config,
        folder,
        weights=arguments.weights,
        seed=arguments.seed,
        budget=times["process_seconds"],
        cache=Path(config.data.cache or our_folder / "data"),
    )
    write_file(folder / TIMES, json.dumps({"asked": asked(arguments, TORCHVISION), **done}))


# -- report ----------------------------------------------------------------------------------------


def report(arguments: argparse.Namespace, chosen: Sequence[str]) -> dict[str, Any]:
    """Prints a table of all runs, and returns the figures of the last line."""
    figures: dict[str, dict[int, dict[str, float]]] = {side: {} for side in chosen}
    times: dict[str, list[dict[str, Any]]] = {side: [] for side in chosen}
    names = equal_steps.FIGURES
    print(
        f"{'seed':>4} {'side':12}"
        + "".join(f"{name:>11}" for name in names)
        + f"{'CPU min':>9}{'min':>7}{'steps':>7}"
    )
    for seed in arguments.seeds:
        for side in chosen:
            folder = run_folder(arguments, seed, side)
            found = figures[side][seed] = json.loads(metrics_file(folder).read_text())
            took = times_of(arguments, seed, side)
            assert took is not None
            times[side].append(took)
            values = "".join(f"{100 * found[name]:11.2f}" for name in names)
            minutes = f"{took['process_seconds'] / 60:9.2f}{took['seconds'] / 60:7.2f}"
            print(f"{seed:4} {folder.name:12}{values}{minutes}{took['steps']:7}")

    def minutes_of(name: str) -> dict[str, list[float]]:
        return {
            side: [round(took[name] / 60, 3) for took in its]
            for side, its in times.items()
            if name in its[0]
        }

    return {
        "data": arguments.folder.name,
        "minutes": arguments.minutes,
        "label": arguments.label,
        "options": arguments.options,
        "seeds": arguments.seeds,
        **with_ratios(equal_steps.summary(figures)),
        "process_minutes": minutes_of("process_seconds"),
        "clock_minutes": minutes_of("seconds"),
        "validation_process_minutes": minutes_of("validation_process_seconds"),
        "steps": {side: [took["steps"] for took in its] for side, its in times.items()},
        "cores": len(os.sched_getaffinity(0)),
    }


def with_ratios(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Adds `ratio`, the mean of ours over torchvision's, where both exist and theirs is above 0."""
    result: dict[str, Any] = {}
    for name, row in summary.items():
        result[name] = dict(row)
        if OURS in row and TORCHVISION in row and fmean(row[TORCHVISION]) > 0:
            result[name]["ratio"] = round(fmean(row[OURS]) / fmean(row[TORCHVISION]), 3)
    return result


# -- command line ----------------------------------------------------------------------------------


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses the command line.

    Raises:
        ConfigError: a value that cannot be used; data or weights that are not there.
    """
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data", default="coco300", help="coco300, coco_mini or a folder")
    made.add_argument("--minutes", type=float, default=15.0)
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--side", choices=[OURS, TORCHVISION, "both"], default="both")
    made.add_argument("--label", default=OURS, help="folder of our runs with other options")
    made.add_argument("--weights", type=Path, help="a file with a ResNet-50")
    made.add_argument("--workdir", type=Path, default=Path("runs/equal_minutes"))
    made.add_argument("--child", choices=[OURS, TORCHVISION], help=argparse.SUPPRESS)
    made.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    end = list(words).index("--") if "--" in words else len(words)
    arguments = made.parse_args(words[:end])
    arguments.words, arguments.options = list(words), list(words[end + 1 :])
    if not arguments.minutes > 0:
        raise ConfigError("--minutes: must be above 0")
    if arguments.label == TORCHVISION or Path(arguments.label).name != arguments.label:
        raise ConfigError(f"--label: {arguments.label}: must be a folder's name, not torchvision")
    if arguments.options and arguments.label == OURS:
        raise ConfigError("--label: options for train.py need one of their own")
    arguments.weights = (arguments.weights or shared(WEIGHTS)).resolve()
    arguments.folder = data_folder(arguments.data, arguments.workdir)
    return arguments


def main() -> None:
    arguments = parse(sys.argv[1:])
    if arguments.child:
        {OURS: ours, TORCHVISION: torchvision}[arguments.child](arguments)
        return
    chosen = [OURS, TORCHVISION] if arguments.side == "both" else [arguments.side]
    if TORCHVISION in chosen and importlib.util.find_spec("torchvision") is None:
        if arguments.side != "both":
            raise ConfigError("--side torchvision: torchvision is not installed")
        print("torchvision is not installed: ours alone", file=sys.stderr)
        chosen.remove(TORCHVISION)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the child as well
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # children inherit it
    train = {OURS: train_ours, TORCHVISION: train_torchvision}
    for seed in arguments.seeds:
        for side in chosen:
            train[side](arguments, seed)
    print(json.dumps(report(arguments, chosen)))


if __name__ == "__main__":
    cli.run(main)
