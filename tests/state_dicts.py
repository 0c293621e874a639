"""State dicts as the families publish them, narrowed sixteen-fold, and the networks that they
fit."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.weights.families import FAMILIES, family_of
from mrcnn_jax.weights.family import Family

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
WIDTH = 4
Shapes = dict[str, tuple[int, ...]]


def recorded(name: str, divisor: int = 16) -> Shapes:
    """torchvision's own names and shapes (weights/record.py)."""
    lines = (
        (Path(__file__).parent / "weights" / "recorded" / f"{name}.txt").read_text().splitlines()
    )
    return {
        name: _narrow(tuple(map(int, shape)), divisor) for name, *shape in map(str.split, lines)
    }


def _narrow(shape: tuple[int, ...], divisor: int) -> tuple[int, ...]:
    """Rows of classes (91, 364) and anchors (3, 12) stay."""
    return tuple(side // divisor if side >= 64 and side % 16 == 0 else side for side in shape)


def published(divisor: int = 16) -> Shapes:
    """The names of torchvision's published V1 file, which is older than the code that reads it, and
    frozen: it has no counters."""
    shapes = {
        key: shape
        for key, shape in recorded("maskrcnn_resnet50_fpn", divisor).items()
        if not key.endswith("num_batches_tracked")
    }
    names = {
        r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.0\.": r"\1.",
        r"rpn\.head\.conv\.0\.0\.": "rpn.head.conv.",
        r"roi_heads\.mask_head\.(\d)\.0\.": lambda match: (
            f"roi_heads.mask_head.mask_fcn{int(match[1]) + 1}."
        ),
    }
    for pattern, new in names.items():
        shapes = {re.sub(pattern, new, key): shape for key, shape in shapes.items()}
    return shapes


def resnet(depth: int, width: int = WIDTH) -> Shapes:
    """torchvision's names, by hand."""
    shapes: Shapes = {}

    def conv_norm(conv: str, norm: str, out: int, into: int, size: int) -> None:
        shapes[f"{conv}.weight"] = (out, into, size, size)
        shapes.update(
            {f"{norm}.{name}": (out,) for name in ("weight", "bias", "running_mean", "running_var")}
        )
        shapes[f"{norm}.num_batches_tracked"] = ()

    conv_norm("conv1", "bn1", width, 3, 7)
    channels = width
    for layer, blocks in enumerate(BLOCKS[depth], 1):
        inner = width * 2 ** (layer - 1)
        out = 4 * inner if depth >= 50 else inner
        three, two = [(inner, 1), (inner, 3), (out, 1)], [(inner, 3), (inner, 3)]
        for block in range(blocks):
            name, into = f"layer{layer}.{block}", channels
            for i, (outputs, size) in enumerate(three if depth >= 50 else two, 1):
                conv_norm(f"{name}.conv{i}", f"{name}.bn{i}", outputs, into, size)
                into = outputs
            if channels != out or (layer > 1 and block == 0):
                conv_norm(f"{name}.downsample.0", f"{name}.downsample.1", out, channels, 1)
            channels = out
    return shapes | {"fc.weight": (10, channels), "fc.bias": (10,)}


def moco() -> Shapes:
    """MoCo v2 by its published names; `dino`, `moco_v3` and `swav` alike."""
    both = {
        f"module.{encoder}.{name.replace('fc.', 'fc.2.')}": shape
        for encoder in ("encoder_q", "encoder_k")
        for name, shape in resnet(50).items()
    }
    return {"module.queue": (10, 8), "module.queue_ptr": (1,)} | both


def swav() -> Shapes:
    heads = {"projection_head.0.weight": (8, 16 * WIDTH), "prototypes.weight": (3, 8)}
    trunk = {name: shape for name, shape in resnet(50).items() if not name.startswith("fc.")}
    return {f"module.{name}": shape for name, shape in (trunk | heads).items()}


def dino() -> Shapes:
    trunk = {name: shape for name, shape in resnet(50).items() if not name.startswith("fc.")}
    head = {"head.mlp.0.weight": (8, 16 * WIDTH), "head.last_layer.weight_g": (3, 1)}
    return {f"backbone.{name}": shape for name, shape in trunk.items()} | head


def moco_v3() -> Shapes:
    base = {f"module.base_encoder.{name}": shape for name, shape in resnet(50).items()}
    momentum = {name.replace("base", "momentum"): shape for name, shape in base.items()}
    return base | momentum | {"module.predictor.0.weight": (8, 8)}


CONVNEXT = {"blocks": (1, 2, 3, 1), "channels": (4, 6, 8, 10)}


def _convnext(
    layers: Mapping[str, str], *, factors: tuple[int, ...] = (), pointwise: tuple[int, ...] = ()
) -> Shapes:
    """A ConvNeXt under a project's names of its layers, with {i} (stage, from 0) and {j} (block).

    Args:
        layers: "stem", "stem_norm", "half_norm", "half", "depthwise", "norm", "expand", "project",
            "gamma", "last" (the norm before the classifier) and "classifier" -> name.
        factors, pointwise: further sides of gamma, and of the two layers of a block.
    """
    shapes: Shapes = {}

    def add(name: str, shape: tuple[int, ...], i: int = 0, j: int = 0) -> None:
        place = layers[name].format(i=i, j=j, before=2 * i, after=2 * i + 1)
        shapes[f"{place}.weight"] = shape
        shapes[f"{place}.bias"] = shape[:1]

    before = 3
    for i, (blocks, c) in enumerate(zip(*CONVNEXT.values(), strict=True)):
        if i == 0:
            add("stem", (c, 3, 4, 4))
            add("stem_norm", (c,))
        else:
            add("half_norm", (before,), i)
            add("half", (c, before, 2, 2), i)
        for j in range(blocks):
            add("depthwise", (c, 1, 7, 7), i, j)
            add("norm", (c,), i, j)
            add("expand", (4 * c, c, *pointwise), i, j)
            add("project", (c, 4 * c, *pointwise), i, j)
            shapes[layers["gamma"].format(i=i, j=j, after=2 * i + 1)] = (c, *factors)
        before = c
    add("last", (before,))
    add("classifier", (5, before))
    return shapes


def convnext_timm(pointwise: tuple[int, ...] = ()) -> Shapes:
    block = "stages.{i}.blocks.{j}"
    return _convnext(
        {
            "stem": "stem.0",
            "stem_norm": "stem.1",
            "half_norm": "stages.{i}.downsample.0",
            "half": "stages.{i}.downsample.1",
            "depthwise": f"{block}.conv_dw",
            "norm": f"{block}.norm",
            "expand": f"{block}.mlp.fc1",
            "project": f"{block}.mlp.fc2",
            "gamma": f"{block}.gamma",
            "last": "head.norm",
            "classifier": "head.fc",
        },
        pointwise=pointwise,
    )


def convnext_authors() -> Shapes:
    block = "stages.{i}.{j}"
    return _convnext(
        {
            "stem": "downsample_layers.0.0",
            "stem_norm": "downsample_layers.0.1",
            "half_norm": "downsample_layers.{i}.0",
            "half": "downsample_layers.{i}.1",
            "depthwise": f"{block}.dwconv",
            "norm": f"{block}.norm",
            "expand": f"{block}.pwconv1",
            "project": f"{block}.pwconv2",
            "gamma": f"{block}.gamma",
            "last": "norm",
            "classifier": "head",
        }
    )


def convnext_torchvision() -> Shapes:
    block = "features.{after}.{j}"
    return _convnext(
        {
            "stem": "features.0.0",
            "stem_norm": "features.0.1",
            "half_norm": "features.{before}.0",
            "half": "features.{before}.1",
            "depthwise": f"{block}.block.0",
            "norm": f"{block}.block.2",
            "expand": f"{block}.block.3",
            "project": f"{block}.block.5",
            "gamma": f"{block}.layer_scale",
            "last": "classifier.0",
            "classifier": "classifier.2",
        },
        factors=(1, 1),
    )


def mmdetection(classes: int = 80, depth: int = 50) -> Shapes:
    """mask-rcnn_r50_fpn by mmdetection's published names, 2.x and 3.x."""
    shapes = {
        f"backbone.{name}": shape
        for name, shape in resnet(depth).items()
        if not name.startswith("fc.")
    }

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = (shape[1] if name.endswith("upsample") else shape[0],)

    expansion = 4 if depth >= 50 else 1
    for i in range(4):
        layer(f"neck.lateral_convs.{i}.conv", 16, expansion * WIDTH * 2**i, 1, 1)
        layer(f"neck.fpn_convs.{i}.conv", 16, 16, 3, 3)
        layer(f"roi_head.mask_head.convs.{i}.conv", 16, 16, 3, 3)
    layer("rpn_head.rpn_conv", 16, 16, 3, 3)
    layer("rpn_head.rpn_cls", 3, 16, 1, 1)
    layer("rpn_head.rpn_reg", 12, 16, 1, 1)
    layer("roi_head.bbox_head.fc_cls", classes + 1, 64)
    layer("roi_head.bbox_head.fc_reg", 4 * classes, 64)
    layer("roi_head.bbox_head.shared_fcs.0", 64, 16 * 49)
    layer("roi_head.bbox_head.shared_fcs.1", 64, 64)
    layer("roi_head.mask_head.upsample", 16, 16, 2, 2)
    layer("roi_head.mask_head.conv_logits", classes, 16, 1, 1)
    return shapes


def detectron2(kind: str, classes: int = 80) -> Shapes:
    """mask_rcnn_R_50_FPN, _C4 or (LSJ) _FPN_100ep_LSJ by detectron2's published names, with the
    buffers of the zoo's older files."""
    shapes: Shapes = {"pixel_mean": (3, 1, 1), "pixel_std": (3, 1, 1)}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = (shape[1] if name.endswith("deconv") else shape[0],)

    def conv_norm(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.norm.{part}"] = shape[:1]
        shapes[f"{name}.norm.num_batches_tracked"] = ()

    live, fpn = kind == "LSJ", kind != "C4"
    three = conv_norm if live else layer
    trunk = "backbone.bottom_up." if fpn else "backbone."
    for name, shape in resnet(50).items():
        if name.startswith("fc.") or (name.endswith("num_batches_tracked") and not live):
            continue
        place = f"{trunk}{name}" if name.startswith("layer") else f"{trunk}stem.{name}"
        for i in (1, 2, 3, 4):
            place = place.replace(f"layer{i}.", f"res{i + 1}.").replace(
                f".bn{i}.", f".conv{i}.norm."
            )
        place = place.replace("downsample.0.", "shortcut.").replace(
            "downsample.1.", "shortcut.norm."
        )
        shapes[place.replace("backbone.res5.", "roi_heads.res5.") if kind == "C4" else place] = (
            shape
        )

    features, pooled = (16, 64) if fpn else (16 * WIDTH, 32 * WIDTH)
    anchors = 3 if fpn else 15
    for conv in ("conv.conv0", "conv.conv1") if live else ("conv",):
        layer(f"proposal_generator.rpn_head.{conv}", features, features, 3, 3)
    layer("proposal_generator.rpn_head.objectness_logits", anchors, features, 1, 1)
    layer("proposal_generator.rpn_head.anchor_deltas", 4 * anchors, features, 1, 1)
    if fpn:
        for i in (2, 3, 4, 5):
            three(f"backbone.fpn_lateral{i}", 16, 4 * WIDTH * 2 ** (i - 2), 1, 1)
            three(f"backbone.fpn_output{i}", 16, 16, 3, 3)
            shapes[f"proposal_generator.anchor_generator.cell_anchors.{i - 2}"] = (3, 4)
        layer("roi_heads.box_head.fc1", 64, 16 * 49)
        for i in (1, 2, 3, 4):
            three(f"roi_heads.mask_head.mask_fcn{i}", 16, 16, 3, 3)
            if live:
                conv_norm(f"roi_heads.box_head.conv{i}", 16, 16, 3, 3)
        if not live:
            layer("roi_heads.box_head.fc2", 64, 64)
    shapes[f"proposal_generator.anchor_generator.cell_anchors.{4 if fpn else 0}"] = (anchors, 4)
    layer("roi_heads.box_predictor.cls_score", classes + 1, pooled)
    layer("roi_heads.box_predictor.bbox_pred", 4 * classes, pooled)
    layer("roi_heads.mask_head.deconv", 16 if fpn else pooled, 16, 2, 2)
    layer("roi_heads.mask_head.predictor", classes, 16, 1, 1)
    return shapes


_ANCHORS = ".anchor_generator.cell_anchors."


def tensors(shapes: Shapes) -> dict[str, np.ndarray]:
    """Every value once: 0, 1, 2, ... through all tensors, but for counters and detectron2's
    constants."""
    made, count = {}, 0
    for name, shape in shapes.items():
        made[name] = np.arange(count, count + np.prod(shape, dtype=int), dtype=np.float32).reshape(
            shape
        )
        count += made[name].size
    assert count < 2**24  # float32 tells them apart
    made |= {name: np.array(7) for name in shapes if name.endswith("num_batches_tracked")}
    constants = {"pixel_mean": (103.53, 116.28, 123.675), "pixel_std": (1, 1, 1)}
    made |= {
        name: np.float32(value).reshape(3, 1, 1)
        for name, value in constants.items()
        if name in made
    }
    return made | {name: cell_anchors(name, len(made[name])) for name in made if _ANCHORS in name}


def write(path: Path, shapes: Shapes) -> Path:
    """Writes `tensors`, as detectron2 does or with NumPy, by the suffix."""
    made = tensors(shapes)
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": made, "__author__": "somebody"}, protocol=4))
    else:
        np.savez(path, **made)  # type: ignore[arg-type]
    return path


def with_classes(shapes: Shapes, classes: int) -> Shapes:
    """Of torchvision's Mask R-CNN, with another number of classes."""
    rows = {91: classes + 1, 364: 4 * (classes + 1)}
    return {name: tuple(rows.get(side, side) for side in shape) for name, shape in shapes.items()}


def cell_anchors(name: str, count: int) -> np.ndarray:
    """detectron2's (`DefaultAnchorGenerator.generate_cell_anchors`) of a level, or of a C4 map."""
    level = int(name.rpartition(".")[2])
    sizes = [32 * 2**level] if count == 3 else [32, 64, 128, 256, 512]
    widths = [(size / math.sqrt(ratio), ratio) for size in sizes for ratio in (0.5, 1.0, 2.0)]
    corners = [(-w / 2, -w * ratio / 2, w / 2, w * ratio / 2) for w, ratio in widths]
    return np.array(corners, np.float32)


def family(name: str) -> Family:
    """A family whose network is narrowed like its state dict."""
    (found,) = [family for family in FAMILIES if family.name == name]
    return replace(found, model=narrow(found.model)) if found.model is not None else found


def narrow_family_of(names: Collection[str], source: str) -> Family:
    """Stands in for `family_of`, for files of such state dicts."""
    found = family_of(names, source)
    return found if found.model is None else family(found.name)


def narrow(model: ModelConfig) -> ModelConfig:
    return replace(
        model,
        fpn_channels=16,
        resnet=replace(model.resnet, width=WIDTH),
        box_head=replace(model.box_head, hidden=64, conv_channels=16),
        mask_head=replace(model.mask_head, channels=16),
    )
