"""Building blocks of recipes (the files of configs/): stage tables and families of constants."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ModelConfig, ResNetConfig, RoIConfig, RPNConfig, Trunk
from mrcnn_jax.config.schema import Config, DataConfig, OptimizerConfig, ParamGroup, StageConfig

ADAM = OptimizerConfig(name="adam", learning_rate=1e-3)
SGD = OptimizerConfig(name="sgd", learning_rate=0.01, momentum=0.9, weight_decay=1e-4)


def staged(
    *,
    pretrained: bool,
    backbone: Literal["fpn", "c4"] = "fpn",
    trunk: Trunk = "resnet",
    epochs: tuple[float, float, float] = (20, 20, 20),
    optimizers: tuple[OptimizerConfig, OptimizerConfig, OptimizerConfig] = (ADAM, ADAM, SGD),
) -> tuple[StageConfig, StageConfig, StageConfig]:
    """Makes the report's three stages: RPN, box head, mask head. Each freezes the earlier ones.

    Args:
        pretrained: True: the imported trunk stays frozen. False: stage 1 trains it too, since
            random weights must not be frozen under trained ones.
        backbone: c4: res5 runs on each box, so it is trained with the box head and frozen with it.
        trunk: the network's `ModelConfig.trunk`.
        epochs: epochs of each stage.
        optimizers: optimiser of each stage.
    """
    below = f"{trunk}/.*"
    neck = ("fpn/.*",) if backbone == "fpn" else ()
    box_head = ("box_head/.*",) if backbone == "fpn" else ("res5/.*", "box_head/.*")
    base = tuple(ParamGroup(pattern) for pattern in (*neck, "rpn/.*"))
    return (
        StageConfig(
            name="rpn",
            losses=("rpn",),
            train=base if pretrained else (ParamGroup(below), *base),
            frozen=(*((below,) if pretrained else ()), *box_head, "mask_head/.*"),
            optimizer=optimizers[0],
            epochs=epochs[0],
        ),
        StageConfig(
            name="box",
            losses=("box",),
            # Imported weights are tuned at a tenth of the rate.
            train=tuple(
                ParamGroup(pattern, 0.1 if pretrained and pattern == "res5/.*" else 1.0)
                for pattern in box_head
            ),
            frozen=(below, *neck, "rpn/.*", "mask_head/.*"),
            optimizer=optimizers[1],
            epochs=epochs[1],
        ),
        StageConfig(
            name="mask",
            losses=("mask",),
            train=(ParamGroup("mask_head/.*"),),
            frozen=(below, *neck, "rpn/.*", *box_head),
            optimizer=optimizers[2],
            epochs=epochs[2],
        ),
    )


def joint(
    train: tuple[ParamGroup, ...],
    frozen: tuple[str, ...] = (),
    *,
    epochs: float,
    optimizer: OptimizerConfig = SGD,
) -> tuple[StageConfig, ...]:
    """Makes one stage that trains all heads together, as in the papers.

    Args:
        train: parameters that are trained.
        frozen: patterns of those that are not.
        epochs: passes over the training images.
        optimizer: the optimiser.
    """
    return (
        StageConfig(
            name="joint",
            losses=("rpn", "box", "mask"),
            train=train,
            frozen=frozen,
            optimizer=optimizer,
            epochs=epochs,
        ),
    )


def extended(config: Config, epochs: float) -> Config:
    """Adds a row that goes on with the last one's training, under its name and _2 (_3, ...).

    Rows at the end that differ in name and epochs alone count together. The new one begins its
    schedule of learning rates anew.

    Args:
        config: of a run, with at least one stage.
        epochs: of these rows and the new one together.

    Raises:
        ConfigError: they have as many without it.
    """
    last = config.stages[-1]
    rows = list(
        itertools.takewhile(
            lambda row: dataclasses.replace(row, name=last.name, epochs=last.epochs) == last,
            reversed(config.stages),
        )
    )
    first, trained = rows[-1].name, sum(row.epochs for row in rows)
    if epochs <= trained:
        raise ConfigError(f"--epochs {epochs:g}: stage {first} has {trained:g} already")
    taken = {row.name for row in config.stages}
    name = next(name for i in itertools.count(2) if (name := f"{first}_{i}") not in taken)
    added = dataclasses.replace(last, name=name, epochs=round(epochs - trained, 6))
    return dataclasses.replace(config, stages=(*config.stages, added))


def canvases_for(short_side: int, long_side: int) -> tuple[tuple[int, int], ...]:
    """Chooses (height, width) of the canvases for images of these sides in pixels.

    One lies and one is upright, with sides rounded up to multiples of 32; one is enough where both
    sides are equal.
    """
    short, long = (-(-side // 32) * 32 for side in (short_side, long_side))
    return tuple(dict.fromkeys(((short, long), (long, short))))


def c4(model: ModelConfig) -> ModelConfig:
    """Returns `model`, an FPN network, with the C4 backbone (He et al. 2017, figure 4, left).

    The RPN sees one map of stride 16, with all scales at each cell; its convolution keeps its
    channels. Boxes and masks come from res5 on 14 x 14 features of each box: no fully connected
    layers, and one 2 x 2 transposed convolution for the masks. Train it in the stages of
    `staged(backbone="c4")`.
    """
    return dataclasses.replace(
        model,
        backbone="c4",
        rpn=dataclasses.replace(model.rpn, channels=model.rpn.channels or model.fpn_channels),
        box_head=dataclasses.replace(model.box_head, fcs=0, pool_size=14),
        mask_head=dataclasses.replace(model.mask_head, convs=0, deconv_kernel=2, pool_size=14),
    )


# Short side 800 and long side 1333, as torchvision and detectron2 resize images; canvases are
# multiples of 32.
COCO_CANVASES = DataConfig(short_side=800, long_side=1333, canvases=((800, 1344), (1344, 800)))

# torchvision's maskrcnn_resnet50_fpn: the constants that differ from the report's (our defaults).
TORCHVISION = ModelConfig(
    num_classes=90,
    rpn=RPNConfig(
        batch_norm=False,
        anchor_grid="torchvision",
        anchors_in_padding=True,
        smooth_l1_beta=1 / 9,
        pre_nms=1000,
        train_pre_nms=2000,
        nms_iou=0.7,
        proposals=1000,
        train_proposals=2000,
    ),
    roi=RoIConfig(aligned=False, sampling_ratio=2, level_epsilon=1e-6),
    box_head=BoxHeadConfig(
        box_weights=(10.0, 10.0, 5.0, 5.0),
        foreground_iou=0.5,
        samples=512,
        positive_fraction=0.25,
        smooth_l1_beta=1 / 9,
        min_size=1e-2,
        detections=100,
    ),
    mask_head=MaskHeadConfig(
        deconv_kernel=2, train_on="box_samples", samples=128, paste="torchvision"
    ),
)

# maskrcnn_resnet50_fpn_v2: two convolutions in the RPN, four and one fully connected layer in the
# box head, and batch norm everywhere but in the RPN.
TORCHVISION_V2 = dataclasses.replace(
    TORCHVISION,
    fpn_norm="frozen_batch",
    rpn=dataclasses.replace(TORCHVISION.rpn, convs=2),
    box_head=dataclasses.replace(TORCHVISION.box_head, convs=4, fcs=1, norm="frozen_batch"),
    mask_head=dataclasses.replace(TORCHVISION.mask_head, norm="frozen_batch"),
)

# detectron2's mask_rcnn_R_50_FPN: pixels in 0..255 without scaling, ResNet v1, RoIAlign with as
# many samples as a bin has cells.
DETECTRON2_FPN = ModelConfig(
    num_classes=80,
    pixel_mean=(123.675 / 255, 116.28 / 255, 103.53 / 255),
    pixel_std=(1 / 255, 1 / 255, 1 / 255),
    resnet=ResNetConfig(stride_in_1x1=True),
    rpn=RPNConfig(
        batch_norm=False,
        anchor_grid="corner",
        anchors_in_padding=True,
        smooth_l1_beta=0.0,
        pre_nms=1000,
        train_pre_nms=2000,
        nms_iou=0.7,
        proposals=1000,
        min_size=0.0,
    ),
    roi=RoIConfig(sampling_ratio=0, level_epsilon=1e-8),
    box_head=BoxHeadConfig(
        box_weights=(10.0, 10.0, 5.0, 5.0),
        foreground_iou=0.5,
        samples=512,
        positive_fraction=0.25,
        smooth_l1_beta=0.0,
        detections=100,
    ),
    mask_head=MaskHeadConfig(deconv_kernel=2, train_on="box_samples", samples=128),
)

# detectron2's new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ: the layers of torchvision's V2.
DETECTRON2_LSJ = dataclasses.replace(
    DETECTRON2_FPN,
    fpn_norm="frozen_batch",
    rpn=dataclasses.replace(DETECTRON2_FPN.rpn, convs=2),
    box_head=dataclasses.replace(DETECTRON2_FPN.box_head, convs=4, fcs=1, norm="frozen_batch"),
    mask_head=dataclasses.replace(DETECTRON2_FPN.mask_head, norm="frozen_batch"),
)

# mmdetection's mask-rcnn_r50_fpn (2.x, 3.x): detectron2's heads on torchvision's ResNet and pixels.
# Anchors of 8 strides are these scales, and standard deviations of .1 .1 .2 .2 of the box head's
# deltas these box weights. Its level rule adds 1e-6 before it takes the logarithm, which is 3.6e-7
# after it at the second of the three limits.
MMDETECTION = dataclasses.replace(
    DETECTRON2_FPN,
    pixel_mean=ModelConfig.pixel_mean,
    pixel_std=ModelConfig.pixel_std,
    resnet=ResNetConfig(),
    roi=dataclasses.replace(DETECTRON2_FPN.roi, level_epsilon=3.6e-7),
)

# detectron2's mask_rcnn_R_50_C4: one map of stride 16, res5 on each box.
DETECTRON2_C4 = dataclasses.replace(
    DETECTRON2_FPN,
    backbone="c4",
    rpn=dataclasses.replace(
        DETECTRON2_FPN.rpn, pre_nms=6000, train_pre_nms=12000, train_proposals=2000
    ),
    box_head=dataclasses.replace(DETECTRON2_FPN.box_head, fcs=0, pool_size=14),
    mask_head=dataclasses.replace(DETECTRON2_FPN.mask_head, convs=0, pool_size=14),
)
