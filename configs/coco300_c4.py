"""The report's experiment 1: ResNet-50-C4 instead of the FPN, otherwise its recipe.

    export MRCNN_DATA=...        # holds coco300/ and weights/
    python train.py --config configs/coco300_c4.py --workdir runs/coco300_c4

One map of stride 16 with all 15 anchors at each cell; boxes and masks from res5 on 14 x 14 features of each box (He et al. 2017, figure 4).

Hardware: one GPU. Time and AP: not yet measured.
"""

from mrcnn_jax.config import BoxHeadConfig, Config, DataConfig, MaskHeadConfig, ModelConfig, RPNConfig
from mrcnn_jax.recipes import staged


def get_config() -> Config:
    return Config(
        name="coco300_c4",
        data=DataConfig(folder="coco300"),
        model=ModelConfig(
            backbone="c4",
            rpn=RPNConfig(channels=256),
            box_head=BoxHeadConfig(fcs=0, pool_size=14),
            mask_head=MaskHeadConfig(convs=0, deconv_kernel=2, pool_size=14),
        ),
        stages=staged(pretrained=True, backbone="c4"),
        init_from="weights/pqf_resnet50_large.npz",
    )
