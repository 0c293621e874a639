"""The report's experiment: ResNet-50-FPN on 300 COCO images, batches of 2, 20 epochs per stage.

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
