"""The experiments' table: a row for each variant that is done with every seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mrcnn_jax.commands.experiment_job import Job, Piece, Record
from mrcnn_jax.commands.variants import Chain, StageRun
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config
from mrcnn_jax.inference.evaluate import read_evaluation
from mrcnn_jax.models.initialise import variable_shapes
from mrcnn_jax.output import write_file
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.logs import TIMING
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.runs.metrics import read_timing

AP = {
    "bbox/AP": "box AP",
    "bbox/AP50": "box AP50",
    "segm/AP": "mask AP",
    "segm/AP50": "mask AP50",
    "segm/AP75": "mask AP75",
}


def write_table(
    recipe: Config,
    by_seed: Sequence[Sequence[Chain]],
    job: Job,
    folder: Path,
    command: Callable[[str], str],
) -> None:
    """Writes table.json and table.md to `folder`, and prints the latter.

    Args:
        by_seed: the chains of every seed.
        command: experiment -> the command that trains it.
    """
    limit = recipe.model.rpn.proposals
    columns = {f"recall@{limit}": f"recall at {limit}"}
    columns |= {f"recall@{limit}/{size}": size for size in ("small", "medium", "large")} | AP
    rows = []
    shown: dict[StageRun, None] = {}
    for chains in zip(*by_seed, strict=True):  # a variant with every seed
        lasts = [chain.runs[-1] for chain in chains]
        if not all(job.done(Piece(last, evaluation=True)) for last in lasts):
            continue
        shown |= dict.fromkeys(run for chain in chains for run in chain.runs)
        found = [read_evaluation(last.folder / "eval") for last in lasts]
        variant = chains[0].variant
        rows.append(
            {
                "variant": variant.title,
                "runs": [str(last.folder) for last in lasts],
                "metrics": {name: [metrics.get(name) for metrics in found] for name in columns},
                "seconds_per_epoch": {
                    runs[0].stage.name: [_seconds_per_epoch(run, job) for run in runs]
                    for runs in zip(*(chain.runs for chain in chains), strict=True)
                },
                "parameters": _parameters(lasts[0].config),
                "command": command(variant.experiment),
            }
        )
    records = [Record.of(run) for run in shown]
    ends = [end for run in shown if (end := job.ends[run]) is not None]
    table = {
        "recipe": recipe.name,
        "seeds": [recipe.seed + number for number in range(len(by_seed))],
        "rows": rows,
        "training_seconds": round(sum(record.training_seconds for record in records), 1),
        "evaluation_seconds": round(sum(record.evaluation_seconds for record in records), 1),
        "device": "; ".join(dict.fromkeys(_device(end) for end in ends)),
        "jax": ", ".join(sorted({str(end.environment["jax"]) for end in ends})),
        "date": max(record.date for record in records if record.date is not None),
    }
    write_file(folder / "table.json", json.dumps(table, indent=2) + "\n")
    text = _markdown(table, columns)
    write_file(folder / "table.md", text)
    print(f"\n{text}\ntable: {folder / 'table.md'}, {folder / 'table.json'}")


def _seconds_per_epoch(run: StageRun, job: Job) -> float:
    end = job.ends[run]
    assert end is not None
    Checkpoints(run.folder, keep=1).refuse_damaged_log(end, TIMING)
    rows = read_timing(run.folder)
    if not rows:
        raise ConfigError(f"{run.folder / TIMING}: holds no row")
    return round(seconds_per_epoch(rows, steps=round(end.stage_step / run.stage.epochs)), 3)


def seconds_per_epoch(rows: Sequence[dict[str, Any]], *, steps: int) -> float:
    """The median over the rows of timing.jsonl that are whole epochs of `steps` steps.

    Where a stop left no whole one, the median over what there is, scaled to an epoch.
    """
    whole = [row for row in rows if row["steps"] == steps] or rows
    return statistics.median(row["seconds"] / row["steps"] for row in whole) * steps


def _parameters(config: Config) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(config.model)["params"]))


def _device(meta: Meta) -> str:
    found = meta.environment
    cpu = f"{found['cores']} cores of {found['processor']}"
    return cpu if found["platform"] == "cpu" else f"{found['devices']} x {found['device']}"


def _markdown(table: dict[str, Any], columns: dict[str, str]) -> str:
    seeds, rows = table["seeds"], table["rows"]
    stages = tuple(rows[0]["seconds_per_epoch"])
    times = f"s an epoch ({' / '.join(stages)})"
    head = ["variant", *columns.values(), times, "parameters", "command"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        seconds = by_stage(row["seconds_per_epoch"], stages)
        metrics = [spread(row["metrics"][name], _share) for name in columns]
        size, command = f"{row['parameters']:,}", f"`{row['command']}`"
        lines.append([row["variant"], *metrics, seconds, size, command])
    training, evaluation = table["training_seconds"] / 60, table["evaluation_seconds"] / 60
    several = f"seed {seeds[0]}"
    if len(seeds) > 1:
        several = f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation"
    machine = f"{table['device']}, jax {table['jax']}, {table['date']}"
    notes = (
        f"Recipe {table['recipe']}, {several}. {machine}.\n"
        f"{training + evaluation:.1f} minutes in all: training {training:.1f} (compilation, "
        f"validation, checkpoints and curves included), evaluation and its pictures "
        f"{evaluation:.1f}; each stage that variants share counts once. Seconds an epoch: the "
        "median over the epochs of a stage, compilation included, validation not.\n"
    )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + f"\n{notes}"


def by_stage(seconds: Mapping[str, Sequence[float]], head: Sequence[str]) -> str:
    """Seconds per epoch of each stage, with its name if the stages are not those of the `head`."""
    named = tuple(seconds) != tuple(head)
    return " / ".join(
        (f"{stage} " if named else "") + spread(values, "{:.1f}".format)
        for stage, values in seconds.items()
    )


def spread(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """Mean ± standard deviation; "-" where COCO's figure is not defined."""
    known = [value for value in values if value is not None and value >= 0]
    if len(known) < len(values):
        return "-"
    mean = show(statistics.mean(known))
    return f"{mean} ± {show(statistics.stdev(known))}" if len(known) > 1 else mean


def _share(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")
