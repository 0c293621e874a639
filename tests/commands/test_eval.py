"""A run is evaluated from its folder alone."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
from pycocotools import mask as rle_ops
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.commands import export
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config
from mrcnn_jax.data.records import ImageRecord, ObjectRecord
from mrcnn_jax.figures import views
from mrcnn_jax.inference.api import Model
from mrcnn_jax.inference.evaluate import read_evaluation
from mrcnn_jax.inference.exported import ExportedModel
from mrcnn_jax.inference.predictor import Predictor
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.structures import Batch
from mrcnn_jax.training import loop

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@pytest.fixture(scope="module")
def moved(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run in another folder: nothing may hang on where it was trained."""
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("moved") / "elsewhere")


@pytest.fixture(scope="module")
def evaluated(moved: Path) -> tuple[dict[str, float], Path]:
    """(metrics, out) of the whole validation split: 8 images in batches of 3."""
    out = moved / "eval"
    return evaluate(moved, figures=2, out=out), out


def evaluate(workdir: Path, **options: Any) -> dict[str, float]:
    return evaluation.run(evaluation.Arguments(workdir=workdir, **options))


def results_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "detections.json").read_text())


def pycocotools_figures(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str
) -> np.ndarray:
    """COCO's own procedure, on the file as it is but for annotation ids from 1 (id 0 is no match to
    pycocotools)."""
    coco = COCO()
    coco.dataset = {
        **truth,
        "annotations": [{**a, "id": a["id"] + 1} for a in truth["annotations"]],
    }
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes([dict(result) for result in results]), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats


# -- evaluation ------------------------------------------------------------------------------------


def test_metrics_are_pycocotools_figures_of_the_written_detections(
    evaluated: tuple[dict[str, float], Path], tiny_data: Path
) -> None:
    metrics, out = evaluated
    written = json.loads((out / "metrics.json").read_text())
    confusion = written.pop("confusion")
    assert written == {"checkpoint": f"{sum(tiny.STAGES.values()):08d}-mask"} | metrics
    assert (confusion["compared"], confusion["score"], metrics["at_score/score"]) == (
        "segm",
        0.5,
        0.5,
    )
    assert read_evaluation(out) == written
    truth, results = tiny.read(tiny_data, "val"), results_of(out)
    assert 0 in {annotation["id"] for annotation in truth["annotations"]}
    boxes = [
        {key: value for key, value in result.items() if key != "segmentation"} for result in results
    ]  # else areas are the masks'
    for kind, given in (("bbox", boxes), ("segm", results)):
        figures = [metrics[f"{kind}/{name}"] for name in FIGURES]
        np.testing.assert_allclose(figures, pycocotools_figures(truth, given, kind), atol=1e-12)
        present = {annotation["category_id"] for annotation in truth["annotations"]}
        names = {category["name"] for category in truth["categories"] if category["id"] in present}
        assert {key.split("/")[2] for key in metrics if key.startswith(f"{kind}/AP/")} == names
        assert metrics[f"{kind}/AP"] == pytest.approx(
            np.mean([metrics[f"{kind}/AP/{name}"] for name in names])
        )
    assert {key for key in metrics if not key.startswith(("bbox/", "segm/"))} >= {"recall@16"}


def test_detections_carry_original_ids_and_sizes(
    evaluated: tuple[dict[str, float], Path], tiny_data: Path
) -> None:
    truth, results = tiny.read(tiny_data, "val"), results_of(evaluated[1])
    assert {result["image_id"] for result in results} == {image["id"] for image in truth["images"]}
    assert {result["category_id"] for result in results} <= {5, 7, 90}
    assert (
        max(Counter(result["image_id"] for result in results).values()) <= 8
    )  # box_head.detections
    for result in results:
        assert set(result) == {"image_id", "category_id", "bbox", "score", "segmentation"}
        x, y, width, height = result["bbox"]
        assert 0 <= x <= x + width <= 128
        assert 0 <= y <= y + height <= 128
        assert rle_ops.decode(result["segmentation"]).shape == (128, 128)
        assert 0.01 <= result["score"] <= 1
    pairs = Counter(
        (result["image_id"], *result["bbox"], result["category_id"]) for result in results
    )
    assert set(pairs.values()) == {1}


def test_every_image_and_annotation_counts_once(
    moved: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the ground truth in the place of the network's results AP is 1 exactly: nothing is left
    out or counted twice."""
    truth = tiny.read(tiny_data, "val")
    asked: list[int] = []

    def results(image_id: int) -> list[dict[str, Any]]:
        asked.append(image_id)
        keys = ("image_id", "category_id", "bbox", "segmentation")
        return [
            {**{key: a[key] for key in keys}, "score": 1.0}
            for a in kept
            if a["image_id"] == image_id
        ]

    def found(self: Predictor, batch: Batch, prediction: Any) -> Iterator[tuple[int, Any]]:
        seen = SimpleNamespace(to_coco=results, depth_map=None)
        return ((row, seen) for row in np.flatnonzero(batch.valid).tolist())

    kept = truth["annotations"]
    monkeypatch.setattr(Predictor, "found", found)
    metrics = evaluate(moved, figures=0, boundary=True, out=tmp_path / "eval")
    assert sorted(asked) == sorted(image["id"] for image in truth["images"])
    assert len(results_of(tmp_path / "eval")) == len(truth["annotations"])
    for key, value in metrics.items():
        if "/AP" in key:
            assert value in (1.0, -1.0), key  # -1: there is no object of this size
    assert metrics["bbox/AP"] == metrics["segm/AP"] == metrics["boundary/AP"] == 1.0
    assert (
        f"8 images, {len(truth['annotations'])} annotations, {len(truth['annotations'])} detections"
        in capsys.readouterr().out
    )

    # And AP tells when something is amiss: without the result of annotation 0, recall is not
    # complete.
    kept = kept[1:]
    fewer = evaluate(moved, figures=0, out=tmp_path / "eval")
    assert fewer["bbox/AR100"] < 1


def test_pictures_and_curves_are_drawn(evaluated: tuple[dict[str, float], Path]) -> None:
    folder = evaluated[1] / "figures"
    for name in (
        "detections_1.png",
        "proposals_1.png",
        "curves_rpn.png",
        "curves_box.png",
        "curves_mask.png",
    ):
        assert cv2.imread(str(folder / name)).std() > 0, name


def test_the_page_shows_this_evaluation(
    evaluated: tuple[dict[str, float], Path], tiny_data: Path
) -> None:
    """In a file that holds the run's figures, curves and config, and its own images."""
    metrics, out = evaluated
    page = (out / "report.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    truth = tiny.read(tiny_data, "val")
    for kind in ("bbox", "segm"):
        expected = [
            None
            if metrics[f"{kind}/{name}"] < 0
            else pytest.approx(metrics[f"{kind}/{name}"], abs=1e-5)
            for name in FIGURES
        ]
        assert list(data["figures"][kind].values()) == expected
    assert data["recall"]["recall@16"] == pytest.approx(metrics["recall@16"], abs=1e-5)
    assert [stage["stage"] for stage in data["training"]] == list(tiny.STAGES)
    assert data["config"]["name"] == "tiny"
    assert data["totals"]["detections"] == len(results_of(out))
    images = data["gallery"]["images"]
    assert len(images) == data["gallery"]["ranked"] > 4
    for image in images:  # each with its own pixels
        stored = cv2.imread(str(tiny_data / "images" / image["name"]))
        shown = cv2.imdecode(
            np.frombuffer(base64.b64decode(image["jpeg"]), np.uint8), cv2.IMREAD_COLOR
        )
        assert np.abs(stored.astype(float) - shown).mean() < 12
        number = next(i["id"] for i in truth["images"] if i["file_name"] == image["name"])
        assert len(image["objects"]) == sum(a["image_id"] == number for a in truth["annotations"])


def test_images_of_crowds_alone_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """They show as little as images without annotations, unless there are no others."""
    crowd = ObjectRecord(1, 1, (0.0, 0.0, 4.0, 4.0), None, True, 16.0)
    lists = [(crowd,), (), (crowd, replace(crowd, iscrowd=False))]
    shown: list[list[int]] = []

    def read(split: Any, chosen: list[int], data: Any) -> Any:
        shown.append(chosen)
        raise InterruptedError  # no more is asked

    monkeypatch.setattr(views, "read_images", read)
    run: Any = SimpleNamespace(config=SimpleNamespace(data=None))
    arguments = evaluation.Arguments(workdir=Path("none"), figures=8)
    for count in (3, 2):
        images = [ImageRecord(i, "a.png", 8, 8, lists[i], depth_file="a") for i in range(count)]
        split: Any = SimpleNamespace(dataset=SimpleNamespace(images=images))
        found: Any = SimpleNamespace(proposals=dict.fromkeys(range(count)))
        with pytest.raises(InterruptedError):
            evaluation.draw(found, run, split, Path("none"), [], arguments)
        alone: Any = SimpleNamespace(mesh=None)
        with pytest.raises(InterruptedError):
            evaluation.draw_depth(alone, run, split, Path("none"), arguments)
    assert shown == [[2], [2], [0, 1], [0, 1]]


def test_data_of_boxes_alone_give_no_masks(
    tiny_config: Config,
    tiny_data: Path,
    tmp_path: Path,
    programs: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The mask head that they leave random shows nowhere, and the best checkpoint is that of the
    best box AP."""
    for split in ("train", "val"):
        content = tiny.read(tiny_data, split)
        for annotation in content["annotations"]:
            del annotation["segmentation"]
        path = tiny.annotations(tmp_path, split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(tiny_data / "images")
    data = replace(tiny_config.data, root=str(tmp_path), cache=str(tmp_path / "cache"))
    rpn, box, mask = tiny_config.stages
    stages = (rpn, replace(box, epochs=3), mask)
    config = replace(tiny_config, data=data, stages=stages, evaluate_every_epochs=1)
    run = tmp_path / "run"
    loop.train(replace(config, keep_checkpoints=1), run)
    rows = {
        row["step"]: row["bbox/AP"]
        for row in read_metrics(run)
        if row["stage"] == "box" and row["split"] == "val"
    }
    best = load_run(run, "best")
    assert len(set(rows.values())) > 1
    assert rows[best.meta.stage_step] == best.meta.ap == max(rows.values())
    assert best.trained == {"rpn", "box"}

    capsys.readouterr()
    metrics = evaluate(run, figures=1, report_images=2)
    printed = capsys.readouterr().out
    assert ": not trained yet, so random: mask; masks are left out\n" in printed
    assert metrics["bbox/AP"] == rows[18]
    assert metrics["segm/AP"] == -1
    assert not [name for name in metrics if name.startswith("at_score/segm")]
    results = results_of(run / "eval")
    assert results
    assert not any("segmentation" in result for result in results)
    assert (run / "eval" / "report.html").exists()
    # Where objects have masks, too: not 0, which a mask head could have reached.
    annotations = tiny.annotations(tiny_data, "val")
    images = tiny_data / "images"
    metrics = evaluate(run, annotations=annotations, images=images, figures=0, boundary=True)
    assert metrics["bbox/AP"] == rows[18]
    assert metrics["segm/AP"] == -1
    assert not [name for name in metrics if name.startswith(("segm/AP/", "boundary"))]

    model = Model(load_run(run))
    image = cv2.imread(str(next((tiny_data / "images").iterdir())))
    whole, tiled = model.predict(image), model.predict(image, tile=96)
    for found in (whole, tiled, model.predict(image, flip=True)):
        assert found.masks is None
        assert len(found.boxes) > 0
    out = tmp_path / "model.jaxexport"
    export.run(export.Arguments(workdir=run, out=out))
    exported = ExportedModel(out).predict(image)
    assert "masks" not in exported
    np.testing.assert_allclose(exported["boxes"], whole.boxes, atol=1e-3)


def test_part_of_the_training_split(moved: Path, tiny_data: Path) -> None:
    evaluate(moved, split="train", limit=4, figures=0)
    out = moved / "eval_train_first4"
    first = sorted(image["id"] for image in tiny.read(tiny_data, "train")["images"])[:4]
    assert {result["image_id"] for result in results_of(out)} == set(first)
    # a part does not stand for it
    assert "checkpoint" not in json.loads((out / "metrics.json").read_text())


def test_another_data_set(
    moved: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same categories it is evaluated like the run's own, under whatever ids; with another
    one it is refused."""
    content = tiny.read(tiny_data, "val")
    content["images"] = content["images"][:2]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [
        annotation for annotation in content["annotations"] if annotation["image_id"] in ids
    ]
    first = content["annotations"][0]
    content["annotations"] += [first | {"id": 1000 + n} for n in range(9)]
    most = sum(a["image_id"] == first["image_id"] for a in content["annotations"])
    path = tmp_path / "other.json"
    new = {5: 2, 7: 1, 90: 0}
    renumbered = content | {
        "categories": [{**c, "id": new[c["id"]]} for c in content["categories"]],
        "annotations": [
            {**a, "category_id": new[a["category_id"]]} for a in content["annotations"]
        ],
    }
    path.write_text(json.dumps(renumbered))
    metrics = evaluate(
        moved, annotations=path, images=tiny_data / "images", figures=0, out=tmp_path / "eval"
    )
    results = results_of(tmp_path / "eval")
    assert {result["image_id"] for result in results} == ids
    for kind in ("bbox", "segm"):
        expected = pycocotools_figures(renumbered, results, kind)
        assert [metrics[f"{kind}/{name}"] for name in FIGURES] == pytest.approx(expected.tolist())
    printed = capsys.readouterr().out
    assert "repaired 3: categories with other ids in the run: matched by their names" in printed
    assert (
        f"model.box_head.detections = 8: images with more objects: 1 (up to {most} in one): no "
        f"more can be found; set it to {most} or more ({first['image_id']})\n" in printed
    )
    assert "mask_head.samples" not in printed  # of training
    assert "\nthe best 100 detections of a class in an image count (COCO's limit)\n" in printed

    content["categories"][0]["name"] = "circle"
    path.write_text(json.dumps(content))
    with pytest.raises(
        ConfigError,
        match=r"other\.json: categories that the run does not have: 5 'circle' \(there 'disc'\)$",
    ):
        evaluate(moved, annotations=path, images=tiny_data / "images", out=tmp_path / "eval")
    with pytest.raises(ConfigError, match="--annotations and --images go together"):
        evaluate(moved, annotations=path, out=tmp_path / "eval")
    with pytest.raises(ConfigError, match="--limit: 0: must be at least 1"):
        evaluate(moved, limit=0, out=tmp_path / "eval")
    with pytest.raises(ConfigError, match="--figures: -1: must be at least 0"):
        evaluate(moved, figures=-1, out=tmp_path / "eval")
    with pytest.raises(ConfigError, match="--report-images: -1: must be at least 0"):
        evaluate(moved, report_images=-1, out=tmp_path / "eval")
    with pytest.raises(ConfigError, match=r"--score: 1.5: must be in 0\.\.1"):
        evaluate(moved, score=1.5, out=tmp_path / "eval")


def test_fewer_categories(
    moved: Path,
    evaluated: tuple[dict[str, float], Path],
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A data set with some of the run's categories is evaluated by those, as COCO does; the same id
    under another name is none of them. The run's own evaluation stays."""
    content = tiny.read(tiny_data, "val")
    content["categories"] = [category for category in content["categories"] if category["id"] != 7]
    content["annotations"] = [
        annotation for annotation in content["annotations"] if annotation["category_id"] != 7
    ]
    path = tmp_path / "fewer.json"
    path.write_text(json.dumps(content))
    own = {file: file.read_bytes() for file in evaluated[1].rglob("*") if file.is_file()}
    metrics = evaluate(moved, annotations=path, images=tiny_data / "images", figures=2)
    assert {file: file.read_bytes() for file in evaluated[1].rglob("*") if file.is_file()} == own
    assert not (moved / "figures" / "detections_1.png").exists()
    assert (
        f"{path} has 2 of the run's 3 categories: detections of the others do not count\n"
        in capsys.readouterr().out
    )
    names = {category["name"] for category in content["categories"]}
    per_class = {key: value for key, value in metrics.items() if key[4:].startswith("/AP/")}
    assert {key.split("/")[2] for key in per_class} == names
    assert per_class == {key: value for key, value in evaluated[0].items() if key in per_class}
    assert any(result["category_id"] == 7 for result in results_of(moved / "eval_on_fewer"))

    content["categories"].append({"id": 6, "name": "hexagon"})
    path.write_text(json.dumps(content))
    with pytest.raises(
        ConfigError,
        match=r"fewer\.json: categories that the run does not have: 6 'hexagon' \(there None\)$",
    ):
        evaluate(moved, annotations=path, images=tiny_data / "images", out=tmp_path / "eval")


def test_results_of_another_file_are_not_replaced(
    moved: Path, tiny_data: Path, tmp_path: Path
) -> None:
    images = tiny_data / "images"
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(tiny.annotations(tiny_data, "val"), tmp_path / folder / "same.json")
    options = {"images": images, "figures": 0, "report_images": 0, "limit": 1}
    for _ in range(2):
        evaluate(moved, annotations=tmp_path / "a" / "same.json", **options)
    line = rf"^{moved}/eval_on_same_first1: holds the evaluation on {tmp_path}/a/same\.json \("
    with pytest.raises(ConfigError, match=line):
        evaluate(moved, annotations=tmp_path / "b" / "same.json", **options)
    raw = tmp_path / os.fsdecode(b"caf\xe9.json")  # no UTF-8
    shutil.copy(tmp_path / "a" / "same.json", raw)
    for _ in range(2):
        evaluate(moved, annotations=raw, **options)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "metrics.json").touch()
    with pytest.raises(ConfigError, match="own: holds the evaluation on the run's own images"):
        evaluate(moved, annotations=raw, out=tmp_path / "own", **options)
    (tmp_path / "predicted").mkdir()
    (tmp_path / "predicted" / "images.json").touch()
    with pytest.raises(ConfigError, match="predicted: holds predictions of images"):
        evaluate(moved, out=tmp_path / "predicted", limit=1)
    with pytest.raises(ConfigError, match="--split: of the run's own images: not with --annot"):
        evaluate(moved, split="train", annotations=tmp_path / "a" / "same.json", images=images)


def test_fewer_images_at_once_give_the_same(
    moved: Path, evaluated: tuple[dict[str, float], Path], tmp_path: Path
) -> None:
    metrics = evaluate(moved, eval_batch_size=1, figures=0, report_images=0, out=tmp_path / "one")
    assert metrics == pytest.approx(evaluated[0], abs=1e-4)


def test_the_average_of_weights_has_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside the current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert evaluation.of_weights(Path("."), "ema") == tmp_path / "here_ema"
    assert evaluation.of_weights(Path("."), "raw") == Path(".")


def test_results_need_a_folder(moved: Path, tmp_path: Path) -> None:
    """Said before any image is evaluated."""
    taken = tmp_path / "taken"
    taken.touch()
    with pytest.raises(ConfigError, match="taken: cannot be created: File exists"):
        evaluate(moved, out=taken)
