"""A network of every kind of layer, small enough to compile for a GPU in seconds: a config file for
benchmarks/gpu_compile.py."""

from __future__ import annotations

from mrcnn_jax.config.heads import BoxHeadConfig, MaskHeadConfig
from mrcnn_jax.config.model import ModelConfig, ResNetConfig, RPNConfig
from mrcnn_jax.config.schema import Config, DataConfig, OptimizerConfig, ParamGroup
from mrcnn_jax.config.tables import joint, staged

SGD = OptimizerConfig(name="sgd", learning_rate=0.01)
HEADS = ("fpn", "rpn", "box_head", "mask_head")


def get_config() -> Config:
    (together,) = joint(
        (ParamGroup("resnet/layer[34]/.*/kernel"), *(ParamGroup(f"{head}/.*") for head in HEADS)),
        ("resnet/(stem|layer[12])/.*", "resnet/layer[34]/.*/(scale|bias)"),
        epochs=1,
        optimizer=SGD,
    )
    _, box, mask = staged(pretrained=True)
    return Config(
        name="small",
        data=DataConfig(
            short_side=256,
            long_side=320,
            canvases=((256, 320), (320, 256)),
            max_objects=16,
            max_ignored=2,
            mask_crop=28,
        ),
        model=ModelConfig(
            num_classes=8,
            fpn_channels=64,
            resnet=ResNetConfig(depth=50, width=16),
            rpn=RPNConfig(batch_norm=False, pre_nms=200, proposals=100),
            box_head=BoxHeadConfig(hidden=128, samples=64, detections=20),
            mask_head=MaskHeadConfig(
                channels=64, convs=2, deconv_kernel=2, train_on="box_samples", samples=16
            ),
        ),
        stages=(together, box, mask),
    )
