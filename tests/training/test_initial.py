"""Starting weights of a run: all of a ResNet's file, or what another run has in common with it;
everything else is listed or refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import state_dicts
from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import config_hash, save_config
from mrcnn_jax.config.heads import (
    BoxHeadConfig,
    DepthHeadConfig,
    MaskHeadConfig,
    MaskIoUHeadConfig,
    PointRendConfig,
)
from mrcnn_jax.config.model import ConvNeXtConfig, ModelConfig, ResNetConfig, RPNConfig
from mrcnn_jax.config.schema import Config, ParamGroup, StageConfig
from mrcnn_jax.config.tables import DETECTRON2_C4, TORCHVISION, TORCHVISION_V2, joint, staged
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.training.initial import initial_variables
from mrcnn_jax.training.stages import loaded_modules, refuse_random_frozen
from mrcnn_jax.weights import network
from mrcnn_jax.weights.importer import import_weights
from mrcnn_jax.weights.published import PUBLISHED

FPN = ModelConfig(
    fpn_channels=8,
    resnet=ResNetConfig(depth=18, width=state_dicts.WIDTH),
    rpn=RPNConfig(batch_norm=False),
    box_head=BoxHeadConfig(hidden=8),
    mask_head=MaskHeadConfig(channels=8, convs=1, refine=PointRendConfig(steps=1, channels=8)),
)
C4 = replace(
    FPN,
    backbone="c4",
    box_head=BoxHeadConfig(fcs=0, pool_size=14),
    mask_head=MaskHeadConfig(channels=8, convs=0, pool_size=14),
)
CONVNEXT = replace(
    FPN,
    trunk="convnext",
    convnext=ConvNeXtConfig(**state_dicts.CONVNEXT),  # type: ignore[arg-type]
)
CLASS_LAYERS = ("box_head/logits", "box_head/deltas", "mask_head/logits", "mask_head/points/logits")
CLASS_LEAVES = {f"params/{layer}/{leaf}" for layer in CLASS_LAYERS for leaf in ("kernel", "bias")}


@functools.cache
def shapes(model: ModelConfig) -> Variables:
    return jax.eval_shape(
        lambda batch: MaskRCNN(model).init(jax.random.key(0), batch), example_batch((64, 64))
    )


def flat(variables: Variables) -> dict[str, np.ndarray]:
    return flatten_dict(variables, sep="/")


def write_run(
    folder: Path,
    model: ModelConfig,
    *modules: str,
    categories: tuple[tuple[int, str], ...] = ((1, "a"),),
    proper: bool = True,
    stages: tuple[StageConfig, ...] = (),
) -> dict[str, np.ndarray]:
    """A run's folder with random values in all modules, or those named; returns its leaves.

    With stages, of which the first is done, it began with random weights."""
    random = np.random.default_rng(0)
    values = jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes(model)
    )
    if proper:
        values["batch_stats"] = jax.tree.map(np.abs, values["batch_stats"])
    if modules:
        values = {
            kind: {name: tree for name, tree in modules_.items() if name in modules}
            for kind, modules_ in values.items()
        }
    config = Config(model=model, stages=stages)
    state = TrainState(
        values["params"], values["batch_stats"], (), jnp.int32(0), jnp.zeros(2, jnp.uint32)
    )
    step, loaded = (9, ()) if stages else (0, None)
    meta = Meta(step, "rpn", 0, step, True, categories, config_hash(config), loaded=loaded)
    Checkpoints(folder, keep=1).save(state, meta)
    save_config(config, folder / "config.json")
    return flat(values)


def load(
    source: Path, model: ModelConfig, *, without_classes: bool = False
) -> dict[str, np.ndarray]:
    config = Config(model=model, init_from=str(source), init_without_classes=without_classes)
    return flat(initial_variables(shapes(model), config)[0])


@pytest.fixture
def resnet_file(tmp_path: Path) -> Path:
    path = tmp_path / "resnet18.npz"
    np.savez(path, **state_dicts.tensors(state_dicts.resnet(18)))  # type: ignore[arg-type]
    return path


@pytest.fixture
def convnext_file(tmp_path: Path) -> Path:
    path = tmp_path / "convnext.npz"
    np.savez(path, **state_dicts.tensors(state_dicts.convnext_timm()))  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("resnet", "train", "name"),
    [
        # Demos and tests: live batch norm, and all of the ResNet is trained.
        (ResNetConfig(depth=10, width=4, norm="live"), ".*", None),
        (ResNetConfig(depth=10, width=4), ".*", "torchvision-resnet18"),
        (ResNetConfig(depth=18, width=4, norm="live"), "(?!resnet).*", "torchvision-resnet18"),
        (ResNetConfig(depth=50, width=4), "(?!resnet/stem).*", "torchvision-coco-v1"),
    ],
)
def test_random_weights_are_told(
    resnet: ResNetConfig, train: str, name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, with what to start from instead, but not where the config means them."""
    model = replace(FPN, resnet=resnet)
    frozen = () if train == ".*" else (train.replace("(?!", "(?=", 1),)
    config = Config(model=model, stages=joint((ParamGroup(train),), frozen, epochs=1))
    assert initial_variables(shapes(model), config) == ({}, set(), {})
    printed = capsys.readouterr().out
    assert printed.count("\n") == (name is not None)
    if name is not None:
        published = PUBLISHED[name]
        assert printed.startswith("the ResNet starts from random weights, a poor start on photo")
        assert f"--weights {name} --download (https://" in printed
        assert f"{published.file}, {published.mebibytes:.0f} MiB, SHA-256 " in printed


def test_random_weights_of_a_convnext_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(model=CONVNEXT, stages=joint((ParamGroup(".*"),), (), epochs=1))
    assert initial_variables(shapes(CONVNEXT), config) == ({}, set(), {})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("the ConvNeXt starts from random weights, a poor start on photographs")
    assert "--weights torchvision-convnext-tiny --download (https://" in line


# -- from a file -----------------------------------------------------------------------------------


def test_a_file_of_a_resnet(resnet_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load(resnet_file, FPN)
    assert loaded.keys() == {path for path in flat(shapes(FPN)) if path.split("/")[1] == "resnet"}
    count = sum(path.startswith("params/") for path in loaded)
    expected = f"loaded into resnet ({count} tensors); box_head, fpn, mask_head, rpn: random"
    assert capsys.readouterr().out == f"resnet18.npz: {expected}\n"


def test_a_file_of_a_convnext(convnext_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it: its maps' norms count as known, so that a stage may freeze it."""
    loaded = load(convnext_file, CONVNEXT)
    of_trunk = {name for name in flat(shapes(CONVNEXT)) if name.split("/")[1] == "convnext"}
    assert loaded.keys() == of_trunk
    expected = f"loaded into convnext ({len(loaded)} tensors); box_head, fpn, mask_head, rpn: rand"
    assert capsys.readouterr().out == f"convnext.npz: {expected}om\n"
    stages = staged(pretrained=True, trunk="convnext")
    params = shapes(CONVNEXT)["params"]
    known = loaded_modules(params, unflatten_dict(loaded, sep="/")["params"])
    refuse_random_frozen(Config(model=CONVNEXT, stages=stages), params, known)


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (FPN, "has a ConvNeXt, but model.trunk is resnet: it needs a config with convnext"),
        (
            replace(CONVNEXT, convnext=replace(CONVNEXT.convnext, blocks=(3, 3, 9, 3))),
            "has a ConvNeXt of blocks 1 2 3 1, but model.convnext.blocks is 3 3 9 3: "
            "--model.convnext.blocks 1 2 3 1 fits it",
        ),
        (
            replace(CONVNEXT, convnext=replace(CONVNEXT.convnext, channels=(4, 6, 8, 9))),
            "has a ConvNeXt of channels 4 6 8 10, but model.convnext.channels is 4 6 8 9: "
            "--model.convnext.channels 4 6 8 10 fits it",
        ),
    ],
)
def test_another_convnext_is_refused(model: ModelConfig, line: str, convnext_file: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(convnext_file, model)
    assert str(error.value) == f"init_from: {convnext_file}: {line}"


def test_a_file_of_a_resnet_for_c4(resnet_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """layer4 is res5, the head of each box."""
    tensors = dict(np.load(resnet_file))
    loaded = load(resnet_file, C4)
    assert loaded.keys() == {
        path for path in flat(shapes(C4)) if path.split("/")[1] in ("resnet", "res5")
    }
    np.testing.assert_array_equal(
        loaded["params/res5/block1/conv2/kernel"],
        tensors["layer4.1.conv2.weight"].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(
        loaded["batch_stats/res5/block0/downsample/var"],
        tensors["layer4.0.downsample.1.running_var"],
    )
    assert "loaded into resnet, res5 " in (printed := capsys.readouterr().out)
    assert "; box_head, mask_head, rpn: random\n" in printed


def test_another_stride_is_warned_of(resnet_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(resnet_file, replace(FPN, resnet=replace(FPN.resnet, stride_in_1x1=True)))
    line = "was trained with other constants: model.resnet.stride_in_1x1: False -> True"
    assert capsys.readouterr().out.splitlines()[1] == f"warning: {resnet_file} {line}"


def test_another_depth_is_refused_with_the_one_that_fits(resnet_file: Path, tmp_path: Path) -> None:
    """Of a file and of a run: ResNet-34 has all of ResNet-18's tensors, in the same shapes."""
    model = replace(FPN, resnet=replace(FPN.resnet, depth=34))
    write_run(tmp_path / "run", FPN)
    for source in (resnet_file, tmp_path / "run"):
        with pytest.raises(ConfigError) as error:
            load(source, model)
        assert str(error.value) == (
            f"init_from: {source}: has a ResNet-18, but model.resnet.depth is 34: "
            "--model.resnet.depth 18 fits it"
        )


@pytest.mark.parametrize(
    ("shapes_of", "model"),
    [
        (state_dicts.published, TORCHVISION),
        (lambda: state_dicts.recorded("maskrcnn_resnet50_fpn_v2"), TORCHVISION_V2),
        (lambda: state_dicts.detectron2("C4"), DETECTRON2_C4),
    ],
)
def test_a_whole_network_is_that_of_its_import(
    shapes_of: Callable[[], state_dicts.Shapes],
    model: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Leaf by leaf, with its classes or without."""
    monkeypatch.setattr(network, "family_of", state_dicts.narrow_family_of)
    path, model = tmp_path / "weights.npz", state_dicts.narrow(model)
    np.savez(path, **state_dicts.tensors(shapes_of()))  # type: ignore[arg-type]
    import_weights(path, tmp_path / "run")
    whole = load(tmp_path / "run", model)
    assert whole.keys() == flat(shapes(model)).keys()
    capsys.readouterr()
    for without in (False, True):
        found = load(path, model, without_classes=without)
        assert found.keys() == whole.keys() - (CLASS_LEAVES if without else set())
        assert all(np.array_equal(found[leaf], whole[leaf]) for leaf in found)
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith(f"{path}: {len(found)} of {len(whole)} tensors loaded")
        assert ("; left out: " in first) == without


def test_a_whole_network_is_loaded_in_full_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the run would not need the tensor that is missing."""
    monkeypatch.setattr(network, "family_of", state_dicts.narrow_family_of)
    tensors = state_dicts.tensors(state_dicts.published())
    del tensors["roi_heads.mask_predictor.mask_fcn_logits.bias"]
    np.savez(tmp_path / "weights.npz", **tensors)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"weights\.npz: no tensor for params/mask_head/logits/bias"
    ):
        load(tmp_path / "weights.npz", state_dicts.narrow(TORCHVISION), without_classes=True)


# -- from a run ------------------------------------------------------------------------------------


def test_the_same_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_run(tmp_path, FPN)
    loaded = load(tmp_path, FPN)
    assert loaded.keys() == source.keys()
    assert all(np.array_equal(loaded[path], source[path]) for path in source)
    assert capsys.readouterr().out == f"{tmp_path}: {len(source)} of {len(source)} tensors loaded\n"


@pytest.mark.parametrize("classes", [5, FPN.num_classes])
def test_other_classes_are_left_out_when_asked_for(
    classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where there are as many."""
    source = write_run(tmp_path, FPN)
    target = replace(FPN, num_classes=classes)
    loaded = load(tmp_path, target, without_classes=True)
    assert loaded.keys() == source.keys() - CLASS_LEAVES
    assert f"; left out: {', '.join(sorted(CLASS_LEAVES))}\n" in capsys.readouterr().out

    # What is loaded in part is not loaded: no stage may build on it before it was trained.
    params = shapes(target)["params"]
    config = Config(model=target, init_from=str(tmp_path), init_without_classes=True)
    partly = initial_variables(shapes(target), config).modules
    same = Config(model=FPN, init_from=str(tmp_path))
    whole = initial_variables(shapes(FPN), same).modules
    assert (whole - partly, partly - whole) == ({"box_head", "mask_head"}, set())
    mask = staged(pretrained=True)[2]
    with pytest.raises(
        ConfigError, match=r"stages\.mask: frozen at random initialisation: box_head \("
    ):
        refuse_random_frozen(Config(model=FPN, stages=(mask,)), params, partly)
    refuse_random_frozen(Config(model=FPN, stages=(mask,)), shapes(FPN)["params"], whole)
    refuse_random_frozen(Config(model=FPN, stages=staged(pretrained=True)), params, partly)
    with pytest.raises(
        ConfigError, match=r"stages\.rpn: frozen at random initialisation: resnet \("
    ):
        refuse_random_frozen(Config(model=FPN, stages=staged(pretrained=True)), params, ())


def test_a_random_head_that_is_frozen_in_part_is_refused(tmp_path: Path) -> None:
    """Of a trunk the first layers may be, and what was loaded, unless it was random there."""
    params = shapes(FPN)["params"]
    heads = tuple(ParamGroup(f"{name}/.*") for name in ("fpn", "rpn", "mask_head"))
    train = (ParamGroup("resnet/layer4/.*"), ParamGroup("box_head/(logits|deltas)/.*"), *heads)
    frozen = ("resnet/(stem|layer[123])/.*", "box_head/fc.*")
    config = Config(model=FPN, stages=joint(train, frozen, epochs=1))
    with pytest.raises(
        ConfigError, match=r"stages\.joint: frozen at random initialisation: box_head in part \("
    ):
        refuse_random_frozen(config, params, (), {})
    # What was loaded may be, although the outputs for other classes are not; of a run that goes on
    # nobody knows.
    refuse_random_frozen(config, params, (), {"box_head": params["box_head"]})
    started = {name: leaf for name, leaf in params["box_head"].items() if name.startswith("fc")}
    refuse_random_frozen(config, params, (), {"box_head": started})
    refuse_random_frozen(config, params, ())
    write_run(tmp_path, FPN, stages=staged(pretrained=False))
    _, modules, began = initial_variables(shapes(FPN), Config(model=FPN, init_from=str(tmp_path)))
    with pytest.raises(ConfigError, match=": box_head in part "):
        refuse_random_frozen(config, params, modules, began)


def test_a_part_that_was_random_in_a_c4_network_makes_the_resnet_random(tmp_path: Path) -> None:
    """Stopped after its first stage, which does not reach res5: layer4 of another network."""
    c4 = replace(C4, resnet=replace(C4.resnet, norm="live"))
    stages = staged(pretrained=False, backbone="c4")
    write_run(tmp_path, c4, "resnet", "res5", stages=stages)
    config = Config(model=FPN, init_from=str(tmp_path))
    known = initial_variables(shapes(FPN), config).modules
    assert "resnet" not in known
    same = Config(model=C4, init_from=str(tmp_path))
    known = initial_variables(shapes(C4), same).modules
    assert known == {"resnet"}


AGNOSTIC = replace(FPN, mask_head=replace(FPN.mask_head, class_agnostic=True))
MASK_LEAVES = {path for path in CLASS_LEAVES if path.startswith("params/mask_head/")}


def test_masks_of_no_class_are_kept_with_other_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is it said that they keep the weights of their label."""
    source = write_run(tmp_path, AGNOSTIC, categories=((1, "a"), (2, "b")))
    target = replace(AGNOSTIC, num_classes=5)
    config = Config(model=target, init_from=str(tmp_path), init_without_classes=True)
    loaded = flat(initial_variables(shapes(target), config, ("b", "a", "c", "d", "e"))[0])
    assert loaded.keys() == source.keys() - CLASS_LEAVES | MASK_LEAVES
    assert all(np.array_equal(loaded[path], source[path]) for path in MASK_LEAVES)
    assert "warning" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"not for 5 classes: .*box_head") as caught:
        load(tmp_path, target)
    assert "mask_head" not in str(caught.value)


@pytest.mark.parametrize("classes", [3, 1])
def test_masks_of_no_class_and_masks_of_classes_are_not_exchanged(
    classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a single class gives both the same shape; boxes keep their classes."""
    ours, theirs = (replace(model, num_classes=classes) for model in (FPN, AGNOSTIC))
    for model, start in ((ours, theirs), (theirs, ours)):
        source = write_run(tmp_path / str(model is ours), start)
        assert load(tmp_path / str(model is ours), model).keys() == source.keys() - MASK_LEAVES
        assert f"; left out: {', '.join(sorted(MASK_LEAVES))}\n" in capsys.readouterr().out


def test_boxes_of_no_class_and_a_cascade_start_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest of the box head is of use; without classes no head's logits are."""
    source = write_run(tmp_path / "plain", FPN)
    box_head = replace(FPN.box_head, class_agnostic=True, cascade=(0.6, 0.7))
    cascade = replace(FPN, box_head=box_head)
    deltas = {f"params/box_head/deltas/{leaf}" for leaf in ("kernel", "bias")}
    assert load(tmp_path / "plain", cascade).keys() == source.keys() - deltas
    printed = capsys.readouterr().out
    assert f"; left out: {', '.join(sorted(deltas))}\n" in printed
    assert "random: params/box_head2/" in printed
    whole = write_run(tmp_path / "cascade", cascade)
    other = replace(cascade, num_classes=5)
    logits = {
        f"params/box_head{i}/logits/{leaf}" for i in ("", 2, 3) for leaf in ("kernel", "bias")
    }
    assert load(tmp_path / "cascade", other, without_classes=True).keys() == whole.keys() - (
        logits | MASK_LEAVES
    )


def test_other_classes_are_refused_with_the_option_that_leaves_them_out(tmp_path: Path) -> None:
    write_run(tmp_path, FPN)
    with pytest.raises(
        ConfigError,
        match=r": not for 5 classes: [^ ]*params/box_head/\S+, .* \(--init-without-classes .*\)$",
    ) as caught:
        load(tmp_path, replace(FPN, num_classes=5))
    assert all(path in str(caught.value) for path in CLASS_LEAVES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model",
    [
        replace(FPN, box_head=BoxHeadConfig(hidden=4)),
        replace(FPN, mask_head=replace(FPN.mask_head, channels=4)),
        replace(FPN, num_classes=5, box_head=BoxHeadConfig(hidden=4)),
    ],
)
def test_other_shapes_are_refused(model: ModelConfig, tmp_path: Path) -> None:
    """Also of the leaves that depend on the classes, where more than the number of classes
    differs."""
    write_run(tmp_path, FPN)
    with pytest.raises(
        ConfigError, match=r"init_from: .*: \d+ shapes differ: params/(box|mask)_head/"
    ) as caught:
        load(tmp_path, model)
    assert "fits it" not in str(caught.value)  # sizes that weights fix
    head = "box_head" if model.box_head.hidden == 4 else "mask_head"
    assert f"params/{head}/" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "field"),
    [
        ({"mask_iou_head": MaskIoUHeadConfig(True, channels=4, fcs=1, hidden=8)}, "hidden"),
        ({"mask_iou_head": MaskIoUHeadConfig(True, channels=4, fcs=1, hidden=8)}, "channels"),
        ({"depth_head": DepthHeadConfig("dense", channels=8)}, "channels"),
        ({"mask_head": FPN.mask_head}, "refine.channels"),
    ],
)
def test_sizes_of_optional_heads_are_named(head: Any, field: str, tmp_path: Path) -> None:
    """Weights do not fix them, so a shape alone does not say which option fits."""
    ((name, config),) = head.items()
    write_run(tmp_path, replace(FPN, **head))
    there = attrgetter(field)(config)
    if field == "refine.channels":
        other = replace(config, refine=replace(config.refine, channels=16))
    else:
        other = replace(config, **{field: 16})
    option = f"--model.{name}.{field}".replace("_", "-")
    with pytest.raises(ConfigError, match=rf"; {option} {there} fits it \(here 16\)$"):
        load(tmp_path, replace(FPN, **{name: other}))


def test_between_fpn_and_c4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_run(tmp_path / "fpn", FPN, "resnet")
    loaded = load(tmp_path / "fpn", C4)
    assert {path.split("/")[1] for path in loaded} == {"resnet", "res5"}
    assert len(loaded) == len(source)
    np.testing.assert_array_equal(
        loaded["params/res5/block1/conv2/kernel"],
        source["params/resnet/layer4/block1/conv2/kernel"],
    )
    assert "not used" not in capsys.readouterr().out
    source = write_run(tmp_path / "c4", C4, "resnet", "res5")
    loaded = load(tmp_path / "c4", FPN)
    np.testing.assert_array_equal(
        loaded["batch_stats/resnet/layer4/block0/conv1/mean"],
        source["batch_stats/res5/block0/conv1/mean"],
    )
    assert len(loaded) == len(source)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"pixel_mean": (0.5, 0.5, 0.5)},
            "model.pixel_mean: (0.5, 0.5, 0.5) -> (0.485, 0.456, 0.406)",
        ),
        (
            {"resnet": replace(FPN.resnet, norm_epsilon=0.0)},
            "model.resnet.norm_epsilon: 0.0 -> 1e-05",
        ),
        (
            {"resnet": replace(FPN.resnet, stride_in_1x1=True)},
            "model.resnet.stride_in_1x1: True -> False",
        ),
        (
            {"rpn": replace(FPN.rpn, box_weights=(10.0, 10.0, 5.0, 5.0))},
            "model.rpn.box_weights: (10.0, 10.0, 5.0, 5.0) -> (1.0, 1.0, 1.0, 1.0)",
        ),
    ],
)
def test_parameters_that_mean_something_else_are_warned_of(
    change: dict, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, replace(FPN, **change))
    load(tmp_path, FPN)
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == [f"warning: {tmp_path} was trained with other constants: {line}"]


@pytest.mark.parametrize(
    ("theirs", "ours", "differ"),
    [("softmax", "bce", True), ("focal", "softmax", True), ("focal", "bce", False)],
)
def test_masks_of_another_activation_have_to_be_trained(
    theirs: Any, ours: Any, differ: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits 2 and 3 of two classes are .27 and .73 by softmax, .88 and .95 by sigmoids."""
    plain = replace(FPN, mask_head=replace(FPN.mask_head, refine=PointRendConfig()))
    write_run(tmp_path, replace(plain, mask_head=replace(plain.mask_head, loss=theirs)))
    model = replace(plain, mask_head=replace(plain.mask_head, loss=ours))
    table = staged(pretrained=True)
    config = Config(model=model, init_from=str(tmp_path), stages=table)
    line = f"{tmp_path} has masks trained by {theirs}, and model.mask_head.loss is {ours}"
    initial_variables(shapes(model), config)
    assert (f"warning: {line}: they are wrong" in capsys.readouterr().out) == differ
    config = replace(config, stages=table[:2])
    if not differ:
        initial_variables(shapes(model), config)
        return
    run = tmp_path / "untrained"
    write_run(run, replace(plain, mask_head=replace(plain.mask_head, loss=theirs)), stages=table)
    initial_variables(shapes(model), replace(config, init_from=str(run)))
    with pytest.raises(
        ConfigError, match=rf"^init_from: {re.escape(line)}: no stage trains .* {theirs}"
    ):
        initial_variables(shapes(model), config)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("a", "b", "c"), None),  # under whatever ids
        (("b", "a", "c"), "in another order, label by label: 1 'a' -> 'b', 2 'b' -> 'a'; each"),
        (("a", "b", "d"), "of other names, label by label: 3 'c' -> 'd'; each keeps the weights"),
    ],
)
def test_classes_of_other_names_are_warned_of(
    names: tuple[str, ...], text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless nothing that belongs to a class is loaded."""
    write_run(tmp_path, FPN, categories=((3, "a"), (7, "b"), (90, "c")))
    config = Config(model=FPN, init_from=str(tmp_path))
    initial_variables(shapes(FPN), config, names)
    warnings = capsys.readouterr().out.splitlines()[1:]
    assert len(warnings) == (text is not None)
    assert text is None or f"{tmp_path} was trained on classes {text}" in warnings[0]
    initial_variables(shapes(FPN), replace(config, init_without_classes=True), names)
    assert "warning" not in capsys.readouterr().out


def test_a_run_whose_weights_are_no_numbers_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", FPN, proper=False)  # normal numbers, its variances too
    with pytest.raises(
        ConfigError,
        match=r"a: checkpoint 00000000-rpn: batch_stats/.*/var: .* negative",
    ):
        load(tmp_path / "a", FPN)
