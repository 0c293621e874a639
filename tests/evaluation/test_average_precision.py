"""AP against pycocotools used directly, the reference figures of its authors, and ground truth fed
back as detections."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.evaluation.average_precision import (
    FIGURES,
    coco_figures,
    detection_limit,
    limit_line,
    mask_score,
    match_results,
    table,
)
from mrcnn_jax.evaluation.coco_categories import COCO as COCO_CATEGORIES
from mrcnn_jax.pixels.rle import paste_rle, segmentation_rle
from mrcnn_jax.pixels.transforms import coverage

NAMES = {3: "cat", 8: "dog"}
SIZE = (100, 140)


def evaluate(*files: Any, **options: Any) -> dict[str, float]:
    return coco_figures(match_results(*files, **options))


def _blob(rng: np.random.Generator) -> dict[str, Any]:
    """An ellipse of random place, size and proportions, as RLE."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    cx, cy, rx, ry = rng.uniform(20, 120), rng.uniform(20, 80), *rng.uniform(4, 55, 2)
    inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
    rle = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
    return {"size": list(SIZE), "counts": rle["counts"].decode()}


def _annotation(
    number: int, image: int, category: int, rle: dict[str, Any], **more: Any
) -> dict[str, Any]:
    area, box = float(coco_mask.area(rle)), coco_mask.toBbox(rle).tolist()
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": rle,
        "bbox": box,
        "area": area,
        "iscrowd": 0,
        **more,
    }


def _ground_truth(first_id: int = 1, images: int = 6) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    annotations = [
        _annotation(first_id + 3 * image + k, image, (3, 8)[rng.integers(2)], _blob(rng))
        for image in range(images)
        for k in range(3)
    ]
    return {
        "images": [
            {"id": i, "height": SIZE[0], "width": SIZE[1], "file_name": f"{i}.jpg"}
            for i in range(images + 1)
        ],  # one is empty
        "categories": [{"id": i, "name": name} for i, name in NAMES.items()],
        "annotations": annotations,
    }


def _as_results(ground_truth: dict[str, Any]) -> list[dict[str, Any]]:
    sizes = {image["id"]: (image["height"], image["width"]) for image in ground_truth["images"]}
    return [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 1.0,
            "segmentation": segmentation_rle(a["segmentation"], sizes[a["image_id"]]),
        }
        for a in ground_truth["annotations"]
        if not a["iscrowd"]
    ]


def _perturbed(ground_truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Shifted copies of the objects, wrong classes, duplicates and inventions, with scores that mix
    them."""
    rng = np.random.default_rng(1)
    results = []
    for annotation in ground_truth["annotations"]:
        for _ in range(rng.integers(0, 4)):
            mask = np.roll(
                coco_mask.decode(annotation["segmentation"]), tuple(rng.integers(-6, 7, 2)), (0, 1)
            )
            rle = coco_mask.encode(np.asfortranarray(mask))
            results.append(
                _annotation(
                    0,
                    annotation["image_id"],
                    annotation["category_id"] if rng.uniform() < 0.8 else 3,
                    rle,
                )
            )
    results += [
        _annotation(0, int(rng.integers(7)), (3, 8)[rng.integers(2)], _blob(rng)) for _ in range(10)
    ]
    keys = ("image_id", "category_id", "bbox", "segmentation")
    return [{**{key: r[key] for key in keys}, "score": float(rng.uniform())} for r in results]


def _direct(ground_truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy({"info": {}, **ground_truth})
        coco.createIndex()
        wanted = [
            {key: value for key, value in r.items() if kind == "bbox" or key != "bbox"}
            for r in copy.deepcopy(results)
        ]
        evaluation = COCOeval(coco, coco.loadRes(wanted), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_equal_pycocotools_used_directly(kind: Any) -> None:
    truth = _ground_truth()
    truth["annotations"][4]["iscrowd"] = 1
    results = _perturbed(truth)
    metrics = evaluate(truth, results, iou_types=(kind,))
    direct = _direct(truth, results, kind)
    assert 0.05 < direct.stats[0] < 0.95
    assert len(set(direct.stats)) > 8
    assert [metrics[f"{kind}/{figure}"] for figure in FIGURES] == direct.stats.tolist()
    for i, name in enumerate(NAMES.values()):
        assert metrics[f"{kind}/AP/{name}"] == direct.eval["precision"][:, :, i, 0, 2].mean()
    assert set(metrics) == {f"{kind}/{figure}" for figure in (*FIGURES, "AP/cat", "AP/dog")}


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_masks_are_ranked_by_their_own_scores(kind: Any) -> None:
    """As pycocotools ranks results that have only these; boxes by the scores of their classes."""
    truth = _ground_truth()
    rng = np.random.default_rng(5)
    results = [
        {**result, "mask_score": result["score"] * rng.uniform()} for result in _perturbed(truth)
    ]
    own = "score" if kind == "bbox" else "mask_score"
    keys = ("image_id", "category_id", "bbox", "segmentation")
    plain = [{**{key: one[key] for key in keys}, "score": one[own]} for one in results]
    metrics = evaluate(truth, results, iou_types=(kind,))
    direct = _direct(truth, plain, kind)
    assert [metrics[f"{kind}/{figure}"] for figure in FIGURES] == direct.stats.tolist()
    other = {"bbox": "mask_score", "segm": "score"}[kind]
    swapped = [{**one, "score": one[other], "mask_score": one[other]} for one in results]
    assert evaluate(truth, swapped, iou_types=(kind,)) != metrics
    first = match_results(truth, results, iou_types=(kind,))[kind].cocoDt.anns[1]
    assert first["score"] == results[0][own]
    with pytest.raises(ConfigError, match=r"^results: image_id 0: mask_score nan: not a finite"):
        evaluate(truth, [{**results[0], "image_id": 0, "mask_score": math.nan}])


def test_by_hand_a_better_mask_comes_first() -> None:
    """Two detections of one object: the better class score has the mask that misses it."""
    truth = _ground_truth(images=1)
    truth["annotations"] = truth["annotations"][:1]
    (right,) = _as_results(truth)
    missed = coco_mask.encode(np.asfortranarray(1 - coco_mask.decode(right["segmentation"])))
    wrong = {**right, "segmentation": missed}
    found = [{**wrong, "score": 0.9}, {**right, "score": 0.8}]
    assert evaluate(truth, found)["segm/AP"] == pytest.approx(0.5, abs=0.01)
    scored = [{**one, "mask_score": score} for one, score in zip(found, (0.3, 0.7), strict=True)]
    metrics = evaluate(truth, scored)
    assert metrics["segm/AP"] == pytest.approx(1)
    assert metrics["bbox/AP"] == pytest.approx(1)
    assert mask_score(scored[0]) == 0.3
    assert mask_score(found[0]) == 0.9


@pytest.mark.data
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_reference_figures_of_the_coco_api(data_folder: Path, kind: Any) -> None:
    folder = data_folder / "cocoapi_eval"
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
    reference = json.loads((folder / f"pycocotools_stats_{kind}.json").read_text())
    metrics = evaluate(truth, results, iou_types=(kind,))
    assert len(reference) == 12
    np.testing.assert_allclose(
        [metrics[f"{kind}/{figure}"] for figure in FIGURES], reference, atol=1e-6, rtol=0
    )


@pytest.mark.data
def test_ground_truth_of_coco300_is_its_own_best_detection(data_folder: Path) -> None:
    truth = json.loads((data_folder / "coco300/annotations/instances_val.json").read_text())
    metrics = evaluate(truth, _as_results(truth))
    assert metrics["bbox/AP"] == 1.0
    assert metrics["segm/AP"] == 1.0


@pytest.mark.data
@pytest.mark.parametrize(("cells", "least"), [(112, 0.998), (28, 0.995)])
def test_ground_truth_of_coco300_through_crop_and_paste(
    data_folder: Path, cells: int, least: float
) -> None:
    """The fixed size of masks costs this much AP before any model is involved."""
    truth = json.loads((data_folder / "coco300/annotations/instances_val.json").read_text())
    results = _as_results(truth)
    for result in results:
        x, y, w, h = result["bbox"]
        mask = coco_mask.decode(result["segmentation"])
        crop = coverage(mask, (x, y, x + w, y + h), cells).astype(np.float32) / 255
        result["segmentation"] = paste_rle(
            crop, np.array([x, y, x + w, y + h]), tuple(result["segmentation"]["size"])
        )
    metrics = evaluate(truth, results, iou_types=("segm",))
    print(
        f"ground truth through {cells} x {cells} crops: mask AP {metrics['segm/AP']:.4f},"
        f" AP75 {metrics['segm/AP75']:.4f}"
    )
    assert least <= metrics["segm/AP"] <= 1.0


def test_ground_truth_as_detections_gives_one() -> None:
    truth = _ground_truth()
    metrics = evaluate(truth, _as_results(truth))
    for figure in ("AP", "AP50", "AP75", "AR100", "AP/cat", "AP/dog"):
        assert metrics[f"bbox/{figure}"] == metrics[f"segm/{figure}"] == 1.0


def test_annotation_id_zero_counts() -> None:
    for ids in (0, -9):
        truth = _ground_truth(first_id=ids)
        assert evaluate(truth, _as_results(truth))["segm/AP"] == 1.0
    assert (
        _direct(_ground_truth(first_id=0), _as_results(truth), "segm").stats[0] < 1.0
    )  # why the annotations are numbered anew


def test_no_detections_give_zero() -> None:
    truth = _ground_truth()
    metrics = evaluate(truth, [])
    assert {metrics[f"{kind}/{figure}"] for kind in ("bbox", "segm") for figure in FIGURES} <= {
        0.0,
        -1.0,
    }
    assert metrics["bbox/AP"] == metrics["segm/AP"] == metrics["segm/AP/cat"] == 0.0


def test_what_has_no_ground_truth_is_undefined_and_takes_no_part() -> None:
    truth = _ground_truth()
    truth["categories"].append({"id": 50, "name": "unicorn"})
    results = _as_results(truth)
    metrics = evaluate(truth, [*results, {**results[0], "category_id": 50}])
    assert metrics["bbox/AP"] == metrics["segm/AP"] == 1.0
    assert not any(key.endswith("unicorn") for key in metrics)
    nothing = evaluate({**truth, "annotations": []}, results)
    assert set(nothing.values()) == {-1.0}
    assert len(nothing) == 24


def test_input_stays_as_it_was_and_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    truth = _ground_truth()
    results = _perturbed(truth)
    before = copy.deepcopy((truth, results))
    evaluate(truth, results)
    assert (truth, results) == before
    assert capsys.readouterr().out == ""


def test_area_and_crowd_flag_may_be_missing() -> None:
    truth = _ground_truth()
    results = _perturbed(truth)
    bare = copy.deepcopy(truth)
    for annotation in bare["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    assert evaluate(bare, results) == evaluate(truth, results)


def test_sizes_of_detections_go_by_what_is_evaluated() -> None:
    """A false positive of 40 x 40 px, a third of it filled: its box is medium, its mask small, and
    it counts among those."""
    truth = _ground_truth()
    mask = np.zeros(SIZE, np.uint8)
    mask[0:40:3, 0:40] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    extra = {"image_id": 1, "category_id": 3, "bbox": [0.0, 0.0, 40.0, 40.0], "score": 1.0}
    extra["segmentation"] = {"size": list(SIZE), "counts": rle["counts"].decode()}
    assert coco_mask.area(rle) < 32**2 < 40 * 40
    results = [*_perturbed(truth), extra]
    metrics = evaluate(truth, results)
    for kind in ("bbox", "segm"):
        assert [metrics[f"{kind}/{figure}"] for figure in FIGURES] == _direct(
            truth, results, kind
        ).stats.tolist()


def test_a_box_without_a_mask_is_ignored_for_masks_only() -> None:
    truth = _ground_truth()
    results = _as_results(truth)
    del truth["annotations"][0]["segmentation"]
    truth["annotations"][5]["segmentation"] = []
    found_wrongly = {
        **results[0],
        "score": 2.0,
    }  # on the object whose mask is unknown: neither right nor wrong
    metrics = evaluate(truth, [found_wrongly, *results[1:5], *results[6:]])
    assert metrics["segm/AP"] == 1.0
    assert metrics["bbox/AP"] < 1.0  # object 5 was not found


def test_categories_of_one_name_are_told_apart() -> None:
    truth = _ground_truth()
    truth["categories"] = [{"id": 3, "name": "cat"}, {"id": 8, "name": "cat"}]
    metrics = evaluate(truth, _as_results(truth), iou_types=("bbox",))
    assert [key for key in metrics if key.startswith("bbox/AP/")] == [
        "bbox/AP/cat (3)",
        "bbox/AP/cat (8)",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 77}, "results: image_id 77: not in the ground truth"),
        ({"category_id": 4}, r"results: category_id 4 \(image 0\): not in the ground truth"),
        ({"segmentation": None}, "results: image_id 0: segmentation"),
        (
            {"segmentation": {"size": [5, 5], "counts": "abc"}},
            r"results: image_id 0: segmentation: an RLE of size \[5, 5\]",
        ),
    ],
)
def test_results_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    truth = _ground_truth()
    with pytest.raises(ConfigError, match=message):
        evaluate(truth, [{**_as_results(truth)[0], **change}])


def test_a_result_without_a_box_is_refused_for_boxes() -> None:
    truth = _ground_truth()
    results = _as_results(truth)
    del results[0]["bbox"]
    assert evaluate(truth, results, iou_types=("segm",))["segm/AP"] == 1.0
    with pytest.raises(ConfigError, match="results: image_id 0: no bbox"):
        evaluate(truth, results)


def test_annotations_that_do_not_fit_are_refused() -> None:
    truth = _ground_truth()
    truth["annotations"][2]["segmentation"] = "polygon"
    with pytest.raises(ConfigError, match=r"annotation 3 \(image 0\): segmentation"):
        evaluate(truth, [])
    truth["annotations"][2]["image_id"] = 99
    with pytest.raises(ConfigError, match=r"annotation 3 \(image 99\): no such image"):
        evaluate(truth, [], iou_types=("bbox",))


@pytest.mark.parametrize("score", [float("nan"), float("inf"), None, "0.5"])
def test_a_score_that_is_not_finite_is_refused(score: Any) -> None:
    truth = _ground_truth()
    results = _as_results(truth)
    results[3]["score"] = score
    with pytest.raises(ConfigError, match=r"results: image_id 1: score .*: not a finite number"):
        evaluate(truth, results)
    results[3] |= {"score": 0.5, "bbox": [0.0, 0.0, float("nan"), 5.0]}
    with pytest.raises(ConfigError, match=r"results: image_id 1: bbox .*: not finite"):
        evaluate(truth, results)


def _dense(objects: int, categories: tuple[tuple[int, str], ...]) -> tuple[dict, list[dict]]:
    """One image with squares of the first category, and each found exactly, the scores falling."""
    truth: dict[str, Any] = {
        "images": [{"id": 1, "height": 150, "width": 150, "file_name": "a.png"}],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [],
    }
    for k in range(objects):
        x, y = 8.0 * (k % 18), 8.0 * (k // 18)
        truth["annotations"].append(
            {
                "id": k + 1,
                "image_id": 1,
                "category_id": categories[0][0],
                "bbox": [x, y, 6.0, 6.0],
                "area": 36.0,
                "iscrowd": 0,
                "segmentation": [[x, y, x + 6, y, x + 6, y + 6, x, y + 6]],
            }
        )
    results = [{**a, "score": 1 - a["id"] / 1000} for a in truth["annotations"]]
    return truth, results


def test_as_many_detections_count_as_an_image_has_objects_of_a_class() -> None:
    """125 objects found exactly are an AP of 1. COCO's limit finds 100, a recall of .8: precision
    is 1 at the recalls 0, .01, ..., .80, which are 81 of 101."""
    truth, results = _dense(125, ((1, "cell"), (2, "other")))
    evaluations = match_results(truth, results, iou_types=("bbox", "segm", "boundary"))
    metrics = coco_figures(evaluations)
    for kind in evaluations:
        values = {key.split("/", 1)[1]: v for key, v in metrics.items() if key.startswith(kind)}
        assert values.keys() == {*FIGURES, "AR125", "AP@100", "AP/cell"}
        assert values["AP"] == values["APs"] == values["AR125"] == values["AP/cell"] == 1.0
        assert values["AP@100"] == pytest.approx(81 / 101)
        assert values["AR100"] == pytest.approx(0.8)
    lines = [line.split() for line in table(metrics).splitlines()]
    assert ["AR1", "AR10", "AR100", "AR125", "ARs", "ARm", "ARl"] in lines
    assert limit_line(evaluations) == (
        "the best 125 detections of a class in an image count, as many as there are objects, "
        "instead of COCO's 100: box AP 100.0, with 100 80.2; mask AP 100.0, with 100 80.2; "
        "boundary AP 100.0, with 100 80.2"
    )
    # The limit is that of the objects, also if there are fewer detections.
    assert evaluate(truth, results[:25])["bbox/AR125"] == pytest.approx(0.2)


def test_up_to_100_objects_of_a_class_and_in_coco_the_limit_is_100() -> None:
    """Also where the classes of an image have more together, or its crowds are more."""
    truth, results = _dense(102, ((1, "cell"), (2, "other")))
    assert detection_limit(truth) == 102
    for annotation in truth["annotations"][:2]:
        annotation["category_id"] = 2
    assert detection_limit(truth) == 100
    truth["annotations"][2] |= {"category_id": 2, "iscrowd": 1}
    assert detection_limit(truth) == 100
    evaluations = match_results(truth, results, iou_types=("bbox",))
    assert coco_figures(evaluations).keys() & {"bbox/AR102", "bbox/AP@100"} == set()
    assert limit_line(evaluations) == (
        "the best 100 detections of a class in an image count (COCO's limit)"
    )
    truth, results = _dense(110, COCO_CATEGORIES)
    assert detection_limit(truth) == 100
    assert evaluate(truth, results)["bbox/AP"] == _direct(truth, results, "bbox").stats[0] < 0.92
    truth["categories"].pop()
    assert detection_limit(truth) == 110, "a part of COCO's categories is another data set"


def test_table_shows_percent_and_dashes() -> None:
    metrics = {f"{kind}/{figure}": 0.1234 for kind in ("bbox", "segm") for figure in FIGURES}
    metrics |= {
        "bbox/APl": -1.0,
        "segm/AR1": 1.0,
        "bbox/AP/streetcar": 0.5,
    }
    lines = table(metrics).splitlines()
    assert [line.split() for line in lines] == [
        ["AP", "AP50", "AP75", "APs", "APm", "APl"],
        ["box", *["12.3"] * 5, "-"],
        ["mask", *["12.3"] * 6],
        ["AR1", "AR10", "AR100", "ARs", "ARm", "ARl"],
        ["box", *["12.3"] * 6],
        ["mask", "100.0", *["12.3"] * 5],
    ]
    assert len({len(line) for line in lines}) == 1
