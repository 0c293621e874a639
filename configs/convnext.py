"""A ConvNeXt-T on COCO 2017: torchvision's network and constants around it, trained by AdamW.

The optimiser is that of the ConvNeXt authors' Mask R-CNN (Liu et al. 2022) over 36 epochs: 1e-4 for
16 images, weight decay 0.05 but for norms, biases and factors, a tenth of the rate after 27 epochs
and a hundredth after 33, up to 0.4 of the residual branches left out. Unlike theirs, all layers
have one rate (they lower it from layer to layer, by 0.95), and images have one short side with
flips (theirs 480 to 800, some after a crop).

    python train.py --config configs/convnext.py --workdir runs/a --data.root coco \\
        --weights convnext_tiny.fb_in1k/model.safetensors

The file and the config.json beside it, which states the pixels' mean and standard deviation, are
those of https://huggingface.co/timm/convnext_tiny.fb_in1k; `--weights torchvision-convnext-tiny
--download` fetches torchvision's. `--data.root` as for configs/torchvision_coco.py. With less
memory, add

    --data.batch-size 4 --stages.0.optimizer.accumulate-steps 4

Hardware: one GPU. Time and AP: not yet measured.
"""

from dataclasses import replace

from mrcnn_jax.config.files import load_config_file
from mrcnn_jax.config.model import ConvNeXtConfig
from mrcnn_jax.config.schema import Config, OptimizerConfig, ParamGroup
from mrcnn_jax.config.tables import joint


def get_config() -> Config:
    config = load_config_file("torchvision_coco")
    return replace(
        config,
        name="convnext",
        data=replace(config.data, shrink="area", batch_size=16),
        model=replace(config.model, trunk="convnext", convnext=ConvNeXtConfig(drop_path=0.4)),
        stages=joint(
            train=tuple(
                ParamGroup(f"{module}/.*")
                for module in ("convnext", "fpn", "rpn", "box_head", "mask_head")
            ),
            epochs=36,
            optimizer=OptimizerConfig(
                name="adamw",
                learning_rate=1e-4,
                batch_size=16,
                weight_decay=0.05,
                decay_vectors=False,
                schedule="step",
                milestones=(27 / 36, 33 / 36),
                warmup_steps=500,
            ),
        ),
    )
