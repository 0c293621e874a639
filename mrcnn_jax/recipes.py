"""Stage tables that configs share (SPEC section 7)."""

from __future__ import annotations

from mrcnn_jax.config import OptimizerConfig, ParamGroup, StageConfig

ADAM = OptimizerConfig(name="adam", learning_rate=1e-3)
SGD = OptimizerConfig(name="sgd", learning_rate=0.01, momentum=0.9, weight_decay=1e-4)


def staged(
    *,
    pretrained: bool,
    epochs: tuple[int, int, int] = (20, 20, 20),
    optimizers: tuple[OptimizerConfig, OptimizerConfig, OptimizerConfig] = (ADAM, ADAM, SGD),
) -> tuple[StageConfig, StageConfig, StageConfig]:
    """The report's three stages: RPN, box head, mask head; what an earlier stage trained stays frozen.

    Args:
        pretrained: True: the imported ResNet stays frozen. False: stage 1 trains it too, since nothing at random initialisation
            may be frozen under what is trained.
    """
    resnet = "resnet/.*"
    base = (ParamGroup("fpn/.*"), ParamGroup("rpn/.*"))
    return (
        StageConfig(
            name="rpn",
            losses=("rpn",),
            train=base if pretrained else (ParamGroup(resnet), *base),
            frozen=(*((resnet,) if pretrained else ()), "box_head/.*", "mask_head/.*"),
            optimizer=optimizers[0],
            epochs=epochs[0],
        ),
        StageConfig(
            name="box",
            losses=("box",),
            train=(ParamGroup("box_head/.*"),),
            frozen=(resnet, "fpn/.*", "rpn/.*", "mask_head/.*"),
            optimizer=optimizers[1],
            epochs=epochs[1],
        ),
        StageConfig(
            name="mask",
            losses=("mask",),
            train=(ParamGroup("mask_head/.*"),),
            frozen=(resnet, "fpn/.*", "rpn/.*", "box_head/.*"),
            optimizer=optimizers[2],
            epochs=epochs[2],
        ),
    )
