"""The page's tables and curves against pycocotools and plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import report_cases
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from report_cases import NAMES, answers_of, case, data_of

from mrcnn_jax.evaluation.average_precision import FIGURES
from mrcnn_jax.figures.page.contents import training_curves

TRUTH, RESULTS = case()
CATEGORIES = sorted(NAMES)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return data_of(TRUTH, RESULTS)


def test_objects_without_masks_are_shown_and_evaluated_by_their_boxes() -> None:
    """Perfect detections of objects that are boxes alone."""
    objects = [{**a, "segmentation": None} for a in TRUTH["annotations"] if not a["iscrowd"]]
    mask = RESULTS[0]["segmentation"]
    results = [
        {key: a[key] for key in ("image_id", "category_id", "bbox")}
        | {"score": 0.9, "segmentation": mask}
        for a in objects
    ]
    data = data_of({**TRUTH, "annotations": objects}, results)
    assert data["totals"]["objects"] == data["totals"]["detections"] == len(objects)
    assert sum(one["objects"] for one in data["classes"]) == len(objects)
    assert data["at_score"]["compared"] == "bbox"
    shown = data["gallery"]["images"]
    assert len(shown) == len({a["image_id"] for a in objects})
    assert {image["quality"] for image in shown} == {1.0}
    assert not any(o["crowd"] for image in shown for o in image["objects"])
    assert all(d["match"] is not None for image in shown for d in image["detections"])


def test_results_without_masks_have_no_figures_for_them_rather_than_zero() -> None:
    boxes = [{key: r[key] for key in r if key != "segmentation"} for r in RESULTS]
    data = data_of(TRUTH, boxes)
    assert not any(value for one in data["class_figures"]["segm"] for value in one.values())
    assert None in data["class_figures"]["segm"][0].values()
    assert data["precision"]["segm"] == [None] * (1 + len(CATEGORIES))
    assert any(data["precision"]["bbox"])
    nothing = data_of(TRUTH, [])  # is judged, by both
    assert nothing["class_figures"]["segm"][0]["AP"] == 0.0


def test_boundary_ap_has_its_row() -> None:
    figures = data_of(TRUTH, RESULTS, metrics={"boundary/AP": 0.25})["figures"]
    assert figures["boundary"]["AP"] == 0.25


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_tables_are_pycocotools_figures(data: dict[str, Any], kind: str) -> None:
    """Of all classes together, and of each class evaluated alone."""
    coco = COCO()
    coco.dataset = {
        **TRUTH,
        "annotations": [{**a, "id": a["id"] + 1} for a in TRUTH["annotations"]],
    }
    coco.createIndex()
    given = [
        {
            key: r[key]
            for key in (
                "image_id",
                "category_id",
                "score",
                "bbox" if kind == "bbox" else "segmentation",
            )
        }
        for r in RESULTS
    ]
    if kind == "bbox":
        for a in coco.dataset["annotations"]:
            assert (
                a["area"] == report_cases.mask_of(a).sum()
            )  # objects are small or large by the area in the file, also for boxes
    for chosen, got in [
        (CATEGORIES, data["figures"][kind]),
        *zip(([c] for c in CATEGORIES), data["class_figures"][kind], strict=True),
    ]:
        evaluation = COCOeval(coco, coco.loadRes([dict(result) for result in given]), kind)
        evaluation.params.catIds = chosen
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        expected = [
            None if value < 0 else pytest.approx(value, abs=1e-5) for value in evaluation.stats
        ]
        assert [got[name] for name in FIGURES[: len(got)]] == expected[: len(got)]
    assert data["class_figures"]["segm"][3] == dict.fromkeys(
        FIGURES[:6]
    )  # the class that is seen nowhere
    objects = [
        sum(a["category_id"] == c and not a["iscrowd"] for a in TRUTH["annotations"])
        for c in CATEGORIES
    ]
    assert data["classes"] == [
        {"name": NAMES[c], "objects": n} for c, n in zip(CATEGORIES, objects, strict=True)
    ]


def test_precision_curves_follow_the_detections_one_by_one(data: dict[str, Any]) -> None:
    answers = answers_of(TRUTH, RESULTS)
    curves = []
    for place, category in enumerate(CATEGORIES[:3], start=1):
        objects = sum(
            a["category_id"] == category and not a["iscrowd"] for a in TRUTH["annotations"]
        )
        rows = sorted(
            (-r["score"], a.annotation is not None)
            for r, a in zip(RESULTS, answers, strict=True)
            if r["category_id"] == category and not a.ignored
        )
        right = np.cumsum([true for _, true in rows])
        precision, recall = right / np.arange(1, len(rows) + 1), right / objects
        steps = [
            (recall >= r - 1e-12).argmax() if recall[-1] >= r - 1e-12 else None
            for r in np.linspace(0, 1, 101)
        ]
        curves.append([0.0 if i is None else precision[i:].max() for i in steps])
        got = data["precision"]["segm"][place]
        np.testing.assert_allclose(got["AP50"], curves[-1], rtol=1e-4)
        np.testing.assert_allclose(
            got["scores"], [0.0 if i is None else -rows[i][0] for i in steps], rtol=1e-4
        )
        for name in ("AP50", "AP75"):
            assert np.mean(got[name]) == pytest.approx(
                data["class_figures"]["segm"][place - 1][name], abs=1e-4
            )
        assert np.mean(got["mean"]) == pytest.approx(
            data["class_figures"]["segm"][place - 1]["AP"], abs=1e-4
        )
    np.testing.assert_allclose(
        data["precision"]["segm"][0]["AP50"], np.mean(curves, axis=0), rtol=1e-4
    )
    assert 0.2 < np.mean(curves) < 0.9
    assert data["precision"]["segm"][4] is None


def test_histogram_counts_each_counted_detection_once(data: dict[str, Any]) -> None:
    answers = answers_of(TRUTH, RESULTS)
    assert any(answer.ignored for answer in answers)
    expected = np.zeros((5, 2, 20), int)
    for result, answer in zip(RESULTS, answers, strict=True):
        if not answer.ignored:
            for place in (0, 1 + CATEGORIES.index(result["category_id"])):
                expected[place, int(answer.annotation is None), int(result["score"] * 20)] += 1
    assert [
        [counts["true"], counts["false"]] for counts in data["histogram"]["segm"]
    ] == expected.tolist()
    whole = data_of(TRUTH, [{**RESULTS[0], "score": 1.0}])["histogram"]["segm"][0]
    assert whole["true"][-1] + whole["false"][-1] == 1  # a score of 1 is in the last bin


def test_rates_at_a_score_are_those_of_its_matrix(data: dict[str, Any]) -> None:
    """Which has each object once, and each detection of the histogram from this score on."""
    found = data["at_score"]
    counts = np.array(found["counts"])
    assert (found["score"], found["compared"]) == (0.5, "segm")
    assert found["names"] == [one["name"] for one in data["classes"]]
    assert counts[:4].sum(axis=1).tolist() == [one["objects"] for one in data["classes"]]
    for k in range(4):
        bins = data["histogram"]["segm"][k + 1]
        right, wrong = (sum(bins[name][10:]) for name in ("true", "false"))
        assert (counts[k, k], counts[:, k].sum()) == (right, right + wrong)
        rates = found["rates"][k]
        if k == 3:
            assert rates == {"precision": None, "recall": None, "F1": None}
            continue
        assert rates["precision"] == pytest.approx(right / (right + wrong), abs=1e-5)
        assert rates["recall"] == pytest.approx(right / data["classes"][k]["objects"], abs=1e-5)
        parts = 1 / rates["precision"] + 1 / rates["recall"]
        assert rates["F1"] == pytest.approx(2 / parts, abs=1e-4)
    right, objects = np.diagonal(counts)[:3].sum(), sum(one["objects"] for one in data["classes"])
    assert found["rates"][4]["recall"] == pytest.approx(right / objects, abs=1e-5)


def test_training_curves_are_means_and_ranges_of_steps() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 3, 1000)
    values[400] = np.nan
    rows: list[dict[str, Any]] = [
        {"stage": "rpn", "step": 7, "split": "train", "loss/total": 99.0}
    ]  # seen again after a resume
    rows += [
        {"stage": "rpn", "step": i + 1, "split": "train", "loss/total": v, "learning_rate": 0.1}
        for i, v in enumerate(values)
    ]
    rows += [
        {
            "stage": "rpn",
            "step": 500 * i,
            "split": "val",
            "loss/total": 0.5 / i,
            "recall@50": 0.4,
            "recall@50/small": 0.1,
        }
        for i in (1, 2)
    ]
    rows += [{"stage": "mask", "step": 1, "split": "train", "loss/mask": 0.7}]
    rows += [
        {"stage": "joint", "step": i, "split": "val", "segm/AP": 0.3 / i, "segm/AP50": 0.9}
        for i in (2, 3)
    ]
    rpn, mask, joint = training_curves(rows)
    assert [panel["title"] for panel in rpn["panels"]] == [
        "total loss",
        "recall@50 of the proposals (validation, IoU .5)",
    ]
    train, val = rpn["panels"][0]["series"]
    finite = np.isfinite(values)
    windows = np.array_split(values[finite], 80)
    for name, function in (("y", np.mean), ("low", np.min), ("high", np.max)):
        np.testing.assert_allclose(train[name], [function(window) for window in windows], rtol=1e-4)
    np.testing.assert_allclose(
        train["x"], [w.mean() for w in np.array_split(np.flatnonzero(finite) + 1.0, 80)], rtol=1e-4
    )
    assert (val["x"], val["y"]) == ([500, 1000], [0.5, 0.25])
    assert [(s["name"], s["y"]) for s in rpn["panels"][1]["series"]] == [
        ("all", [0.4, 0.4]),
        ("small", [0.1, 0.1]),
    ]
    assert mask["panels"] == [
        {
            "title": "mask loss",
            "label": "loss",
            "series": [{"name": "training", "x": [1], "y": [0.7]}],
        }
    ]
    series = [{"name": "masks", "x": [2, 3], "y": [0.15, 0.1]}]
    assert joint["panels"] == [
        {"title": "average precision (validation, IoU .50:.95)", "label": "AP", "series": series}
    ]
