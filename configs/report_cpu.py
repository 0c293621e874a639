"""The report's experiments on 2 CPU cores: coco300 at a short side of 300, few epochs, one seed.

    export MRCNN_DATA=...        # holds coco300/ and weights/
    mrcnn experiments --workdir runs/report

Time and AP of every variant: docs/results.md.
"""

from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ModelConfig, RoIConfig, RPNConfig
from mrcnn_jax.config.schema import Config, DataConfig, OptimizerConfig
from mrcnn_jax.config.tables import staged

DELTAS = (10.0, 10.0, 5.0, 5.0)  # as in configs/coco300_cpu.py


def adam(learning_rate: float) -> OptimizerConfig:
    return OptimizerConfig(
        name="adam", learning_rate=learning_rate, schedule="cosine", warmup_steps=45
    )


def get_config() -> Config:
    return Config(
        name="report_cpu",
        data=DataConfig(
            folder="coco300",
            short_side=300,
            long_side=480,
            canvases=((320, 480), (480, 320)),
            max_objects=32,
            eval_batch_size=2,
        ),
        # Images are 2.67 times smaller than in the report; so are the anchors (to the next power of
        # two) and the size in the level rule. Half the channels and samples make an epoch about
        # half as long.
        model=ModelConfig(
            fpn_channels=128,
            rpn=RPNConfig(scales=(16, 32, 64, 128, 256), positive_iou=0.5, box_weights=DELTAS),
            box_head=BoxHeadConfig(box_weights=DELTAS, samples=32),
            roi=RoIConfig(canonical_size=112.0),
            mask_head=MaskHeadConfig(channels=128, samples=8),
        ),
        stages=staged(
            pretrained=True,
            epochs=(3, 3, 1),
            optimizers=(
                adam(1e-3),
                adam(5e-4),
                OptimizerConfig(
                    name="sgd",
                    learning_rate=0.02,
                    weight_decay=1e-4,
                    clip_norm=1.0,
                    schedule="cosine",
                    warmup_steps=15,
                ),
            ),
        ),
        init_from="weights/pqf_resnet50_large.npz",
        validate_every_epochs=4,
    )
