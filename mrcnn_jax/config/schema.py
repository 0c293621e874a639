"""Every option of the project, once: frozen, typed, validated dataclasses.

A config file (configs/*.py) has `get_config() -> Config`; any field can be overridden on the
command line. Names of files inside a data set are relative to its root; the root comes from
`--data.root` or from `$MRCNN_DATA/<data.folder>`.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Literal

RUNTIME = {"runtime": True}  # metadata of the fields that may differ when a run is resumed


class ConfigError(ValueError):
    """A user's mistake in a config, a path or a data set. Its text is one line that names the
    field, file or id."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are changed, drawn anew each time one is used (data/augment.py). By
    default not at all; validation never is."""

    flip: float = 0.0
    """Probability that an image is mirrored, left to right."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of a factor, uniform, on the scale that `short_side` and `long_side` give. Of an image
    that then leaves its canvas a random window is taken. (0.1, 2.0) is the large-scale jitter of
    Ghiasi et al. 2021."""
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    """Each a factor in 1 - x..1 + x, uniform: of all values, of the distance from the image's mean
    grey, of that from the pixel's grey."""
    hue: float = 0.0
    """A turn in -x..x, uniform, as a share of the circle of colours."""
    copy_paste: float = 0.0
    """Probability that objects of another training image (each with chance .5, if it has a mask)
    are pasted over this one (Ghiasi et al. 2021), which is mirrored and scaled by draws of its
    own."""

    def __post_init__(self) -> None:
        for name, most in (
            ("flip", 1.0),
            ("brightness", 1.0),
            ("contrast", 1.0),
            ("saturation", 1.0),
            ("hue", 0.5),
            ("copy_paste", 1.0),
        ):
            _require(
                0 <= getattr(self, name) <= most, f"data.augment.{name}: must be in 0..{most:g}"
            )
        _require(
            0 < self.scale[0] <= self.scale[1] <= 4,
            "data.augment.scale: must be (low, high) with 0 < low <= high <= 4",
        )


@dataclass(frozen=True)
class DataConfig:
    """Which data set, and how its images become canvases (a few fixed sizes)."""

    folder: str = ""
    """Name of the data set's folder under $MRCNN_DATA; used when `root` is not given."""
    root: str | None = field(default=None, metadata=RUNTIME)
    """Folder that the four names below are relative to."""
    train_annotations: str = "annotations/instances_train.json"
    train_images: str = "images"
    val_annotations: str = "annotations/instances_val.json"
    val_images: str = "images"
    cache: str | None = field(default=None, metadata=RUNTIME)
    """Folder of built data sets; by default <workdir>/data."""
    short_side: int = 800
    long_side: int = 1088
    """An image is scaled by min(short_side / short, long_side / long)."""
    canvases: tuple[tuple[int, int], ...] = ((800, 1088), (1088, 800))
    """(height, width), multiples of 32; an image goes to the smallest one that holds it."""
    max_objects: int = 100
    """Ground-truth boxes an image is padded or truncated to (truncation is counted and
    reported)."""
    max_ignored: int = 20
    """Crowd regions an image is padded or truncated to."""
    mask_crop: int = 112
    """Ground-truth masks travel as crops of their box, mask_crop x mask_crop."""
    keep_empty: bool = True
    """Keep training images without objects (they are negatives)."""
    repeat_threshold: float = 0.0
    """Training images with a class that fewer than this share of them have are repeated in an epoch
    (Gupta et al. 2019; LVIS: 0.001): an image max(1, sqrt(threshold / share)) times, by its rarest
    class. 0: each once."""
    augment: AugmentConfig = AugmentConfig()
    class_names: tuple[str, ...] = field(default=(), metadata=RUNTIME)
    """The names that the annotation files must have for labels 1, 2, ... (categories by id); empty:
    whatever they have."""
    max_pixels: int = field(default=100_000_000, metadata=RUNTIME)
    """A data set with an image of more pixels is refused before that image is decoded."""
    batch_size: int = 2
    eval_batch_size: int = 2
    threads: int = field(default=2, metadata=RUNTIME)
    """Threads that decode images when there are no worker processes."""
    workers: int = field(default=0, metadata=RUNTIME)
    """Worker processes that decode images; on few cores threads are faster."""

    def __post_init__(self) -> None:
        _require(len(self.canvases) > 0, "data.canvases: at least one canvas is needed")
        for height, width in self.canvases:
            _require(
                height > 0 and width > 0 and height % 32 == 0 and width % 32 == 0,
                f"data.canvases: {height} x {width}: sides must be positive multiples of 32",
            )
        _require(
            0 < self.short_side <= self.long_side, "data.short_side: must be in 1..data.long_side"
        )
        for need in ((self.short_side, self.long_side), (self.long_side, self.short_side)):
            _require(
                any(h >= need[0] and w >= need[1] for h, w in self.canvases),
                f"data.canvases: none holds an image of {need[0]} x {need[1]} (data.short_side, data.long_side)",
            )
        for name in (
            "max_objects",
            "max_ignored",
            "mask_crop",
            "batch_size",
            "eval_batch_size",
            "threads",
        ):
            _require(getattr(self, name) >= 1, f"data.{name}: must be at least 1")
        _require(self.workers >= 0, "data.workers: must be at least 0")
        _require(0 <= self.repeat_threshold <= 1, "data.repeat_threshold: must be in 0..1")
        # pycocotools counts fifths of a pixel in 32 bits.
        _require(1 <= self.max_pixels <= 200_000_000, "data.max_pixels: must be in 1..200000000")


@dataclass(frozen=True)
class ResNetConfig:
    depth: Literal[10, 18, 34, 50, 101] = 50
    width: int = 64
    """Channels of the stem and of the first stage's 3x3 convolutions."""
    stride_in_1x1: bool = False
    """False: v1.5 (stride in the 3x3), True: v1 (only the bottleneck depths differ)."""
    norm: Literal["frozen", "live"] = "frozen"
    """frozen: running statistics folded into the convolutions, always; live: batch statistics
    wherever the stage trains them."""
    norm_epsilon: float = 1e-5
    """Added to the variance; 0 for torchvision's published COCO_V1 weights."""

    def __post_init__(self) -> None:
        _require(self.width >= 1, "model.resnet.width: must be at least 1")
        _require(self.norm_epsilon >= 0, "model.resnet.norm_epsilon: must not be negative")


Norm = Literal["none", "frozen_batch", "group"]
"""Normalisation of a convolution outside the ResNet. frozen_batch: imported batch norm, by its
running statistics, always; its scale and bias train. group (Wu & He 2018): by the statistics of
groups of channels of each box, in float32; 32 groups, or fewer where they would have less than 8
channels."""

BoxLoss = Literal["smooth_l1", "l1", "giou"]
"""smooth_l1 and l1 on the deltas, summed over the four; giou: 1 - generalised IoU of the decoded
box (Rezatofighi et al. 2019)."""


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network (report table 1)."""

    scales: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Anchor sides in pixels: FPN, one a level P2..P6; C4, all of them at each cell."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height : width of the anchors."""
    channels: int | None = None
    """Of its 3x3 convolution; None: as many as its input has."""
    convs: int = 1
    """3x3 convolutions, with ReLU between them."""
    batch_norm: bool = True
    """After the convolution, if there is one."""
    anchor_grid: Literal["centre", "corner", "torchvision"] = "centre"
    """Anchors are centred at (i + 0.5) stride; corner: at i stride (detectron2); torchvision: at i
    stride, where the stride is canvas // cells, with sides rounded to whole pixels."""
    anchors_in_padding: bool = False
    """Whether anchors centred beyond the image, in the canvas's padding, count as any others
    (torchvision, detectron2)."""
    box_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    positive_iou: float = 0.7
    negative_iou: float = 0.3
    anchors_across_border: bool = True
    crowd_overlap: float = 0.5
    """A negative with at least this share of its area inside a crowd region is ignored."""
    samples: int = 256
    positive_fraction: float = 0.5
    box_loss: BoxLoss = "smooth_l1"
    smooth_l1_beta: float = 1.0
    objectness_loss_weight: float = 1.0
    box_loss_weight: float = 1.0
    pre_nms: int = 1000
    """Candidates a level before NMS."""
    train_pre_nms: int | None = None
    """The same when the losses of later stages are computed; None: as at inference."""
    nms_iou: float = 0.5
    proposals: int = 50
    """Best boxes over all levels after NMS."""
    train_proposals: int | None = None
    min_size: float = 1e-3
    """Boxes with a side under it (pixels) are dropped."""

    def __post_init__(self) -> None:
        _require(len(self.scales) > 0, "model.rpn.scales: at least one scale is needed")
        _require(len(self.ratios) > 0, "model.rpn.ratios: at least one ratio is needed")
        _require(
            0 <= self.negative_iou <= self.positive_iou <= 1,
            "model.rpn.negative_iou: must be in 0..model.rpn.positive_iou, and that at most 1",
        )
        _require(0 < self.positive_fraction <= 1, "model.rpn.positive_fraction: must be in (0, 1]")
        for name in (
            "samples",
            "pre_nms",
            "proposals",
            "train_pre_nms",
            "train_proposals",
            "channels",
            "convs",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"model.rpn.{name}: must be at least 1")
        _require(
            self.convs == 1 or not self.batch_norm,
            "model.rpn.convs: more than one goes with batch_norm False",
        )
        _require(self.smooth_l1_beta >= 0, "model.rpn.smooth_l1_beta: must not be negative")


@dataclass(frozen=True)
class RoIConfig:
    """Between the stages: features of a box (report section on RoIAlign, FPN paper for the level
    rule)."""

    op: Literal["align", "pool", "warp"] = "align"
    """align: bilinear samples, averaged (He et al. 2017); pool: bins of whole cells, maximum
    (Girshick 2015); warp: the box rounded as pool does, then sampled and averaged as align does."""
    aligned: bool = True
    """align: cell centres at (i + 0.5) stride. False: at i stride, boxes at least one cell wide
    (torchvision)."""
    sampling_ratio: int = 2
    """align, warp: samples a bin and axis (2 is the report's four samples a bin); 0: as many as the
    bin has cells, rounded up."""
    max_sampling_ratio: int = 7
    """Bound of the samples a bin and axis where sampling_ratio is 0."""
    level_epsilon: float = 0.0
    """Added to the level before it is rounded down (torchvision: 1e-6)."""
    canonical_size: float = 224.0
    canonical_level: int = 4
    """A box of canonical_size squared belongs to this level: k = floor(level + log2(sqrt(w h) /
    size)), clamped to 2..5."""

    def __post_init__(self) -> None:
        _require(
            self.sampling_ratio >= 0,
            "model.roi.sampling_ratio: must be at least 1, or 0 (adaptive)",
        )
        _require(self.max_sampling_ratio >= 1, "model.roi.max_sampling_ratio: must be at least 1")
        _require(self.level_epsilon >= 0, "model.roi.level_epsilon: must not be negative")
        _require(self.canonical_size > 0, "model.roi.canonical_size: must be positive")


@dataclass(frozen=True)
class BoxHeadConfig:
    """Box head (report table 2)."""

    convs: int = 0
    """3x3 convolutions before the fully connected layers."""
    conv_channels: int = 256
    norm: Norm = "none"
    """After these convolutions."""
    fcs: int = 2
    hidden: int = 1024
    """Width of the fully connected layers."""
    pool_size: int = 7
    box_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    foreground_iou: float = 0.4
    crowd_overlap: float = 0.5
    """A background proposal with at least this share of its area inside a crowd region is not
    sampled."""
    samples: int = 64
    positive_fraction: float = 0.75
    box_loss: BoxLoss = "smooth_l1"
    smooth_l1_beta: float = 1.0
    class_loss_weight: float = 1.0
    box_loss_weight: float = 1.0
    score_threshold: float = 0.05
    nms_iou: float = 0.5
    min_size: float = 0.0
    """Detections with a side under it (canvas pixels) are dropped, as are those without area."""
    detections: int = 20

    def __post_init__(self) -> None:
        _require(
            0 < self.positive_fraction <= 1, "model.box_head.positive_fraction: must be in (0, 1]"
        )
        for name in ("hidden", "conv_channels", "pool_size", "samples", "detections"):
            _require(getattr(self, name) >= 1, f"model.box_head.{name}: must be at least 1")
        for name in ("convs", "fcs", "min_size", "smooth_l1_beta"):
            _require(getattr(self, name) >= 0, f"model.box_head.{name}: must not be negative")


@dataclass(frozen=True)
class PointRendConfig:
    """Masks refined point by point (PointRend, Kirillov et al. 2020), after the mask branch and
    trained beside it."""

    steps: int = 0
    """Doublings of the mask branch's masks: 2 make 112 x 112 of 28 x 28. 0: no refinement."""
    points: int = 784
    """Cells that each doubling predicts anew: those whose probability is nearest to .5."""
    train_points: int = 196
    """Points a box that the loss is taken at."""
    oversampling: int = 3
    """Random points a box from which these are chosen, for each of them."""
    uncertain_fraction: float = 0.75
    """Share of them that are the most uncertain of those; the rest is random."""
    channels: int = 256
    """Width of the fully connected layers, which see the finest map and the mask branch's logit at
    a point."""
    fcs: int = 3
    loss_weight: float = 1.0

    def __post_init__(self) -> None:
        _require(0 <= self.steps <= 4, "model.mask_head.refine.steps: must be in 0..4")
        for name in ("points", "train_points", "oversampling", "channels"):
            _require(getattr(self, name) >= 1, f"model.mask_head.refine.{name}: must be at least 1")
        _require(self.fcs >= 0, "model.mask_head.refine.fcs: must not be negative")
        _require(
            0 <= self.uncertain_fraction <= 1,
            "model.mask_head.refine.uncertain_fraction: must be in 0..1",
        )


@dataclass(frozen=True)
class MaskHeadConfig:
    """Mask head (report table 3)."""

    channels: int = 256
    convs: int = 4
    norm: Norm = "none"
    """After these convolutions."""
    deconv_kernel: Literal[2, 3] = 3
    """Of the stride-2 transposed convolution: 3 (padding 1, output padding 1), 2 in the paper."""
    pool_size: int = 14
    train_on: Literal["detections", "box_samples"] = "detections"
    """detections: ground truth, then the box head's detections matched at match_iou; box_samples:
    the foreground of the box head's own mini-batch (the paper; no inference within the step)."""
    match_iou: float = 0.5
    samples: int = 64
    """Boxes an image the mask head is trained on, at most: ground truth first, then matched
    detections by score. How many more there would have been is in metrics.jsonl
    (mask_boxes_left_out)."""
    loss: Literal["bce", "focal", "softmax"] = "bce"
    """bce and focal: of each pixel, on the true class's mask alone; softmax: the classes compete
    for a pixel, with the background as a further class of logit 0 (the paper's comparison)."""
    focal_gamma: float = 2.0
    focal_alpha: float = 0.25
    loss_weight: float = 1.0
    paste: Literal["exact", "torchvision"] = "exact"
    """How masks go back to the image: pixel centres inside the box as it is; torchvision: boxes
    widened by a border cell and cut to whole pixels first."""
    refine: PointRendConfig = PointRendConfig()

    def __post_init__(self) -> None:
        for name in ("channels", "pool_size", "samples"):
            _require(getattr(self, name) >= 1, f"model.mask_head.{name}: must be at least 1")
        _require(self.convs >= 0, "model.mask_head.convs: must not be negative")
        _require(self.focal_gamma >= 0, "model.mask_head.focal_gamma: must not be negative")
        _require(0 < self.focal_alpha <= 1, "model.mask_head.focal_alpha: must be in (0, 1]")
        # Points and cells are parts of one mask: their logits have to mean the same.
        _require(
            self.refine.steps == 0 or self.loss == "bce",
            "model.mask_head.refine.steps: goes with model.mask_head.loss bce",
        )


@dataclass(frozen=True)
class ModelConfig:
    num_classes: int = 3
    """Foreground classes K; the data set's categories map to 1..K."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of convolutions and matrix products; parameters, geometry, softmax and losses are float32 in
    any case."""
    remat: bool = False
    """Keep only the inputs of the ResNet's blocks for the backward pass, which computes the rest
    again: less memory, a longer step."""
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    backbone: Literal["fpn", "c4"] = "fpn"
    """fpn: P2..P6; c4: one map of stride 16 (res4), and res5 on the features of each box."""
    fpn_channels: int = 256
    fpn_norm: Norm = "none"
    resnet: ResNetConfig = ResNetConfig()
    rpn: RPNConfig = RPNConfig()
    roi: RoIConfig = RoIConfig()
    box_head: BoxHeadConfig = BoxHeadConfig()
    mask_head: MaskHeadConfig = MaskHeadConfig()

    def __post_init__(self) -> None:
        for name in ("num_classes", "fpn_channels"):
            _require(getattr(self, name) >= 1, f"model.{name}: must be at least 1")
        _require(
            self.fpn_norm != "group",
            "model.fpn_norm: group would take the canvas's padding into its statistics",
        )
        if self.backbone == "fpn":
            _require(
                len(self.rpn.scales) == 5,
                "model.rpn.scales: one scale a level P2..P6 is needed (5)",
            )
        else:
            _require(
                self.mask_head.refine.steps == 0,
                "model.mask_head.refine.steps: the C4 backbone has no finer map to refine masks by",
            )

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels a cell of each map that the RPN sees: P2..P6, or C4."""
        return (4, 8, 16, 32, 64) if self.backbone == "fpn" else (16,)

    @property
    def mask_size(self) -> int:
        """Side of the masks before `refine`: the transposed convolution doubles what the head sees,
        which res5 (C4) has halved."""
        return 2 * self.mask_head.pool_size // (1 if self.backbone == "fpn" else 2)


@dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-3
    batch_size: int = field(default=2, metadata=RUNTIME)
    """Images an update that `learning_rate` is meant for: with another data.batch_size x
    accumulate_steps a hint is printed, and nothing is scaled."""
    momentum: float = 0.9
    weight_decay: float = 0.0
    """adam, sgd: L2 (added to the gradient), as in the paper; adamw: decoupled, learning rate x
    weight_decay x parameter is subtracted (Loshchilov and Hutter 2019). It never reaches a frozen
    parameter."""
    decay_vectors: bool = True
    """Whether it reaches parameters of one axis: biases, scales of norms."""
    clip_norm: float | None = None
    """Global norm over the trained parameters only."""
    schedule: Literal["constant", "cosine", "step"] = "constant"
    """Over the updates of the stage, after the warm-up. cosine: half of one, to 0; step: times
    `step_factor` at each of `milestones`."""
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    """Shares of the stage's updates, warm-up included (detectron2's 1x: 60k and 80k of 90k)."""
    step_factor: float = 0.1
    warmup_steps: int = 0
    """Updates of a linear warm-up."""
    accumulate_steps: int = 1
    """Steps whose gradients are averaged for one update, as of one batch so many times as large
    where its losses are means over as many rows; what is left at the end of a stage makes its last
    one. Gradients are clipped after that; batch statistics are each step's own."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning_rate: must be positive")
        _require(self.batch_size >= 1, "optimizer.batch_size: must be at least 1")
        _require(0 <= self.momentum < 1, "optimizer.momentum: must be in [0, 1)")
        _require(self.weight_decay >= 0, "optimizer.weight_decay: must not be negative")
        _require(
            self.clip_norm is None or self.clip_norm > 0, "optimizer.clip_norm: must be positive"
        )
        _require(self.warmup_steps >= 0, "optimizer.warmup_steps: must not be negative")
        _require(
            all(a < b for a, b in itertools.pairwise((0.0, *self.milestones, 1.0))),
            f"optimizer.milestones: {self.milestones}: must rise, between 0 and 1",
        )
        _require(0 < self.step_factor < 1, "optimizer.step_factor: must be in (0, 1)")
        _require(self.accumulate_steps >= 1, "optimizer.accumulate_steps: must be at least 1")


@dataclass(frozen=True)
class ParamGroup:
    """Parameters whose path ("rpn/conv1/kernel") fully matches `pattern` train at learning_rate *
    lr_scale."""

    pattern: str
    lr_scale: float = 1.0


Loss = Literal["rpn", "box", "mask"]


@dataclass(frozen=True)
class StageConfig:
    """A row of the stage table: every parameter matches exactly one pattern of `train` and `frozen`
    together."""

    name: str
    losses: tuple[Loss, ...]
    train: tuple[ParamGroup, ...]
    frozen: tuple[str, ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    epochs: int = 20
    ema_decay: float = 0.0
    """Beside the trained parameters their moving average, average = decay x average + (1 - decay) x
    parameter after every update, from those that the stage begins with; 0: none. It is evaluated
    beside them, with their batch statistics; it changes nothing in training, and the next stage
    starts from the parameters themselves."""

    def __post_init__(self) -> None:
        _require(
            re.fullmatch(r"[a-z0-9_]+", self.name) is not None,
            f"stages: name {self.name!r}: use a-z, 0-9, _",
        )
        _require(len(self.losses) > 0, f"stages.{self.name}.losses: at least one loss is needed")
        _require(
            len(self.train) > 0, f"stages.{self.name}.train: at least one parameter group is needed"
        )
        _require(self.epochs >= 1, f"stages.{self.name}.epochs: must be at least 1")
        _require(0 <= self.ema_decay < 1, f"stages.{self.name}.ema_decay: must be in [0, 1)")
        for pattern in (*(group.pattern for group in self.train), *self.frozen):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"stages.{self.name}: pattern {pattern!r}: {error}") from None


@dataclass(frozen=True)
class DistributedConfig:
    """How several processes find each other; one process, with however many devices, needs none of
    it."""

    coordinator: str | None = field(default=None, metadata=RUNTIME)
    """host:port of process 0, the same for all; auto: all three as SLURM, Open MPI, Kubernetes or a
    TPU pod tell them."""
    processes: int | None = field(default=None, metadata=RUNTIME)
    """How many there are."""
    index: int | None = field(default=None, metadata=RUNTIME)
    """Which of them this one is, from 0."""

    def __post_init__(self) -> None:
        known = {None, "auto"}
        _require(
            self.coordinator in known or re.fullmatch(r".+:\d+", str(self.coordinator)) is not None,
            f"distributed.coordinator: {self.coordinator!r}: must be host:port or auto",
        )
        for name in ("processes", "index"):
            _require(
                (getattr(self, name) is None) == (self.coordinator in known),
                f"distributed.{name}: goes with distributed.coordinator host:port",
            )
        if self.processes is not None and self.index is not None:
            _require(self.processes >= 1, "distributed.processes: must be at least 1")
            _require(
                0 <= self.index < self.processes,
                "distributed.index: must be in 0..distributed.processes - 1",
            )


@dataclass(frozen=True)
class Config:
    name: str = "unnamed"
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    stages: tuple[StageConfig, ...] = ()
    init_from: str | None = None
    """Weights to start from: a run's folder or a weights file; relative names are looked up in
    $MRCNN_DATA as well."""
    init_without_classes: bool = False
    """Leave the outputs per class of `init_from` out: they are of other classes."""
    seed: int = 0
    save_every_steps: int = field(default=500, metadata=RUNTIME)
    keep_checkpoints: int = field(default=2, metadata=RUNTIME)
    """Newest checkpoints kept beside the last one of every stage, and the one of the best mask
    AP."""
    validate_every_epochs: int = field(default=1, metadata=RUNTIME)
    evaluate_every_epochs: int = field(default=0, metadata=RUNTIME)
    """Epochs between two measurements of COCO's AP on the validation images, in stages that train
    masks, each saved in a checkpoint; 0: never."""
    deterministic: bool = field(default=False, metadata=RUNTIME)
    """On a GPU, ask the compiler (xla_gpu_deterministic_ops) for programs that give the same bits
    each time, and choose no kernels by timing them. Its cost is not yet measured; expect much:
    scatter, RoIAlign's backward pass, is known to become very slow. On a CPU runs are equal to the
    bit without it."""
    skip_non_finite: int = field(default=0, metadata=RUNTIME)
    """Steps a stage that are left out, since their loss or gradient is not finite, before the run
    stops."""
    shard_parameters: bool = field(default=False, metadata=RUNTIME)
    """Spread parameters and optimiser state over the devices, where each has a copy otherwise: less
    memory, more traffic."""
    profile: bool = field(default=False, metadata=RUNTIME)
    """Write a trace of a few steps of each stage to <workdir>/profile, for TensorBoard's profiler
    or ui.perfetto.dev."""
    distributed: DistributedConfig = DistributedConfig()

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        _require(
            len(set(names)) == len(names), f"stages: two have the same name: {', '.join(names)}"
        )
        _require(
            self.init_from is not None or not self.init_without_classes,
            "init_without_classes: needs init_from",
        )
        _require(self.seed >= 0, "seed: must not be negative")
        for name in ("save_every_steps", "keep_checkpoints", "validate_every_epochs"):
            _require(getattr(self, name) >= 1, f"{name}: must be at least 1")
        for name in ("skip_non_finite", "evaluate_every_epochs"):
            _require(getattr(self, name) >= 0, f"{name}: must not be negative")
