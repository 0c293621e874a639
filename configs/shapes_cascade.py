"""The stages of configs/shapes.py with a cascade of three box heads (Cai & Vasconcelos 2018).

    mrcnn generate shapes --out runs/shapes_data --train 4000
    python train.py --config configs/shapes_cascade.py --workdir runs/shapes_cascade \\
        --data.root runs/shapes_data

Each head is a stage of its own: rpn, box, box2, box3, mask.

Hardware: 2 CPU cores. Its AP: not yet measured.
"""

from dataclasses import replace

from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.optional_heads import with_cascade
from mrcnn_jax.config.schema import Config


def get_config() -> Config:
    config = load_config_file("shapes")
    box_head = replace(
        config.model.box_head, foreground_iou=0.5, class_agnostic=True, cascade=(0.6, 0.7)
    )
    return replace(
        config,
        name="shapes_cascade",
        model=replace(config.model, box_head=box_head),
        stages=with_cascade(config.stages, 2),
    )
