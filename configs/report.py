"""The report's constants, and ours where it states none (docs/differences.md).

    python train.py --config configs/report.py --workdir runs/a --data.root DIR \\
        --weights resnet50.pth

Hardware: one GPU. Time and AP: not yet measured.
"""

from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ModelConfig, ResNetConfig, RoIConfig, RPNConfig
from mrcnn_jax.config.schema import Config, DataConfig, OptimizerConfig
from mrcnn_jax.config.tables import staged


def get_config() -> Config:
    return Config(
        name="report",
        data=DataConfig(
            short_side=800, long_side=1088, canvases=((800, 1088), (1088, 800)), batch_size=2
        ),
        model=ModelConfig(
            num_classes=3,
            pixel_mean=(0.485, 0.456, 0.406),
            pixel_std=(0.229, 0.224, 0.225),
            backbone="fpn",
            fpn_channels=256,
            resnet=ResNetConfig(depth=50, stride_in_1x1=False, norm="frozen"),
            rpn=RPNConfig(
                scales=(32, 64, 128, 256, 512),
                ratios=(0.5, 1.0, 2.0),
                batch_norm=True,
                anchor_grid="centre",
                box_weights=(1.0, 1.0, 1.0, 1.0),
                positive_iou=0.7,
                negative_iou=0.3,
                crowd_overlap=0.5,
                samples=256,
                positive_fraction=0.5,
                box_loss="smooth_l1",
                smooth_l1_beta=1.0,
                pre_nms=1000,
                nms_iou=0.5,
                proposals=50,
                min_size=1e-3,
            ),
            roi=RoIConfig(
                op="align", aligned=True, sampling_ratio=2, canonical_size=224.0, canonical_level=4
            ),
            box_head=BoxHeadConfig(
                fcs=2,
                hidden=1024,
                pool_size=7,
                box_weights=(1.0, 1.0, 1.0, 1.0),
                foreground_iou=0.4,
                samples=64,
                positive_fraction=0.75,
                box_loss="smooth_l1",
                smooth_l1_beta=1.0,
                score_threshold=0.05,
                nms_iou=0.5,
                detections=20,
            ),
            mask_head=MaskHeadConfig(
                channels=256,
                convs=4,
                deconv_kernel=3,
                pool_size=14,
                train_on="detections",
                match_iou=0.5,
                loss="bce",
                focal_gamma=2.0,
            ),
        ),
        stages=staged(
            pretrained=True,
            epochs=(20, 20, 20),
            optimizers=(
                OptimizerConfig(name="adam", learning_rate=1e-3),
                OptimizerConfig(name="adam", learning_rate=1e-3),
                OptimizerConfig(name="sgd", learning_rate=0.01, momentum=0.9, weight_decay=1e-4),
            ),
        ),
    )
