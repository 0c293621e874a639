"""What somebody who is handed a model should know of it, as a page of Markdown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax

from mrcnn_jax.config.files import to_dict
from mrcnn_jax.config.schema import Config, DataConfig
from mrcnn_jax.runs.run import Run

FIGURES = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")
UNKNOWN = "not stated (ask where they came from before you hand this model on)"


def without_paths(config: Config) -> Config:
    """`config` with names where it has absolute paths: nobody else has those."""
    data, default = config.data, DataConfig()
    names = {
        field: getattr(default, field)
        if Path(getattr(data, field)).is_absolute()
        else getattr(data, field)
        for field in ("train_annotations", "train_images", "val_annotations", "val_images")
    }
    init_from = Path(config.init_from).name if config.init_from else None
    return replace(config, data=replace(data, root=None, cache=None, **names), init_from=init_from)


def model_card(run: Run, workdir: Path, *, weights_licence: str | None = None) -> str:
    """Data, categories, stages, command, figures, what it started from with its licence, and the
    config of a restored run.

    Args:
        workdir: the run's folder: figures come from its own evaluation.
        weights_licence: of the weights that the run started from; nobody but the user knows it.
    """
    config, meta, model = run.config, run.meta, run.config.model
    backbone = f"ResNet-{model.resnet.depth}-{model.backbone.upper()}"
    size = sum(leaf.size for leaf in jax.tree.leaves(run.variables["params"]))
    environment = meta.environment
    lines = [
        f"# {config.name}",
        "",
        f"Mask R-CNN on a {backbone}, {size:,} parameters: boxes, classes, scores and masks of the objects in an RGB image. Checkpoint"
        f" {meta.name}{', moving average of its weights' if run.weights == 'ema' else ''}"
        f"{'' if meta.stage_complete else ', whose stage is not complete'}. Made with mrcnn_jax.",
        "",
        "## Categories",
        "",
        ", ".join(f"{name} ({number})" for number, name in meta.categories),
        "",
        "## Training",
        "",
    ]
    if config.stages:
        data = config.data
        lines += [
            f"Trained on {Path(data.train_annotations).name}, validated on {Path(data.val_annotations).name}"
            f"{f' of {data.folder}' if data.folder else ''}; images scaled to a short side of {data.short_side} and a long side of at most"
            f" {data.long_side}; {data.batch_size} images a step.",
            "",
            "| stage | losses | epochs | optimiser | learning rate |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {stage.name} | {', '.join(stage.losses)} | {stage.epochs} | {stage.optimizer.name} | {stage.optimizer.learning_rate:g} |"
            for stage in config.stages
        ]
        on = f"{environment['cores']} cores of {environment['processor']}"
        if environment["platform"] != "cpu":
            on = f"{environment.get('devices', 1)} x {environment['device']}"
        lines += ["", f"{on}, jax {environment['jax']}. Command: {_command(workdir)}"]
    else:
        lines.append("Imported; not trained here.")
    lines += ["", "## Figures", "", *_figures(run, workdir), "", "## Started from", ""]
    if config.init_from is None:
        lines.append(
            "Random weights."
            if config.stages
            else f"Licence of the imported weights: {weights_licence or UNKNOWN}."
        )
    else:
        lines.append(f"`{Path(config.init_from).name}`. Its licence: {weights_licence or UNKNOWN}.")
    return "\n".join(
        [
            *lines,
            "",
            "## Config",
            "",
            "```json",
            json.dumps(to_dict(without_paths(config)), indent=1),
            "```",
            "",
        ]
    )


def _command(workdir: Path) -> str:
    """That the run was begun with."""
    path = workdir / "commands.txt"
    return f"`{path.read_text().splitlines()[0]}`" if path.exists() else "not recorded"


def figures_of(run: Run, workdir: Path) -> dict[str, float] | None:
    """What eval.py found for these weights on the validation images; None if it was not asked, or
    of another checkpoint."""
    path = workdir / ("eval" if run.weights == "raw" else "eval_ema") / "metrics.json"
    metrics = json.loads(path.read_text()) if path.exists() else {}
    return metrics if metrics.pop("checkpoint", None) == run.meta.name else None


def _figures(run: Run, workdir: Path) -> list[str]:
    metrics = figures_of(run, workdir)
    if metrics is None:
        return ["Not evaluated."]
    cells = [f"{metrics[name]:.3f}" if metrics[name] >= 0 else "-" for name in FIGURES]
    by_class = [
        f"{name.removeprefix('segm/AP/')} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith("segm/AP/")
    ]
    lines = [
        "COCO average precision on the validation images.",
        "",
        f"| {' | '.join(FIGURES)} |",
        "|" + "---|" * len(FIGURES),
        f"| {' | '.join(cells)} |",
    ]
    if by_class:
        lines += ["", f"Mask AP by class: {', '.join(by_class)}."]
    return lines
