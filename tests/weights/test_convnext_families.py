"""ConvNeXts under the names of three projects: every tensor in its place, or one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import state_dicts
from flax.traverse_util import flatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json
from mrcnn_jax.config.model import ConvNeXtConfig
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.weights.importer import import_weights
from mrcnn_jax.weights.network import read_network

Tensors = dict[str, np.ndarray]
SIZES = ConvNeXtConfig(**state_dicts.CONVNEXT)  # type: ignore[arg-type]


def timm_with_convolutions() -> state_dicts.Shapes:
    """As the smaller ones of timm (conv_mlp)."""
    return state_dicts.convnext_timm((1, 1))


# Shapes, project, and the names of: a norm, a depthwise kernel, a 2x2 kernel, a layer, a factor.
CASES: dict[str, tuple[Callable[[], state_dicts.Shapes], str, tuple[str, ...]]] = {
    "timm": (
        state_dicts.convnext_timm,
        "timm",
        (
            "stem.1.bias",
            "stages.2.blocks.1.conv_dw.weight",
            "stages.3.downsample.1.weight",
            "stages.1.blocks.1.mlp.fc1.weight",
            "stages.0.blocks.0.gamma",
        ),
    ),
    "authors": (
        state_dicts.convnext_authors,
        "ConvNeXt's authors",
        (
            "downsample_layers.0.1.bias",
            "stages.2.1.dwconv.weight",
            "downsample_layers.3.1.weight",
            "stages.1.1.pwconv1.weight",
            "stages.0.0.gamma",
        ),
    ),
    "torchvision": (
        state_dicts.convnext_torchvision,
        "torchvision",
        (
            "features.0.1.bias",
            "features.5.1.block.0.weight",
            "features.6.1.weight",
            "features.3.1.block.3.weight",
            "features.1.0.layer_scale",
        ),
    ),
}
CASES["timm, convolutions"] = (timm_with_convolutions, *CASES["timm"][1:])
CLASSIFIER = ("head.", "norm.", "classifier.")


def write(path: Path, tensors: Tensors) -> Path:
    safetensors.numpy.save_file(tensors, path)
    return path


def tensors_of(case: str) -> Tensors:
    return {name: np.array(x) for name, x in state_dicts.tensors(CASES[case][0]()).items()}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_finds_its_place(case: str, tmp_path: Path) -> None:
    tensors = tensors_of(case)
    network = read_network(write(tmp_path / "a.safetensors", tensors))
    assert (network.model.trunk, network.model.convnext) == ("convnext", SIZES)
    assert not network.has_heads
    assert network.title == f"convnext ({CASES[case][1]})"
    leaves = flatten_dict(network.variables(), sep="/")
    norm, depthwise, half, layer, gamma = (tensors[name] for name in CASES[case][2])
    expected = {
        "stem/norm/bias": norm,
        "stage3/block1/kernel": depthwise.transpose(2, 3, 1, 0),
        "stage4/downsample/kernel": half.transpose(2, 3, 1, 0),
        "stage2/block1/expand/kernel": layer.reshape(layer.shape[:2]).T,
        "stage1/block0/gamma": gamma.ravel(),
    }
    for path, value in expected.items():
        np.testing.assert_array_equal(leaves[f"params/convnext/{path}"], value, err_msg=path)
    # The maps' norms, of no file, do nothing at first; each other leaf is of one tensor.
    norms = {path: leaves.pop(path) for path in list(leaves) if re.search(r"/norm\d/", path)}
    assert {path: float(leaf.min()) for path, leaf in norms.items()} == {
        f"params/convnext/norm{i}/{leaf}": value
        for i in (2, 3, 4, 5)
        for leaf, value in (("scale", 1.0), ("bias", 0.0))
    }
    used = [x for name, x in tensors.items() if not name.startswith(CLASSIFIER)]
    assert len(used) == len(leaves)
    starts = sorted(float(x.min()) for x in used)
    assert sorted(float(leaf.min()) for leaf in leaves.values()) == starts
    for leaf in leaves.values():
        assert float(leaf.max()) == float(leaf.min()) + leaf.size - 1


@pytest.mark.parametrize("case", CASES)
def test_a_tensor_less_or_more_or_of_another_shape_is_named(case: str, tmp_path: Path) -> None:
    tensors, path = tensors_of(case), tmp_path / "a.safetensors"

    def line(changed: Tensors) -> str:
        with pytest.raises(ConfigError) as error:
            read_network(write(path, changed)).variables()
        assert "\n" not in str(error.value)
        return str(error.value).removeprefix(f"{path}: ")

    norm, depthwise, half, *_, gamma = CASES[case][2]
    assert line(tensors | {"grn.weight": tensors[norm]}) == "grn.weight: unknown tensor"
    missing = {name: x for name, x in tensors.items() if name != half}
    assert line(missing) == "no tensor for params/convnext/stage4/downsample/kernel"
    if gamma != "features.1.0.layer_scale":  # the mark of its family
        missing = {name: x for name, x in tensors.items() if name != gamma}
        assert line(missing) == "no tensor for params/convnext/stage1/block0/gamma"
    wide = tensors | {half: np.pad(tensors[half], [(0, 0), (0, 0), (0, 1), (0, 1)])}
    assert line(wide).startswith(f"{half}: shape (10, 8, 3, 3) does not fit params/convnext/stage4")
    if "conv_dw" in depthwise:  # else the mark, too
        second = {name: x for name, x in tensors.items() if "stages.1.blocks.0." not in name}
        assert "params/convnext/stage2/block1" in line(second) or "block0" in line(second)


def test_pixels_are_those_of_timms_config(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", tensors_of("timm"))
    assert not read_network(path).pixels_stated
    stated = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.1, 0.3]}
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "convnext_tiny", "pretrained_cfg": stated})
    )
    network = read_network(path)
    assert network.pixels_stated
    assert network.model.pixel_mean == (0.5, 0.4, 0.3)
    assert network.model.pixel_std == (0.2, 0.1, 0.3)


def test_published_sizes_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of another epsilon, which their tensors do not show, are known by their sizes."""

    def named(blocks: Any, channels: Any) -> str:
        monkeypatch.setattr(state_dicts, "CONVNEXT", {"blocks": blocks, "channels": channels})
        tensors = {
            name: np.broadcast_to(np.float32(0), shape).copy()
            for name, shape in state_dicts.convnext_timm().items()
            if len(shape) == 1 or name == "stages.0.blocks.0.conv_dw.weight"
        }
        return read_network(write(tmp_path / "a.safetensors", tensors)).name

    assert named((3, 3, 9, 3), (96, 192, 384, 768)) == "convnext_tiny"
    assert named((3, 3, 27, 3), (192, 384, 768, 1536)) == "convnext_large"
    with pytest.raises(ConfigError, match=r"a ConvNeXt-XXL, whose layer norms have an epsilon"):
        named((3, 4, 30, 3), (384, 768, 1536, 3072))
    with pytest.raises(ConfigError, match=r"timm's test_convnext, whose layer norms have"):
        named((1, 2, 4, 2), (24, 32, 48, 64))
    with pytest.raises(ConfigError, match=r"timm's test_convnext2, whose layer norms have"):
        named((1, 1, 1, 1), (32, 64, 96, 128))


def test_an_import_is_only_trained_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "a.safetensors", tensors_of("authors"))
    import_weights(source, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "left out: head.bias, head.weight and 2 more: the classifier, with the norm" in printed
    assert "norms of the backbone's four maps, which a classifier lacks: ones and zeros" in printed
    config = load_config_json(tmp_path / "run" / "config.json")
    assert (config.name, config.model.trunk, config.model.convnext) == (
        "convnext",
        "convnext",
        SIZES,
    )
    with pytest.raises(ConfigError, match=r"run: holds only a backbone, to train a detector from"):
        load_run(tmp_path / "run")
    presumed = re.findall(r"^  ([a-z][\w.]+): .*$", printed, re.MULTILINE)
    assert presumed == ["channel_order", "model.pixel_mean", "model.pixel_std"]
    for name in ("model.resnet.norm_epsilon", "data.short_side", "model.rpn.nms_iou"):
        told = rf"^{name}: .*a\.safetensors: a convnext alone does not decide it$"
        with pytest.raises(ConfigError, match=told):
            import_weights(source, tmp_path / "other", values={name: 1})
    assert not (tmp_path / "other").exists()
