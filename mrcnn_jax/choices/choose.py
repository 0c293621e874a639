"""Chooses a config for a data set: every value by a rule that is stated and can be overruled.

The constants come from recipes that were tried (`choices.recipes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mrcnn_jax import cli
from mrcnn_jax.choices.batch import choose_batch, choose_epochs, rate_for
from mrcnn_jax.choices.data import choose_data, object_counts, rounded
from mrcnn_jax.choices.devices import Device, Devices
from mrcnn_jax.choices.fitting import choose_repeats, choose_scales, object_sides
from mrcnn_jax.choices.recipes import NAMES, Start, recipe_for
from mrcnn_jax.choices.table import Chosen, Row
from mrcnn_jax.config.files import with_fields
from mrcnn_jax.config.model import ModelConfig, Trunk
from mrcnn_jax.config.schema import Config, DataConfig, StageConfig
from mrcnn_jax.data.order import repeat_factors
from mrcnn_jax.data.records import CocoDataset

TINY = 8  # px on the canvas: half of all objects under it are worth a word
THREADS = 16  # at most, to load images for a GPU
SAVE_EVERY: dict[Device, int] = {"cpu": 500, "gpu": 5000}  # steps; a GPU's may take a few ms
WARMUP = 500  # updates at most, and a tenth of all
OF_NETWORK = {  # by the name of the recipe
    "scratch": "small, as weights are random (--weights)",
    "finetune": "torchvision's, around the {} of the weights",
    "finetune_cpu": "torchvision's, half as wide around the {} of the weights: fast on a CPU",
}
FINENESS = {"finetune_cpu": 14.0}  # 7 in torchvision: 224 and anchors from 32 px
VALIDATION = "validation"
NOTHING: Mapping[str, Any] = {}
OTHERS = "other --weights"  # what changes a choice that weights fix
TRAINED: dict[tuple[str, Trunk], str] = {
    ("finetune", "resnet"): "all but the stem, res2 and batch norms",
    ("finetune", "convnext"): "all but the stem and its first stage",
    ("finetune_cpu", "resnet"): "res5 without batch norms, FPN and heads",
    ("finetune_cpu", "convnext"): "its last stage, the maps' norms, FPN and heads",
}


def choose(
    train: CocoDataset,
    val: CocoDataset,
    devices: Devices,
    given: Mapping[str, Any] = NOTHING,
    *,
    start: Start | None = None,
    name: str = "own",
) -> Chosen:
    """Chooses a config for a data set; the paths in it are those of the data sets.

    Args:
        train: training images, with one object at least.
        val: validation images.
        devices: what trains.
        given: fields by dotted name, "stages.0.epochs" for example. They are not chosen; those that
            depend on them follow.
        start: what training starts from; None: random weights.
        name: of the config.

    Raises:
        ConfigError: a value given cannot be used; a network or start for which nothing is chosen.
    """
    device, recipe = devices.kind, recipe_for(devices.kind, given, start)
    whole = start if start is not None and start.has_heads else None
    data, of_data = choose_data(train, val, device, recipe, given)
    if whole is not None:
        data = replace(data, shrink=whole.shrink)
        why = f"as for {whole.path}"
        changed_by = "--data.shrink" if "data.shrink" in whole.presumed else OTHERS
        of_data.append(Row("made smaller by", lambda c: c.data.shrink, why, (changed_by,)))
    model, of_model = _model(train, val, device, data, recipe, given, whole)
    draft = with_fields(replace(recipe, name=name, data=data, model=model), given)
    data, stage, of_stage = _training(train, devices, draft, recipe, given)
    chosen = replace(
        draft,
        data=data,
        stages=(stage,),
        init_without_classes=whole is not None and not whole.fits(train.class_names),
        validate_every_epochs=math.ceil(stage.epochs / 10),
        save_every_steps=SAVE_EVERY[device],
    )
    return Chosen(with_fields(chosen, given), (*of_data, *of_model, *of_stage))


# -- network ---------------------------------------------------------------------------------------


def _model(
    train: CocoDataset,
    val: CocoDataset,
    device: Device,
    data: DataConfig,
    recipe: Config,
    given: Mapping[str, Any],
    start: Start | None,
) -> tuple[ModelConfig, list[Row]]:
    base = recipe.model
    why = OF_NETWORK[recipe.name].format(NAMES[base.trunk])
    if start is not None:
        why = f"that of {recipe.init_from}"
    sides = object_sides(train, data)
    scales = base.rpn.scales
    if "model.rpn.scales" not in given:
        scales = choose_scales(sides, _usual_scale(base, data, start))
    low, middle, high = np.quantile(sides, (0.05, 0.5, 0.95))
    of_sides = f"objects on the canvas: {low:.0f} to {high:.0f} px (5 % to 95 %)"
    if middle < TINY:
        tiles = cli.command("convert", "tile")
        of_sides += (
            f"; half are under {TINY} px, which few are found of: cut tiles ({tiles} --help)"
        )
        of_sides += ", or larger images (--data.short-side)"
    most = max(object_counts(train) + object_counts(val))
    typical = float(np.median([count for count in object_counts(train) if count]))
    rpn, box_head, of_proposals = base.rpn, base.box_head, []
    if device == "cpu":
        few = rounded(max(200, 2 * most), 8)
        rpn = replace(
            rpn, pre_nms=max(500, few), train_pre_nms=None, proposals=few, train_proposals=None
        )
        if "model.box_head.samples" not in given:
            box_head = replace(box_head, samples=min(box_head.samples, 128))
        of_proposals.append(
            Row(
                "proposals, box samples",
                lambda c: f"{c.model.rpn.proposals}, {c.model.box_head.samples}",
                "few on a CPU; twice the most objects in an image, at least 200",
                ("--model.rpn.proposals", "--model.box-head.samples"),
            )
        )
    elif rpn.proposals < 2 * most:
        many = rounded(2 * most, 8)
        rpn = replace(rpn, pre_nms=max(rpn.pre_nms, many), proposals=many)
        if rpn.train_pre_nms is not None:
            rpn = replace(rpn, train_pre_nms=max(rpn.train_pre_nms, many))
        if rpn.train_proposals is not None:
            rpn = replace(rpn, train_proposals=max(rpn.train_proposals, many))
        of_proposals.append(
            Row(
                "proposals",
                lambda c: f"{c.model.rpn.proposals}",
                "twice the most objects in an image",
                ("--model.rpn.proposals",),
            )
        )
    foreground = max(1, int(box_head.samples * box_head.positive_fraction))
    masks, of_masks = foreground, "all samples of the box head that are objects"
    if device == "cpu":
        masks = min(foreground, max(8, rounded(math.ceil(2 * typical), 4)))
        of_masks = f"twice an image's {typical:g} objects (median), 8 to {foreground}"
    if not train.has_masks:
        of_masks = "no object has a mask, only a box: the mask head learns nothing"
    model = replace(
        base,
        num_classes=len(train.categories),
        rpn=replace(rpn, scales=scales),
        roi=replace(base.roi, canonical_size=_fineness(recipe, start) * scales[0]),
        box_head=replace(box_head, detections=max(100, 2 * most)),
        mask_head=replace(base.mask_head, train_on="box_samples", samples=masks),
    )
    changed_by: tuple[str, ...] = ("--model.resnet.depth", "--model.fpn-channels")
    if base.trunk == "convnext":
        sizes = ("--model.convnext.blocks", "--model.convnext.channels")
        changed_by = ("--model.trunk", *sizes, "--model.fpn-channels")
    if recipe.init_from is not None:
        changed_by = (OTHERS, *([] if start else ["--model.fpn-channels"]))
    names = ("cascade", "class_agnostic", "foreground_iou")
    of_cascade = {f"model.box_head.{name}" for name in names}
    of_heads = [
        Row(
            "box heads",
            lambda c: f"{1 + len(c.model.box_head.cascade)}",
            "a cascade gives better boxes; without a number, there is one head",
            ("--model.box-head.cascade",),
        )
    ]
    return model, [
        Row(
            "network",
            lambda c: f"{c.model.trunk_name}, FPN of {c.model.fpn_channels} channels",
            why,
            changed_by,
        ),
        *(of_heads if base.box_head.cascade or of_cascade & set(given) else ()),
        Row(
            "anchors, px",
            lambda c: (
                f"{' '.join(map(str, c.model.rpn.scales))}, P4 at {c.model.roi.canonical_size:g}"
            ),
            of_sides,
            ("--model.rpn.scales", "--model.roi.canonical-size"),
        ),
        *of_proposals,
        Row(
            "most detections",
            lambda c: f"{c.model.box_head.detections}",
            "twice the most objects in an image, at least 100",
            ("--model.box-head.detections",),
        ),
        Row(
            "masks trained per image",
            lambda c: f"{c.model.mask_head.samples}",
            of_masks,
            ("--model.mask-head.samples",),
        ),
    ]


def _fineness(recipe: Config, start: Start | None) -> float:
    """The side of a box that is read from P4, as a multiple of the smallest anchor."""
    if start is not None:
        return start.model.roi.canonical_size / start.model.rpn.scales[0]
    return FINENESS.get(recipe.name, 7.0)


def _usual_scale(base: ModelConfig, data: DataConfig, start: Start | None) -> int:
    """The smallest anchor if objects do not say otherwise: the start's, or 32 at 800 px."""
    if start is not None:
        return base.rpn.scales[0]
    return int(2 ** max(0, round(math.log2(32 * data.short_side / 800))))


# -- training --------------------------------------------------------------------------------------


def _training(
    train: CocoDataset,
    devices: Devices,
    draft: Config,
    recipe: Config,
    given: Mapping[str, Any],
) -> tuple[DataConfig, StageConfig, list[Row]]:
    (stage,), source, data = recipe.stages, f"configs/{recipe.name}.py", draft.data
    device = devices.kind
    optimizer, trained = stage.optimizer, "everything"
    why_trained = "weights are random" if recipe.init_from is None else "batch norms are live"
    if any(field.startswith(("stages.0.train.", "stages.0.frozen")) for field in given):
        trained, why_trained = "by the patterns of the stage", "given"
    elif stage.frozen:
        trained, why_trained = TRAINED[recipe.name, recipe.model.trunk], f"as in {source}"
    if not data.keep_empty:
        train = train.with_images(i for i in train.images if i.objects)
    threshold, rare = choose_repeats(train)
    threshold = given.get("data.repeat_threshold", threshold)
    images = int(repeat_factors(train, threshold).sum())
    of_batch = source
    if recipe.model.trunk == "convnext" and recipe.init_from and device == "gpu":
        of_batch = "configs/convnext.py, halved"
    chosen = choose_batch(optimizer, of_batch, devices, data, draft.model, images)
    batch = given.get("data.batch_size", chosen.size)
    data = replace(data, batch_size=batch, repeat_threshold=threshold)
    of_gpu = []
    if device == "gpu":
        data = replace(data, threads=min(THREADS, devices.cores))
        if devices.count == 1:
            data = replace(data, eval_batch_size=batch)
        of_gpu.append(
            Row(
                "loading, checkpoints",
                lambda c: f"{c.data.threads} threads, every {c.save_every_steps} steps",
                f"the {devices.cores} cores, {THREADS} at most; and after ten minutes of steps",
                ("--data.threads", "--save-every-steps"),
            )
        )
    of_update = batch * optimizer.accumulate_steps
    of_rate = "the recipe's rate, whatever the batch"
    if optimizer.name == "sgd":
        rate, of_rate = rate_for(optimizer, of_update)
        optimizer = replace(optimizer, learning_rate=rate, batch_size=of_update)
    elif "stages.0.optimizer.learning_rate" in given:
        optimizer = replace(optimizer, batch_size=of_update)
    steps = math.ceil(images / batch) / optimizer.accumulate_steps
    epochs, why = choose_epochs(device, images, steps, pretrained=recipe.init_from is not None)
    epochs = given.get("stages.0.epochs", epochs)
    warmup = int(max(0, min(WARMUP, epochs * steps // 10)))  # other checks name what is below 0
    stage = replace(stage, epochs=epochs, optimizer=replace(optimizer, warmup_steps=warmup))
    return (
        data,
        stage,
        [
            Row("trained", lambda _: trained, why_trained),
            Row(
                "batch",
                lambda c: f"{c.data.batch_size} images",
                chosen.why,
                ("--data.batch-size",),
            ),
            *of_gpu,
            Row(
                "epochs",
                lambda c: f"{c.stages[0].epochs:g} of {images} images",
                why,
                ("--stages.0.epochs", "--minutes"),
            ),
            Row(
                "optimiser",
                lambda c: (
                    f"{c.stages[0].optimizer.name}, {c.stages[0].optimizer.learning_rate:g}, "
                    f"warm-up {c.stages[0].optimizer.warmup_steps}"
                ),
                f"{of_rate}; a tenth of the updates warms up, {WARMUP} at most",
                ("--stages.0.optimizer.learning-rate", "--stages.0.optimizer.warmup-steps"),
            ),
            Row(
                VALIDATION,
                lambda c: f"every {c.validate_every_epochs} epochs",
                "a tenth of all; of losses (--evaluate-every-epochs measures AP)",
                ("--validate-every-epochs",),
            ),
            Row(
                "rare classes",
                lambda c: f"threshold {c.data.repeat_threshold:.2g}",
                f"{rare} have under a tenth of the images of the most frequent",
                ("--data.repeat-threshold",),
            ),
        ],
    )
