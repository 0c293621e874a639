"""Options of the heads behind the RPN; `config.model` has the rest of the network."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

from mrcnn_jax.config.errors import (
    require,
    require_at_least,
    require_positive,
    require_positives,
    require_share,
    require_weight,
)

Norm = Literal["none", "frozen_batch", "group"]
"""Normalisation of a convolution outside the ResNet. frozen_batch: batch norm by its imported
running statistics, whose scale and bias train. group (Wu & He 2018): by the statistics of groups of
channels of each box, in float32; 32 groups, or fewer where a group would have under 8 channels."""

BoxLoss = Literal["smooth_l1", "l1", "giou"]
"""smooth_l1 and l1: on the deltas, summed over the four. giou: 1 - generalised IoU of the decoded
boxes (Rezatofighi et al. 2019)."""


@dataclass(frozen=True)
class BoxHeadConfig:
    """Box head: classifies and refines the proposals (report table 2)."""

    convs: int = 0
    """Number of 3x3 convolutions before the fully connected layers."""
    conv_channels: int = 256
    """Channels of these convolutions."""
    norm: Norm = "none"
    """Normalisation after them: none, frozen_batch (imported batch norm) or group."""
    fcs: int = 2
    """Number of fully connected layers."""
    hidden: int = 1024
    """Width of the fully connected layers."""
    pool_size: int = 7
    """Side, in cells, of the features of a box."""
    box_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Factors on the box deltas (x, y, width, height): larger ones make the targets larger."""
    foreground_iou: float = 0.4
    """A proposal above this IoU with an object is foreground; the rest is background."""
    crowd_overlap: float = 0.5
    """A background proposal with at least this share of its area inside a crowd region is not
    sampled."""
    samples: int = 64
    """Proposals sampled for the loss, per image."""
    positive_fraction: float = 0.75
    """Largest share of foreground among them."""
    box_loss: BoxLoss = "smooth_l1"
    """Loss of the boxes. smooth_l1, l1: on the four deltas; giou: 1 - generalised IoU."""
    smooth_l1_beta: float = 1.0
    """Where smooth L1 turns from quadratic to linear; 0: L1."""
    class_loss_weight: float = 1.0
    """Factor on the classification loss."""
    box_loss_weight: float = 1.0
    """Factor on the box loss."""
    score_threshold: float = 0.05
    """Detections have a score above this."""
    nms_iou: float = 0.5
    """NMS drops a box whose IoU with a better one of its class is above this."""
    min_size: float = 0.0
    """Detections with a side shorter than this (canvas pixels), or without area, are dropped."""
    detections: int = 20
    """Most detections per image."""
    class_agnostic: bool = False
    """One box for each proposal, which all classes train, in place of one per class."""
    cascade: tuple[float, ...] = ()
    """One or two further heads, box_head2 and box_head3, each trained on the boxes that the head
    before refined (Cai & Vasconcelos 2018): the IoU with an object above which a box is foreground
    for each. The paper has 0.6 0.7, with foreground_iou 0.5. Needs class_agnostic."""
    cascade_box_weights: tuple[float, float] = (2.0, 3.0)
    """Factors on box_weights in the second and third head, whose deltas are smaller."""
    cascade_loss_weights: tuple[float, float] = (0.5, 0.25)
    """Factors on both losses of the second and third head."""

    def __post_init__(self) -> None:
        require_positives(self.samples, self.positive_fraction, "model.box_head.")
        self._check_cascade()
        require_at_least(1, self, "model.box_head.", "hidden", "conv_channels", "pool_size")
        require_at_least(1, self, "model.box_head.", "detections")
        require(self.crowd_overlap > 0, "model.box_head.crowd_overlap: must be positive")
        require_at_least(0, self, "model.box_head.", "convs", "fcs", "min_size", "smooth_l1_beta")
        require_share(self, "model.box_head.", "foreground_iou", "nms_iou", "score_threshold")
        require_weight(self, "model.box_head.", "class_loss_weight", "box_loss_weight")
        require_positive(self, "model.box_head.", "box_weights")

    def _check_cascade(self) -> None:
        prefix = "model.box_head.cascade"
        require(len(self.cascade) <= 2, f"{prefix}: at most two further heads")
        require(
            len(self.cascade) == 0 or self.class_agnostic,
            f"{prefix}: needs model.box_head.class_agnostic: a box is refined before its class is "
            "known",
        )
        thresholds = (self.foreground_iou, *self.cascade, 1.0)
        require(
            len(self.cascade) == 0 or all(a < b for a, b in itertools.pairwise(thresholds)),
            f"{prefix}: {self.cascade}: must rise from model.box_head.foreground_iou, "
            f"{self.foreground_iou:g}, and stay below 1",
        )
        require_positive(self, "model.box_head.", "cascade_box_weights")
        require_weight(self, "model.box_head.", "cascade_loss_weights")

    @property
    def heads(self) -> tuple[BoxHeadConfig, ...]:
        """Options of each head by itself, first to last: one without a cascade."""
        further = zip(
            self.cascade, self.cascade_box_weights, self.cascade_loss_weights, strict=False
        )
        x, y, width, height = self.box_weights
        return (
            replace(self, cascade=()),
            *(
                replace(
                    self,
                    cascade=(),
                    foreground_iou=iou,
                    box_weights=(factor * x, factor * y, factor * width, factor * height),
                    class_loss_weight=share * self.class_loss_weight,
                    box_loss_weight=share * self.box_loss_weight,
                )
                for iou, factor, share in further
            ),
        )


@dataclass(frozen=True)
class PointRendConfig:
    """Refinement of masks point by point (PointRend, Kirillov et al. 2020)."""

    steps: int = 0
    """How often the resolution of a mask is doubled: 2 turn 28 x 28 into 112 x 112. 0: off."""
    points: int = 784
    """Cells predicted anew after each doubling: those with a probability nearest to 0.5."""
    train_points: int = 196
    """Points per box that the loss is taken at."""
    oversampling: int = 3
    """Random candidates drawn for each of these points."""
    uncertain_fraction: float = 0.75
    """Share of the points that are the most uncertain candidates; the rest is random."""
    channels: int = 256
    """Width of the fully connected layers, whose input is the finest feature map and the mask
    head's logit at a point."""
    fcs: int = 3
    """Number of fully connected layers."""
    loss_weight: float = 1.0
    """Factor on the loss of the points."""

    def __post_init__(self) -> None:
        prefix = "model.mask_head.refine."
        require(0 <= self.steps <= 4, f"{prefix}steps: must be in 0..4")
        require_at_least(1, self, prefix, "points", "train_points", "oversampling", "channels")
        require_at_least(0, self, prefix, "fcs")
        require_share(self, prefix, "uncertain_fraction")
        require_weight(self, prefix, "loss_weight")


@dataclass(frozen=True)
class MaskHeadConfig:
    """Mask head: a mask for each detection (report table 3)."""

    channels: int = 256
    """Channels of all its convolutions."""
    convs: int = 4
    """Number of 3x3 convolutions before the transposed one."""
    norm: Norm = "none"
    """Normalisation after them: none, frozen_batch (imported batch norm) or group."""
    deconv_kernel: Literal[2, 3] = 3
    """Kernel of the transposed convolution with stride 2: 3 (padding 1, output padding 1), or 2 as
    in the paper."""
    pool_size: int = 14
    """Side, in cells, of the features of a box; the masks' is twice that (C4: equal to it)."""
    train_on: Literal["detections", "box_samples"] = "detections"
    """Boxes that the loss is taken on. detections: ground truth, then the box head's detections
    that match it; box_samples: the box head's foreground samples of IoU `match_iou` or above (as in
    the paper; the step then runs no inference)."""
    match_iou: float = 0.5
    """A box matches an object at this IoU or above."""
    samples: int = 64
    """Most boxes per image to train on; of detections: ground truth first, then those matched, by
    score. metrics.jsonl counts those over the limit (mask_boxes_left_out)."""
    class_agnostic: bool = False
    """One mask for whatever is in the box, which all classes train, in place of one per class."""
    soft_targets: bool = False
    """Targets are the share of a cell that the object covers (as in torchvision), in place of 0 or
    1 at one half; only with loss bce. Those of `refine`'s points stay 0 or 1."""
    loss: Literal["bce", "focal", "softmax"] = "bce"
    """Loss of a pixel. bce, focal: on the mask of the true class alone; softmax: all classes and a
    background of logit 0 compete (the comparison in the paper)."""
    focal_gamma: float = 2.0
    """focal: exponent that turns down the loss of easy pixels (Lin et al. 2017)."""
    focal_alpha: float = 0.25
    """focal: weight of the pixels of objects; the others have 1 - focal_alpha."""
    loss_weight: float = 1.0
    """Factor on the mask loss."""
    paste: Literal["exact", "torchvision"] = "exact"
    """How masks are resized into the image. exact: at pixel centres inside the box as it is;
    torchvision: boxes are widened by a border cell and cut to whole pixels first."""
    refine: PointRendConfig = PointRendConfig()

    def __post_init__(self) -> None:
        require_at_least(1, self, "model.mask_head.", "channels", "pool_size", "samples")
        require_at_least(0, self, "model.mask_head.", "convs", "focal_gamma")
        require_share(self, "model.mask_head.", "match_iou")
        require_weight(self, "model.mask_head.", "loss_weight")
        require(0 < self.focal_alpha <= 1, "model.mask_head.focal_alpha: must be in (0, 1]")
        require(
            not self.soft_targets or self.loss == "bce",
            "model.mask_head.soft_targets: needs model.mask_head.loss bce",
        )
        require(
            not self.class_agnostic or self.loss != "softmax",
            "model.mask_head.class_agnostic: not with model.mask_head.loss softmax, in which "
            "classes compete",
        )
        # Points and cells are parts of one mask: their logits have to mean the same.
        require(
            self.refine.steps == 0 or self.loss == "bce",
            "model.mask_head.refine.steps: needs model.mask_head.loss bce",
        )


@dataclass(frozen=True)
class MaskIoUHeadConfig:
    """Mask-IoU head (Mask Scoring R-CNN, Huang et al. 2019): how well masks cover their objects."""

    enabled: bool = False
    """Predict the IoU of each mask with its object, and rank masks by class score * IoU (mask_score
    in the results); boxes keep the class score."""
    channels: int = 256
    """Channels of its convolutions."""
    convs: int = 4
    """Number of 3x3 convolutions; the last one has stride 2."""
    fcs: int = 2
    """Number of fully connected layers after them."""
    hidden: int = 1024
    """Width of the fully connected layers."""
    loss_weight: float = 1.0
    """Factor on its loss, half the squared error of the IoU."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "model.mask_iou_head.", "channels", "convs", "hidden")
        require_at_least(0, self, "model.mask_iou_head.", "fcs")
        require_weight(self, "model.mask_iou_head.", "loss_weight")


@dataclass(frozen=True)
class DepthHeadConfig:
    """Depth head: metres from the camera, for images or for boxes (the report's future work)."""

    kind: Literal["none", "dense", "roi"] = "none"
    """none: no depth. dense: a map of the whole image, from P2..P5 (Kirillov et al. 2019, Panoptic
    FPN); roi: the mask branch with one channel, a map of each box (the report's proposal)."""
    channels: int = 128
    """dense: channels of its convolutions. roi has the layers of model.mask_head."""
    loss: Literal["silog", "berhu", "l1"] = "silog"
    """Of the differences d of log depths. silog: mean(d^2) - silog_lambda * mean(d)^2 (Eigen et al.
    2014); berhu: |d|, and from a fifth of the largest |d| on a square (Laina et al. 2016); l1:
    |d|."""
    silog_lambda: float = 0.85
    """silog: share of an image's mean error that is forgiven. 1: a depth that is wrong by one
    factor everywhere costs nothing."""
    loss_weight: float = 1.0
    """Factor on the depth loss."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "model.depth_head.", "channels")
        require_share(self, "model.depth_head.", "silog_lambda")
        require_weight(self, "model.depth_head.", "loss_weight")
