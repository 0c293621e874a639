"""A few hundred images of your own in minutes on a few CPU cores, from an ImageNet ResNet-50.

What `train.py my/` chooses on a CPU where the weights are those of a ResNet alone: torchvision's
network with half as wide a pyramid and mask head, of whose ResNet only res5 is trained, and a
cascade of three box heads. A step takes less than half of the time of that of configs/finetune.py,
which counts for more in a short training. Its AP: docs/results.md.

    python train.py --config configs/finetune_cpu.py --workdir runs/mine --model.num-classes 5 \\
        --data.root my --data.train-annotations train.json --data.val-annotations val.json \\
        --weights torchvision-resnet50-v2 --download

Hardware: 2 CPU cores.
"""

from dataclasses import replace

from mrcnn_jax.config.schema import AugmentConfig, Config, DataConfig, OptimizerConfig, ParamGroup
from mrcnn_jax.config.tables import TORCHVISION, joint


def get_config() -> Config:
    heads = tuple(ParamGroup(f"{head}/.*") for head in ("fpn", "rpn", "box_head", "mask_head"))
    return Config(
        name="finetune_cpu",
        data=DataConfig(
            short_side=320,
            long_side=480,
            canvases=((320, 480), (480, 320)),
            augment=AugmentConfig(flip=0.5, scale=(0.8, 1.25)),
        ),
        model=replace(
            TORCHVISION,
            num_classes=1,
            fpn_channels=128,
            rpn=replace(
                TORCHVISION.rpn,
                scales=(16, 32, 64, 128, 256),
                pre_nms=500,
                train_pre_nms=None,
                proposals=200,
                train_proposals=None,
            ),
            # Twice as fine maps for each object as by the anchors: better masks (docs/results.md).
            roi=replace(TORCHVISION.roi, canonical_size=224.0),
            # A cascade needs one box for all classes. Training adds its further heads to the table.
            box_head=replace(
                TORCHVISION.box_head, samples=128, class_agnostic=True, cascade=(0.6, 0.7)
            ),
            # One mask for all classes: few images have to teach only one.
            mask_head=replace(
                TORCHVISION.mask_head,
                channels=128,
                samples=16,
                class_agnostic=True,
                soft_targets=True,
            ),
        ),
        stages=joint(
            train=(ParamGroup("resnet/layer4/.*/kernel", lr_scale=0.1), *heads),
            frozen=("resnet/(stem|layer[123])/.*", "resnet/layer4/.*/(scale|bias)"),
            epochs=10,
            optimizer=OptimizerConfig(
                name="adamw",
                learning_rate=1e-3,
                weight_decay=0.05,
                decay_vectors=False,
                clip_norm=1.0,
                schedule="cosine",
                warmup_steps=150,
            ),
        ),
    )
