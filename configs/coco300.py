"""The report's recipe: ResNet-50-FPN on 300 COCO images, 20 epochs per stage.

Canvases are 800 x 1088 and 1088 x 800, in batches of 2.

    export MRCNN_DATA=...        # holds coco300/ and weights/
    python train.py --config configs/coco300.py --workdir runs/coco300

Hardware: one GPU. Time and AP: not yet measured.
"""

from mrcnn_jax.config.schema import Config, DataConfig
from mrcnn_jax.config.tables import staged


def get_config() -> Config:
    return Config(
        name="coco300",
        data=DataConfig(folder="coco300"),
        stages=staged(pretrained=True),
        init_from="weights/pqf_resnet50_large.npz",
    )
