"""Bins again, from a trained run: the depth head alone, for other heads and losses.

    python train.py --config configs/bins_depth.py --workdir runs/bins_roi \\
        --data.root runs/bins_data --weights runs/bins --model.depth-head.kind roi

The run to start from may have a depth head of the same kind, which is trained on; one of the other
kind is not used. Depth errors: docs/depth.md.
"""

from dataclasses import replace

from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.schema import Config


def get_config() -> Config:
    config = load_config_file("bins")
    return replace(config, name="bins_depth", stages=config.stages[-1:])
