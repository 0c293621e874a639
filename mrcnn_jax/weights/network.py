"""The network of another project's weights file: its config, and its variables."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mrcnn_jax.config.errors import ConfigError, refuse_pipe
from mrcnn_jax.config.files import values_of, with_fields
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config
from mrcnn_jax.evaluation.coco_categories import Categories
from mrcnn_jax.models.convnext import ConvNeXt
from mrcnn_jax.models.initialise import variable_shapes
from mrcnn_jax.models.resnet import RESNET_BLOCKS, ResNet, ResNetBlocks
from mrcnn_jax.models.rpn import level_scales
from mrcnn_jax.ops.anchors import level_anchors
from mrcnn_jax.weights import convnext_families, mmdetection
from mrcnn_jax.weights.families import family_of
from mrcnn_jax.weights.family import ChannelOrder, Family
from mrcnn_jax.weights.mapping import Assigned, assign, bgr_input, fill
from mrcnn_jax.weights.tensors import read_tensors


@dataclass(frozen=True)
class FileNetwork:
    """A file whose tensors all have a place, and the network that they are of."""

    path: Path
    family: Family
    model: ModelConfig
    published: ModelConfig
    """`model` before options changed it: what a file does not say is as published."""
    channel_order: ChannelOrder
    """Of the images that it was trained on."""
    tensors: Mapping[str, np.ndarray]
    assigned: Mapping[str, Assigned]
    """Path of a variable -> its tensor."""
    stated: frozenset[str] = frozenset()
    """Those of PRESUMED that a file says."""
    note: str = ""
    """As of `pickles.Pickled`."""

    @property
    def name(self) -> str:
        """Name of the network, "resnet50" or "convnext_tiny" for example."""
        if self.model.trunk == "convnext":
            return _CONVNEXTS.get(self.model.trunk_name, "convnext")
        depth = str(self.model.resnet.depth)
        return self.family.name.replace("50", depth) if self.has_heads else f"resnet{depth}"

    @property
    def title(self) -> str:
        """The name, whose it is, what is presumed of it, and which weights were not read."""
        presumed = self.family.presumed and f"presumably {self.family.presumed}"
        return self._titled(presumed, self.note)

    @property
    def short_title(self) -> str:
        """The same without what is presumed."""
        return self._titled(self.note)

    def _titled(self, *remarks: str) -> str:
        return f"{self.name} ({'; '.join(filter(None, (self.family.project, *remarks)))})"

    @property
    def presumed(self) -> tuple[str, ...]:
        """Those of PRESUMED that decide what it computes, and that the file does not say."""
        names = [name for name in PRESUMED if name not in self.stated]
        if not self.has_heads:
            names = [name for name in names if not name.startswith(("data.", "model.rpn."))]
        not_there: tuple[str, ...] = ()
        if self.model.trunk == "convnext":
            not_there = ("model.resnet.",)
        elif not RESNET_BLOCKS[self.model.resnet.depth].bottleneck:
            not_there = ("model.resnet.stride_in_1x1",)
        return tuple(name for name in names if not name.startswith(not_there))

    @property
    def pixels_stated(self) -> bool:
        """Whether a file says which mean or standard deviation of pixels it was trained with."""
        return not self.stated.isdisjoint({"model.pixel_mean", "model.pixel_std"})

    @property
    def has_heads(self) -> bool:
        """Whether it is a whole Mask R-CNN."""
        return self.family.model is not None

    @property
    def categories(self) -> Categories:
        """Those that the file names, or the family's published file, if it has as many.

        Else (): unknown.
        """
        known = self.family.categories
        return known if len(known) == self.model.num_classes else ()

    def variables(self) -> dict[str, Any]:
        """Fills all variables of the network, NumPy float32: those of its trunk if that is all.

        Raises:
            ConfigError: names the tensor that is missing, of another shape or not finite.
        """
        if self.has_heads:
            template = variable_shapes(self.model)
        else:
            convnext = self.model.trunk == "convnext"
            trunk = ConvNeXt(self.model.convnext) if convnext else ResNet(self.model.resnet)
            found = jax.eval_shape(lambda: trunk.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
            if convnext:
                found = {"params": convnext_families.without_norms(found["params"])}
            template = {kind: {self.model.trunk: tree} for kind, tree in found.items()}
        filled = fill(template, self.assigned, self.tensors, str(self.path))
        if self.model.trunk == "convnext":
            return convnext_families.with_norms(filled, self.model.convnext)
        return filled


PRESUMED = (
    *("data.short_side", "data.long_side", "data.shrink"),
    *("channel_order", "model.pixel_mean", "model.pixel_std"),
    *("model.resnet.stride_in_1x1", "model.resnet.norm_epsilon"),
    *("model.rpn.scales", "model.rpn.ratios"),
)
"""Fields of `Config`, and "channel_order", that leave no trace in the tensors of most files."""
_CONVNEXTS = {
    "ConvNeXt-T": "convnext_tiny",
    "ConvNeXt-S": "convnext_small",
    "ConvNeXt-B": "convnext_base",
    "ConvNeXt-L": "convnext_large",
    "ConvNeXt-XL": "convnext_xlarge",
}


def unnamed(count: int) -> Categories:
    """Makes up the categories of a network whose classes have no known names."""
    return tuple((number, f"class{number}") for number in range(1, count + 1))


def read_network(
    path: Path,
    *,
    values: Mapping[str, Any] | None = None,
    channel_order: ChannelOrder | None = None,
) -> FileNetwork:
    """Reads a file of one of `families.FAMILIES`.

    Args:
        path: the file.
        values: fields of the network that are known better than by PRESUMED, by their dotted names
            in `Config`.
        channel_order: of the images that it was trained on; None: the family's.

    Raises:
        ConfigError: the file cannot be read, is of no known family, has a tensor without a place or
            blocks of no known ResNet or ConvNeXt, or states something else than is given.
    """
    tensors, meta, note = read_tensors(path)
    family = family_of(tensors, str(path))
    if family.mark == mmdetection.MASK_RCNN.mark:
        family = mmdetection.with_meta(family, meta, str(path))
    assigned = assign(tensors, family.rules, family.left_out, str(path))
    beside = _pixels_beside(path) if family.model is None else {}
    published = _published(family, beside, tensors, assigned, path)
    given = {name: value for name, value in (values or {}).items() if name.startswith("model.")}
    model = with_fields(Config(model=published), given).model
    order = channel_order or family.channel_order
    fixed = family.stated | {f"model.{name}" for name in beside}
    was, now = (
        {**values_of(Config(model=network), fixed), "channel_order": channels}
        for network, channels in ((published, family.channel_order), (model, order))
    )
    for name in sorted(fixed):
        if not _agree(now[name], was[name]):
            raise ConfigError(
                f"{name}: {as_text(now[name])}, but {path} states {as_text(was[name])}"
            )
    of_user = {*given, *(["channel_order"] if channel_order is not None else [])}
    _refuse_other_pixels(model, order, tensors, path, given=of_user)
    _refuse_other_anchors(model, tensors, path)
    if family.project in ("torchvision", "detectron2") and family.model is not None:
        family = replace(family, presumed=_not_stated(tensors))
    if order != family.channel_order:
        stem = f"params/{model.trunk}/stem/kernel"
        if stem in assigned:  # else it is named where variables are filled
            name, layouts = assigned[stem]
            assigned[stem] = Assigned(name, (*layouts, bgr_input))
    return FileNetwork(
        path=path,
        family=family,
        model=model,
        published=published,
        channel_order=order,
        tensors=tensors,
        assigned=assigned,
        stated=fixed | _stated_by(tensors),
        note=note,
    )


def _published(
    family: Family,
    beside: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    assigned: Mapping[str, Assigned],
    path: Path,
) -> ModelConfig:
    """The family's network in the sizes of a file.

    Args:
        beside: as of `_pixels_beside`.

    Raises:
        ConfigError: blocks of no known ResNet or ConvNeXt.
    """
    model = family.model or replace(ModelConfig(), **beside)
    if family.trunk == "convnext":
        convnext = convnext_families.sizes(assigned, tensors, str(path))
        return replace(model, trunk="convnext", convnext=convnext)
    depth = _depth(assigned, path)
    live = any(name.endswith(".num_batches_tracked") for name in tensors)
    # Frozen batch norm of other depths comes from ImageNet weights, not a published detector.
    norm_epsilon = family.frozen_norm_epsilon if depth == 50 and not live else 1e-5
    resnet = replace(model.resnet, depth=depth, norm_epsilon=norm_epsilon)
    stem = assigned.get("params/resnet/stem/kernel")
    if stem is not None and tensors[stem.name].ndim == 4 and len(tensors[stem.name]) > 0:
        resnet = replace(resnet, width=len(tensors[stem.name]))
    model = replace(model, resnet=resnet)
    logits = assigned.get("params/box_head/logits/bias")
    if logits is not None:
        model = replace(model, num_classes=tensors[logits.name].size - 1)  # the background has one
    boxes = assigned.get("params/box_head/deltas/bias")
    if boxes is not None and tensors[boxes.name].size == 4 < 4 * model.num_classes:
        model = replace(model, box_head=replace(model.box_head, class_agnostic=True))
    masks = assigned.get("params/mask_head/logits/bias")
    if masks is not None and tensors[masks.name].size == 1 < model.num_classes:
        model = replace(model, mask_head=replace(model.mask_head, class_agnostic=True))
    return model


def as_text(value: Any) -> str:
    """A field's value as it is typed in an option."""
    if isinstance(value, tuple):
        return " ".join(map(as_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _agree(value: Any, other: Any) -> bool:
    """Whether values of a field are the same, but for digits that `as_text` leaves out."""
    if not (isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other)):
        return bool(value == other)
    return bool(np.allclose(value, other, rtol=1e-3))


def _pixels_beside(path: Path) -> dict[str, Any]:
    """The mean and standard deviation of pixels that a config.json of timm beside a file states.

    Raises:
        ConfigError: the file is not JSON, states no three numbers, or names an architecture with
            layers that leave no trace in the tensors.
    """
    beside = path.with_name("config.json")
    refuse_pipe(beside)
    if not beside.is_file():
        return {}
    try:
        content = json.loads(beside.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{beside}: beside the weights, and not JSON: {error}") from None
    if not isinstance(content, dict):
        return {}
    architecture = content.get("architecture")
    if isinstance(architecture, str) and re.search(r"resnet(aa|blur)", architecture):
        raise ConfigError(
            f"{beside}: architecture: {architecture}: the tensors are those of a ResNet, but it "
            "averages or blurs where it strides, which is not supported"
        )
    stated = content.get("pretrained_cfg")
    found = {**content, **(stated if isinstance(stated, dict) else {})}
    fields = {"pixel_mean": "mean", "pixel_std": "std"}
    return {
        field: _three_numbers(found[name], f"{beside}: {name}", positive=name == "std")
        for field, name in fields.items()
        if name in found
    }


def _three_numbers(values: Any, where: str, *, positive: bool) -> tuple[float, ...]:
    usable = isinstance(values, list) and len(values) == 3
    usable = usable and all(type(value) in (int, float) for value in values)
    if not usable or not all(math.isfinite(v) and (v > 0 or not positive) for v in values):
        raise ConfigError(f"{where}: {values!r:.80}: three numbers are needed")
    return tuple(map(float, values))


def _depth(assigned: Iterable[str], source: Path) -> Any:
    """Returns the ResNet's depth, known from the numbers of its blocks."""
    block = r"params/(resnet/layer\d|res5)/(block\d+)/(\w+)/"
    parts = {match.groups() for path in assigned if (match := re.match(block, path))}
    found = {(layer, number) for layer, number, _ in parts}
    counts = [
        sum(layer == name for layer, _ in found)
        for name in ("resnet/layer1", "resnet/layer2", "resnet/layer3")
    ]
    counts.append(sum(layer in ("resnet/layer4", "res5") for layer, _ in found))
    bottleneck = any(name == "conv3" for _, _, name in parts)
    for depth, blocks in RESNET_BLOCKS.items():
        if blocks == ResNetBlocks(bottleneck, tuple(counts)):
            return depth
    raise ConfigError(f"{source}: no known ResNet has blocks {counts}")


_ANCHORS = "proposal_generator.anchor_generator.cell_anchors."  # where detectron2 keeps them


def _not_stated(names: Collection[str]) -> str:
    """What of torchvision's or detectron2's networks no tensor of a file states, for people.

    torchvision's never do, and detectron2's no longer do.
    """
    marks = {"anchors": _ANCHORS, "normalisation of pixels": "pixel_mean"}
    missing = [what for what, mark in marks.items() if not any(mark in name for name in names)]
    return f"{' and '.join(missing)} as published, which the file does not state" * bool(missing)


def _refuse_other_anchors(
    model: ModelConfig, tensors: Mapping[str, np.ndarray], source: Path
) -> None:
    """Raises ConfigError if the anchors that detectron2 keeps beside its weights are not those of
    the config."""
    for level, scales in enumerate(level_scales(model.rpn, model.strides)):
        name = f"{_ANCHORS}{level}"
        if name not in tensors:
            continue
        expected = level_anchors(
            grid=(1, 1), stride=(1, 1), scales=scales, ratios=model.rpn.ratios, offset=0.0
        )
        found = tensors[name]
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3):
            raise ConfigError(
                f"{source}: {name}: other anchors than those of scales {list(scales)} and ratios "
                f"{list(model.rpn.ratios)}: import takes --model.rpn.scales and --model.rpn.ratios"
            )


_CONSTANTS = {"pixel_mean": "model.pixel_mean", "pixel_std": "model.pixel_std"}
"""Where older files of detectron2 keep fields, of values from 0 to 255 in the images' order."""


def _stated_by(names: Collection[str]) -> frozenset[str]:
    """Those of PRESUMED that detectron2's constants say, which are compared with the network."""
    stated = {field for name, field in _CONSTANTS.items() if name in names}
    if any(name.startswith(_ANCHORS) for name in names):
        stated |= {"model.rpn.scales", "model.rpn.ratios"}
    return frozenset(stated)


def _refuse_other_pixels(
    model: ModelConfig,
    channel_order: ChannelOrder,
    tensors: Mapping[str, np.ndarray],
    source: Path,
    given: Collection[str],
) -> None:
    """Raises ConfigError if the pixels that detectron2 keeps beside its weights are not those of
    the config.

    They do not say in which order a network read its channels: it may have had the usual mean of
    the other order.

    Args:
        given: the fields, "channel_order" too, that are not presumed.
    """
    step = 1 if channel_order == "rgb" else -1
    for name, field in _CONSTANTS.items():
        if name not in tensors:
            continue
        own = getattr(model, field.removeprefix("model."))[::step]
        found = np.ravel(tensors[name]) / 255
        if found.shape == (3,) and np.allclose(found, own, rtol=1e-3):
            continue
        word = "given" if field in given else "presumed"
        line = f"{source}: {name}: {_of_255(found)}, where {_of_255(own)} is {word}"
        if found.shape != (3,) or not np.isfinite(found).all():
            raise ConfigError(line)
        other = "bgr" if channel_order == "rgb" else "rgb"
        option = f"--{field.replace('_', '-')}"
        as_here = f"{option} {as_text(tuple(found[::step].tolist()))}"
        as_other = f"{option} {as_text(tuple(found[::-step].tolist()))}"
        if not {field, "channel_order"}.isdisjoint(given):
            way = as_here
        elif np.allclose(found[::-1], own, rtol=1e-3):
            way = f"--channel-order {other}"
        else:
            way = f"{as_here} if the network read {channel_order.upper()}, which is presumed, else "
            way += f"--channel-order {other} {as_other}"
        raise ConfigError(f"{line}: import takes {way}")


def _of_255(pixel: Iterable[float]) -> list[float]:
    return [round(255 * float(value), 3) for value in pixel]
