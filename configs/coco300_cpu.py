"""The report's stages within an hour on 2 CPU cores: coco300 at a short side of 300, few epochs.

    export MRCNN_DATA=...        # holds coco300/ and weights/
    python train.py --config configs/coco300_cpu.py --workdir runs/coco300_cpu

Time and AP: docs/results.md.
"""

from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ModelConfig, RoIConfig, RPNConfig
from mrcnn_jax.config.schema import Config, DataConfig, OptimizerConfig
from mrcnn_jax.config.tables import staged

# Larger deltas give larger gradients, which so few epochs seem to need. Measured once: with weights
# of 1, positives from IoU 0.7, a box head rate of 3e-4 and epochs (4, 6, 2), box AP50 was 0.118 on
# 50 training images and 0.065 in validation; which of the changes helped is not known.
DELTAS = (10.0, 10.0, 5.0, 5.0)


def get_config() -> Config:
    return Config(
        name="coco300_cpu",
        data=DataConfig(
            folder="coco300",
            short_side=300,
            long_side=480,
            canvases=((320, 480), (480, 320)),
            max_objects=32,
            eval_batch_size=2,
        ),
        # Images are 2.67 times smaller than in the report; so are the anchors (to the next power of
        # two) and the size in the level rule.
        model=ModelConfig(
            rpn=RPNConfig(scales=(16, 32, 64, 128, 256), positive_iou=0.5, box_weights=DELTAS),
            box_head=BoxHeadConfig(box_weights=DELTAS),
            roi=RoIConfig(canonical_size=112.0),
            mask_head=MaskHeadConfig(samples=16),
        ),
        stages=staged(
            pretrained=True,
            epochs=(3, 4, 2),
            optimizers=(
                OptimizerConfig(
                    name="adam", learning_rate=1e-3, schedule="cosine", warmup_steps=45
                ),
                OptimizerConfig(
                    name="adam", learning_rate=5e-4, schedule="cosine", warmup_steps=50
                ),
                OptimizerConfig(
                    name="sgd",
                    learning_rate=0.02,
                    weight_decay=1e-4,
                    clip_norm=1.0,
                    schedule="cosine",
                    warmup_steps=30,
                ),
            ),
        ),
        init_from="weights/pqf_resnet50_large.npz",
        validate_every_epochs=4,
    )
