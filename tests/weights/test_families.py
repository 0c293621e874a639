"""Each family's names fill its network, all of it, and every tensor is where it belongs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import state_dicts
from flax.traverse_util import flatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.model import ModelConfig, ResNetConfig
from mrcnn_jax.models.initialise import variable_shapes
from mrcnn_jax.weights.families import FAMILIES, RESNET, family_of
from mrcnn_jax.weights.mapping import assign, fill

Tensors = dict[str, np.ndarray]
LEFT_OUT = (
    *("fc.", "pixel", "proposal_generator.anchor"),
    *("queue", "encoder_q.fc", "encoder_k.", "base_encoder.fc", "momentum_encoder", "predictor"),
    *("projection_head", "prototypes", "head."),
)


def load(name: str, tensors: Tensors, depth: Any = 50) -> dict[str, np.ndarray]:
    """{"params/resnet/stem/kernel": array, ...}"""
    family = state_dicts.family(name)
    model = family.model or ModelConfig(resnet=ResNetConfig(width=state_dicts.WIDTH))
    model = replace(model, resnet=replace(model.resnet, depth=depth))
    template = variable_shapes(model)
    if family.model is None:
        template = {kind: {"resnet": tree["resnet"]} for kind, tree in template.items()}
    variables = fill(
        template, assign(tensors, family.rules, family.left_out, "file"), tensors, "file"
    )
    assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, template)
    return flatten_dict(variables, sep="/")


def conv(x: np.ndarray) -> np.ndarray:
    return x.transpose(2, 3, 1, 0)


def dense(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).T


def flattened(x: np.ndarray) -> np.ndarray:
    """The weight of input (row, column, channel), for channels of 7 x 7 cells."""
    order = np.arange(x.shape[1]).reshape(-1, 7, 7).transpose(1, 2, 0).reshape(-1)
    return x[:, order].T


def norm_of(tensors: Tensors, source: str, target: str) -> dict[str, np.ndarray]:
    return {
        f"params/{target}/scale": tensors[f"{source}.weight"],
        f"params/{target}/bias": tensors[f"{source}.bias"],
        f"batch_stats/{target}/mean": tensors[f"{source}.running_mean"],
        f"batch_stats/{target}/var": tensors[f"{source}.running_var"],
    }


def resnet(t: Tensors) -> dict[str, np.ndarray]:
    return {
        "params/resnet/stem/kernel": conv(t["conv1.weight"]),
        **norm_of(t, "bn1", "resnet/stem"),
        "params/resnet/layer3/block1/conv2/kernel": conv(t["layer3.1.conv2.weight"]),
        **norm_of(t, "layer4.1.bn1", "resnet/layer4/block1/conv1"),
        "params/resnet/layer2/block0/downsample/kernel": conv(t["layer2.0.downsample.0.weight"]),
        **norm_of(t, "layer2.0.downsample.1", "resnet/layer2/block0/downsample"),
    }


def torchvision_heads(t: Tensors) -> dict[str, np.ndarray]:
    box, mask = "roi_heads.box_predictor", "roi_heads.mask_predictor"
    return {
        "params/resnet/layer4/block2/conv3/kernel": conv(t["backbone.body.layer4.2.conv3.weight"]),
        **norm_of(t, "backbone.body.layer1.0.downsample.1", "resnet/layer1/block0/downsample"),
        "params/rpn/logits/kernel": dense(t["rpn.head.cls_logits.weight"]),
        "params/rpn/logits/bias": t["rpn.head.cls_logits.bias"],
        "params/rpn/deltas/kernel": dense(t["rpn.head.bbox_pred.weight"]),
        "params/box_head/logits/kernel": dense(t[f"{box}.cls_score.weight"]),
        "params/box_head/logits/bias": t[f"{box}.cls_score.bias"],
        "params/box_head/deltas/kernel": dense(t[f"{box}.bbox_pred.weight"][4:]),
        "params/box_head/deltas/bias": t[f"{box}.bbox_pred.bias"][4:],
        "params/mask_head/deconv/kernel": t[f"{mask}.conv5_mask.weight"].transpose(2, 3, 0, 1),
        "params/mask_head/deconv/bias": t[f"{mask}.conv5_mask.bias"],
        "params/mask_head/logits/kernel": dense(t[f"{mask}.mask_fcn_logits.weight"][1:]),
        "params/mask_head/logits/bias": t[f"{mask}.mask_fcn_logits.bias"][1:],
    }


def v1(t: Tensors) -> dict[str, np.ndarray]:
    return {
        **torchvision_heads(t),
        "params/fpn/lateral2/kernel": dense(t["backbone.fpn.inner_blocks.0.0.weight"]),
        "params/fpn/lateral5/bias": t["backbone.fpn.inner_blocks.3.0.bias"],
        "params/fpn/output4/kernel": conv(t["backbone.fpn.layer_blocks.2.0.weight"]),
        "params/rpn/conv1/kernel": conv(t["rpn.head.conv.0.0.weight"]),
        "params/rpn/conv1/bias": t["rpn.head.conv.0.0.bias"],
        "params/box_head/fc1/kernel": flattened(t["roi_heads.box_head.fc6.weight"]),
        "params/box_head/fc2/kernel": dense(t["roi_heads.box_head.fc7.weight"]),
        "params/mask_head/conv1/kernel": conv(t["roi_heads.mask_head.0.0.weight"]),
        "params/mask_head/conv4/bias": t["roi_heads.mask_head.3.0.bias"],
    }


def v1_published(t: Tensors) -> dict[str, np.ndarray]:
    return {
        **torchvision_heads(t),
        "params/fpn/lateral2/kernel": dense(t["backbone.fpn.inner_blocks.0.weight"]),
        "params/fpn/lateral5/bias": t["backbone.fpn.inner_blocks.3.bias"],
        "params/fpn/output4/kernel": conv(t["backbone.fpn.layer_blocks.2.weight"]),
        "params/rpn/conv1/kernel": conv(t["rpn.head.conv.weight"]),
        "params/box_head/fc1/kernel": flattened(t["roi_heads.box_head.fc6.weight"]),
        "params/mask_head/conv1/kernel": conv(t["roi_heads.mask_head.mask_fcn1.weight"]),
        "params/mask_head/conv4/bias": t["roi_heads.mask_head.mask_fcn4.bias"],
    }


def v2(t: Tensors) -> dict[str, np.ndarray]:
    return {
        **torchvision_heads(t),
        "params/fpn/lateral2/kernel": conv(t["backbone.fpn.inner_blocks.0.0.weight"]),
        **norm_of(t, "backbone.fpn.inner_blocks.3.1", "fpn/lateral5"),
        "params/fpn/output5/kernel": conv(t["backbone.fpn.layer_blocks.3.0.weight"]),
        **norm_of(t, "backbone.fpn.layer_blocks.0.1", "fpn/output2"),
        "params/rpn/conv1/kernel": conv(t["rpn.head.conv.0.0.weight"]),
        "params/rpn/conv2/kernel": conv(t["rpn.head.conv.1.0.weight"]),
        "params/box_head/conv3/kernel": conv(t["roi_heads.box_head.2.0.weight"]),
        **norm_of(t, "roi_heads.box_head.3.1", "box_head/conv4"),
        "params/box_head/fc1/kernel": flattened(t["roi_heads.box_head.5.weight"]),
        "params/mask_head/conv2/kernel": conv(t["roi_heads.mask_head.1.0.weight"]),
        **norm_of(t, "roi_heads.mask_head.0.1", "mask_head/conv1"),
    }


def detectron2_heads(t: Tensors) -> dict[str, np.ndarray]:
    rpn, box, mask = "proposal_generator.rpn_head", "roi_heads.box_predictor", "roi_heads.mask_head"
    last_first = [80, *range(80)]
    return {
        "params/rpn/conv1/kernel": conv(t[f"{rpn}.conv.weight"]),
        "params/rpn/logits/kernel": dense(t[f"{rpn}.objectness_logits.weight"]),
        "params/rpn/deltas/kernel": dense(t[f"{rpn}.anchor_deltas.weight"]),
        "params/box_head/logits/kernel": dense(t[f"{box}.cls_score.weight"][last_first]),
        "params/box_head/logits/bias": t[f"{box}.cls_score.bias"][last_first],
        "params/box_head/deltas/kernel": dense(t[f"{box}.bbox_pred.weight"]),
        "params/box_head/deltas/bias": t[f"{box}.bbox_pred.bias"],
        "params/mask_head/deconv/kernel": t[f"{mask}.deconv.weight"].transpose(2, 3, 0, 1),
        "params/mask_head/logits/kernel": dense(t[f"{mask}.predictor.weight"]),
        "params/mask_head/logits/bias": t[f"{mask}.predictor.bias"],
    }


def detectron2_fpn(t: Tensors) -> dict[str, np.ndarray]:
    trunk = "backbone.bottom_up"
    return {
        **detectron2_heads(t),
        "params/resnet/stem/kernel": conv(t[f"{trunk}.stem.conv1.weight"][:, ::-1]),
        **norm_of(t, f"{trunk}.stem.conv1.norm", "resnet/stem"),
        "params/resnet/layer1/block0/downsample/kernel": conv(t[f"{trunk}.res2.0.shortcut.weight"]),
        **norm_of(t, f"{trunk}.res2.0.shortcut.norm", "resnet/layer1/block0/downsample"),
        "params/resnet/layer4/block2/conv3/kernel": conv(t[f"{trunk}.res5.2.conv3.weight"]),
        **norm_of(t, f"{trunk}.res5.2.conv3.norm", "resnet/layer4/block2/conv3"),
        "params/fpn/lateral2/kernel": dense(t["backbone.fpn_lateral2.weight"]),
        "params/fpn/output5/kernel": conv(t["backbone.fpn_output5.weight"]),
        "params/box_head/fc1/kernel": flattened(t["roi_heads.box_head.fc1.weight"]),
        "params/box_head/fc2/kernel": dense(t["roi_heads.box_head.fc2.weight"]),
        "params/mask_head/conv4/kernel": conv(t["roi_heads.mask_head.mask_fcn4.weight"]),
    }


def detectron2_lsj(t: Tensors) -> dict[str, np.ndarray]:
    rpn, box, mask = "proposal_generator.rpn_head", "roi_heads.box_head", "roi_heads.mask_head"
    heads = detectron2_heads(t | {f"{rpn}.conv.weight": t[f"{rpn}.conv.conv0.weight"]})
    return {
        **heads,
        "params/resnet/stem/kernel": conv(t["backbone.bottom_up.stem.conv1.weight"][:, ::-1]),
        "params/fpn/lateral2/kernel": conv(t["backbone.fpn_lateral2.weight"]),
        **norm_of(t, "backbone.fpn_lateral5.norm", "fpn/lateral5"),
        **norm_of(t, "backbone.fpn_output3.norm", "fpn/output3"),
        "params/rpn/conv2/kernel": conv(t[f"{rpn}.conv.conv1.weight"]),
        "params/rpn/conv2/bias": t[f"{rpn}.conv.conv1.bias"],
        "params/box_head/conv3/kernel": conv(t[f"{box}.conv3.weight"]),
        **norm_of(t, f"{box}.conv4.norm", "box_head/conv4"),
        "params/box_head/fc1/kernel": flattened(t[f"{box}.fc1.weight"]),
        "params/mask_head/conv2/kernel": conv(t[f"{mask}.mask_fcn2.weight"]),
        **norm_of(t, f"{mask}.mask_fcn1.norm", "mask_head/conv1"),
    }


def mmdetection(t: Tensors) -> dict[str, np.ndarray]:
    box, mask = "roi_head.bbox_head", "roi_head.mask_head"
    last_first = [80, *range(80)]
    return {
        "params/resnet/stem/kernel": conv(t["backbone.conv1.weight"]),
        **norm_of(t, "backbone.layer1.0.downsample.1", "resnet/layer1/block0/downsample"),
        "params/fpn/lateral2/kernel": dense(t["neck.lateral_convs.0.conv.weight"]),
        "params/fpn/lateral5/bias": t["neck.lateral_convs.3.conv.bias"],
        "params/fpn/output4/kernel": conv(t["neck.fpn_convs.2.conv.weight"]),
        "params/rpn/conv1/kernel": conv(t["rpn_head.rpn_conv.weight"]),
        "params/rpn/logits/kernel": dense(t["rpn_head.rpn_cls.weight"]),
        "params/rpn/deltas/kernel": dense(t["rpn_head.rpn_reg.weight"]),
        "params/box_head/fc1/kernel": flattened(t[f"{box}.shared_fcs.0.weight"]),
        "params/box_head/fc2/kernel": dense(t[f"{box}.shared_fcs.1.weight"]),
        "params/box_head/logits/kernel": dense(t[f"{box}.fc_cls.weight"][last_first]),
        "params/box_head/logits/bias": t[f"{box}.fc_cls.bias"][last_first],
        "params/box_head/deltas/kernel": dense(t[f"{box}.fc_reg.weight"]),
        "params/box_head/deltas/bias": t[f"{box}.fc_reg.bias"],
        "params/mask_head/conv1/kernel": conv(t[f"{mask}.convs.0.conv.weight"]),
        "params/mask_head/deconv/kernel": t[f"{mask}.upsample.weight"].transpose(2, 3, 0, 1),
        "params/mask_head/logits/kernel": dense(t[f"{mask}.conv_logits.weight"]),
    }


def of_prefix(prefix: str) -> Callable[[Tensors], dict[str, np.ndarray]]:
    """A ResNet whose names begin so."""
    return lambda t: resnet(
        {name.removeprefix(prefix): tensor for name, tensor in t.items() if name.startswith(prefix)}
    )


def without_module(shapes: state_dicts.Shapes) -> state_dicts.Shapes:
    """As `read_tensors` returns them."""
    return {name.removeprefix("module."): shape for name, shape in shapes.items()}


def detectron2_c4(t: Tensors) -> dict[str, np.ndarray]:
    return {
        **detectron2_heads(t),
        "params/resnet/stem/kernel": conv(t["backbone.stem.conv1.weight"][:, ::-1]),
        "params/resnet/layer3/block5/conv2/kernel": conv(t["backbone.res4.5.conv2.weight"]),
        "params/res5/block0/downsample/kernel": conv(t["roi_heads.res5.0.shortcut.weight"]),
        **norm_of(t, "roi_heads.res5.2.conv1.norm", "res5/block2/conv1"),
    }


CASES: dict[
    str, tuple[str, Callable[[], state_dicts.Shapes], Callable[[Tensors], dict[str, np.ndarray]]]
] = {
    "v1": ("maskrcnn_resnet50_fpn", lambda: state_dicts.recorded("maskrcnn_resnet50_fpn"), v1),
    "v1 published": ("maskrcnn_resnet50_fpn", state_dicts.published, v1_published),
    "v2": (
        "maskrcnn_resnet50_fpn_v2",
        lambda: state_dicts.recorded("maskrcnn_resnet50_fpn_v2"),
        v2,
    ),
    "detectron2 fpn": ("mask_rcnn_R_50_FPN", lambda: state_dicts.detectron2("FPN"), detectron2_fpn),
    "detectron2 c4": ("mask_rcnn_R_50_C4", lambda: state_dicts.detectron2("C4"), detectron2_c4),
    "detectron2 lsj": (
        "mask_rcnn_R_50_FPN_LSJ",
        lambda: state_dicts.detectron2("LSJ"),
        detectron2_lsj,
    ),
    "mmdetection": ("mask-rcnn_r50_fpn", state_dicts.mmdetection, mmdetection),
    "moco": (
        "resnet_encoder_q",
        lambda: without_module(state_dicts.moco()),
        of_prefix("encoder_q."),
    ),
    "moco v3": (
        "resnet_base_encoder",
        lambda: without_module(state_dicts.moco_v3()),
        of_prefix("base_encoder."),
    ),
    "swav": ("resnet", lambda: without_module(state_dicts.swav()), resnet),
    "dino": ("resnet_backbone", state_dicts.dino, of_prefix("backbone.")),
    **{
        f"resnet{depth}": ("resnet", lambda depth=depth: state_dicts.resnet(depth), resnet)
        for depth in state_dicts.BLOCKS
    },
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_finds_its_place(case: str) -> None:
    name, shapes, expected = CASES[case]
    tensors = state_dicts.tensors(shapes())
    assert family_of(tensors, "file").name == name
    depth = int(case.removeprefix("resnet")) if case.startswith("resnet") else 50
    leaves = load(name, tensors, depth)
    for target, value in expected(tensors).items():
        np.testing.assert_array_equal(leaves[target], value, err_msg=target)
    # The values tell the rest: each leaf is of one source tensor, and no two of the same.
    used = {
        source: tensor
        for source, tensor in tensors.items()
        if tensor.ndim and not source.startswith(LEFT_OUT)
    }
    starts = np.array([np.min(tensor) for tensor in used.values()])
    origins = {
        target: set(np.searchsorted(starts, np.ravel(leaf), "right").tolist())
        for target, leaf in leaves.items()
    }
    assert {len(numbers) for numbers in origins.values()} == {1}
    assert set().union(*origins.values()) == set(range(1, len(used) + 1))
    assert len(leaves) == len(used)


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_less_or_more_is_named(case: str) -> None:
    name, shapes, _ = CASES[case]
    family, tensors = state_dicts.family(name), state_dicts.tensors(shapes())
    with pytest.raises(ConfigError, match=r"file: roi_heads\.extra\.weight: unknown tensor"):
        assign([*tensors, "roi_heads.extra.weight"], family.rules, family.left_out, "file")
    needed = next(
        tensor
        for tensor in tensors
        if tensor.endswith("conv2.weight") and not tensor.startswith(LEFT_OUT)
    )
    depth = int(case.removeprefix("resnet")) if case.startswith("resnet") else 50
    with pytest.raises(ConfigError, match=r"file: no tensor for params/.*/conv2/kernel$"):
        load(name, {key: tensor for key, tensor in tensors.items() if key != needed}, depth)


def test_another_depth_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1\.weight: shape"):
        load("resnet", state_dicts.tensors(state_dicts.resnet(50)), 34)
    with pytest.raises(ConfigError, match=r"layer1\.2\.conv1\.weight: this model has no"):
        load("resnet", state_dicts.tensors(state_dicts.resnet(34)), 18)


def test_families_are_told_apart_by_their_marks() -> None:
    names = ", ".join(family.name for family in FAMILIES)
    first, last = r"resnet \(torchvision or timm\)", r"mask_rcnn_R_50_C4 \(detectron2\)"
    unknown = "file: names of no known family"
    with pytest.raises(ConfigError, match=rf"{unknown} \('encoder\.weight'\): {first}, .*{last}$"):
        family_of(["encoder.weight"], "file")
    for prefix in ("model.", "_orig_mod."):
        shapes = [f"{prefix}{name}" for name in state_dicts.published()]
        told = ", ".join(map(repr, shapes[:3]))
        end = (
            f" and {len(shapes) - 3} more; they are of maskrcnn_resnet50_fpn without the prefix "
            f"'{prefix}': save them so"
        )
        with pytest.raises(ConfigError, match=re.escape(f"({told}{end}): ")):
            family_of(shapes, "file")
    with pytest.raises(ConfigError, match=rf"file: names of several families: {first}, {last}$"):
        family_of([RESNET.mark, "roi_heads.res5.0.conv1.weight"], "file")
    with pytest.raises(ConfigError, match=r"file: bbox_head\.fc_cls\.weight: a name of mmd.* 1\.x"):
        family_of(["backbone.layer1.0.conv1.weight", "bbox_head.fc_cls.weight"], "file")
    for name in ("roi_heads.box_predictor.1.cls_score.bias", "roi_head.bbox_head.1.fc_cls.bias"):
        with pytest.raises(ConfigError, match=rf"file: {re.escape(name)}: of a Cascade R-CNN, "):
            family_of(["backbone.layer1.0.conv1.weight", name], "file")
    assert len({family.mark for family in FAMILIES}) == len(FAMILIES), names
