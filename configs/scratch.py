"""A small network from random weights, all heads together.

What `train.py my/` trains where no weights are given: the network of configs/shapes.py with a
cascade of three box heads, which see three backgrounds for each object, and one mask for all
classes, of soft cells.

    mrcnn generate shapes --out runs/shapes_data --train 4000
    python train.py --config configs/scratch.py --workdir runs/scratch --data.root runs/shapes_data

Hardware: 2 CPU cores. AP of the demo, which is this at 160 px: docs/results.md.
"""

from dataclasses import replace

from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.schema import AugmentConfig, Config, ParamGroup
from mrcnn_jax.config.tables import joint


def get_config() -> Config:
    config = load_config_file("shapes")
    model, parts = config.model, ("resnet", "fpn", "rpn", "box_head", "mask_head")
    return replace(
        config,
        name="scratch",
        data=replace(config.data, augment=AugmentConfig(flip=0.5, scale=(0.8, 1.25))),
        model=replace(
            model,
            box_head=replace(
                model.box_head,
                samples=64,
                positive_fraction=0.25,
                foreground_iou=0.5,
                class_agnostic=True,
                cascade=(0.6, 0.7),
            ),
            mask_head=replace(
                model.mask_head, train_on="box_samples", class_agnostic=True, soft_targets=True
            ),
        ),
        stages=joint(
            tuple(ParamGroup(f"{part}/.*") for part in parts),
            epochs=4,
            optimizer=config.stages[0].optimizer,
        ),
    )
