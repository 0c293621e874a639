"""Name maps of ConvNeXts as timm, their authors and torchvision save them, and their sizes.

A classifier has no norms of its maps; those of the backbone here start as ones and zeros.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.model import ConvNeXtConfig
from mrcnn_jax.weights.family import Family, layer
from mrcnn_jax.weights.mapping import Assigned, Rule, convolution, pointwise

_CLASSIFIER = "the classifier, with the norm before it"


def _of_channels(x: Float[np.ndarray, "c ..."]) -> Float[np.ndarray, " c"]:
    """Drops the axes of rows and columns that torchvision's factors per channel have."""
    return x.reshape(len(x))


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(rf"{source}\.weight", f"params/{target}/scale"),
        Rule(rf"{source}\.bias", f"params/{target}/bias"),
    )


def _patches(conv: str, norm: str, target: str) -> tuple[Rule, ...]:
    """Rules of the stem, or of what halves the resolution."""
    return (*layer(conv, target, convolution), *_norm(norm, f"{target}/norm"))


def _blocks(source: str, target: str, names: tuple[str, str, str, str, str]) -> tuple[Rule, ...]:
    """Rules of the blocks of one resolution; `source` has a group for the number of the block.

    Args:
        names: of the depthwise convolution, the norm, the two layers and the factors.
    """
    depthwise, norm, expand, project, gamma = (rf"{source}\.{name}" for name in names)
    block = rf"{target}/block\1"
    return (
        *layer(depthwise, block, convolution),
        *_norm(norm, f"{block}/norm"),
        # Fully connected layers or, in some of timm's, convolutions of one tap.
        *layer(expand, f"{block}/expand", pointwise),
        *layer(project, f"{block}/project", pointwise),
        Rule(gamma, f"params/{block}/gamma", (_of_channels,)),
    )


def _network(
    stem: tuple[str, str],
    halving: Callable[[int], tuple[str, str]],
    blocks: Callable[[int], str],
    names: tuple[str, str, str, str, str],
) -> tuple[Rule, ...]:
    """Rules of the stem and the four stages, which are counted from 0.

    Args:
        stem: names of its convolution and its norm.
        halving: stage 1 to 3 -> the same of what halves its resolution.
        blocks: stage -> name of its blocks, with a group for the number of the block.
        names: as of `_blocks`.
    """
    halvings = (_patches(*halving(i), f"convnext/stage{i + 1}/downsample") for i in range(1, 4))
    stages = (_blocks(blocks(i), f"convnext/stage{i + 1}", names) for i in range(4))
    return tuple(itertools.chain(_patches(*stem, "convnext/stem"), *halvings, *stages))


TIMM = Family(
    name="convnext",
    project="timm",
    mark="stages.0.blocks.0.conv_dw.weight",
    rules=_network(
        (r"stem\.0", r"stem\.1"),
        lambda i: (rf"stages\.{i}\.downsample\.1", rf"stages\.{i}\.downsample\.0"),
        lambda i: rf"stages\.{i}\.blocks\.(\d+)",
        ("conv_dw", "norm", r"mlp\.fc1", r"mlp\.fc2", "gamma"),
    ),
    left_out={r"(head|norm_pre)\..*": _CLASSIFIER},
    model=None,
    trunk="convnext",
)
AUTHORS = Family(
    name="convnext_facebook",
    project="ConvNeXt's authors",
    mark="stages.0.0.dwconv.weight",
    rules=_network(
        (r"downsample_layers\.0\.0", r"downsample_layers\.0\.1"),
        lambda i: (rf"downsample_layers\.{i}\.1", rf"downsample_layers\.{i}\.0"),
        lambda i: rf"stages\.{i}\.(\d+)",
        ("dwconv", "norm", "pwconv1", "pwconv2", "gamma"),
    ),
    left_out={r"(norm|head)\..*": _CLASSIFIER},
    model=None,
    trunk="convnext",
    remarks=("untested on the published file: this map was made from the authors' source",),
)
TORCHVISION = Family(
    name="convnext_torchvision",
    project="torchvision",
    mark="features.1.0.layer_scale",
    rules=_network(
        (r"features\.0\.0", r"features\.0\.1"),
        lambda i: (rf"features\.{2 * i}\.1", rf"features\.{2 * i}\.0"),
        lambda i: rf"features\.{2 * i + 1}\.(\d+)",
        (r"block\.0", r"block\.2", r"block\.3", r"block\.5", "layer_scale"),
    ),
    left_out={r"classifier\..*": _CLASSIFIER},
    model=None,
    trunk="convnext",
)
FAMILIES = (TIMM, AUTHORS, TORCHVISION)


# Known by their sizes: the tensors show neither the epsilon nor, of the last two, another GELU.
_OTHERS = {
    ((3, 4, 30, 3), (384, 768, 1536, 3072)): "a ConvNeXt-XXL",
    ((1, 2, 4, 2), (24, 32, 48, 64)): "timm's test_convnext",
    ((1, 1, 1, 1), (32, 64, 96, 128)): "timm's test_convnext2",
}


def sizes(
    assigned: Mapping[str, Assigned], tensors: Mapping[str, np.ndarray], source: str
) -> ConvNeXtConfig:
    """Returns the sizes of a ConvNeXt, known from its blocks and their factors.

    Args:
        assigned: path of a variable -> its tensor.
        tensors: by name.
        source: the file, for messages.

    Raises:
        ConfigError: a stage has no block, or has layer norms of another epsilon.
    """
    found = [_blocks_of(stage, assigned) for stage in range(1, 5)]
    gammas = [f"params/convnext/stage{stage}/block0/gamma" for stage in range(1, 5)]
    missing = [path for path in gammas if path not in assigned]
    if missing:
        raise ConfigError(f"{source}: no tensor for {missing[0]}")
    channels: Any = tuple(max(1, tensors[assigned[path].name].size) for path in gammas)
    blocks: Any = tuple(found)
    if other := _OTHERS.get((blocks, channels)):
        raise ConfigError(
            f"{source}: {other}, whose layer norms have an epsilon of 1e-5: not supported"
        )
    return ConvNeXtConfig(blocks, channels)


def _blocks_of(stage: int, paths: Iterable[str]) -> int:
    start = rf"params/convnext/stage{stage}/block(\d+)/"
    return len({match[1] for path in paths if (match := re.match(start, path))})


def with_norms(variables: dict[str, Any], config: ConvNeXtConfig) -> dict[str, Any]:
    """Adds what a classifier lacks: the norms of the four maps, as ones and zeros."""
    norms = {
        f"norm{level}": {
            "scale": np.ones(channels, np.float32),
            "bias": np.zeros(channels, np.float32),
        }
        for level, channels in enumerate(config.channels, start=2)
    }
    return {"params": {"convnext": variables["params"]["convnext"] | norms}, "batch_stats": {}}


def without_norms(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the backbone that a classifier has."""
    return {name: leaf for name, leaf in shapes.items() if not re.fullmatch(r"norm\d", name)}
