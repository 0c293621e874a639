"""From a file to a run's folder that everything accepts; or one line, and nothing is written."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import state_dicts
import tiny
from flax.traverse_util import flatten_dict

from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json
from mrcnn_jax.config.tables import (
    DETECTRON2_C4,
    DETECTRON2_FPN,
    DETECTRON2_LSJ,
    MMDETECTION,
    TORCHVISION,
    TORCHVISION_V2,
)
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.run import load_run, open_data
from mrcnn_jax.weights import network
from mrcnn_jax.weights.importer import import_weights

V1, V2 = "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"
FPN, C4 = "mask_rcnn_R_50_FPN", "mask_rcnn_R_50_C4"
CONSTANTS = ("pixel_mean", "pixel_std", "rpn.scales", "rpn.ratios")
LSJ, MMDET = "mask_rcnn_R_50_FPN_LSJ", "mask-rcnn_r50_fpn"
SHAPES = {
    V1: lambda: state_dicts.recorded(V1),
    V2: lambda: state_dicts.recorded(V2),
    FPN: lambda: state_dicts.detectron2("FPN"),
    C4: lambda: state_dicts.detectron2("C4"),
    LSJ: lambda: state_dicts.detectron2("LSJ"),
    MMDET: state_dicts.mmdetection,
    "published": state_dicts.published,
    "frozen, 101 layers": lambda: deeper(state_dicts.published()),
}


def deeper(shapes: state_dicts.Shapes) -> state_dicts.Shapes:
    """The same with as many blocks as a ResNet-101 has."""
    last = {name: shape for name, shape in shapes.items() if ".layer3.5." in name}
    more = (
        {name.replace("3.5", f"3.{block}", 1): shape for name, shape in last.items()}
        for block in range(6, 23)
    )
    return dict(item for each in (shapes, *more) for item in each.items())


LEFT_OPEN = (
    *("data.short_side", "data.long_side", "data.shrink"),
    *("channel_order", "model.pixel_mean", "model.pixel_std"),
    *("model.resnet.stride_in_1x1", "model.resnet.norm_epsilon"),
    *("model.rpn.scales", "model.rpn.ratios"),
)


@pytest.fixture(autouse=True)
def narrow_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "family_of", state_dicts.narrow_family_of)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        (V1, TORCHVISION),
        (V2, TORCHVISION_V2),
        (FPN, DETECTRON2_FPN),
        (C4, DETECTRON2_C4),
        (LSJ, DETECTRON2_LSJ),
        (MMDET, MMDETECTION),
    ],
)
def test_a_run_that_is_whole(
    name: str, model: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = state_dicts.write(tmp_path / "weights.pkl", SHAPES[name]())
    import_weights(source, tmp_path / "runs" / "a")
    run = load_run(tmp_path / "runs" / "a")
    assert (run.config.name, run.config.stages) == (name, ())
    assert run.config.model == state_dicts.narrow(model)  # type: ignore[arg-type]
    assert run.meta.stage_complete
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["a"]
    leaves = flatten_dict(run.variables, sep="/")
    tensors = state_dicts.tensors(SHAPES[name]())
    stem = {
        V1: "backbone.body.bn1",
        V2: "backbone.body.bn1",
        C4: "backbone.stem.conv1.norm",
        MMDET: "backbone.bn1",
    }.get(name, "backbone.bottom_up.stem.conv1.norm")
    np.testing.assert_array_equal(
        leaves["batch_stats/resnet/stem/mean"], tensors[f"{stem}.running_mean"]
    )

    torchvision = name in (V1, V2)
    detectron2 = name in (FPN, C4, LSJ)
    assert run.config.data.shrink == ("area" if detectron2 else "bilinear")
    assert run.category_ids == list(range(1, 91)) if torchvision else len(run.category_ids) == 80
    assert (run.class_names[1], run.class_names[13], run.class_names[90]) == (
        "person",
        "stop sign",
        "toothbrush",
    )
    assert run.class_names.get(12) == ("N/A 12" if torchvision else None)
    printed = capsys.readouterr().out
    used = len(leaves)
    project = "detectron2" if detectron2 else "torchvision" if torchvision else "mmdetection"
    title = f"{name} ({project})"
    assert f"{source}: {title}, {len(tensors)} tensors, {used} of them used" in printed
    assert ("the first kernel was turned from BGR to RGB" in printed) == detectron2
    assert ("untested on the published file" in printed) == (not torchvision)
    assert ("num_batches_tracked and 51 more: counters of steps" in printed) == (
        name in (V1, MMDET)
    )
    assert ("left out: pixel_mean, pixel_std: as in the config" in printed) == detectron2
    shrink = f"data.shrink: {run.config.data.shrink} (the nearest to how {project} shrinks images)"
    assert f"  {shrink}\n" in printed
    presumed = re.findall(r"^  ([a-z][\w.]+): .*$", printed, re.MULTILINE)
    # Files of detectron2 that are as old as these state the others.
    stated = {f"model.{name}" for name in CONSTANTS} if detectron2 else set()
    assert presumed == [field for field in LEFT_OPEN if field not in stated]
    style = "  channel_order: rgb (style pytorch: no config in the file says caffe)\n"
    assert (style in printed) == (name == MMDET)
    assert f"python -m mrcnn_jax eval --workdir {tmp_path / 'runs' / 'a'} --annotations" in printed


@pytest.mark.parametrize(
    ("head", "layer", "name", "tensor"),
    [
        ("mask_head", "logits", FPN, "roi_heads.mask_head.predictor"),
        ("mask_head", "logits", MMDET, "roi_head.mask_head.conv_logits"),
        ("box_head", "deltas", FPN, "roi_heads.box_predictor.bbox_pred"),
        ("box_head", "deltas", MMDET, "roi_head.bbox_head.fc_reg"),
    ],
)
def test_class_agnostic_heads_are_seen(
    head: str, layer: str, name: str, tensor: str, tmp_path: Path
) -> None:
    """detectron2's CLS_AGNOSTIC_MASK and CLS_AGNOSTIC_BBOX_REG, mmdetection's class_agnostic and
    reg_class_agnostic: the shape tells."""
    shapes, outputs = SHAPES[name](), 1 if head == "mask_head" else 4
    for part in ("weight", "bias"):
        shapes[f"{tensor}.{part}"] = (outputs, *shapes[f"{tensor}.{part}"][1:])
    path = state_dicts.write(tmp_path / "a.npz", shapes)
    found = network.read_network(path)
    assert (found.model.num_classes, getattr(found.model, head).class_agnostic) == (80, True)
    kernel = found.variables()["params"][head][layer]["kernel"]
    with np.load(path) as file:
        expected = file[f"{tensor}.weight"].T
    np.testing.assert_array_equal(kernel, expected[0, 0] if head == "mask_head" else expected)


def test_categories_are_coco_s(data_folder: Path, tmp_path: Path) -> None:
    content = json.loads(
        (data_folder / "coco_mini" / "annotations" / "val_full80.json").read_text()
    )
    expected = {category["id"]: category["name"] for category in content["categories"]}
    import_weights(state_dicts.write(tmp_path / "d2.pkl", SHAPES[FPN]()), tmp_path / "d2")
    assert load_run(tmp_path / "d2").class_names == expected
    import_weights(state_dicts.write(tmp_path / "tv.pkl", SHAPES[V1]()), tmp_path / "tv")
    names = load_run(tmp_path / "tv").class_names
    assert {
        number: name for number, name in names.items() if not name.startswith("N/A")
    } == expected
    assert {number: name for number, name in names.items() if number not in expected} == {
        number: f"N/A {number}" for number in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
    }


@pytest.mark.parametrize(
    ("name", "given", "epsilon"),
    [
        (V1, None, 1e-5),
        ("published", None, 0.0),
        ("frozen, 101 layers", None, 1e-5),
        ("published", 1e-5, 1e-5),
        (V1, 1e-3, 1e-3),
        (V2, None, 1e-5),
        (FPN, None, 1e-5),
    ],
)
def test_epsilon_of_batch_norm(
    name: str,
    given: float | None,
    epsilon: float,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import_weights(
        state_dicts.write(tmp_path / "weights.npz", SHAPES[name]()),
        tmp_path / "run",
        values={} if given is None else {"model.resnet.norm_epsilon": given},
    )
    assert load_config_json(tmp_path / "run" / "config.json").model.resnet.norm_epsilon == epsilon
    printed = capsys.readouterr().out
    assert f"  model.resnet.norm_epsilon: {epsilon:g}" in printed
    assert (": 0 (1e-5 for models trained from ImageNet weights)" in printed) == (epsilon == 0)


@pytest.mark.parametrize("depth", [18, 101])
def test_a_backbone_is_only_trained_from(
    depth: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_weights(
        state_dicts.write(tmp_path / "weights.npz", state_dicts.resnet(depth)), tmp_path / "run"
    )
    config = load_config_json(tmp_path / "run" / "config.json")
    assert (config.name, config.model.resnet.depth) == (f"resnet{depth}", depth)
    printed = capsys.readouterr().out
    assert "left out: fc.weight, fc.bias: the classifier" in printed
    assert (config.data.shrink, "data.shrink" in printed) == ("area", False)
    assert (
        "next: python -m mrcnn_jax train --config CONFIG --workdir DIR "
        f"--weights {tmp_path / 'run'}" in printed
    )
    with pytest.raises(
        ConfigError,
        match=r"run: holds only a backbone, to train a detector from: "
        r"python -m mrcnn_jax train --weights .*run$",
    ):
        load_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--categories: .*: a resnet has no classes"):
        import_weights(tmp_path / "weights.npz", tmp_path / "other", categories=tmp_path / "x.json")


@pytest.mark.parametrize(
    ("shapes", "project", "left_out"),
    [
        (state_dicts.moco, "MoCo", "queue, queue_ptr: the queue of keys"),
        (state_dicts.moco_v3, "MoCo v3", "predictor.0.weight: the predictor"),
        (state_dicts.swav, "torchvision or timm", "projection_head.0.weight, prototypes.weight: a"),
        (state_dicts.dino, "DINO or others", "head.mlp.0.weight, head.last_layer.weight_g: a pro"),
    ],
)
def test_a_self_supervised_resnet(
    shapes: Callable[[], state_dicts.Shapes],
    project: str,
    left_out: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its prefix goes, and what is not its trunk is left out by name; a tensor more is refused."""
    tensors = state_dicts.tensors(shapes())
    source = tmp_path / "pretrain.pth.tar"
    table = "teacher" if project.startswith("DINO") else "state_dict"
    others = {"student": {"no": "tensor"}, "optimizer": {}, "args": argparse.Namespace(lr=0.1)}
    source.write_bytes(pickle.dumps(others | {table: tensors}, protocol=2))
    import_weights(source, tmp_path / "run")
    printed = capsys.readouterr().out
    assert f"{source}: resnet50 ({project}), {len(tensors)} tensors, 265 of them used" in printed
    assert f"left out: {left_out}" in printed
    (stem,) = (
        name
        for name in tensors
        if name.endswith("bn1.running_mean") and "layer" not in name
        if not re.search("encoder_k|momentum", name)
    )
    variables = Checkpoints(tmp_path / "run", keep=1)
    meta = variables.latest()
    assert meta is not None
    found = flatten_dict(variables.restore_weights(meta)["raw"], sep="/")
    np.testing.assert_array_equal(found["batch_stats/resnet/stem/mean"], tensors[stem])

    more = tensors | {f"{stem.removesuffix('bn1.running_mean')}layer9.weight": np.zeros(3)}
    source.write_bytes(pickle.dumps({table: more}, protocol=2))
    with pytest.raises(ConfigError, match=r"layer9\.weight: unknown tensor"):
        import_weights(source, tmp_path / "other")


def test_other_numbers_of_classes(tiny_data: Path, tmp_path: Path) -> None:
    source = state_dicts.write(tmp_path / "weights.npz", state_dicts.with_classes(SHAPES[V1](), 3))
    import_weights(source, tmp_path / "a")
    run = load_run(tmp_path / "a")
    assert run.config.model.num_classes == 3
    assert run.meta.categories == ((1, "class1"), (2, "class2"), (3, "class3"))
    annotations = tiny.annotations(tiny_data, "val")
    with pytest.raises(
        ConfigError, match=r"\(its classes have no names: import it again with --categories FILE\)$"
    ):
        open_data(run, tmp_path / "a", "val", annotations, tiny_data / "images")

    file = tmp_path / "categories.json"
    file.write_text(
        json.dumps(
            {
                "categories": [
                    {"id": 90, "name": "c"},
                    {"id": 5, "name": "a"},
                    {"id": 7, "name": "b"},
                ]
            }
        )
    )
    import_weights(source, tmp_path / "b", categories=file)
    assert load_run(tmp_path / "b").meta.categories == ((5, "a"), (7, "b"), (90, "c"))
    for content, message in (
        (
            '{"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}',
            "2 categories, but the network has 3 classes",
        ),
        (
            '{"categories": [{"id": 1, "name": ""}, {"id": 1, "name": ""}, {"id": 2, "name": ""}]}',
            "two categories have the same id",
        ),
        ('{"categories": [{"id": 1, "name": "a"}]', "not a COCO file with categories"),
        ('{"categories": [1]}', "not a COCO file with categories"),
        ("[]", "not a COCO file with categories"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=rf"--categories: .*categories\.json: {message}"):
            import_weights(source, tmp_path / "c", categories=file)
    assert not (tmp_path / "c").exists()


def test_names_that_a_file_states_keep_their_labels(tmp_path: Path) -> None:
    """mmdetection's: a categories file gives them ids, whatever their order, and no other names."""
    tensors = state_dicts.tensors(state_dicts.mmdetection(classes=2))
    source, file = tmp_path / "a.pth", tmp_path / "categories.json"
    content = {"meta": {"CLASSES": ("dog", "cat")}, "state_dict": tensors}
    source.write_bytes(pickle.dumps(content, protocol=2))
    listed = [{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}]
    file.write_text(json.dumps({"categories": listed}))
    import_weights(source, tmp_path / "run", categories=file)
    assert load_run(tmp_path / "run").meta.categories == ((2, "dog"), (1, "cat"))
    file.write_text(json.dumps({"categories": [{"id": 1, "name": "cow"}, listed[0]]}))
    with pytest.raises(ConfigError, match=r"\.json: has cow, where .*a\.pth itself names .* cat: "):
        import_weights(source, tmp_path / "other", categories=file)
    assert not (tmp_path / "other").exists()


def test_an_imported_run_is_evaluated(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the data set that is named; its own config names none."""
    shapes = state_dicts.with_classes(SHAPES[V1](), 3)
    tensors = {
        name: np.float32(0.01) * (tensor % 7 - 3)
        for name, tensor in state_dicts.tensors(shapes).items()
    }
    tensors |= {
        name: np.ones_like(tensor)
        for name, tensor in tensors.items()
        if name.endswith("running_var")
    }
    np.savez(tmp_path / "weights.npz", **tensors)
    import_weights(
        tmp_path / "weights.npz", tmp_path / "run", categories=tiny.annotations(tiny_data, "val")
    )
    with pytest.raises(
        ConfigError, match=r"run: its config names no data set \(eval takes --annotations and --im"
    ):
        evaluation.run(evaluation.Arguments(workdir=tmp_path / "run"))
    annotations = tiny.annotations(tiny_data, "val")
    metrics = evaluation.run(
        evaluation.Arguments(
            workdir=tmp_path / "run",
            annotations=annotations,
            images=tiny_data / "images",
            limit=1,
            figures=0,
        )
    )
    assert 0 <= metrics["bbox/AP"] <= 1
    assert "run: checkpoint 00000000-imported\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backbone.body.layer1.0.bn1.bias": None},
            r"no tensor for params/resnet/layer1/block0/conv1/bias$",
        ),
        (
            {"roi_heads.keypoint_head.weight": np.zeros(3)},
            r"roi_heads\.keypoint_head\.weight: unknown tensor",
        ),
        (
            {"roi_heads.box_predictor.cls_score.weight": np.zeros((5, 64), np.float32)},
            r"cls_score\.weight: shape \(5, 64\) does not fit",
        ),
        (
            {"backbone.body.layer4.3.conv1.weight": np.zeros((32, 128, 1, 1))},
            r"no known ResNet has blocks \[3, 4, 6, 4\]",
        ),
        (
            {"backbone.fpn_lateral2.bias": np.zeros(3)},
            "of several families: maskrcnn_resnet50_fpn ",
        ),
    ],
)
def test_nothing_is_written_if_it_does_not_fit(change: dict, message: str, tmp_path: Path) -> None:
    tensors = state_dicts.tensors(SHAPES[V1]()) | change
    np.savez(
        tmp_path / "weights.npz",
        **{name: tensor for name, tensor in tensors.items() if tensor is not None},
    )
    with pytest.raises(ConfigError, match=rf"weights\.npz: .*{message}"):
        import_weights(tmp_path / "weights.npz", tmp_path / "runs" / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["weights.npz"]


@pytest.mark.parametrize(("family", "level"), [(FPN, 1), (FPN, 4), (C4, 0)])
def test_anchors_of_another_config_are_refused(family: str, level: int, tmp_path: Path) -> None:
    """detectron2 keeps them beside the weights; of other ratios all tensors keep their shapes."""
    tensors = state_dicts.tensors(SHAPES[family]())
    name = f"proposal_generator.anchor_generator.cell_anchors.{level}"
    tensors[name][-1] *= (0.5, 2.0, 0.5, 2.0)
    np.savez(tmp_path / "weights.npz", **tensors)
    told = rf"weights\.npz: {name}: other anchors than those of .*: import takes --model\.rpn\.sca"
    with pytest.raises(ConfigError, match=told):
        import_weights(tmp_path / "weights.npz", tmp_path / "run")


def test_constants_that_a_file_does_not_state_are_presumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of today's detectron2, which no longer saves them."""
    tensors = state_dicts.tensors(SHAPES[C4]())
    for mark, what, lines in (
        (
            "cell_anchors",
            "anchors",
            ("model.rpn.scales: 32 64 128 256 512", "model.rpn.ratios: 0.5 1 2"),
        ),
        (
            "pixel_",
            "anchors and normalisation of pixels",
            ("model.pixel_std: 0.00392157 0.00392157 0.00392157",),
        ),
    ):
        np.savez(tmp_path / "weights.npz", **tensors)
        import_weights(tmp_path / "weights.npz", tmp_path / f"with_{mark}")
        before = capsys.readouterr().out
        tensors = {name: tensor for name, tensor in tensors.items() if mark not in name}
        np.savez(tmp_path / "weights.npz", **tensors)
        import_weights(tmp_path / "weights.npz", tmp_path / mark)
        printed = capsys.readouterr().out
        for line in lines:
            assert (f"  {line}\n" in printed, f"  {line}\n" in before) == (True, False)
        title = f"{C4} (detectron2; presumably {what} as published, which the file does not state)"
        assert network.read_network(tmp_path / "weights.npz").title == title


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    source = state_dicts.write(tmp_path / "weights.npz", SHAPES[V1]())
    (tmp_path / "empty").mkdir()
    import_weights(source, tmp_path / "empty")
    before = sorted(path for path in (tmp_path / "empty").rglob("*"))
    for out in (tmp_path / "empty", source):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            import_weights(source, out)
    assert sorted(path for path in (tmp_path / "empty").rglob("*")) == before
    with pytest.raises(ConfigError, match=r"weights\.npz/run: cannot be written"):
        import_weights(source, source / "run")
