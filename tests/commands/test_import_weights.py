"""What an imported file does not state can be given: it decides what the run computes, is printed,
and is refused in one line where the file states something else or its tensors do not fit."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import state_dicts

import mrcnn_jax
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json
from mrcnn_jax.config.tables import DETECTRON2_FPN, MMDETECTION, TORCHVISION
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.weights import network, published
from mrcnn_jax.weights.importer import import_weights

V1 = "maskrcnn_resnet50_fpn"


@pytest.fixture(autouse=True)
def narrow_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "family_of", state_dicts.narrow_family_of)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mrcnn: Callable[..., int]
) -> None:
    source = state_dicts.write(tmp_path / "weights.npz", state_dicts.published())
    command = ("import", source, "--out", tmp_path / "run")
    options = (
        *("--data.short-side", "600", "--data.long-side", "1000", "--model.resnet.norm-epsilon"),
        *("1e-5", "--model.resnet.stride-in-1x1", "--model.roi.aligned", "--channel-order", "bgr"),
    )
    assert mrcnn(*command, *options) == 0
    config = load_config_json(tmp_path / "run" / "config.json")
    assert (config.data.short_side, config.data.long_side) == (600, 1000)
    assert config.data.canvases == ((608, 1024), (1024, 608))
    model = state_dicts.narrow(TORCHVISION)
    resnet = replace(model.resnet, norm_epsilon=1e-5, stride_in_1x1=True)
    assert config.model == replace(model, resnet=resnet, roi=replace(model.roi, aligned=True))
    printed = capsys.readouterr().out
    for line in (
        "data.short_side: 600 (in place of 800)",
        "channel_order: bgr (in place of rgb)",
        "model.resnet.stride_in_1x1: True (in place of False)",
        "model.resnet.norm_epsilon: 1e-05 (in place of 0)",
        "model.roi.aligned: True (in place of False)",
        "model.rpn.scales: 32 64 128 256 512",
    ):
        assert f"  {line}\n" in printed
    assert "canvases: 608 x 1024, 1024 x 608\n" in printed
    assert printed.index("given:\n") < printed.index("the file does not state them")
    assert mrcnn(*command) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'run'}: exists and is not an ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--data.short-side 2000", "data.short_side: must be in 1..data.long_side"),
        ("--data.canvases 32 32", "data.canvases: none holds an image of 800 x 1333"),
        ("--model.pixel-std 1 0 1", "model.pixel_std: must be positive"),
        ("--model.rpn.scales 32 64", "model.rpn.scales: five are needed, one for each"),
        ("--model.num-classes 7", "(64, 8) (with model.num_classes as given)"),
        ("--model.convnext.blocks 1 1 1 1", "model.convnext.blocks: weights.npz: a maskrcnn"),
    ],
)
def test_options_that_do_not_fit(
    words: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mrcnn: Callable[..., int],
) -> None:
    monkeypatch.chdir(tmp_path)
    state_dicts.write(Path("weights.npz"), state_dicts.recorded(V1))
    assert mrcnn("import", "weights.npz", "--out", "other", *words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1
    assert not Path("other").exists()


def test_options_decide_what_the_run_predicts(tmp_path: Path) -> None:
    """Each is undone by its inverse in the weights or in the image: colours that trade places, a
    kernel times the deviations, a mean that grows with the image, and pixels that are squares."""
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(0, (0.5 / max(1, math.prod(shape[1:]))) ** 0.5, shape).astype(np.float32)
        for name, shape in state_dicts.with_classes(state_dicts.published(), 3).items()
    }
    norms = r"(running_var|bn\d\.weight|downsample\.1\.weight)"
    tensors |= {
        name: np.ones_like(tensor) for name, tensor in tensors.items() if re.search(norms, name)
    }
    values: dict[str, Any] = {
        "data.short_side": 96,
        "data.long_side": 128,
        "model.rpn.pre_nms": 50,
        "model.rpn.proposals": 20,
        "model.box_head.detections": 10,
        "model.pixel_mean": (0.1, 0.2, 0.3),
        "model.pixel_std": (1.0, 1.0, 1.0),
    }
    np.savez(tmp_path / "plain.npz", **tensors)
    import_weights(tmp_path / "plain.npz", tmp_path / "plain", values=values)
    plain = mrcnn_jax.load(tmp_path / "plain")

    kernel, deviations = "backbone.body.conv1.weight", np.float32([0.5, 0.25, 0.125])
    tensors[kernel] = tensors[kernel] * deviations.reshape(1, 3, 1, 1)
    np.savez(tmp_path / "other.npz", **tensors)
    values |= {
        "model.pixel_mean": (0.3 + 0.2, 0.2 + 0.2, 0.1 + 0.2),
        "model.pixel_std": tuple(deviations[::-1].tolist()),
    }
    import_weights(tmp_path / "other.npz", tmp_path / "other", values=values, channel_order="bgr")
    other = mrcnn_jax.load(tmp_path / "other")

    image = rng.integers(0, 204, (96, 128, 3)).astype(np.uint8)
    turned = np.ascontiguousarray(image[..., ::-1]) + np.uint8(51)
    expected = plain.predict(image, rle=True)
    assert len(expected.scores) == 10
    for found, scale in (
        (other.predict(turned, rle=True), 1),
        (plain.predict(image.repeat(2, axis=0).repeat(2, axis=1), rle=True), 2),
    ):
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
        np.testing.assert_allclose(found.boxes, scale * expected.boxes, atol=scale * 1e-2)


def test_what_a_file_states_is_not_overruled(tmp_path: Path) -> None:
    """mmdetection's config: another style than it says is refused, the same is not."""
    tensors = state_dicts.tensors(state_dicts.mmdetection())
    source = tmp_path / "a.pth"
    meta = {"config": "model = dict(backbone=dict(style='pytorch'))\nto_rgb=True\n"}
    source.write_bytes(pickle.dumps({"meta": meta, "state_dict": tensors}, protocol=2))
    cases: list[tuple[dict[str, Any], Literal["bgr"] | None, str]] = [
        ({"model.resnet.stride_in_1x1": True}, None, r"1x1: True, but .*a\.pth states False"),
        ({"model.rpn.scales": (16, 32, 64, 128, 256)}, None, "scales: 16 32 64 .* states 32 64"),
        ({}, "bgr", r"^channel_order: bgr, but .*a\.pth states rgb$"),
    ]
    for values, order, told in cases:
        with pytest.raises(ConfigError, match=told):
            import_weights(source, tmp_path / "run", values=values, channel_order=order)
    assert not (tmp_path / "run").exists()
    import_weights(source, tmp_path / "run", values={"model.resnet.stride_in_1x1": False})
    assert load_run(tmp_path / "run").config.model == state_dicts.narrow(MMDETECTION)


def test_a_stated_value_can_be_typed_as_it_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mrcnn: Callable[..., int]
) -> None:
    """Rounded; and a ResNet without bottlenecks has no stride in 1x1 that could be presumed."""
    tensors = state_dicts.tensors(state_dicts.mmdetection(depth=18))
    source = tmp_path / "a.pth"
    config = "model = dict(backbone=dict(style='caffe'))\nmean=[103.53, 116.28, 123.675]\n"
    meta = {"config": f"{config}std=[1.0, 1.0, 1.0]\nto_rgb=False\n"}
    source.write_bytes(pickle.dumps({"meta": meta, "state_dict": tensors}, protocol=2))
    deviation = ("--model.pixel-std", *["0.00392157"] * 3)
    command = ("import", source, "--out", tmp_path / "run", "--data.canvases", "1344", "1344")
    assert mrcnn(*command, *deviation) == 0
    printed = capsys.readouterr().out
    assert "  model.pixel_std: 0.00392157 0.00392157 0.00392157\n" in printed
    assert "  data.canvases: 1344 1344 (in place of " in printed
    assert "  data.short_side: 800 (the scale of a config's Resize is not read)\n" in printed
    assert "stride" not in printed


def test_pixels_that_are_read_otherwise_are_refused(
    tmp_path: Path, mrcnn: Callable[..., int]
) -> None:
    """A network of detectron2 that was trained on RGB images, from torchvision's ResNet: its stem
    must not be turned. What is told can be typed."""
    tensors = state_dicts.tensors(state_dicts.detectron2("FPN"))
    tensors["pixel_mean"] = tensors["pixel_mean"][::-1]
    np.savez(tmp_path / "weights.npz", **tensors)
    with pytest.raises(
        ConfigError,
        match=r"weights\.npz: pixel_mean: \[123\.675, .*\], where \[103\.53, 116\.28, 123\.675\] "
        r"is presumed: import takes --channel-order rgb$",
    ):
        import_weights(tmp_path / "weights.npz", tmp_path / "run")
    import_weights(tmp_path / "weights.npz", tmp_path / "run", channel_order="rgb")
    run, stem = load_run(tmp_path / "run"), tensors["backbone.bottom_up.stem.conv1.weight"]
    assert run.config.model.pixel_mean == DETECTRON2_FPN.pixel_mean
    kernel = run.variables["params"]["resnet"]["stem"]["kernel"]
    np.testing.assert_array_equal(kernel, stem.transpose(2, 3, 1, 0))

    usual = state_dicts.tensors(state_dicts.detectron2("FPN"))["pixel_mean"]  # left as it was
    for name, mean, order, told in (
        ("left", usual, "rgb", r"import takes --model\.pixel-mean 0\.406 0\.456 0\.485$"),
        (
            "own",
            np.float32([130, 110, 90]).reshape(3, 1, 1),
            None,
            r"import takes --model\.pixel-mean 0\.352941 0\.431373 0\.509804 if the network read "
            r"BGR, which is presumed, else --channel-order rgb --model\.pixel-mean 0\.509804 ",
        ),
    ):
        np.savez(tmp_path / f"{name}.npz", **tensors | {"pixel_mean": mean})
        with pytest.raises(ConfigError, match=told):
            import_weights(tmp_path / f"{name}.npz", tmp_path / "other", channel_order=order)

    tensors["pixel_std"] = np.float32([58.395, 57.12, 57.375]).reshape(3, 1, 1)
    np.savez(tmp_path / "weights.npz", **tensors)
    told = r"pixel_std: \[58\.395, 57\.12, 57\.375\], .*: import takes (--model.*)$"
    with pytest.raises(ConfigError, match=told) as error:
        import_weights(tmp_path / "weights.npz", tmp_path / "other", channel_order="rgb")
    option = re.search(told, str(error.value))[1]  # type: ignore[index]
    assert option == "--model.pixel-std 0.229 0.224 0.225"
    command = ("import", tmp_path / "weights.npz", "--out", tmp_path / "other")
    assert mrcnn(*command, "--channel-order", "rgb", *option.split()) == 0


@pytest.mark.parametrize(
    ("kind", "scales"), [("FPN", (16, 32, 64, 128, 256)), ("C4", (64, 128, 256, 512))]
)
def test_anchors_that_are_given(
    kind: str, scales: tuple[int, ...], tmp_path: Path, mrcnn: Callable[..., int]
) -> None:
    """Of half the size, and one size less on the one map, where the RPN has fewer outputs."""
    shapes = state_dicts.detectron2(kind)
    if kind == "C4":
        for name, rows in (("objectness_logits", 12), ("anchor_deltas", 48)):
            for part in ("weight", "bias"):
                key = f"proposal_generator.rpn_head.{name}.{part}"
                shapes[key] = (rows, *shapes[key][1:])
    tensors = state_dicts.tensors(shapes)
    for name in [name for name in tensors if "cell_anchors" in name]:
        tensors[name] = tensors[name] / 2 if kind == "FPN" else tensors[name][3:]
    np.savez(tmp_path / "weights.npz", **tensors)
    command = ("import", tmp_path / "weights.npz", "--out", tmp_path / "run")
    assert mrcnn(*command) == 2
    assert not (tmp_path / "run").exists()
    assert mrcnn(*command, "--model.rpn.scales", *scales) == 0
    assert load_config_json(tmp_path / "run" / "config.json").model.rpn.scales == scales


def test_published_weights_by_name(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mrcnn: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their file where `--download` keeps it; nothing is fetched unasked, nor for a taken place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("MRCNN_DATA", raising=False)
    name = "torchvision-coco-v1"
    assert mrcnn("import", name, "--out", "run") == 2
    assert capsys.readouterr().err.startswith(f"error: {name}: not fetched yet; with --download ")
    (tmp_path / "taken").touch()
    assert mrcnn("import", name, "--download", "--out", "taken") == 2
    assert capsys.readouterr().err.startswith("error: taken: exists and is not an empty folder")
    assert mrcnn("import", "nowhere.pth", "--out", "run") == 2
    assert capsys.readouterr().err.startswith("error: nowhere.pth: no such file or run, and none")
    path = tmp_path / "cache" / "mrcnn_jax" / "weights" / published.PUBLISHED[name].file
    path.parent.mkdir(parents=True)
    state_dicts.write(tmp_path / "a.pkl", state_dicts.published()).rename(path)
    for number, option in enumerate(((), ("--download",))):
        assert mrcnn("import", name, "--out", f"run{number}", *option) == 0
        assert capsys.readouterr().out.startswith(f"{path}: {V1} (torchvision")
        assert load_run(tmp_path / f"run{number}").meta.stage == "imported"
