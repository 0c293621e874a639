"""Box and mask AP of joint training, ours beside torchvision's maskrcnn_resnet50_fpn.

    export MRCNN_DATA=...        # holds coco300/ and weights/
    python benchmarks/accuracy_vs_torchvision.py [--steps 600] [--seeds 0 1 2] [--side ours] \\
        [--workdir DIR]

Both sides have the same images, weights, canvases, order and steps: coco300 at its own size (short
side 300, long side at most 480), batches of 2, no augmentation. An ImageNet ResNet-50 with frozen
batch norm, res3 to res5 trainable; FPN and heads start from our random weights, drawn from the
seed. SGD 0.005 after a linear warm-up, a tenth of it in the last quarter, momentum 0.9, weight
decay 1e-4. torchvision gets our loader's canvases and boxes, and our evaluation rates both.

The sides train one after the other, each in a process of its own; the same command again resumes.
Losses are printed side by side, as means over the last 50 steps. The last line is JSON: AP by seed
and on average, `difference` (ours minus torchvision's), and `spread` (standard deviation over the
seeds). Without torch, ours is trained alone.

--steps is rounded to whole epochs; below one, only as many of the first images are trained on.
--samples: RoIs per image in the box head (torchvision: 512); at most a quarter are foreground, and
these train the mask head.

What differs on purpose (see also docs/differences.md):
- samples of anchors and proposals: each side has its own random numbers. With --all-samples every
  anchor and every one of 100 proposals is taken, and nothing is left to chance: losses then agree
  step by step, but for what follows;
- mask targets: torchvision's are averages of the full, resized masks; ours are 0 or 1, from crops;
- crowds: torchvision's recipe leaves them out; ours takes no negatives inside them. With
  --without-crowds neither side knows of them;
- pasting: torchvision's detections are pasted by its own code.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import joint_run
import peer_training
import sides

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError

SIDES = ("torchvision", "ours")
LOSSES = ("rpn_objectness", "rpn_box", "box_class", "box_box", "mask")
FIGURES = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")


def ours(arguments: argparse.Namespace) -> None:
    """Trains and evaluates our side."""
    from mrcnn_jax.commands import eval as evaluation
    from mrcnn_jax.training.loop import train

    _, config = joint_run.planned_config(arguments)
    folder = joint_run.folder_of(arguments, arguments.seed, "ours")
    try:
        train(config, folder)
    except cli.Stopped as stopped:
        sys.exit(str(stopped))
    evaluation.run(evaluation.Arguments(workdir=folder))


def window_means(rows: Sequence[Mapping[str, Any]], size: int) -> dict[int, dict[str, float]]:
    """Returns the mean training losses of the first step and of each whole window of `size` steps.

    They are listed by the last step of a window.
    """
    losses = [row for row in rows if row["split"] == "train"]
    windows = [
        losses[:1],
        *(losses[end - size : end] for end in range(size, len(losses) + 1, size)),
    ]
    return {
        window[-1]["step"]: {name: fmean(row[f"loss/{name}"] for row in window) for name in LOSSES}
        for window in windows
        if window
    }


def loss_lines(means: Mapping[str, Mapping[int, Mapping[str, float]]], step: int) -> list[str]:
    """Returns a line with the losses of each side that has reached a step."""
    return [
        f"step {step:5} {side:12}"
        + "  ".join(f"{name} {value:.4f}" for name, value in at[step].items())
        for side, at in means.items()
        if step in at
    ]


def seconds_a_step(folder: Path) -> float | None:
    """Returns the median over the epochs; the one in which programs were compiled is slower."""
    path = folder / "timing.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seconds = [row["seconds"] / row["steps"] for row in rows if row["steps"]]
    return round(median(seconds), 3) if seconds else None


def mean_losses(arguments: argparse.Namespace, seed: int, sides: Sequence[str]) -> dict[str, Any]:
    """Returns the `window_means` of each side so far."""
    from mrcnn_jax.runs.logs import METRICS
    from mrcnn_jax.runs.metrics import read_metrics

    folders = {side: joint_run.folder_of(arguments, seed, side) for side in sides}
    return {
        side: window_means(read_metrics(folder), arguments.every)
        for side, folder in folders.items()
        if (folder / METRICS).exists()
    }


def run_child(arguments: argparse.Namespace, seed: int, child: str) -> None:
    """Runs one process; while a side trains, its losses are printed beside those of the other."""
    process = sides.start(
        "--child",
        child,
        "--seed",
        str(seed),
        cache=arguments.workdir.absolute() / "cache",
        stdout=sys.stderr,
    )
    shown: set[int] = set()
    running = True
    try:
        while running:
            try:
                process.wait(timeout=5)
                running = False
            except subprocess.TimeoutExpired:
                pass
            means = mean_losses(arguments, seed, SIDES)
            for step in sorted(means.get(child, {}).keys() - shown):
                shown.add(step)
                print("\n".join(loss_lines(means, step)), file=sys.stderr, flush=True)
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        sys.exit(process.returncode)


def summary(figures: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, Any]:
    """Summarises figures by side, seed and name.

    Returns:
        For each name: the figures of each side by seed, their means and spreads, and the
        differences of the sides.
    """
    result: dict[str, Any] = {}
    for name in FIGURES:
        row: dict[str, Any] = {
            side: [round(values[name], 5) for values in by_seed.values()]
            for side, by_seed in figures.items()
        }
        row |= {f"{side}_mean": round(fmean(row[side]), 5) for side in figures}
        row |= {
            f"{side}_spread": round(stdev(row[side]), 5) for side in figures if len(row[side]) > 1
        }
        if len(figures) == 2:
            row["difference"] = [
                round(a - b, 5) for a, b in zip(row["ours"], row["torchvision"], strict=True)
            ]
        result[name] = row
    return result


def report(
    arguments: argparse.Namespace, figures: Mapping[str, Mapping[int, Mapping[str, float]]]
) -> None:
    """Prints the losses, the table and the line of JSON."""
    plan = json.loads((arguments.workdir / "plan.json").read_text())
    losses: dict[str, dict[str, Any]] = {}
    for seed in arguments.seeds:
        means = mean_losses(arguments, seed, list(figures))
        print(f"\nseed {seed}")
        for step in sorted(set().union(*means.values())):
            print("\n".join(loss_lines(means, step)))
        losses[f"seed{seed}"] = {
            side: {
                str(step): {name: round(value, 4) for name, value in at[step].items()}
                for step in (min(at), max(at))
            }
            for side, at in means.items()
        }
    print(
        f"\n{'seed':>4} {'side':12}"
        + "".join(f"{name:>11}" for name in FIGURES)
        + f"{'s a step':>11}"
    )
    seconds: dict[str, list[float | None]] = {side: [] for side in figures}
    for seed in arguments.seeds:
        for side, by_seed in figures.items():
            folder = joint_run.folder_of(arguments, seed, side)
            seconds[side].append(seconds_a_step(folder))
            values = "".join(f"{100 * by_seed[seed][name]:11.2f}" for name in FIGURES)
            print(f"{seed:4} {side:12}{values}{seconds[side][-1] or float('nan'):11.2f}")
    result = joint_run.asked(arguments) | {
        "steps": plan["steps"],
        "epochs": plan["epochs"],
        "seeds": arguments.seeds,
    }
    result |= summary(figures) | {
        "seconds_a_step": seconds,
        "losses": losses,
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--side", choices=[*SIDES, "both"], default="both")
    made.add_argument("--steps", type=int, default=600)
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--samples", type=int, default=128, help="RoIs per image in the box head")
    made.add_argument("--all-samples", action="store_true", help="leave nothing to chance")
    made.add_argument(
        "--without-crowds", action="store_true", help="leave crowds out of the training images"
    )
    made.add_argument("--every", type=int, default=50, help="steps between two lines of losses")
    made.add_argument("--workdir", type=Path, default=Path("runs/accuracy_vs_torchvision"))
    made.add_argument(
        "--child", choices=["prepare", *SIDES], help=argparse.SUPPRESS
    )  # in a process of its own
    made.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if arguments.child:
        run = {"prepare": joint_run.prepare, "ours": ours, "torchvision": peer_training.train}
        run[arguments.child](arguments)
        return
    for name in ("steps", "samples", "every"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name}: must be at least 1")
    chosen = list(SIDES) if arguments.side == "both" else [arguments.side]
    if "torchvision" in chosen and importlib.util.find_spec("torchvision") is None:
        if arguments.side != "both":
            raise ConfigError("--side torchvision: torchvision is not installed")
        print("torchvision is not installed: ours alone", file=sys.stderr)
        chosen.remove("torchvision")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the child as well
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    path = arguments.workdir / "plan.json"
    planned = json.loads(path.read_text())["asked"] if path.exists() else None
    if planned not in (None, joint_run.asked(arguments)):
        raise ConfigError(f"{path}: made with other options: {planned} (choose another --workdir)")

    figures: dict[str, dict[int, dict[str, float]]] = {side: {} for side in chosen}
    for seed in arguments.seeds:
        arguments.seed = seed
        if not joint_run.initial_weights(arguments).exists():
            run_child(arguments, seed, "prepare")
        for side in chosen:
            metrics = joint_run.folder_of(arguments, seed, side) / "eval" / "metrics.json"
            if not metrics.exists():
                run_child(arguments, seed, side)
            figures[side][seed] = json.loads(metrics.read_text())
    report(arguments, figures)


if __name__ == "__main__":
    cli.run(main)
