"""A few hundred images of your own: torchvision's network and constants, all heads together.

Training images are flipped and rescaled at random.

    python train.py --config configs/finetune.py --workdir runs/mine --model.num-classes 5 \\
        --data.root my --data.train-annotations train.json --data.val-annotations val.json \\
        --weights torchvision-coco-v1 --download

Other weights: docs/weights.md. Step by step: docs/training.md.

Hardware: one GPU. Time and AP: not yet measured.
"""

from dataclasses import replace

from mrcnn_jax.config.schema import AugmentConfig, Config, OptimizerConfig, ParamGroup
from mrcnn_jax.config.tables import COCO_CANVASES, TORCHVISION, joint


def get_config() -> Config:
    return Config(
        name="finetune",
        data=replace(COCO_CANVASES, augment=AugmentConfig(flip=0.5, scale=(0.8, 1.25))),
        model=replace(TORCHVISION, num_classes=1),
        # torchvision trains the same parameters: all but the stem, res2 and the batch norms.
        stages=joint(
            train=(
                ParamGroup("resnet/layer[234]/.*/kernel"),
                *(ParamGroup(f"{head}/.*") for head in ("fpn", "rpn", "box_head", "mask_head")),
            ),
            frozen=("resnet/(stem|layer1)/.*", "resnet/layer[234]/.*/(scale|bias)"),
            epochs=20,
            # For 2 images per step. With 300 images an epoch is 150 steps: the warm-up takes two.
            optimizer=OptimizerConfig(
                name="sgd",
                learning_rate=0.005,
                momentum=0.9,
                weight_decay=1e-4,
                schedule="cosine",
                warmup_steps=300,
            ),
        ),
    )
