"""A ResNet-50 of timm on COCO 2017: torchvision's network and constants, trained by AdamW.

timm's newer weights (Wightman et al. 2021) want another optimiser than torchvision's. This is
mmdetection's for them, over its usual 12 epochs: 2e-4 for 16 images, weight decay 0.05 without
norms and biases (mmdetection's decays biases). The stem and res2 are frozen; the norms of the other
stages are trained, and normalise by their running statistics.

    python train.py --config configs/timm_coco.py --workdir runs/a --data.root coco \\
        --weights resnet50.a1_in1k/model.safetensors

The file and the config.json beside it, which states the pixels' mean and standard deviation, are
those of https://huggingface.co/timm/resnet50.a1_in1k. `--data.root` as for
configs/torchvision_coco.py. With less memory, add

    --data.batch-size 4 --stages.0.optimizer.accumulate-steps 4

Hardware: one GPU. Time and AP: not yet measured.
"""

from dataclasses import replace

from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.schema import Config, OptimizerConfig, ParamGroup
from mrcnn_jax.config.tables import joint


def get_config() -> Config:
    config = load_config_file("torchvision_coco")
    return replace(
        config,
        name="timm_coco",
        data=replace(config.data, shrink="area", batch_size=16),
        stages=joint(
            train=(
                ParamGroup("resnet/layer[234]/.*"),
                *(ParamGroup(f"{head}/.*") for head in ("fpn", "rpn", "box_head", "mask_head")),
            ),
            frozen=("resnet/(stem|layer1)/.*",),
            epochs=12,
            # A tenth after 8 epochs, a hundredth after 11.
            optimizer=OptimizerConfig(
                name="adamw",
                learning_rate=2e-4,
                batch_size=16,
                weight_decay=0.05,
                decay_vectors=False,
                schedule="step",
                milestones=(8 / 12, 11 / 12),
                warmup_steps=500,
            ),
        ),
    )
