"""The report's experiment 1: its recipe with ResNet-50-C4 instead of the FPN.

    export MRCNN_DATA=...        # holds coco300/ and weights/
    python train.py --config configs/coco300_c4.py --workdir runs/coco300_c4

One map of stride 16 with all 15 anchors at each cell; boxes and masks come from res5 on the 14 x 14
features of each box (He et al. 2017, figure 4).

Hardware: one GPU. Time and AP: not yet measured.
"""

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config, DataConfig
from mrcnn_jax.config.tables import c4, staged


def get_config() -> Config:
    return Config(
        name="coco300_c4",
        data=DataConfig(folder="coco300"),
        model=c4(ModelConfig()),
        stages=staged(pretrained=True, backbone="c4"),
        init_from="weights/pqf_resnet50_large.npz",
    )
