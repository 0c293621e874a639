"""The model card: a page of Markdown for those who are handed a model."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import PATHS, to_dict
from mrcnn_jax.config.schema import Config, DistributedConfig
from mrcnn_jax.inference.evaluate import read_evaluation
from mrcnn_jax.output import printable
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.logs import COMMANDS
from mrcnn_jax.runs.run import Run, begun_stages
from mrcnn_jax.weights.published import BASE, PUBLISHED

FIGURES = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")
UNKNOWN = "not stated (ask where they came from before you hand this model on)"


def without_paths(config: Config) -> Config:
    """`config` with the last name alone of every path that leaves the data's folder, and without
    the hosts that trained."""
    data = config.data
    paths = {name: getattr(data, name) for name in PATHS}
    names: dict[str, Any] = {name: path and _name(path) for name, path in paths.items()}
    init_from = Path(config.init_from).name if config.init_from else None
    return replace(
        config,
        data=replace(data, root=None, cache=None, **names),
        init_from=init_from,
        distributed=DistributedConfig(),
    )


def without_folders(text: str) -> str:
    """Words of a shell with the last name alone of every path that leaves the current folder."""

    def shown(word: re.Match[str]) -> str:
        try:
            (plain,) = shlex.split(word[0])
        except ValueError:  # a lone quote, in what was not written by a shell
            return word[0]
        option, equals, value = plain.rpartition("=")
        named = option + equals + _name(value)
        return word[0] if named == plain else shlex.quote(named)

    return re.sub(r"""(?:'[^']*'|"[^"]*"|[^\s'"])+""", shown, text)


def _name(path: str) -> str:
    """The last name of a path that exists on this machine only; any other as it is."""
    parts = Path(path).parts
    return Path(path).name if parts and (parts[0][0] in "/~" or ".." in parts) else path


def model_card(run: Run, workdir: Path, *, weights_licence: str | None = None) -> str:
    """The card of a restored run: data, categories, training, figures, origin, licence and config.

    Args:
        workdir: the run's folder, which has the figures of its own evaluation.
        weights_licence: of the weights that the run started from; only the user knows it.
    """
    config, meta, model = run.config, run.meta, run.config.model
    size = sum(leaf.size for leaf in jax.tree.leaves(run.variables["params"]))
    licence = weights_licence or UNKNOWN
    if config.init_from is not None:
        file = str(meta.environment.get("weights", Path(config.init_from).name))
        published = any(file == row.file for row in PUBLISHED.values())
        at = f" (a file of this name is published at {BASE}{file})" if published else ""
        part = ", without its outputs per class" if config.init_without_classes else ""
        origin = f"`{_text(file)}`{at}{part}. Its licence: {licence}."
    elif config.stages:
        origin = "Random weights."
    else:
        origin = f"Licence of the imported weights: {licence}."
    before = _handed_on(run, workdir)
    if weights_licence is None:
        origin = before.get("Started from", origin)
    found = "boxes, classes" + (", scores and masks" if run.has_masks else " and scores")
    lines = [
        f"# {_text(config.name)}",
        "",
        f"Mask R-CNN on a {model.trunk_name}-{model.backbone.upper()}, {size:,} "
        f"parameters: {found} of the objects in an RGB image. Checkpoint "
        f"{run.title}{'' if meta.stage_complete else ', whose stage is not complete'}. "
        "Made with mrcnn_jax.",
        "",
        "## Categories",
        "",
        ", ".join(f"{_text(name)} ({number})" for number, name in meta.categories),
        "",
        "## Training",
        "",
        *([before["Training"]] if "Training" in before else _training(run, workdir)),
        "",
        "## Figures",
        "",
        *(_figures(run, workdir) or [before.get("Figures", "Not evaluated.")]),
        "",
        "## Started from",
        "",
        origin,
        "",
        "## Config",
        "",
        "```json",
        json.dumps(to_dict(without_paths(config)), indent=1),
        "```",
        "",
    ]
    return printable("\n".join(lines))


def _handed_on(run: Run, workdir: Path) -> dict[str, str]:
    """Sections of the card of a run that `share` wrote, and that was not trained since."""
    if (workdir / COMMANDS).exists():
        return {}
    try:
        card = (workdir / "README.md").read_text(errors="backslashreplace")
    except OSError:
        return {}
    if f"Checkpoint {run.meta.name}" not in card or "Made with mrcnn_jax." not in card:
        return {}
    _, *parts = re.split(r"^## (.+)\n", card, flags=re.MULTILINE)
    return dict(zip(parts[::2], map(str.strip, parts[1::2]), strict=True))


def _training(run: Run, workdir: Path) -> list[str]:
    if not run.config.stages:
        return ["Imported; not trained here."]
    data, environment = run.config.data, run.meta.environment
    machine = f"{environment['cores']} cores of {environment['processor']}"
    if environment["platform"] != "cpu":
        machine = f"{environment.get('devices', 1)} x {environment['device']}"
    command = _first_command(run, workdir)
    validated = Path(data.val_annotations).name + (f" of {data.folder}" if data.folder else "")
    return [
        f"Trained on {_text(Path(data.train_annotations).name)}, validated on {_text(validated)}; "
        f"images scaled to a short side of {data.short_side} and a long side of at most "
        f"{data.long_side}; {data.batch_size} images a step.",
        "",
        "| stage | losses | epochs | optimiser | learning rate |",
        "|---|---|---|---|---|",
        *(
            f"| {_text(stage.name)} | {', '.join(stage.losses)} | {stage.epochs:g} "
            f"| {stage.optimizer.name} | {stage.optimizer.learning_rate:g} |"
            for stage in begun_stages(run.config, run.meta)
        ),
        "",
        f"{machine}, jax {environment['jax']}. "
        f"Command: {f'`{command}`' if command else 'not recorded'}",
        *(["", f"{run.untrained_line.capitalize()}."] if run.untrained_line else []),
    ]


def _text(name: str) -> str:
    return printable(name, one_line=True)


def _first_command(run: Run, workdir: Path) -> str:
    """The command of the run's first start; "" if there is none."""
    Checkpoints(workdir, keep=1).refuse_damaged_log(run.meta, COMMANDS)
    try:
        text = (workdir / COMMANDS).read_text(errors="backslashreplace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"{workdir / COMMANDS}: {error.strerror}") from None
    return without_folders(text.partition("\n")[0].strip())


def _figures(run: Run, workdir: Path) -> list[str]:
    """The run's own evaluation, if it is of this checkpoint and these weights; else nothing."""
    end = "" if run.weights == "raw" else "_ema"
    found = (read_evaluation(workdir / f"{name}{end}") for name in ("eval", "eval_best"))
    metrics = next((one for one in found if one.pop("checkpoint", None) == run.meta.name), None)
    if metrics is None:
        return []
    known = {name: metrics.get(name, -1) for name in FIGURES}
    cells = [f"{value:.3f}" if value >= 0 else "-" for value in known.values()]
    kind, title = ("segm", "Mask") if run.has_masks else ("bbox", "Box")
    by_class = [
        f"{_text(name.removeprefix(f'{kind}/AP/'))} {value:.3f}"
        for name, value in metrics.items()
        if name.startswith(f"{kind}/AP/")
    ]
    lines = [
        "COCO average precision on the validation images.",
        "",
        f"| {' | '.join(FIGURES)} |",
        "|" + "---|" * len(FIGURES),
        f"| {' | '.join(cells)} |",
    ]
    return lines + (["", f"{title} AP by class: {', '.join(by_class)}."] if by_class else [])
