"""What a checkpoint of mmdetection says beside its tensors decides what they mean."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import state_dicts

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.tables import DETECTRON2_FPN, MMDETECTION
from mrcnn_jax.evaluation.coco_categories import COCO
from mrcnn_jax.weights import network
from mrcnn_jax.weights.mmdetection import MASK_RCNN, with_meta
from mrcnn_jax.weights.origin import open_origin

# As mmengine and mmcv print a config, in parts.
PYTORCH = """model = dict(
    backbone=dict(depth=50, style='pytorch', type='ResNet'),
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            123.675,
            116.28,
            103.53,
        ],
        std=[
            58.395,
            57.12,
            57.375,
        ]),
    rpn_head=dict(
        anchor_generator=dict(ratios=[0.5, 1.0, 2.0], scales=[8], strides=[4, 8, 16, 32, 64]),
        bbox_coder=dict(target_stds=[1.0, 1.0, 1.0, 1.0])),
    roi_head=dict(bbox_head=dict(bbox_coder=dict(target_stds=[0.1, 0.1, 0.2, 0.2]))))
"""
CAFFE = (
    "_base_ = './mask_rcnn_r50_fpn_1x_coco.py'\nmodel = dict(backbone=dict(style='caffe'))\n"
    "img_norm_cfg = dict(mean=[103.530, 116.280, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)\n"
)
# Of a file and its base, as early versions of 2.x wrote it.
BASE = "style='pytorch'\nimg_norm_cfg = dict(std=[58.395, 57.12, 57.375], to_rgb=True)\n"


@pytest.mark.parametrize(
    ("meta", "caffe"),
    [
        ({"cfg": PYTORCH}, False),
        ({"config": PYTORCH}, False),
        ({"config": CAFFE}, True),
        ({"config": CAFFE + BASE}, True),
        ({"cfg": 'style="caffe", bgr_to_rgb=False'}, True),
        ({"cfg": PYTORCH.replace("scales=[8]", "scales=[8], center_offset=0.0")}, False),
        ({}, False),
        ({"cfg": None, "epoch": 12}, False),
    ],
)
def test_the_style_is_the_config_s(meta: dict, caffe: bool) -> None:
    family = with_meta(MASK_RCNN, meta, "file")
    model = family.model
    assert model is not None
    expected = DETECTRON2_FPN if caffe else MMDETECTION
    assert model.resnet.stride_in_1x1 is caffe
    assert (model.pixel_mean, model.pixel_std) == (expected.pixel_mean, expected.pixel_std)
    assert (model.rpn, model.roi) == (MMDETECTION.rpn, MMDETECTION.roi)
    assert family.name == ("mask-rcnn_r50-caffe_fpn" if caffe else "mask-rcnn_r50_fpn")
    stated = any(isinstance(meta.get(key), str) for key in ("config", "cfg"))
    assert bool(family.presumed) is not stated


def test_numbers_of_the_definition() -> None:
    """Anchors of 8 strides; deltas divided by .1 .1 .2 .2; levels from 56, 112, 224 and 448 on."""
    assert MMDETECTION.rpn.scales == tuple(8 * stride for stride in MMDETECTION.strides)
    np.testing.assert_allclose(1 / np.array(MMDETECTION.box_head.box_weights), (0.1, 0.1, 0.2, 0.2))
    roi = MMDETECTION.roi
    starts = roi.canonical_size * 2.0 ** (np.arange(3, 6) - roi.canonical_level - roi.level_epsilon)
    np.testing.assert_allclose(starts, 56 * (np.array([2, 4, 8]) - 1e-6), rtol=1e-6, atol=0)
    assert (starts < (112, 224, 448)).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PYTORCH.replace("True", "False"), "style pytorch and BGR images: unsupported"),
        (CAFFE.replace("False", "True"), "style caffe and RGB images: unsupported"),
        (PYTORCH.replace("57.12", "57.0"), r"style pytorch and std=\[58\.395, 57\.0, 57\.375\]"),
        (CAFFE.replace("[1.0, 1.0, 1.0]", "[58.395, 57.12, 57.375]"), r"style caffe and std=\[58"),
        (PYTORCH.replace("123.675", "0.0"), r"style pytorch and mean=\[0\.0, 116"),
        (
            CAFFE.replace("103.530, 116.280, 123.675", "102.9801, 115.9465, 122.7717"),
            r"style caffe and mean=\[102\.9801",
        ),
        (PYTORCH.replace("scales=[8]", "scales=[4, 8]"), r"scales=\[4\.0, 8\.0\]: unsupported"),
        (
            PYTORCH.replace("scales=[8]", "octave_base_scale=4"),
            "has octave_base_scale=4: other anchors",
        ),
        (
            PYTORCH.replace("scales=[8]", "scales=[8], center_offset=0.5"),
            r"has center_offset=0\.5: other anchors",
        ),
        (PYTORCH.replace("0.5, 1.0, 2.0", "1.0"), r"ratios=\[1\.0\]"),
        (
            PYTORCH.replace("0.1, 0.1, 0.2, 0.2", "0.1, 0.1, 0.1, 0.1"),
            r"target_stds=\[0\.1, 0\.1, 0",
        ),
        (PYTORCH + "type='LegacyAnchorGenerator'", "has LegacyAnchorGenerator, which is unsupp"),
    ],
)
def test_another_network_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^file: its config .*{message}"):
        with_meta(MASK_RCNN, {"cfg": text}, "file")


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({}, COCO),
        ({"CLASSES": ("cell", "crown")}, ((1, "cell"), (2, "crown"))),
        ({"dataset_meta": {"classes": ["cell"]}}, ((1, "cell"),)),
        ({"dataset_meta": {"CLASSES": ("cell",), "palette": [(1, 2, 3)]}}, ((1, "cell"),)),
        ({"CLASSES": tuple(name.replace(" ", "_") for _, name in COCO)}, COCO),
        ({"CLASSES": "cell"}, COCO),
        ({"CLASSES": ("cell", 7)}, COCO),
        ({"CLASSES": ("\x1b[2J",)}, COCO),
        ({"dataset_meta": ("cell",)}, COCO),
    ],
)
def test_classes(meta: dict[str, Any], expected: tuple) -> None:
    assert with_meta(MASK_RCNN, meta, "file").categories == expected


def write(path: Path, meta: dict[str, Any], **shapes: int) -> Path:
    tensors = state_dicts.tensors(state_dicts.mmdetection(**shapes))
    path.write_bytes(pickle.dumps({"meta": meta, "state_dict": tensors}, protocol=2))
    return path


class Names:
    """An object that a checkpoint may hold in place of a list."""


def test_an_object_is_no_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one class, the object's type would be its name."""
    monkeypatch.setattr(network, "family_of", state_dicts.narrow_family_of)
    path = write(tmp_path / "a.pth", {"dataset_meta": {"classes": Names()}}, classes=1)
    assert open_origin(path).class_names == ()


def test_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two classes, caffe style, 101 layers: what it says reaches the weights and their title."""
    monkeypatch.setattr(network, "family_of", state_dicts.narrow_family_of)
    path = write(tmp_path / "a.pth", {"config": CAFFE, "CLASSES": ("x", "y")}, classes=2, depth=101)
    origin = open_origin(path)
    assert origin.title == "mask-rcnn_r101-caffe_fpn (mmdetection)"
    assert origin.class_names == ("x", "y")
    assert (origin.model.num_classes, origin.model.resnet.depth) == (2, 101)
    assert origin.model.resnet.stride_in_1x1
    tensors = state_dicts.tensors(state_dicts.mmdetection(classes=2, depth=101))
    leaves = origin.load()
    np.testing.assert_array_equal(
        leaves["params/resnet/stem/kernel"],
        tensors["backbone.conv1.weight"][:, [2, 1, 0]].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(
        leaves["params/box_head/logits/bias"], tensors["roi_head.bbox_head.fc_cls.bias"][[2, 0, 1]]
    )
    other = write(tmp_path / "b.pth", {"config": CAFFE, "CLASSES": ("x", "y")}, classes=3)
    assert open_origin(other).class_names == ()  # names of another number of classes
    content = {"state_dict": tensors, "state_dict_ema": tensors}
    (tmp_path / "e.pth").write_bytes(pickle.dumps(content, protocol=2))
    note = "; read: state_dict; also there: 'state_dict_ema', not read)"
    assert open_origin(tmp_path / "e.pth").title.endswith(note)
    box_only = state_dicts.tensors(state_dicts.mmdetection())
    box_only = {name: x for name, x in box_only.items() if "mask_head" not in name}
    (tmp_path / "c.pth").write_bytes(pickle.dumps({"state_dict": box_only}))
    with pytest.raises(ConfigError, match=r"c\.pth: no tensor for params/mask_head/"):
        open_origin(tmp_path / "c.pth").load()
