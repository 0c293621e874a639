"""Generated shapes with a mask-IoU head: masks are ranked by how well they cover their objects.

    mrcnn generate shapes --out runs/shapes_data --train 4000
    python train.py --config configs/shapes_scoring.py --workdir runs/shapes_scoring \\
        --data.root runs/shapes_data

The stages and the network of configs/shapes.py, and a fourth stage, which trains the head alone
(Mask Scoring R-CNN, docs/masks.md). AP: not yet measured.

Hardware: 2 CPU cores, minutes.
"""

from dataclasses import replace

from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.heads import MaskIoUHeadConfig
from mrcnn_jax.config.optional_heads import following_heads
from mrcnn_jax.config.schema import Config


def get_config() -> Config:
    shapes = load_config_file("shapes")
    head = MaskIoUHeadConfig(enabled=True, channels=32, hidden=256)
    model = replace(shapes.model, mask_iou_head=head)
    return following_heads(replace(shapes, name="shapes_scoring", model=model))
