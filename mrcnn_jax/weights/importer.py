"""Imports a weights file of another project as the folder of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import config_hash
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config
from mrcnn_jax.config.tables import COCO_CANVASES
from mrcnn_jax.evaluation.coco_categories import Categories
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
from mrcnn_jax.models.resnet import DEPTHS, Depth
from mrcnn_jax.runs.checkpoints import Meta
from mrcnn_jax.runs.run import refuse_taken, write_run
from mrcnn_jax.weights.families import Family, family_of
from mrcnn_jax.weights.mapping import assign, fill
from mrcnn_jax.weights.tensors import read_tensors


def import_weights(
    source: Path, out: Path, *, categories: Path | None = None, norm_epsilon: float | None = None
) -> None:
    """Writes a folder that eval, predict and --init-from accept as a run; prints its content.

    Args:
        source: a file of one of `families.FAMILIES`. out: the new folder. categories: a COCO file
        whose categories, by id, are the classes; None: those of the family's
            published file or, if their number differs, class1, class2, ...
        norm_epsilon: epsilon of the ResNet's batch norm; None: the family's.

    Raises:
        ConfigError: `out` is not empty; `source` cannot be read, is of no known family or does not
            fill its network exactly; or there are not as many categories as classes. Nothing is
            written then.
    """
    refuse_taken(out)
    tensors = read_tensors(source)
    family = family_of(tensors, str(source))
    assigned = assign(tensors, family.rules, family.left_out, str(source))
    _refuse_other_constants(family, tensors, source)

    live = any(name.endswith(".num_batches_tracked") for name in tensors)
    if norm_epsilon is None:
        norm_epsilon = 1e-5 if live else family.frozen_norm_epsilon
    base = family.model or ModelConfig()
    model = replace(
        base, resnet=replace(base.resnet, depth=_depth(assigned, source), norm_epsilon=norm_epsilon)
    )
    logits = assigned.get("params/box_head/logits/bias")
    if logits is not None:
        model = replace(model, num_classes=tensors[logits.name].size - 1)  # the background has one
    template = jax.eval_shape(
        lambda batch: MaskRCNN(model).init(jax.random.key(0), batch), example_batch((64, 64))
    )
    if family.model is None:
        template = {kind: {"resnet": tree["resnet"]} for kind, tree in template.items()}
    variables = fill(template, assigned, tensors, str(source))

    known = _categories(family, model.num_classes, categories)
    name = family.name if family.model is not None else f"resnet{model.resnet.depth}"
    config = Config(name=name, data=COCO_CANVASES, model=model)
    meta = Meta(
        step=0,
        stage="imported",
        stage_index=0,
        stage_step=0,
        stage_complete=True,
        categories=known,
        config_hash=config_hash(config),
    )
    write_run(out, config, variables, meta)
    print(
        f"{source}: {name} ({family.project}), {len(tensors)} tensors, {len(assigned)} of them used"
    )
    _print_choices(family, tensors, model)
    if family.model is None:
        words = ("--config", "CONFIG", "--workdir", "DIR", "--init-from", out)
        print(f"next: {cli.command('train', *words)}")
    else:
        print(f"{len(known)} classes: {', '.join(name for _, name in known[:3])}, ...")
        data = ("--annotations", "JSON", "--images", "DIR")
        print(f"next: {cli.command('predict', 'IMAGE', '--workdir', out, '--out', 'DIR')}")
        print(f"      {cli.command('eval', '--workdir', out, *data)}")


def _print_choices(family: Family, names: Iterable[str], model: ModelConfig) -> None:
    """Prints what was left out, and what a user might have to choose differently."""
    for pattern, reason in family.left_out.items():
        found = [name for name in names if re.fullmatch(pattern, name)]
        more = f" and {len(found) - 2} more" if len(found) > 2 else ""
        if found:
            print(f"left out: {', '.join(found[:2])}{more}: {reason}")
    for remark in family.remarks:
        print(remark)
    print(f"batch norm: epsilon {model.resnet.norm_epsilon:g}")
    if model.resnet.norm_epsilon == 0:
        print("  for the published file and models trained from it;")
        print("  use --norm-epsilon 1e-5 for models trained from ImageNet weights")


def _depth(assigned: Iterable[str], source: Path) -> Any:
    """Returns the ResNet's depth, known from the numbers of its blocks."""
    found = {
        match.groups()
        for path in assigned
        if (match := re.match(r"params/(resnet/layer\d|res5)/(block\d+)/", path))
    }
    blocks = [
        sum(layer == name for layer, _ in found)
        for name in ("resnet/layer1", "resnet/layer2", "resnet/layer3")
    ]
    blocks.append(sum(layer in ("resnet/layer4", "res5") for layer, _ in found))
    bottleneck = any(path.endswith("/conv3/kernel") for path in assigned)
    for depth, known in DEPTHS.items():
        if known == Depth(bottleneck, tuple(blocks)):
            return depth
    raise ConfigError(f"{source}: no known ResNet has blocks {blocks}")


def _refuse_other_constants(
    family: Family, tensors: Mapping[str, np.ndarray], source: Path
) -> None:
    for name, expected in family.constants.items():
        if name in tensors:
            found = np.ravel(tensors[name])
            if found.shape != np.shape(expected) or not np.allclose(found, expected, rtol=1e-3):
                raise ConfigError(
                    f"{source}: {name}: {found.tolist()}, but {family.name} has {list(expected)}"
                )


def _categories(family: Family, count: int, file: Path | None) -> Categories:
    """Returns the `count` classes, from a COCO file if there is one."""
    if family.model is None:
        if file is not None:
            raise ConfigError(f"--categories: {file}: a {family.name} has no classes here")
        return ()
    if file is None:
        if len(family.categories) == count:
            return family.categories
        return tuple((i, f"class{i}") for i in range(1, count + 1))
    try:
        listed = json.loads(file.read_bytes())["categories"]
        found = tuple(sorted((int(each["id"]), str(each["name"])) for each in listed))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--categories: {file}: not a COCO file with categories: {error}"
        ) from None
    known = len(dict(found))
    if known != count:
        raise ConfigError(
            f"--categories: {file}: {known} categories, but the network has {count} classes"
        )
    return found
