"""Options of the network: frozen, typed, validated dataclasses. A field's docstring is its help.

The report is the document that this project reproduces; its constants are the defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mrcnn_jax.config.errors import (
    require,
    require_at_least,
    require_positive,
    require_positives,
    require_share,
    require_weight,
)
from mrcnn_jax.config.heads import (
    BoxHeadConfig,
    BoxLoss,
    DepthHeadConfig,
    MaskHeadConfig,
    MaskIoUHeadConfig,
    Norm,
)

Trunk = Literal["resnet", "convnext"]
"""Networks whose maps the pyramid is built on, by the names of their modules."""


@dataclass(frozen=True)
class ResNetConfig:
    """ResNet backbone (He et al. 2016)."""

    depth: Literal[10, 18, 34, 50, 101] = 50
    """Number of layers. 50 and 101 have bottleneck blocks; 10 is not in the paper, but small enough
    for demos and tests."""
    width: int = 64
    """Channels of the stem and of the 3x3 convolutions in res2; each later stage doubles them."""
    stride_in_1x1: bool = False
    """Where a bottleneck block strides. False: in its 3x3 convolution (v1.5, torchvision); True: in
    its first 1x1 (v1, detectron2). Depths 10 to 34 have no bottlenecks and ignore it."""
    norm: Literal["frozen", "live"] = "frozen"
    """Batch norm. frozen: always by the running statistics, folded into the convolutions; live: by
    the statistics of the batch in stages that train the backbone."""
    norm_epsilon: float = 1e-5
    """Added to the variance in batch norm. torchvision's published COCO_V1 weights need 0."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "model.resnet.", "width")
        require_at_least(0, self, "model.resnet.", "norm_epsilon")


@dataclass(frozen=True)
class ConvNeXtConfig:
    """ConvNeXt backbone (Liu et al. 2022); the default sizes are those of ConvNeXt-T."""

    blocks: tuple[int, int, int, int] = (3, 3, 9, 3)
    """Number of blocks in each of the four stages."""
    channels: tuple[int, int, int, int] = (96, 192, 384, 768)
    """Channels of each stage."""
    layer_scale: float = 1e-6
    """What the factors on the residual branches (layer scale) start from, without weights."""
    drop_path: float = 0.0
    """Share of the residual branches that a training step leaves out, image by image, in the last
    block; it rises linearly from 0 in the first one (stochastic depth, Huang et al. 2016)."""

    def __post_init__(self) -> None:
        for name in ("blocks", "channels"):
            require(min(getattr(self, name)) >= 1, f"model.convnext.{name}: must be at least 1")
        require_weight(self, "model.convnext.", "layer_scale")
        require(0 <= self.drop_path < 1, "model.convnext.drop_path: must be in [0, 1)")

    @property
    def name(self) -> str:
        """The published name, "ConvNeXt-T" for example; "ConvNeXt" for other sizes."""
        size = CONVNEXT_SIZES.get((self.blocks, self.channels))
        return "ConvNeXt" if size is None else f"ConvNeXt-{size}"


_FOUR = tuple[int, int, int, int]
CONVNEXT_SIZES: dict[tuple[_FOUR, _FOUR], str] = {
    ((3, 3, 9, 3), (96, 192, 384, 768)): "T",
    ((3, 3, 27, 3), (96, 192, 384, 768)): "S",
    ((3, 3, 27, 3), (128, 256, 512, 1024)): "B",
    ((3, 3, 27, 3), (192, 384, 768, 1536)): "L",
    ((3, 3, 27, 3), (256, 512, 1024, 2048)): "XL",
}
"""Blocks and channels -> the published size."""


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network (report table 1; Ren et al. 2015)."""

    scales: tuple[int, ...] = (32, 64, 128, 256, 512)
    """Anchor sizes: sides in pixels of the square ones. FPN: one for each level P2..P6; C4: all of
    them at every cell."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Anchor shapes: height / width, at equal area."""
    channels: int | None = None
    """Channels of the 3x3 convolutions; None: as many as their input has."""
    convs: int = 1
    """Number of 3x3 convolutions, each followed by ReLU."""
    batch_norm: bool = True
    """Batch norm between convolution and ReLU; only with one convolution."""
    anchor_grid: Literal["centre", "corner", "torchvision"] = "centre"
    """Where anchors are centred. centre: at (i + 0.5) * stride; corner: at i * stride (detectron2);
    torchvision: at i * stride with stride = canvas // cells, sides rounded to whole pixels."""
    anchors_in_padding: bool = False
    """Use anchors centred in the canvas's padding, outside the image, like any others (as
    torchvision and detectron2 do)."""
    box_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Factors on the box deltas (x, y, width, height): larger ones make the targets larger."""
    positive_iou: float = 0.7
    """An anchor with at least this IoU with an object is positive, as is each object's best one."""
    negative_iou: float = 0.3
    """An anchor under this IoU with every object is negative; the rest is ignored."""
    anchors_across_border: bool = True
    """Train on anchors that reach across the border of the image as well."""
    crowd_overlap: float = 0.5
    """A negative with at least this share of its area inside a crowd region is ignored."""
    samples: int = 256
    """Anchors sampled for the loss, per image."""
    positive_fraction: float = 0.5
    """Largest share of positives among them."""
    box_loss: BoxLoss = "smooth_l1"
    """Loss of the boxes. smooth_l1, l1: on the four deltas; giou: 1 - generalised IoU."""
    smooth_l1_beta: float = 1.0
    """Where smooth L1 turns from quadratic to linear; 0: L1."""
    objectness_loss_weight: float = 1.0
    """Factor on the objectness loss."""
    box_loss_weight: float = 1.0
    """Factor on the box loss."""
    pre_nms: int = 1000
    """Candidates per level that go into NMS, best first."""
    train_pre_nms: int | None = None
    """The same while the heads behind the RPN are trained; None: as at inference."""
    nms_iou: float = 0.5
    """NMS drops a box whose IoU with a better one of its level is above this."""
    proposals: int = 50
    """Proposals per image: the best over all levels after NMS."""
    train_proposals: int | None = None
    """The same while the heads behind the RPN are trained; None: as at inference."""
    min_size: float = 1e-3
    """Boxes with a side shorter than this (pixels) are dropped."""

    def __post_init__(self) -> None:
        require(len(self.scales) > 0, "model.rpn.scales: at least one scale is needed")
        require(len(self.ratios) > 0, "model.rpn.ratios: at least one ratio is needed")
        require(
            0 <= self.negative_iou <= self.positive_iou <= 1,
            "model.rpn.negative_iou: must be in 0..model.rpn.positive_iou, and that at most 1",
        )
        require(self.positive_iou > 0, "model.rpn.positive_iou: must be above 0")
        require_positives(self.samples, self.positive_fraction, "model.rpn.")
        require_at_least(1, self, "model.rpn.", "pre_nms", "proposals", "channels")
        require_at_least(1, self, "model.rpn.", "train_pre_nms", "train_proposals", "convs")
        require(
            self.convs == 1 or not self.batch_norm,
            "model.rpn.convs: more than one needs model.rpn.batch_norm False",
        )
        require_at_least(0, self, "model.rpn.", "smooth_l1_beta")
        require_share(self, "model.rpn.", "nms_iou")
        require(self.crowd_overlap > 0, "model.rpn.crowd_overlap: must be positive")
        require_weight(self, "model.rpn.", "objectness_loss_weight", "box_loss_weight")
        require_positive(self, "model.rpn.", "scales", "ratios", "box_weights")


@dataclass(frozen=True)
class RoIConfig:
    """Features of a box, cut from the backbone's maps (He et al. 2017, section 3)."""

    op: Literal["align", "pool", "warp"] = "align"
    """align: average of bilinear samples (He et al. 2017); pool: maximum over bins of whole cells
    (Girshick 2015); warp: the box rounded as by pool, then averaged as by align."""
    aligned: bool = True
    """align: cells are centred at (i + 0.5) * stride. False: at i * stride, and boxes are at least
    one cell wide (torchvision)."""
    sampling_ratio: int = 2
    """align, warp: samples per bin along each axis (2: the report's four per bin). 0: as many as
    the bin has cells, rounded up."""
    max_sampling_ratio: int = 7
    """Upper limit of the samples per bin and axis if sampling_ratio is 0."""
    level_epsilon: float = 0.0
    """Added to a box's FPN level before it is rounded down (torchvision: 1e-6)."""
    canonical_size: float = 224.0
    """Side in pixels of the square box that belongs to canonical_level."""
    canonical_level: int = 4
    """FPN level of that box. Others: floor(level + log2(sqrt(width * height) / size)), clamped to
    2..5 (Lin et al. 2017, equation 1)."""

    def __post_init__(self) -> None:
        require(
            self.sampling_ratio >= 0,
            "model.roi.sampling_ratio: must be at least 1, or 0 (adaptive)",
        )
        require_at_least(1, self, "model.roi.", "max_sampling_ratio")
        require_at_least(0, self, "model.roi.", "level_epsilon")
        require_positive(self, "model.roi.", "canonical_size")


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    num_classes: int = 3
    """Number of foreground classes K; the categories of the data set become labels 1..K."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of convolutions and matrix products. Parameters, box arithmetic, softmax and losses are
    always float32."""
    remat: bool = False
    """Save memory at the price of a longer step: the backward pass recomputes what is inside the
    blocks of the ResNet or ConvNeXt."""
    pixel_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from the RGB values (0..1) of the images."""
    pixel_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """The difference is divided by this."""
    backbone: Literal["fpn", "c4"] = "fpn"
    """fpn: feature pyramid P2..P6; c4: one map of stride 16 (res4), with res5 run on each box."""
    fpn_channels: int = 256
    """Channels of the pyramid's maps."""
    fpn_norm: Norm = "none"
    """Normalisation of the pyramid's convolutions: none or frozen_batch (imported batch norm)."""
    trunk: Trunk = "resnet"
    """The network before the pyramid: resnet, or convnext (with backbone fpn only)."""
    resnet: ResNetConfig = ResNetConfig()
    convnext: ConvNeXtConfig = ConvNeXtConfig()
    rpn: RPNConfig = RPNConfig()
    roi: RoIConfig = RoIConfig()
    box_head: BoxHeadConfig = BoxHeadConfig()
    mask_head: MaskHeadConfig = MaskHeadConfig()
    depth_head: DepthHeadConfig = DepthHeadConfig()
    mask_iou_head: MaskIoUHeadConfig = MaskIoUHeadConfig()

    def __post_init__(self) -> None:
        require_at_least(1, self, "model.", "num_classes", "fpn_channels")
        require_positive(self, "model.", "pixel_std")
        require(
            self.fpn_norm != "group",
            "model.fpn_norm: group norm would include the canvas's padding in its statistics",
        )
        if self.backbone == "fpn":
            require(
                len(self.rpn.scales) == 5,
                "model.rpn.scales: five are needed, one for each level P2..P6",
            )
        else:
            require(
                self.trunk == "resnet",
                f"model.trunk: {self.trunk} needs model.backbone fpn: C4 runs a ResNet's res5 on "
                "each box",
            )
            require(
                self.mask_head.refine.steps == 0,
                "model.mask_head.refine.steps: the C4 backbone has no finer map to refine masks by",
            )
            require(
                self.depth_head.kind == "none",
                f"model.depth_head.kind: {self.depth_head.kind} needs model.backbone fpn: C4 has "
                "no P2..P5",
            )
            require(
                len(self.box_head.cascade) == 0,
                "model.box_head.cascade: needs model.backbone fpn: res5 (C4) would run on every "
                "box again for each head",
            )

    @property
    def trunk_name(self) -> str:
        """What is before the pyramid or the C4 map, "ResNet-50" or "ConvNeXt-T" for example."""
        return self.convnext.name if self.trunk == "convnext" else f"ResNet-{self.resnet.depth}"

    @property
    def live_norm(self) -> bool:
        """Whether the trunk has batch norm by the statistics of the batch."""
        return self.trunk == "resnet" and self.resnet.norm == "live"

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per cell of each map that the RPN sees: P2..P6, or C4."""
        return (4, 8, 16, 32, 64) if self.backbone == "fpn" else (16,)

    @property
    def mask_size(self) -> int:
        """Side of the masks before refinement: twice the head's input, which res5 (C4) halves."""
        size = self.mask_head.pool_size
        return 2 * (size if self.backbone == "fpn" else (size + 1) // 2)
