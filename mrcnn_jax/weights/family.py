"""A family of weights files, and the rules of the layers that several families have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mrcnn_jax.config.model import ModelConfig, Trunk
from mrcnn_jax.config.schema import Shrink
from mrcnn_jax.evaluation.coco_categories import Categories
from mrcnn_jax.weights.mapping import Layout, Rule, convolution

ChannelOrder = Literal["rgb", "bgr"]
COUNTERS = {r".*\.num_batches_tracked": "counters of steps"}
"""Of `Family.left_out`: those of torch's batch norm."""


@dataclass(frozen=True)
class Family:
    """Files with the same names of tensors, and their network."""

    name: str
    project: str
    mark: str
    """Name of a tensor that every file of this family has, and no other file (but see
    `family_of`)."""
    rules: tuple[Rule, ...]
    left_out: Mapping[str, str]
    """Pattern of names -> why they are left out."""
    model: ModelConfig | None
    """None: a ResNet or ConvNeXt without heads."""
    trunk: Trunk = "resnet"
    """The network, if there are no heads."""
    categories: Categories = ()
    """Those of the published file, or those that a file itself names."""
    categories_stated: bool = False
    """A file itself names `categories`."""
    frozen_norm_epsilon: float = 1e-5
    """Epsilon of frozen batch norm (files without counters of steps) of a ResNet-50, the published
    one; live batch norm, and that of other depths, has 1e-5."""
    shrink: Shrink = "area"
    """`DataConfig.shrink` nearest to how the project makes images smaller, for networks with heads.
    torchvision's GeneralizedRCNNTransform and mmdetection's Resize (OpenCV's INTER_LINEAR)
    interpolate without antialiasing; detectron2 resizes by Pillow's bilinear filter, which averages
    over a window that grows with the factor."""
    channel_order: ChannelOrder = "rgb"
    """Of the images that the published network reads; ours reads RGB, so `rules` turn the first
    kernel of a BGR one."""
    stated: frozenset[str] = frozenset()
    """Dotted names of the fields, and "channel_order", that the config in a file states."""
    presumed: str = ""
    """What of the network a file does not say."""
    remarks: tuple[str, ...] = ()
    """Printed when a file is imported."""


# -- rules -----------------------------------------------------------------------------------------


def conv_norm(conv: str, norm: str, target: str, *layouts: Layout) -> tuple[Rule, ...]:
    """Rules of a convolution and its batch norm: our ConvNorm."""
    return (
        Rule(rf"{conv}\.weight", f"params/{target}/kernel", layouts or (convolution,)),
        Rule(rf"{norm}\.weight", f"params/{target}/scale"),
        Rule(rf"{norm}\.bias", f"params/{target}/bias"),
        Rule(rf"{norm}\.running_mean", f"batch_stats/{target}/mean"),
        Rule(rf"{norm}\.running_var", f"batch_stats/{target}/var"),
    )


def layer(source: str, target: str, kernel: Layout, *rows: Layout) -> tuple[Rule, ...]:
    """Rules of a convolution or fully connected layer with a bias; `rows` select outputs."""
    return (
        Rule(rf"{source}\.weight", f"params/{target}/kernel", (*rows, kernel)),
        Rule(rf"{source}\.bias", f"params/{target}/bias", rows),
    )


def blocks(
    source: str, target: str, *, norm: str, shortcut: str, shortcut_norm: str
) -> tuple[Rule, ...]:
    """Rules of the residual blocks of one resolution."""
    block = rf"{source}\.(\d+)\."
    return (
        *conv_norm(rf"{block}conv(\d)", block + norm, rf"{target}/block\1/conv\2"),
        *conv_norm(block + shortcut, block + shortcut_norm, rf"{target}/block\1/downsample"),
    )


def torchvision_resnet(
    prefix: str = "", *, stem: tuple[Layout, ...] = (convolution,)
) -> tuple[Rule, ...]:
    """Rules of torchvision's ResNet.

    Args:
        prefix: pattern that the names begin with.
        stem: layouts of the stem's kernel.
    """
    names = {"norm": r"bn(\d)", "shortcut": r"downsample\.0", "shortcut_norm": r"downsample\.1"}
    return (
        *conv_norm(f"{prefix}conv1", f"{prefix}bn1", "resnet/stem", *stem),
        *(
            rule
            for i in (1, 2, 3, 4)
            for rule in blocks(f"{prefix}layer{i}", f"resnet/layer{i}", **names)
        ),
    )
