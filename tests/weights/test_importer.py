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
from mrcnn_jax.weights import network, published
from mrcnn_jax.weights.importer import import_weights

V1, V2 = "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"
FPN, C4 = "mask_rcnn_R_50_FPN", "mask_rcnn_R_50_C4"
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


@pytest.fixture(autouse=True)
def narrow_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "family_of", state_dicts.narrow_family_of)


def write(path: Path, shapes: state_dicts.Shapes) -> Path:
    tensors = state_dicts.tensors(shapes)
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps({"model": tensors, "__author__": "somebody"}, protocol=4))
    else:
        np.savez(path, **tensors)  # type: ignore[arg-type]
    return path


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
    source = write(tmp_path / "weights.pkl", SHAPES[name]())
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
    presumed = {
        "mmdetection": "; presumably style pytorch: no config in the file says caffe",
        "torchvision": "; presumably anchors and normalisation of pixels as published, which the "
        "file does not state",
        "detectron2": "",
    }
    title = f"{name} ({project}{presumed[project]})"
    assert f"{source}: {title}, {len(tensors)} tensors, {used} of them used" in printed
    assert ("untested on the published file" in printed) == (not torchvision)
    assert ("num_batches_tracked and 51 more: counters of steps" in printed) == (
        name in (V1, MMDET)
    )
    assert ("left out: pixel_mean, pixel_std: as in the config" in printed) == detectron2
    shrink = f"data.shrink: {run.config.data.shrink}, the nearest to how {project} shrinks images\n"
    assert shrink in printed
    assert f"python -m mrcnn_jax eval --workdir {tmp_path / 'runs' / 'a'} --annotations" in printed


@pytest.mark.parametrize(
    ("name", "layer"),
    [(FPN, "roi_heads.mask_head.predictor"), (MMDET, "roi_head.mask_head.conv_logits")],
)
def test_class_agnostic_masks_are_seen(name: str, layer: str, tmp_path: Path) -> None:
    """detectron2's CLS_AGNOSTIC_MASK, mmdetection's class_agnostic: the shape tells."""
    shapes = SHAPES[name]()
    for part in ("weight", "bias"):
        shapes[f"{layer}.{part}"] = (1, *shapes[f"{layer}.{part}"][1:])
    path = write(tmp_path / "a.npz", shapes)
    found = network.read_network(path)
    assert (found.model.num_classes, found.model.mask_head.class_agnostic) == (80, True)
    kernel = found.variables()["params"]["mask_head"]["logits"]["kernel"]
    with np.load(path) as file:
        np.testing.assert_array_equal(kernel[:, 0], file[f"{layer}.weight"][0, :, 0, 0])


@pytest.mark.parametrize(
    ("name", "layer"),
    [(FPN, "roi_heads.box_predictor.bbox_pred"), (MMDET, "roi_head.bbox_head.fc_reg")],
)
def test_class_agnostic_boxes_are_seen(name: str, layer: str, tmp_path: Path) -> None:
    """detectron2's CLS_AGNOSTIC_BBOX_REG, mmdetection's reg_class_agnostic: the shape tells."""
    shapes = SHAPES[name]()
    for part in ("weight", "bias"):
        shapes[f"{layer}.{part}"] = (4, *shapes[f"{layer}.{part}"][1:])
    path = write(tmp_path / "a.npz", shapes)
    found = network.read_network(path)
    assert (found.model.num_classes, found.model.box_head.class_agnostic) == (80, True)
    kernel = found.variables()["params"]["box_head"]["deltas"]["kernel"]
    with np.load(path) as file:
        np.testing.assert_array_equal(kernel, file[f"{layer}.weight"].T)


def test_categories_are_coco_s(data_folder: Path, tmp_path: Path) -> None:
    content = json.loads(
        (data_folder / "coco_mini" / "annotations" / "val_full80.json").read_text()
    )
    expected = {category["id"]: category["name"] for category in content["categories"]}
    import_weights(write(tmp_path / "d2.pkl", SHAPES[FPN]()), tmp_path / "d2")
    assert load_run(tmp_path / "d2").class_names == expected
    import_weights(write(tmp_path / "tv.pkl", SHAPES[V1]()), tmp_path / "tv")
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
        write(tmp_path / "weights.npz", SHAPES[name]()), tmp_path / "run", norm_epsilon=given
    )
    assert load_config_json(tmp_path / "run" / "config.json").model.resnet.norm_epsilon == epsilon
    printed = capsys.readouterr().out
    assert f"batch norm: epsilon {epsilon:g}\n" in printed
    assert ("use --norm-epsilon 1e-5 for models trained from ImageNet weights" in printed) == (
        epsilon == 0
    )


@pytest.mark.parametrize("depth", [18, 101])
def test_a_backbone_is_only_trained_from(
    depth: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_weights(write(tmp_path / "weights.npz", state_dicts.resnet(depth)), tmp_path / "run")
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


def narrow_to(shapes: state_dicts.Shapes, classes: int) -> state_dicts.Shapes:
    rows = {91: classes + 1, 364: 4 * (classes + 1)}
    return {name: tuple(rows.get(side, side) for side in shape) for name, shape in shapes.items()}


def test_other_numbers_of_classes(tiny_data: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "weights.npz", narrow_to(SHAPES[V1](), 3))
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
    shapes = narrow_to(SHAPES[V1](), 3)
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


def test_pixels_that_are_read_otherwise_are_refused(tmp_path: Path) -> None:
    """A network of detectron2 that was trained on RGB images: its stem must not be turned."""
    tensors = state_dicts.tensors(SHAPES[FPN]())
    tensors["pixel_mean"] = tensors["pixel_mean"][::-1]
    np.savez(tmp_path / "weights.npz", **tensors)
    with pytest.raises(
        ConfigError,
        match=r"weights\.npz: pixel_mean: \[123\..*\], but mask_rcnn_R_50_FPN has \[103\.",
    ):
        import_weights(tmp_path / "weights.npz", tmp_path / "run")


@pytest.mark.parametrize(("family", "level"), [(FPN, 1), (FPN, 4), (C4, 0)])
def test_anchors_of_another_config_are_refused(family: str, level: int, tmp_path: Path) -> None:
    """detectron2 keeps them beside the weights; of other ratios all tensors keep their shapes."""
    tensors = state_dicts.tensors(SHAPES[family]())
    name = f"proposal_generator.anchor_generator.cell_anchors.{level}"
    tensors[name][-1] *= (0.5, 2.0, 0.5, 2.0)
    np.savez(tmp_path / "weights.npz", **tensors)
    with pytest.raises(ConfigError, match=rf"weights\.npz: {name}: other anchors than those of "):
        import_weights(tmp_path / "weights.npz", tmp_path / "run")


def test_constants_that_a_file_does_not_state_are_presumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of today's detectron2, which no longer saves them."""
    tensors = state_dicts.tensors(SHAPES[C4]())
    for mark, what in (
        ("cell_anchors", "anchors"),
        ("pixel_", "anchors and normalisation of pixels"),
    ):
        tensors = {name: tensor for name, tensor in tensors.items() if mark not in name}
        np.savez(tmp_path / "weights.npz", **tensors)
        import_weights(tmp_path / "weights.npz", tmp_path / mark)
        title = (
            f"{C4} (detectron2; presumably {what} as published, which the file does not state), "
        )
        assert title in capsys.readouterr().out


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "weights.npz", SHAPES[V1]())
    (tmp_path / "empty").mkdir()
    import_weights(source, tmp_path / "empty")
    before = sorted(path for path in (tmp_path / "empty").rglob("*"))
    for out in (tmp_path / "empty", source):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            import_weights(source, out)
    assert sorted(path for path in (tmp_path / "empty").rglob("*")) == before
    with pytest.raises(ConfigError, match=r"weights\.npz/run: cannot be written"):
        import_weights(source, source / "run")


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mrcnn: Callable[..., int]
) -> None:
    source = write(tmp_path / "weights.npz", SHAPES["published"]())
    command = ("import", source, "--out", tmp_path / "run")
    assert mrcnn(*command, "--norm-epsilon", "1e-5") == 0
    assert load_config_json(tmp_path / "run" / "config.json").model.resnet.norm_epsilon == 1e-5
    capsys.readouterr()
    assert mrcnn(*command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


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
    write(tmp_path / "a.pkl", SHAPES["published"]()).rename(path)
    for number, option in enumerate(((), ("--download",))):
        assert mrcnn("import", name, "--out", f"run{number}", *option) == 0
        assert capsys.readouterr().out.startswith(f"{path}: {V1} (torchvision")
        assert load_run(tmp_path / f"run{number}").meta.stage == "imported"
