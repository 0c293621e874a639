"""Generated shapes with depth: boxes, masks and distances together, in minutes on 2 CPU cores.

    mrcnn generate shapes --out runs/shapes_depth_data --train 2000 --depth
    python train.py --config configs/shapes_depth.py --workdir runs/shapes_depth \\
        --data.root runs/shapes_depth_data

The network of configs/shapes.py, from random weights. A shape's distance shows in its haze alone.
Depth errors: docs/depth.md.
"""

from dataclasses import replace

from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.heads import DepthHeadConfig
from mrcnn_jax.config.optional_heads import with_depth
from mrcnn_jax.config.schema import Config, ParamGroup
from mrcnn_jax.config.tables import joint


def get_config() -> Config:
    shapes = load_config_file("shapes")
    adam = shapes.stages[0].optimizer
    modules = ("resnet", "fpn", "rpn", "box_head", "mask_head")
    heads = joint(
        train=tuple(ParamGroup(f"{module}/.*") for module in modules),
        frozen=(),
        epochs=3,
        optimizer=adam,
    )
    return replace(
        shapes,
        name="shapes_depth",
        model=replace(
            shapes.model,
            depth_head=DepthHeadConfig("dense", channels=64, loss_weight=10.0),
            mask_head=replace(shapes.model.mask_head, train_on="box_samples"),
        ),
        stages=with_depth(heads, epochs=1, optimizer=adam, together=True),
    )
