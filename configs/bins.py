"""Bin picking: boxes, masks and the distance of every object, trained on 2 CPU cores.

All heads are trained together from a ResNet-18, so that its features learn to tell distance, then
the depth head alone, while boxes and masks stay as they are. Training needs depth; prediction needs
colour alone.

    mrcnn generate bins --out runs/bins_data --processes 2
    python train.py --config configs/bins.py --workdir runs/bins --data.root runs/bins_data \\
        --weights resnet18.pth

Time, AP and depth errors: docs/depth.md.
"""

from dataclasses import replace

from mrcnn_jax.config.heads import BoxHeadConfig, DepthHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ModelConfig, ResNetConfig, RoIConfig, RPNConfig
from mrcnn_jax.config.optional_heads import with_depth
from mrcnn_jax.config.schema import AugmentConfig, Config, DataConfig, OptimizerConfig, ParamGroup
from mrcnn_jax.config.tables import joint

ADAM = OptimizerConfig(
    name="adam", learning_rate=1e-3, clip_norm=1.0, schedule="cosine", warmup_steps=100
)
DELTAS = (10.0, 10.0, 5.0, 5.0)


def get_config() -> Config:
    heads = joint(
        # Imported weights are tuned at a fifth of the rate.
        train=(
            ParamGroup("resnet/layer[234]/.*/kernel", 0.2),
            *(ParamGroup(f"{head}/.*") for head in ("fpn", "rpn", "box_head", "mask_head")),
        ),
        frozen=("resnet/(stem|layer1)/.*", "resnet/layer[234]/.*/(scale|bias)"),
        epochs=6,
        optimizer=replace(ADAM, learning_rate=5e-4),
    )
    return Config(
        name="bins",
        data=DataConfig(
            short_side=312,
            long_side=416,
            canvases=((320, 416), (416, 320)),
            max_objects=20,
            eval_batch_size=4,
            augment=AugmentConfig(flip=0.5),
        ),
        model=ModelConfig(
            num_classes=4,
            fpn_channels=128,
            resnet=ResNetConfig(depth=18),
            rpn=RPNConfig(
                scales=(16, 32, 64, 128, 256),
                batch_norm=False,
                positive_iou=0.5,
                box_weights=DELTAS,
                pre_nms=500,
                nms_iou=0.7,
                proposals=200,
            ),
            roi=RoIConfig(canonical_size=112.0),
            box_head=BoxHeadConfig(
                box_weights=DELTAS,
                foreground_iou=0.5,
                samples=128,
                positive_fraction=0.25,
                detections=40,
            ),
            mask_head=MaskHeadConfig(
                channels=128, deconv_kernel=2, train_on="box_samples", samples=32
            ),
            # The loss itself is a few thousandths; the others are about 1 together. Metres are
            # asked for, so that an error of an image's scale counts by half, not by .15.
            depth_head=DepthHeadConfig("dense", loss_weight=20.0, silog_lambda=0.5),
        ),
        stages=with_depth(heads, epochs=4, optimizer=ADAM, together=True),
        validate_every_epochs=2,
    )
