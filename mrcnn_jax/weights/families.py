"""Name maps of ResNets, ConvNeXts and of torchvision's, detectron2's and mmdetection's Mask R-CNNs.

A family is recognised by a tensor that no other has. The maps of detectron2, mmdetection and
self-supervised ResNets were made from their sources and from the names in their users' logs; they
are UNTESTED ON THE PUBLISHED FILES.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.tables import (
    DETECTRON2_C4,
    DETECTRON2_FPN,
    DETECTRON2_LSJ,
    TORCHVISION,
    TORCHVISION_V2,
)
from mrcnn_jax.evaluation.coco_categories import COCO, COCO_WITH_GAPS
from mrcnn_jax.output import listed
from mrcnn_jax.weights import convnext_families, mmdetection
from mrcnn_jax.weights.family import (
    COUNTERS,
    Family,
    blocks,
    conv_norm,
    layer,
    torchvision_resnet,
)
from mrcnn_jax.weights.mapping import (
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


def _detectron2_resnet(prefix: str, res5: tuple[str, str]) -> tuple[Rule, ...]:
    """Rules of detectron2's ResNet; `res5` is (source, target) of its last blocks."""
    layers = [(rf"{prefix}res{i + 1}", f"resnet/layer{i}") for i in (1, 2, 3)] + [res5]
    names = {"norm": r"conv(\d)\.norm", "shortcut": "shortcut", "shortcut_norm": r"shortcut\.norm"}
    return (
        *conv_norm(
            rf"{prefix}stem\.conv1",
            rf"{prefix}stem\.conv1\.norm",
            "resnet/stem",
            convolution,
            bgr_input,
        ),
        *(rule for source, target in layers for rule in blocks(source, target, **names)),
    )


# -- ResNets ---------------------------------------------------------------------------------------

_PROJECTION = "a projection head"
RESNET = Family(
    name="resnet",
    project="torchvision or timm",
    mark="layer1.0.conv1.weight",
    rules=torchvision_resnet(),
    left_out={
        **COUNTERS,
        r"fc\..*": "the classifier",
        r"projection_head\..*|prototypes\..*": f"{_PROJECTION} and prototypes (SwAV)",
    },
    model=None,
)
# MoCo, of which the encoder that learns by gradients is taken, as its authors do.
RESNET_ENCODER_Q = Family(
    name="resnet_encoder_q",
    project="MoCo",
    mark="encoder_q.layer1.0.conv1.weight",
    rules=torchvision_resnet(r"encoder_q\."),
    left_out={
        **COUNTERS,
        r"encoder_q\.fc\..*": _PROJECTION,
        r"encoder_k\..*": "the momentum encoder",
        r"queue(_ptr)?": "the queue of keys",
    },
    model=None,
)
RESNET_BASE_ENCODER = Family(
    name="resnet_base_encoder",
    project="MoCo v3",
    mark="base_encoder.layer1.0.conv1.weight",
    rules=torchvision_resnet(r"base_encoder\."),
    left_out={
        **COUNTERS,
        r"base_encoder\.fc\..*": _PROJECTION,
        r"momentum_encoder\..*": "the momentum encoder",
        r"predictor\..*": "the predictor",
    },
    model=None,
)
RESNET_BACKBONE = Family(
    name="resnet_backbone",
    project="DINO or others",
    mark="backbone.layer1.0.conv1.weight",
    rules=torchvision_resnet(r"backbone\."),
    left_out={
        **COUNTERS,
        r"backbone\.fc\..*": "the classifier",
        r"head\..*": _PROJECTION,
    },
    model=None,
)

# -- torchvision -----------------------------------------------------------------------------------

_BACKGROUND = "the background's box deltas and masks are left out: label 0 has neither here"

# V1 has two sets of names: those of the published file, and (with another .0) those of models saved
# since torchvision 0.13.
_TORCHVISION_HEADS = (
    *layer(r"rpn\.head\.cls_logits", "rpn/logits", pointwise),
    *layer(r"rpn\.head\.bbox_pred", "rpn/deltas", pointwise),
    *layer(r"roi_heads\.box_predictor\.cls_score", "box_head/logits", linear),
    *layer(
        r"roi_heads\.box_predictor\.bbox_pred", "box_head/deltas", linear, without_background_box
    ),
    *layer(r"roi_heads\.mask_predictor\.conv5_mask", "mask_head/deconv", transposed_convolution),
    *layer(
        r"roi_heads\.mask_predictor\.mask_fcn_logits",
        "mask_head/logits",
        pointwise,
        without_background,
    ),
)
_BODY = torchvision_resnet(r"backbone\.body\.")

MASKRCNN = Family(
    name="maskrcnn_resnet50_fpn",
    project="torchvision",
    mark="roi_heads.box_head.fc6.weight",
    rules=(
        *_BODY,
        *(
            rule
            for i in range(4)
            for rule in layer(
                rf"backbone\.fpn\.inner_blocks\.{i}(?:\.0)?", f"fpn/lateral{i + 2}", pointwise
            )
        ),
        *(
            rule
            for i in range(4)
            for rule in layer(
                rf"backbone\.fpn\.layer_blocks\.{i}(?:\.0)?", f"fpn/output{i + 2}", convolution
            )
        ),
        *layer(r"rpn\.head\.conv(?:\.0\.0)?", "rpn/conv1", convolution),
        *layer(r"roi_heads\.box_head\.fc6", "box_head/fc1", linear_of_7x7),
        *layer(r"roi_heads\.box_head\.fc7", "box_head/fc2", linear),
        *(
            rule
            for i in range(1, 5)
            for rule in layer(
                rf"roi_heads\.mask_head\.(?:mask_fcn{i}|{i - 1}\.0)",
                f"mask_head/conv{i}",
                convolution,
            )
        ),
        *_TORCHVISION_HEADS,
    ),
    left_out=COUNTERS,
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
            for rule in conv_norm(
                rf"backbone\.fpn\.{part}_blocks\.{i}\.0",
                rf"backbone\.fpn\.{part}_blocks\.{i}\.1",
                f"fpn/{target}{i + 2}",
            )
        ),
        *(
            rule
            for i in (1, 2)
            for rule in layer(rf"rpn\.head\.conv\.{i - 1}\.0", f"rpn/conv{i}", convolution)
        ),
        *(
            rule
            for head in ("box_head", "mask_head")
            for i in range(1, 5)
            for rule in conv_norm(
                rf"roi_heads\.{head}\.{i - 1}\.0",
                rf"roi_heads\.{head}\.{i - 1}\.1",
                f"{head}/conv{i}",
            )
        ),
        *layer(r"roi_heads\.box_head\.5", "box_head/fc1", linear_of_7x7),
        *_TORCHVISION_HEADS,
    ),
    left_out=COUNTERS,
    model=TORCHVISION_V2,
    categories=COCO_WITH_GAPS,
    shrink="bilinear",
    remarks=(_BACKGROUND,),
)

# -- detectron2 ------------------------------------------------------------------------------------

_UNTESTED = "untested on the published file: this map was made from detectron2's published names"
_DETECTRON2_RPN_CONV = layer(r"proposal_generator\.rpn_head\.conv", "rpn/conv1", convolution)
_DETECTRON2_HEADS = (
    *layer(r"proposal_generator\.rpn_head\.objectness_logits", "rpn/logits", pointwise),
    *layer(r"proposal_generator\.rpn_head\.anchor_deltas", "rpn/deltas", pointwise),
    *layer(r"roi_heads\.box_predictor\.cls_score", "box_head/logits", linear, background_first),
    *layer(r"roi_heads\.box_predictor\.bbox_pred", "box_head/deltas", linear),
    *layer(r"roi_heads\.mask_head\.deconv", "mask_head/deconv", transposed_convolution),
    *layer(r"roi_heads\.mask_head\.predictor", "mask_head/logits", pointwise),
)
# Older files hold constants of the config as tensors.
_BUFFERS = {
    r"pixel_(mean|std)": "as in the config (checked)",
    r"proposal_generator\.anchor_generator\.cell_anchors\.\d": "those of the config (checked)",
}
_REMARKS = (
    _UNTESTED,
    "the background's class logit was moved from the end to the front",
)

_DETECTRON2_BODY = _detectron2_resnet(
    r"backbone\.bottom_up\.", (r"backbone\.bottom_up\.res5", "resnet/layer4")
)
MASK_RCNN_FPN = Family(
    name="mask_rcnn_R_50_FPN",
    project="detectron2",
    mark="backbone.fpn_lateral2.bias",
    rules=(
        *_DETECTRON2_BODY,
        *_DETECTRON2_RPN_CONV,
        *(
            rule
            for i in range(2, 6)
            for rule in layer(rf"backbone\.fpn_lateral{i}", f"fpn/lateral{i}", pointwise)
        ),
        *(
            rule
            for i in range(2, 6)
            for rule in layer(rf"backbone\.fpn_output{i}", f"fpn/output{i}", convolution)
        ),
        *layer(r"roi_heads\.box_head\.fc1", "box_head/fc1", linear_of_7x7),
        *layer(r"roi_heads\.box_head\.fc2", "box_head/fc2", linear),
        *(
            rule
            for i in range(1, 5)
            for rule in layer(
                rf"roi_heads\.mask_head\.mask_fcn{i}", f"mask_head/conv{i}", convolution
            )
        ),
        *_DETECTRON2_HEADS,
    ),
    left_out=_BUFFERS,
    model=DETECTRON2_FPN,
    categories=COCO,
    channel_order="bgr",
    remarks=_REMARKS,
)
MASK_RCNN_LSJ = Family(
    name="mask_rcnn_R_50_FPN_LSJ",
    project="detectron2",
    mark="backbone.fpn_lateral2.norm.weight",
    rules=(
        *_DETECTRON2_BODY,
        *(
            rule
            for i in range(2, 6)
            for part in ("lateral", "output")
            for rule in conv_norm(
                rf"backbone\.fpn_{part}{i}", rf"backbone\.fpn_{part}{i}\.norm", f"fpn/{part}{i}"
            )
        ),
        *(
            rule
            for i in (1, 2)
            for rule in layer(
                rf"proposal_generator\.rpn_head\.conv\.conv{i - 1}", f"rpn/conv{i}", convolution
            )
        ),
        *(
            rule
            for head, layer in (("box_head", "conv"), ("mask_head", "mask_fcn"))
            for i in range(1, 5)
            for rule in conv_norm(
                rf"roi_heads\.{head}\.{layer}{i}",
                rf"roi_heads\.{head}\.{layer}{i}\.norm",
                f"{head}/conv{i}",
            )
        ),
        *layer(r"roi_heads\.box_head\.fc1", "box_head/fc1", linear_of_7x7),
        *_DETECTRON2_HEADS,
    ),
    left_out={**COUNTERS, **_BUFFERS},
    model=DETECTRON2_LSJ,
    categories=COCO,
    channel_order="bgr",
    remarks=_REMARKS,
)
MASK_RCNN_C4 = Family(
    name="mask_rcnn_R_50_C4",
    project="detectron2",
    mark="roi_heads.res5.0.conv1.weight",
    rules=(
        *_detectron2_resnet(r"backbone\.", (r"roi_heads\.res5", "res5")),
        *_DETECTRON2_RPN_CONV,
        *_DETECTRON2_HEADS,
    ),
    left_out=_BUFFERS,
    model=DETECTRON2_C4,
    categories=COCO,
    channel_order="bgr",
    remarks=_REMARKS,
)

FAMILIES = (
    RESNET,
    RESNET_ENCODER_Q,
    RESNET_BASE_ENCODER,
    RESNET_BACKBONE,
    *convnext_families.FAMILIES,
    MASKRCNN,
    MASKRCNN_V2,
    mmdetection.MASK_RCNN,
    MASK_RCNN_FPN,
    MASK_RCNN_LSJ,
    MASK_RCNN_C4,
)


# The second box head of detectron2 and of mmdetection.
_CASCADE = re.compile(r"roi_heads\.box_predictor\.1\..*|roi_head\.bbox_head\.1\..*")


def family_of(names: Collection[str], source: str) -> Family:
    """Recognises the family of a file by the names of its tensors.

    A file with mmdetection's mark has that of RESNET_BACKBONE too, and is mmdetection's.

    Raises:
        ConfigError: no family has its mark among `names`, or several have, or they are those of a
            cascade of box heads; `source` is the file.
    """
    mmdetection.refuse_first_version(names, source)
    cascade = min(filter(_CASCADE.fullmatch, names), default=None)
    if cascade is not None:
        raise ConfigError(
            f"{source}: {cascade}: of a Cascade R-CNN, whose box heads are not imported"
        )
    found = [family for family in FAMILIES if family.mark in names]
    if mmdetection.MASK_RCNN in found and RESNET_BACKBONE in found:
        found.remove(RESNET_BACKBONE)
    if len(found) != 1:
        known = ", ".join(f"{family.name} ({family.project})" for family in found or FAMILIES)
        unknown = f"names of no known family ({_told(names)})"
        reason = "names of several families" if found else unknown
        raise ConfigError(f"{source}: {reason}: {known}")
    return found[0]


def _told(names: Collection[str]) -> str:
    """Three of the names, and the prefix without which they would be of a known family."""
    told = listed([f"{name!r:.60}" for name in names])
    known = [
        (name.removesuffix(family.mark), family.name)
        for name in names
        for family in FAMILIES
        if name.endswith(f".{family.mark}")
    ]
    if not known:
        return told
    prefix, family = min(known, key=lambda pair: len(pair[0]))
    return f"{told}; they are of {family} without the prefix {prefix!r:.60}: save them so"
