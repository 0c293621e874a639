"""ResNets by the names of torchvision (resnet18 .. resnet101), as trained on ImageNet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrcnn_jax.weights.mapping import Rule, map_tensors, read_npz

OIHW_TO_HWIO = (2, 3, 1, 0)


def _conv_norm(conv: str, norm: str, target: str) -> tuple[Rule, ...]:
    """A convolution and its batch norm: our ConvNorm."""
    return (
        Rule(rf"{conv}\.weight", f"params/{target}/kernel", OIHW_TO_HWIO),
        Rule(rf"{norm}\.weight", f"params/{target}/scale"),
        Rule(rf"{norm}\.bias", f"params/{target}/bias"),
        Rule(rf"{norm}\.running_mean", f"batch_stats/{target}/mean"),
        Rule(rf"{norm}\.running_var", f"batch_stats/{target}/var"),
    )


_BLOCK = r"layer(\d)\.(\d+)\."
RULES = (
    *_conv_norm("conv1", "bn1", "stem"),
    *_conv_norm(_BLOCK + r"conv(\d)", _BLOCK + r"bn(\d)", r"layer\1/block\2/conv\3"),
    *_conv_norm(_BLOCK + r"downsample\.0", _BLOCK + r"downsample\.1", r"layer\1/block\2/downsample"),
)
# The classifier, and a counter that torch keeps for batch norms without momentum.
LEFT_OUT = (r"fc\..*", r".*\.num_batches_tracked")


def load_resnet(path: Path, template: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of `models.resnet.ResNet` from a flat npz file with torchvision's names.

    Args:
        path: the file.
        template: {"params", "batch_stats"} of the ResNet, arrays or shapes.

    Raises:
        ConfigError: the file is not an npz, or a tensor is unknown, missing or of another shape (named).
    """
    return map_tensors(read_npz(path), RULES, LEFT_OUT, template, str(path))
