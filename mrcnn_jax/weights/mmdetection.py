"""mmdetection's Mask R-CNNs (2.x, 3.x): their map, and what a checkpoint says beside its tensors.

Its two styles of ResNet have the same tensors: "caffe" strides in the first 1x1 convolution of a
block and reads BGR images that are not divided by a standard deviation. Only the config that a
checkpoint holds as text, under "meta", tells which of them it is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.tables import DETECTRON2_FPN, MMDETECTION
from mrcnn_jax.evaluation.coco_categories import COCO, Categories
from mrcnn_jax.weights.family import COUNTERS, Family, layer, torchvision_resnet
from mrcnn_jax.weights.mapping import (
    background_first,
    bgr_input,
    convolution,
    linear,
    linear_of_7x7,
    pointwise,
    transposed_convolution,
)

_HEADS = (
    *(
        rule
        for i in range(4)
        for rule in (
            *layer(rf"neck\.lateral_convs\.{i}\.conv", f"fpn/lateral{i + 2}", pointwise),
            *layer(rf"neck\.fpn_convs\.{i}\.conv", f"fpn/output{i + 2}", convolution),
        )
    ),
    *layer(r"rpn_head\.rpn_conv", "rpn/conv1", convolution),
    *layer(r"rpn_head\.rpn_cls", "rpn/logits", pointwise),
    *layer(r"rpn_head\.rpn_reg", "rpn/deltas", pointwise),
    *layer(r"roi_head\.bbox_head\.shared_fcs\.0", "box_head/fc1", linear_of_7x7),
    *layer(r"roi_head\.bbox_head\.shared_fcs\.1", "box_head/fc2", linear),
    *layer(r"roi_head\.bbox_head\.fc_cls", "box_head/logits", linear, background_first),
    *layer(r"roi_head\.bbox_head\.fc_reg", "box_head/deltas", linear),
    *(
        rule
        for i in range(4)
        for rule in layer(
            rf"roi_head\.mask_head\.convs\.{i}\.conv", f"mask_head/conv{i + 1}", convolution
        )
    ),
    *layer(r"roi_head\.mask_head\.upsample", "mask_head/deconv", transposed_convolution),
    *layer(r"roi_head\.mask_head\.conv_logits", "mask_head/logits", pointwise),
)
MASK_RCNN = Family(
    name="mask-rcnn_r50_fpn",
    project="mmdetection",
    mark="roi_head.bbox_head.fc_cls.weight",
    rules=(*torchvision_resnet(r"backbone\."), *_HEADS),
    left_out=COUNTERS,
    model=MMDETECTION,
    categories=COCO,
    shrink="bilinear",
    remarks=(
        "untested on the published file: this map was made from mmdetection's published names",
        "the background's class logit was moved from the end to the front",
    ),
)
_PIXELS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "mean": {"pytorch": (123.675, 116.28, 103.53), "caffe": (103.53, 116.28, 123.675)},
    "std": {"pytorch": (58.395, 57.12, 57.375), "caffe": (1.0, 1.0, 1.0)},
}
# Lists of numbers in a config's text -> those that the network here has.
_STATED: Mapping[str, set[tuple[float, ...]]] = {
    **{name: {*by_style.values()} for name, by_style in _PIXELS.items()},
    "scales": {(8.0,)},
    "ratios": {(0.5, 1.0, 2.0)},
    "target_stds": {(1.0, 1.0, 1.0, 1.0), (0.1, 0.1, 0.2, 0.2)},
}
_STATED_FIELDS = frozenset(
    (
        *("channel_order", "model.pixel_mean", "model.pixel_std"),
        *("model.resnet.stride_in_1x1", "model.rpn.scales", "model.rpn.ratios"),
    )
)
"""What a config in a checkpoint decides, of what import takes as options."""


def refuse_first_version(names: Collection[str], source: str) -> None:
    """Raises ConfigError if the tensors of a file are named as by mmdetection 1.x.

    There label 0 is the background, anchors lie elsewhere and sides are a pixel longer.
    """
    if "bbox_head.fc_cls.weight" in names:
        raise ConfigError(
            f"{source}: bbox_head.fc_cls.weight: a name of mmdetection 1.x, whose classes, anchors "
            "and boxes are others; files of 2.x and 3.x are read"
        )


def with_meta(family: Family, meta: Mapping[Any, Any], source: str) -> Family:
    """Returns `family`, which is MASK_RCNN or a narrower one, as a checkpoint's "meta" states it.

    Args:
        family: pytorch style, trained on COCO.
        meta: has the config's text under "config" (2.x) or "cfg" (3.x), and the classes under
            "CLASSES" or "dataset_meta"; all may be missing.
        source: the file, for messages.

    Raises:
        ConfigError: the config states another network.
    """
    if stated := _categories(meta):
        family = replace(family, categories=stated, categories_stated=True)
    text = next((meta[key] for key in ("config", "cfg") if isinstance(meta.get(key), str)), None)
    if text is None:
        return replace(family, presumed="style pytorch: no config in the file says caffe")
    # Older files hold the text of the base files as well: their style is always pytorch.
    style = "caffe" if re.search(r"""\bstyle=['"]caffe""", text) else "pytorch"
    _refuse_other(text, style, source)
    family = replace(family, stated=_STATED_FIELDS)
    if style == "pytorch":
        return family
    assert family.model is not None
    model = replace(
        family.model,
        pixel_mean=DETECTRON2_FPN.pixel_mean,
        pixel_std=DETECTRON2_FPN.pixel_std,
        resnet=replace(family.model.resnet, stride_in_1x1=True),
    )
    return replace(
        family,
        name=family.name.replace("_fpn", "-caffe_fpn"),
        rules=(*torchvision_resnet(r"backbone\.", stem=(convolution, bgr_input)), *_HEADS),
        model=model,
        channel_order="bgr",
    )


def _refuse_other(text: str, style: str, source: str) -> None:
    """Raises ConfigError if a config states pixels, anchors or boxes that `style` does not have."""
    if legacy := re.search(r"\bLegacy\w+", text):
        raise ConfigError(f"{source}: its config has {legacy[0]}, which is unsupported")
    moved = re.search(r"\b(center_offset=0*\.?0*[1-9][\d.]*|octave_base_scale=[\d.]+)", text)
    if moved is not None:
        raise ConfigError(f"{source}: its config has {moved[0]}: other anchors, unsupported")
    bgr = "False" in re.findall(r"to_rgb=(True|False)", text)
    if bgr != (style == "caffe"):
        read = "BGR" if bgr else "RGB"
        raise ConfigError(f"{source}: its config has style {style} and {read} images: unsupported")
    for name, allowed in _STATED.items():
        listed = re.findall(rf"\b{name}=\[([\d.,\s]+)\]", text)
        found = [tuple(map(float, re.findall(r"[\d.]+", numbers))) for numbers in listed]
        other = [numbers for numbers in found if numbers not in allowed]
        if name in _PIXELS and found and _PIXELS[name][style] not in found:
            other = found
        if other:
            raise ConfigError(
                f"{source}: its config has style {style} and {name}={list(other[0])}: unsupported"
            )


def _categories(meta: Mapping[Any, Any]) -> Categories:
    """The classes that a checkpoint names, with COCO's ids if they are COCO's; () if unknown."""
    for table in (meta, meta.get("dataset_meta")):
        for key in ("CLASSES", "classes"):
            names: Any = table.get(key) if isinstance(table, dict) else None
            # Exactly these: what stands for another object in a pickle is a named tuple.
            if type(names) not in (list, tuple) or not all(map(_is_name, names)):
                continue
            # Early files of 2.x write "traffic_light".
            if [name.replace("_", " ") for name in names] == [name for _, name in COCO]:
                return COCO
            return tuple(enumerate(names, start=1))
    return ()


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()
