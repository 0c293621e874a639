"""Backbone weights: a ResNet trained on ImageNet, straight from its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.weights.families import family_of, torchvision_resnet
from mrcnn_jax.weights.mapping import assign, fill
from mrcnn_jax.weights.tensors import read_tensors


def load_resnet(path: Path, template: Mapping[str, Any]) -> dict[str, Any]:
    """Reads all variables of a backbone from a file with torchvision's names.

    Args:
        path: the file.
        template: {"params", "batch_stats"} of the module "resnet" and, in a C4 network, of "res5",
            which takes layer4; arrays or shapes.

    Returns:
        Variables as in `template`, NumPy float32.

    Raises:
        ConfigError: the file cannot be read or holds more than a ResNet; or names the tensor that
            is unknown, missing or of another shape.
    """
    tensors = read_tensors(path)
    family = family_of(tensors, str(path))
    if family.model is not None:
        command = f"python -m mrcnn_jax.commands.import_weights import {path} --out DIR"
        raise ConfigError(
            f"{path}: a whole {family.name} ({family.project}), not a ResNet;"
            f" import it first: {command}"
        )
    rules = torchvision_resnet(layer4="res5") if "res5" in template["params"] else family.rules
    return fill(template, assign(tensors, rules, family.left_out, str(path)), tensors, str(path))
