"""Our network with a peer's weights, a compiled call per stage, and its losses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.models.box_head import BoxOutput, BoxSamples, box_detections, box_loss
from mrcnn_jax.models.convnext import ConvNeXt, Stage
from mrcnn_jax.models.initialise import variable_shapes
from mrcnn_jax.models.mask_head import MaskSamples, mask_loss
from mrcnn_jax.models.mask_rcnn import (
    MaskRCNN,
    Prediction,
    Variables,
    normalise,
    select_proposals,
)
from mrcnn_jax.models.rpn import RPNOutput, pyramid_anchors, rpn_loss, rpn_targets
from mrcnn_jax.pixels.transforms import coverage
from mrcnn_jax.structures import Batch, Instances
from mrcnn_jax.weights.families import MASKRCNN, MASKRCNN_V2
from mrcnn_jax.weights.mapping import assign, fill
from mrcnn_jax.weights.mmdetection import MASK_RCNN, with_meta
from mrcnn_jax.weights.network import FileNetwork

FAMILIES = {
    "v1": MASKRCNN,
    "v2": MASKRCNN_V2,
    "mmdet": MASK_RCNN,
    "caffe": with_meta(MASK_RCNN, {"cfg": "style='caffe', bgr_to_rgb=False"}, "parity"),
}


def model_config(version: str, *, depth: int = 50, classes: int = 91) -> ModelConfig:
    """The config of a peer's network; `classes` has the background among them."""
    family = FAMILIES[version]
    assert family.model is not None
    epsilon = family.frozen_norm_epsilon if version == "v1" else 1e-5
    resnet = replace(family.model.resnet, depth=depth, norm_epsilon=epsilon)
    return replace(family.model, num_classes=classes - 1, resnet=resnet)


def variables_of(version: str, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> Variables:
    """Turns a state dict, or gradients named so, into our layout by the importer's map."""
    family, template = FAMILIES[version], variable_shapes(config)
    return fill(template, assign(tensors, family.rules, family.left_out, version), tensors, version)


def convnext_stages(network: FileNetwork, image: np.ndarray) -> dict[str, np.ndarray]:
    """{"stage1": map before its norm, ...} of our ConvNeXt."""
    ours = ConvNeXt(network.model.convnext)
    apply = functools.partial(
        ours.apply,
        mutable=["intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, Stage),
    )
    variables = {"params": network.variables()["params"]["convnext"]}
    canvas = normalise(image[None], np.array([image.shape[:2]], np.int32), network.model)
    _, seen = jax.jit(apply)(variables, canvas)
    return {
        name: np.asarray(seen["intermediates"][name]["__call__"][0])
        for name in ("stage1", "stage2", "stage3", "stage4")
    }


def batch_of(images: Sequence[np.ndarray], canvas: tuple[int, int]) -> Batch:
    """uint8 images at the top left of a canvas, without objects."""
    batch = len(images)
    pixels = np.zeros((batch, *canvas, 3), np.uint8)
    for place, image in zip(pixels, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    sizes = np.array([image.shape[:2] for image in images], np.int32)
    none = Instances(boxes=np.zeros((batch, 1, 4), np.float32), valid=np.zeros((batch, 1), bool))
    return Batch(
        images=pixels,
        image_sizes=sizes,
        original_sizes=sizes,
        scales=np.ones((batch, 2), np.float32),
        indices=np.arange(batch, dtype=np.int32),
        valid=np.ones(batch, bool),
        ground_truth=none,
        ignore=none,
    )


def padded(rows: Sequence[np.ndarray], count: int) -> tuple[np.ndarray, np.ndarray]:
    """An array [B, count, ...] of B arrays [N_b, ...], and which of its rows exist."""
    values = np.zeros((len(rows), count, *rows[0].shape[1:]), rows[0].dtype)
    valid = np.zeros((len(rows), count), bool)
    for b, row in enumerate(rows):
        values[b, : len(row)] = row
        valid[b, : len(row)] = True
    return values, valid


def mask_logits(
    model: MaskRCNN, pyramid: dict[str, jax.Array], boxes: Instances | MaskSamples
) -> jax.Array:
    """Of every class [B, N, M, M, K], for boxes in canvas pixels."""
    pooled = model.mask_features(pyramid, boxes.boxes, boxes.valid)
    return model.mask_logits(pooled, boxes.valid)


class Stages:
    """The network cut into its stages, each compiled once for a shape: NumPy in, NumPy out."""

    def __init__(self, config: ModelConfig, variables: Variables) -> None:
        self.config = config
        bound = {
            "canvas": lambda m, batch: normalise(batch.images, batch.image_sizes, config),
            "maps": lambda m, batch: m.resnet(normalise(batch.images, batch.image_sizes, config)),
            "pyramid": lambda m, maps: m.fpn(maps),
            "rpn": lambda m, pyramid, batch: m.rpn_output(pyramid, batch),
            "proposals": lambda m, output, batch: select_proposals(
                output, batch, config, train=False
            ),
            "features": lambda m, pyramid, boxes, size: m._roi_features(
                pyramid, boxes.boxes, boxes.valid, size
            ),
            "boxes": lambda m, pyramid, boxes: m.box_output(pyramid, boxes.boxes, boxes.valid),
            "detections": lambda m, output, proposals, batch: jax.vmap(
                lambda o, p, size: box_detections(o, p, size, config.box_head)
            )(output, proposals, batch.image_sizes),
            "masks": mask_logits,
            "all": lambda m, batch: m(batch),
        }
        variables = jax.device_put(variables)
        model = MaskRCNN(config)
        static = {"features": (3,)}
        self._stages = {
            name: functools.partial(
                jax.jit(nn.apply(stage, model), static_argnums=static.get(name)), variables
            )
            for name, stage in bound.items()
        }

    def __call__(self, stage: str, *arguments: Any) -> Any:
        return jax.device_get(self._stages[stage](*arguments))


class Everything(NamedTuple):
    """One call from images to masks, and what the heads say of boxes that are handed over."""

    prediction: Prediction
    maps: dict[str, np.ndarray]
    pyramid: dict[str, np.ndarray]
    rpn: RPNOutput
    boxes: BoxOutput  # of the proposals handed over
    masks: np.ndarray  # logits, of the detections handed over


def everything(
    config: ModelConfig,
    variables: Variables,
    batch: Batch,
    proposals: Instances,
    detections: Instances,
) -> Everything:
    def forward(
        model: MaskRCNN, batch: Batch, proposals: Instances, detections: Instances
    ) -> Everything:
        maps = model.resnet(normalise(batch.images, batch.image_sizes, config))
        pyramid = model.fpn(maps)
        return Everything(
            prediction=model(batch),
            maps=maps,
            pyramid=pyramid,
            rpn=model.rpn_output(pyramid, batch),
            boxes=model.box_output(pyramid, proposals.boxes, proposals.valid),
            masks=mask_logits(model, pyramid, detections),
        )

    return jax.device_get(
        jax.jit(nn.apply(forward, MaskRCNN(config)))(variables, batch, proposals, detections)
    )


def with_ground_truth(
    batch: Batch, truth: Sequence[Mapping[str, np.ndarray]], mask_size: int = 112
) -> Batch:
    """Adds each image's boxes, labels and masks [N, H, W], which become crops of their boxes."""
    count = max(len(image["labels"]) for image in truth)
    boxes, valid = padded([image["boxes"] for image in truth], count)
    labels, _ = padded([image["labels"].astype(np.int32) for image in truth], count)
    crops = [
        np.stack([coverage(mask, box, mask_size) for mask, box in zip(*objects, strict=True)])
        for objects in ((image["masks"], image["boxes"]) for image in truth)
    ]
    masks, _ = padded(crops, count)
    return batch.replace(
        ground_truth=Instances(boxes=boxes, valid=valid, labels=labels, masks=masks, has_mask=valid)
    )


def handed_over(
    boxes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    deltas: Sequence[np.ndarray],
    mask_targets: Sequence[np.ndarray],
) -> tuple[BoxSamples, MaskSamples]:
    """Makes the samples of both heads; `mask_targets` are those of the foreground among them."""
    count = _rounded(max(map(len, boxes)))
    (all_boxes, valid), (all_labels, _), (all_deltas, _) = (
        padded(rows, count) for rows in (boxes, labels, deltas)
    )
    foreground = [label > 0 for label in labels]
    count = _rounded(max(map(len, mask_targets)))
    mask_boxes, mask_valid = padded(
        [rows[chosen] for rows, chosen in zip(boxes, foreground, strict=True)], count
    )
    mask_labels, _ = padded(
        [rows[chosen] for rows, chosen in zip(labels, foreground, strict=True)], count
    )
    targets, _ = padded(mask_targets, count)
    return (
        BoxSamples(
            boxes=all_boxes, labels=all_labels.astype(np.int32), deltas=all_deltas, valid=valid
        ),
        MaskSamples(
            boxes=mask_boxes,
            labels=mask_labels.astype(np.int32),
            targets=targets,
            valid=mask_valid,
            gt_index=np.zeros(mask_valid.shape, np.int32),
            left_out=np.zeros(len(boxes), np.int32),
        ),
    )


def _rounded(count: int) -> int:
    """Slots that a program is compiled for, which other samples of the same network fit, too."""
    return -(-count // 64) * 64


def losses_and_gradients(
    config: ModelConfig, variables: Variables, batch: Batch, boxes: BoxSamples, masks: MaskSamples
) -> tuple[dict[str, float], Variables]:
    """Computes the five losses of a batch, and the gradient of their sum for every parameter.

    The RPN's targets are our own, and all anchors that have a label are taken; the other heads are
    trained on the samples handed over.
    """
    gradients, values = jax.device_get(
        _gradient(config)(variables["params"], variables["batch_stats"], batch, boxes, masks)
    )
    return {name: float(value) for name, value in values.items()}, gradients


@functools.cache
def _gradient(config: ModelConfig) -> Callable[..., tuple[Variables, dict[str, jax.Array]]]:
    """The program of a network, compiled once for a shape."""

    def forward(
        model: MaskRCNN, batch: Batch, boxes: BoxSamples, masks: MaskSamples
    ) -> dict[str, jax.Array]:
        features = model.features(batch)
        anchors = jnp.asarray(
            np.concatenate(pyramid_anchors(config.rpn, batch.images.shape[1:3], config.strides))
        )
        rpn = replace(config.rpn, samples=len(anchors), positive_fraction=1.0)
        targets = jax.vmap(
            lambda size, gt, ignore: rpn_targets(jax.random.key(0), anchors, size, gt, ignore, rpn)
        )(batch.image_sizes, batch.ground_truth, batch.ignore)
        values = rpn_loss(model.rpn_output(features, batch), targets, batch.valid, rpn)
        values |= box_loss(
            model.box_output(features, boxes.boxes, boxes.valid),
            boxes,
            batch.valid,
            config.box_head,
        )
        return values | mask_loss(
            mask_logits(model, features, masks), masks, batch.valid, config.mask_head
        )

    @jax.jit
    def gradient(
        params: Variables, statistics: Variables, *samples: Any
    ) -> tuple[Variables, dict[str, jax.Array]]:
        def objective(params: Variables) -> tuple[jax.Array, dict[str, jax.Array]]:
            values = nn.apply(forward, MaskRCNN(config))(
                {"params": params, "batch_stats": statistics}, *samples
            )
            return sum(values.values(), jnp.float32(0)), values

        return jax.grad(objective, has_aux=True)(params)

    return gradient


def gradients_of(
    version: str,
    config: ModelConfig,
    theirs: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
) -> Variables:
    """The peer's gradients by our paths ("rpn/conv1/kernel"), those that it has.

    Of its box and mask predictors only the rows of foreground classes: the importer's map leaves
    out the background's.
    """
    absent = {
        name: np.zeros(shape, np.float32) for name, shape in shapes.items() if name not in theirs
    }
    ours = flatten_dict(variables_of(version, config, {**absent, **theirs})["params"], sep="/")
    family = FAMILIES[version]
    assigned = assign(shapes, family.rules, family.left_out, version)
    return {
        path: gradient
        for path, gradient in ours.items()
        if assigned[f"params/{path}"].name in theirs
    }
