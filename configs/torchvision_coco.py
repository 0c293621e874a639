"""torchvision's maskrcnn_resnet50_fpn on COCO 2017: its constants and its recipe.

All heads train together, with SGD; of the ResNet res3 to res5 are trainable.

    python train.py --config configs/torchvision_coco.py --workdir runs/a --data.root coco \\
        --weights resnet50.pth

`--data.root` holds annotations/instances_{train,val}2017.json, train2017/ and val2017/. To evaluate
the weights that torchvision has published for this network, import them instead:

    mrcnn import FILE --out DIR

Hardware: one GPU. Time and AP: not yet measured.
"""

from dataclasses import replace

from mrcnn_jax.config.schema import AugmentConfig, Config, OptimizerConfig, ParamGroup
from mrcnn_jax.config.tables import COCO_CANVASES, TORCHVISION, joint


def get_config() -> Config:
    return Config(
        name="torchvision_coco",
        data=replace(
            COCO_CANVASES,
            train_annotations="annotations/instances_train2017.json",
            train_images="train2017",
            val_annotations="annotations/instances_val2017.json",
            val_images="val2017",
            keep_empty=False,
            augment=AugmentConfig(flip=0.5),
            shrink="bilinear",
        ),
        # The 80 categories of the annotation files; the published weights count the gaps between
        # their ids as classes too, 90 in all.
        model=replace(TORCHVISION, num_classes=80),
        stages=joint(
            train=(
                ParamGroup("resnet/layer[234]/.*/kernel"),
                *(ParamGroup(f"{head}/.*") for head in ("fpn", "rpn", "box_head", "mask_head")),
            ),
            # torchvision's batch norms are constants.
            frozen=("resnet/(stem|layer1)/.*", "resnet/layer[234]/.*/(scale|bias)"),
            epochs=26,
            # torchvision's 0.02 is for 16 images per step. A tenth after 16 epochs, a hundredth
            # after 22.
            optimizer=OptimizerConfig(
                name="sgd",
                learning_rate=0.0025,
                momentum=0.9,
                weight_decay=1e-4,
                schedule="step",
                milestones=(16 / 26, 22 / 26),
                warmup_steps=1000,
            ),
        ),
    )
