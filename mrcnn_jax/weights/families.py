"""Name maps of torchvision's ResNets and Mask R-CNNs and of detectron2's Mask R-CNNs.

A family is recognised by a tensor that no other has. detectron2's maps were made from its source
and from the names in its users' logs; they are UNTESTED ON THE PUBLISHED FILES.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Shrink
from mrcnn_jax.config.tables import DETECTRON2_C4, DETECTRON2_FPN, TORCHVISION, TORCHVISION_V2
from mrcnn_jax.evaluation.coco_categories import COCO, COCO_WITH_GAPS, Categories
from mrcnn_jax.weights.mapping import (
    Layout,
    Rule,
    background_first,
    bgr_input,
    convolution,
    linear,
    linear_of_7x7,
    pointwise,
    transposed_convolution,
    without_background,
    without_background_box,
)


@dataclass(frozen=True)
class Family:
    """Files with the same names of tensors, and their network."""

    name: str
    project: str
    mark: str
    """Name of a tensor that every file of this family has, and no other file."""
    rules: tuple[Rule, ...]
    left_out: Mapping[str, str]
    """Pattern of names -> why they are left out."""
    model: ModelConfig | None
    """None: a ResNet without heads."""
    categories: Categories = ()
    """Those of the published file."""
    frozen_norm_epsilon: float = 1e-5
    """Epsilon of frozen batch norm (files without counters of steps); live batch norm has 1e-5."""
    shrink: Shrink = "area"
    """`DataConfig.shrink` nearest to how the project makes images smaller, for networks with heads.
    torchvision's GeneralizedRCNNTransform interpolates without antialiasing; detectron2 resizes by
    Pillow's bilinear filter, which averages over a window that grows with the factor."""
    constants: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Values that left-out tensors must have, since the config states them."""
    remarks: tuple[str, ...] = ()
    """Printed when a file is imported."""


# -- parts -----------------------------------------------------------------------------------------


def _conv_norm(conv: str, norm: str, target: str, *layouts: Layout) -> tuple[Rule, ...]:
    """Rules of a convolution and its batch norm: our ConvNorm."""
    return (
        Rule(rf"{conv}\.weight", f"params/{target}/kernel", layouts or (convolution,)),
        Rule(rf"{norm}\.weight", f"params/{target}/scale"),
        Rule(rf"{norm}\.bias", f"params/{target}/bias"),
        Rule(rf"{norm}\.running_mean", f"batch_stats/{target}/mean"),
        Rule(rf"{norm}\.running_var", f"batch_stats/{target}/var"),
    )


def _layer(source: str, target: str, kernel: Layout, *rows: Layout) -> tuple[Rule, ...]:
    """Rules of a convolution or fully connected layer with a bias; `rows` select outputs."""
    return (
        Rule(rf"{source}\.weight", f"params/{target}/kernel", (*rows, kernel)),
        Rule(rf"{source}\.bias", f"params/{target}/bias", rows),
    )


def _blocks(
    source: str, target: str, *, norm: str, shortcut: str, shortcut_norm: str
) -> tuple[Rule, ...]:
    """Rules of the residual blocks of one resolution."""
    block = rf"{source}\.(\d+)\."
    return (
        *_conv_norm(rf"{block}conv(\d)", block + norm, rf"{target}/block\1/conv\2"),
        *_conv_norm(block + shortcut, block + shortcut_norm, rf"{target}/block\1/downsample"),
    )


def torchvision_resnet(prefix: str = "", layer4: str = "resnet/layer4") -> tuple[Rule, ...]:
    """Rules of torchvision's ResNet; its last blocks go to `layer4` ("res5" in a C4 network)."""
    targets = ("resnet/layer1", "resnet/layer2", "resnet/layer3", layer4)
    names = {"norm": r"bn(\d)", "shortcut": r"downsample\.0", "shortcut_norm": r"downsample\.1"}
    return (
        *_conv_norm(f"{prefix}conv1", f"{prefix}bn1", "resnet/stem"),
        *(
            rule
            for i, target in enumerate(targets, 1)
            for rule in _blocks(f"{prefix}layer{i}", target, **names)
        ),
    )


def _detectron2_resnet(prefix: str, res5: tuple[str, str]) -> tuple[Rule, ...]:
    """Rules of detectron2's ResNet; `res5` is (source, target) of its last blocks."""
    layers = [(rf"{prefix}res{i + 1}", f"resnet/layer{i}") for i in (1, 2, 3)] + [res5]
    names = {"norm": r"conv(\d)\.norm", "shortcut": "shortcut", "shortcut_norm": r"shortcut\.norm"}
    return (
        *_conv_norm(
            rf"{prefix}stem\.conv1",
            rf"{prefix}stem\.conv1\.norm",
            "resnet/stem",
            convolution,
            bgr_input,
        ),
        *(rule for source, target in layers for rule in _blocks(source, target, **names)),
    )


# -- torchvision -----------------------------------------------------------------------------------

_COUNTERS = {r".*\.num_batches_tracked": "counters of steps"}
_BACKGROUND = "the background's box deltas and masks are left out: label 0 has neither here"

# V1 has two sets of names: those of the published file, and (with another .0) those of models saved
# since torchvision 0.13.
_TORCHVISION_HEADS = (
    *_layer(r"rpn\.head\.cls_logits", "rpn/logits", pointwise),
    *_layer(r"rpn\.head\.bbox_pred", "rpn/deltas", pointwise),
    *_layer(r"roi_heads\.box_predictor\.cls_score", "box_head/logits", linear),
    *_layer(
        r"roi_heads\.box_predictor\.bbox_pred", "box_head/deltas", linear, without_background_box
    ),
    *_layer(r"roi_heads\.mask_predictor\.conv5_mask", "mask_head/deconv", transposed_convolution),
    *_layer(
        r"roi_heads\.mask_predictor\.mask_fcn_logits",
        "mask_head/logits",
        pointwise,
        without_background,
    ),
)
_BODY = torchvision_resnet(r"backbone\.body\.")

RESNET = Family(
    name="resnet",
    project="torchvision or timm",
    mark="layer1.0.conv1.weight",
    rules=torchvision_resnet(),
    left_out={**_COUNTERS, r"fc\..*": "the classifier"},
    model=None,
)
MASKRCNN = Family(
    name="maskrcnn_resnet50_fpn",
    project="torchvision",
    mark="roi_heads.box_head.fc6.weight",
    rules=(
        *_BODY,
        *(
            rule
            for i in range(4)
            for rule in _layer(
                rf"backbone\.fpn\.inner_blocks\.{i}(?:\.0)?", f"fpn/lateral{i + 2}", pointwise
            )
        ),
        *(
            rule
            for i in range(4)
            for rule in _layer(
                rf"backbone\.fpn\.layer_blocks\.{i}(?:\.0)?", f"fpn/output{i + 2}", convolution
            )
        ),
        *_layer(r"rpn\.head\.conv(?:\.0\.0)?", "rpn/conv1", convolution),
        *_layer(r"roi_heads\.box_head\.fc6", "box_head/fc1", linear_of_7x7),
        *_layer(r"roi_heads\.box_head\.fc7", "box_head/fc2", linear),
        *(
            rule
            for i in range(1, 5)
            for rule in _layer(
                rf"roi_heads\.mask_head\.(?:mask_fcn{i}|{i - 1}\.0)",
                f"mask_head/conv{i}",
                convolution,
            )
        ),
        *_TORCHVISION_HEADS,
    ),
    left_out=_COUNTERS,
    model=TORCHVISION,
    categories=COCO_WITH_GAPS,
    frozen_norm_epsilon=0.0,
    shrink="bilinear",
    remarks=(_BACKGROUND,),
)
MASKRCNN_V2 = Family(
    name="maskrcnn_resnet50_fpn_v2",
    project="torchvision",
    mark="roi_heads.box_head.0.0.weight",
    rules=(
        *_BODY,
        *(
            rule
            for i in range(4)
            for part, target in (("inner", "lateral"), ("layer", "output"))
            for rule in _conv_norm(
                rf"backbone\.fpn\.{part}_blocks\.{i}\.0",
                rf"backbone\.fpn\.{part}_blocks\.{i}\.1",
                f"fpn/{target}{i + 2}",
            )
        ),
        *(
            rule
            for i in (1, 2)
            for rule in _layer(rf"rpn\.head\.conv\.{i - 1}\.0", f"rpn/conv{i}", convolution)
        ),
        *(
            rule
            for head in ("box_head", "mask_head")
            for i in range(1, 5)
            for rule in _conv_norm(
                rf"roi_heads\.{head}\.{i - 1}\.0",
                rf"roi_heads\.{head}\.{i - 1}\.1",
                f"{head}/conv{i}",
            )
        ),
        *_layer(r"roi_heads\.box_head\.5", "box_head/fc1", linear_of_7x7),
        *_TORCHVISION_HEADS,
    ),
    left_out=_COUNTERS,
    model=TORCHVISION_V2,
    categories=COCO_WITH_GAPS,
    shrink="bilinear",
    remarks=(_BACKGROUND,),
)

# -- detectron2 ------------------------------------------------------------------------------------

_UNTESTED = "untested on the published file: this map was made from detectron2's published names"
_DETECTRON2_HEADS = (
    *_layer(r"proposal_generator\.rpn_head\.conv", "rpn/conv1", convolution),
    *_layer(r"proposal_generator\.rpn_head\.objectness_logits", "rpn/logits", pointwise),
    *_layer(r"proposal_generator\.rpn_head\.anchor_deltas", "rpn/deltas", pointwise),
    *_layer(r"roi_heads\.box_predictor\.cls_score", "box_head/logits", linear, background_first),
    *_layer(r"roi_heads\.box_predictor\.bbox_pred", "box_head/deltas", linear),
    *_layer(r"roi_heads\.mask_head\.deconv", "mask_head/deconv", transposed_convolution),
    *_layer(r"roi_heads\.mask_head\.predictor", "mask_head/logits", pointwise),
)
# Older files hold constants of the config as tensors.
_BUFFERS = {
    r"pixel_(mean|std)": "as in the config (checked)",
    r"proposal_generator\.anchor_generator\.cell_anchors\.\d": "anchors are made from the config",
}
_PIXELS = {  # BGR, 0..255
    "pixel_mean": tuple(255 * value for value in reversed(DETECTRON2_FPN.pixel_mean)),
    "pixel_std": tuple(255 * value for value in reversed(DETECTRON2_FPN.pixel_std)),
}
_REMARKS = (
    _UNTESTED,
    "the stem's kernel was turned from BGR to RGB, and the background's class logit moved from the"
    " end to the front",
)

MASK_RCNN_FPN = Family(
    name="mask_rcnn_R_50_FPN",
    project="detectron2",
    mark="backbone.fpn_lateral2.weight",
    rules=(
        *_detectron2_resnet(
            r"backbone\.bottom_up\.", (r"backbone\.bottom_up\.res5", "resnet/layer4")
        ),
        *(
            rule
            for i in range(2, 6)
            for rule in _layer(rf"backbone\.fpn_lateral{i}", f"fpn/lateral{i}", pointwise)
        ),
        *(
            rule
            for i in range(2, 6)
            for rule in _layer(rf"backbone\.fpn_output{i}", f"fpn/output{i}", convolution)
        ),
        *_layer(r"roi_heads\.box_head\.fc1", "box_head/fc1", linear_of_7x7),
        *_layer(r"roi_heads\.box_head\.fc2", "box_head/fc2", linear),
        *(
            rule
            for i in range(1, 5)
            for rule in _layer(
                rf"roi_heads\.mask_head\.mask_fcn{i}", f"mask_head/conv{i}", convolution
            )
        ),
        *_DETECTRON2_HEADS,
    ),
    left_out=_BUFFERS,
    model=DETECTRON2_FPN,
    categories=COCO,
    constants=_PIXELS,
    remarks=_REMARKS,
)
MASK_RCNN_C4 = Family(
    name="mask_rcnn_R_50_C4",
    project="detectron2",
    mark="roi_heads.res5.0.conv1.weight",
    rules=(*_detectron2_resnet(r"backbone\.", (r"roi_heads\.res5", "res5")), *_DETECTRON2_HEADS),
    left_out=_BUFFERS,
    model=DETECTRON2_C4,
    categories=COCO,
    constants=_PIXELS,
    remarks=_REMARKS,
)

FAMILIES = (RESNET, MASKRCNN, MASKRCNN_V2, MASK_RCNN_FPN, MASK_RCNN_C4)


def family_of(names: Collection[str], source: str) -> Family:
    """Recognises the family of a file by the names of its tensors.

    Raises:
        ConfigError: no family has its mark among `names`, or several have; `source` is the file.
    """
    found = [family for family in FAMILIES if family.mark in names]
    if len(found) != 1:
        known = ", ".join(f"{family.name} ({family.project})" for family in found or FAMILIES)
        reason = "names of several families" if found else "names of no known family"
        raise ConfigError(f"{source}: {reason}: {known}")
    return found[0]
