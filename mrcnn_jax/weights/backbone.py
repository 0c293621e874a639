"""A ResNet trained on ImageNet, straight from its file: what a detector is trained from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.weights.families import family_of, torchvision_resnet
from mrcnn_jax.weights.mapping import assign, fill
from mrcnn_jax.weights.tensors import read_tensors


def load_resnet(path: Path, template: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a backbone, all of them, from a file with torchvision's names.

    Args:
        path: the file.
        template: {"params", "batch_stats"} of the module "resnet" and, in a C4 network, of "res5",
            which takes layer4; arrays or shapes.

    Raises:
        ConfigError: the file can't be read, holds more than a ResNet, or a tensor is unknown,
            missing or of another shape (named).
    """
    tensors = read_tensors(path)
    family = family_of(tensors, str(path))
    if family.model is not None:
        command = f"python -m mrcnn_jax.commands.import_weights import {path} --out DIR"
        raise ConfigError(
            f"{path}: a whole {family.name} ({family.project}); make a run of it first: {command}"
        )
    rules = torchvision_resnet(layer4="res5") if "res5" in template["params"] else family.rules
    return fill(template, assign(tensors, rules, family.left_out, str(path)), tensors, str(path))
