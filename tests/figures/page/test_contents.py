"""The page's numbers against pycocotools and plain loops, and its HTML against what its texts try
to do."""

from __future__ import annotations

import base64
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import report_cases
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from report_cases import NAMES, SIZE, case, data_of, instance, judged, picture

from mrcnn_jax.evaluation.average_precision import FIGURES, judge
from mrcnn_jax.figures import page
from mrcnn_jax.figures.page import render
from mrcnn_jax.figures.page.contents import image_qualities, outline, report_data, training_curves

TRUTH, RESULTS = case()
CATEGORIES = sorted(NAMES)


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    return data_of(TRUTH, RESULTS)


# -- numbers ---------------------------------------------------------------------------------------


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
    answers = judged(TRUTH, RESULTS)
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


def test_histogram_counts_each_judged_detection_once(data: dict[str, Any]) -> None:
    answers = judged(TRUTH, RESULTS)
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


# -- images ----------------------------------------------------------------------------------------


def _strip(start: int, stop: int) -> np.ndarray:
    """Columns `start` to `stop` of a band 20 pixels high: IoUs are ratios of lengths."""
    mask = np.zeros(SIZE, bool)
    mask[10:30, start:stop] = True
    return mask


def _handmade() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    objects = [
        instance(_strip(0, 10), 0, 3),
        instance(_strip(20, 40), 0, 8),  # is missed
        instance(_strip(0, 10), 1, 3),
        instance(_strip(40, 100), 1, 3, iscrowd=1),
        instance(_strip(0, 10), 3, 3),
        instance(_strip(0, 10), 5, 3),
        instance(_strip(20, 30), 5, 3),
    ]
    results = [
        instance(_strip(0, 8), 0, 3, score=0.9),  # IoU .8
        instance(_strip(0, 10), 0, 3, score=0.6),  # finds it taken
        instance(_strip(20, 40), 0, 8, score=0.49),  # too low to count
        instance(_strip(0, 10), 1, 3, score=0.5),
        instance(_strip(50, 70), 1, 3, score=0.8),  # in the crowd
        instance(_strip(0, 10), 2, 3, score=0.8),  # in an image without objects
        instance(_strip(0, 10), 4, 3, score=0.3),
        instance(_strip(0, 4), 5, 3, score=0.8),  # IoU .4
    ]
    ground_truth = {
        "images": [
            {"id": i, "height": SIZE[0], "width": SIZE[1], "file_name": f"{i}.png"}
            for i in range(6)
        ],
        "categories": [{"id": number, "name": name} for number, name in NAMES.items()],
        "annotations": [{**a, "id": number} for number, a in enumerate(objects)],
    }
    return ground_truth, results


def test_quality_of_images_by_hand() -> None:
    ground_truth, results = _handmade()
    qualities = image_qualities(judge(ground_truth, results)["segm"])
    # Image 4 has neither an object nor a detection that counts. Of those where nothing is found the
    # one with most in it is the worst.
    assert list(qualities.items()) == [
        (5, 0.0),
        (2, 0.0),
        (3, 0.0),
        (0, pytest.approx(0.8 / (1 + 1 / 2 + 1 / 2))),
        (1, 1.0),
    ]


def test_quality_of_images_in_plain_loops() -> None:
    qualities = image_qualities(judge(TRUTH, RESULTS)["segm"], score=0.4)
    answers = [
        (r, a)
        for r, a in zip(RESULTS, judged(TRUTH, RESULTS), strict=True)
        if r["score"] >= 0.4 and not a.ignored
    ]
    for image in range(14):
        here = [answer for result, answer in answers if result["image_id"] == image]
        pairs = [answer.iou for answer in here if answer.annotation is not None]
        objects = sum(a["image_id"] == image and not a["iscrowd"] for a in TRUTH["annotations"])
        weight = len(pairs) + (len(here) - len(pairs)) / 2 + (objects - len(pairs)) / 2
        assert qualities.get(image) == (pytest.approx(sum(pairs) / weight) if weight else None), (
            image
        )
    assert sorted(qualities.values()) == list(qualities.values())
    assert 14 not in qualities


def test_gallery_holds_the_worst_and_the_best(data: dict[str, Any]) -> None:
    names = {image["id"]: image["file_name"] for image in TRUTH["images"]}
    ranked = list(image_qualities(judge(TRUTH, RESULTS)["segm"]))
    assert [image["name"] for image in data["gallery"]["images"]] == [names[i] for i in ranked]
    part = data_of(TRUTH, RESULTS, images=5)["gallery"]
    assert [image["name"] for image in part["images"]] == [
        names[i] for i in (*ranked[:3], *ranked[-2:])
    ]
    assert part["ranked"] == len(ranked)
    assert data_of(TRUTH, RESULTS, images=0)["gallery"]["images"] == []

    answers = judged(TRUTH, RESULTS)
    for number, image in zip(ranked, data["gallery"]["images"], strict=True):
        assert (image["width"], image["height"]) == (640, 480)  # 128 x 96, times 5
        jpeg = cv2.imdecode(
            np.frombuffer(base64.b64decode(image["jpeg"]), np.uint8), cv2.IMREAD_COLOR_RGB
        )
        assert jpeg.shape == (*SIZE, 3)
        grey = [cv2.blur(pixels.mean(axis=2), (9, 9)) for pixels in (jpeg, picture(number))]
        assert np.abs(grey[0] - grey[1]).max() < 12
        objects = [a for a in TRUTH["annotations"] if a["image_id"] == number]
        assert [(o["box"], o["crowd"]) for o in image["objects"]] == [
            ([5 * v for v in a["bbox"]], bool(a["iscrowd"])) for a in objects
        ]
        here = sorted((-r["score"], i) for i, r in enumerate(RESULTS) if r["image_id"] == number)
        assert len(here) == len(image["detections"])
        for (score, i), detection in zip(here, image["detections"], strict=True):
            assert detection["score"] == -score
            assert detection["class"] == CATEGORIES.index(RESULTS[i]["category_id"])
            assert detection["ignored"] == answers[i].ignored
            assert (None if detection["match"] is None else objects[detection["match"]]) is answers[
                i
            ].annotation


def _filled(path: str, size: tuple[int, int]) -> np.ndarray:
    """The mask that a browser would draw: contours of relative steps, filled by the even-odd rule;
    pixel i reaches from i to i + 1."""
    contours = []
    for part in path.split("z")[:-1]:
        first, steps = part.removeprefix("M").split("l")
        numbers = np.array([first.split(), *np.array(steps.split()).reshape(-1, 2)], int)
        contours.append(np.cumsum(numbers, axis=0).astype(np.int32) * 4)
    mask = np.zeros((size[0] * 4, size[1] * 4), np.uint8)
    cv2.fillPoly(mask, contours, 1)
    return cv2.resize(mask.astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA) >= 0.5


@pytest.mark.parametrize("side", [200, 640, 1600])
def test_outlines_enclose_their_masks(side: int) -> None:
    """A ring, two parts of which one touches the image's corner, and nothing; in images that are
    enlarged, left and made smaller."""
    unit, scale = side / 200, 640 / side
    y, x = (np.mgrid[: side * 3 // 4, :side] + 0.5) / unit
    radius = np.hypot(x - 90, y - 70)
    ring = (radius < 50) & (radius > 22)
    parts = (np.hypot(x, y) < 40) | (np.hypot(x - 150, y - 100) < 30)
    for mask in (ring, parts):
        path = outline(instance(mask, 0, 3)["segmentation"], scale)
        assert path.count("M") == 2
        drawn = _filled(path, (480, 640))
        expected = (
            cv2.resize(
                mask.astype(np.float32),
                (640, 480),
                interpolation=cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA,
            )
            >= 0.5
        )
        assert (drawn & expected).sum() / (drawn | expected).sum() > 0.985
        assert drawn.sum() == pytest.approx(expected.sum(), rel=0.01)
        assert (
            abs(np.argwhere(drawn).mean(axis=0) - np.argwhere(expected).mean(axis=0)) < 0.4
        ).all()
    empty = coco_mask.encode(np.asfortranarray(np.zeros((side, side), np.uint8)))
    assert outline(empty, scale) == ""


# -- training --------------------------------------------------------------------------------------


def test_training_curves_are_means_and_ranges_of_steps(tmp_path: Path) -> None:
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
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rpn, mask, joint = training_curves(path)
    assert [panel["title"] for panel in rpn["panels"]] == [
        "total loss",
        "recall@50 of the proposals, IoU .5",
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
        {"title": "average precision, IoU .50:.95", "label": "AP", "series": series}
    ]


# -- the file --------------------------------------------------------------------------------------


class _Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of those with an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text: str) -> None:
        name = self.elements[-1][1].get("id") if self.elements else None
        if name:
            self.texts[name] = self.texts.get(name, "") + text


def test_no_text_of_the_data_becomes_markup(data: dict[str, Any]) -> None:
    """With names that are markup the page has the elements it has without them, and the names
    arrive whole."""
    hostile, plain = _Elements(render(data)), _Elements(render({}))
    assert hostile.elements == plain.elements
    assert json.loads(hostile.texts["data"]) == json.loads(json.dumps(data))
    assert NAMES[3] in [one["name"] for one in json.loads(hostile.texts["data"])["classes"]]
    assert data["config"] == {
        "name": NAMES[3],
        "model": {"scales": [16, 32], "high": "Infinity"},
        "stages": [{"name": "rpn"}],
    }


def test_the_file_names_nothing_outside_itself(data: dict[str, Any]) -> None:
    text = render(data)
    assert not re.search(
        r"https?:|wss?:|@import|url\(|\bfetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|document\.write",
        text,
    )
    elements = _Elements(text).elements
    assert not [attributes for _, attributes in elements if "src" in attributes]
    links = [
        attributes["href"] for tag, attributes in elements if "href" in attributes or tag == "link"
    ]
    assert links
    assert all(link and link.startswith("#") for link in links)
    policy = next(
        a["content"]
        for tag, a in elements
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_sixty_images_stay_below_15_mb() -> None:
    """Four images of noise, which no JPEG makes small, each with a hundred masks that are no simple
    shapes, take less than their share."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (480, 640, 3), np.uint8)
    blobs = [
        cv2.resize(
            rng.uniform(size=(16, 16)).astype(np.float32), (640, 480), interpolation=cv2.INTER_CUBIC
        )
        > 0.5
        for _ in range(4)
    ]
    shapes = [instance(blob & (np.arange(640) // 160 == i), 0, 3) for i, blob in enumerate(blobs)]
    truth = {
        "images": [
            {"id": i, "height": 480, "width": 640, "file_name": f"{i}.png"} for i in range(4)
        ],
        "categories": [{"id": 3, "name": "blob"}],
        "annotations": [
            {**shape, "image_id": i, "id": 4 * i + k}
            for i in range(4)
            for k, shape in enumerate(shapes)
        ],
    }
    results = [
        {**shapes[k % 4], "image_id": i, "score": 1 - k / 100} for i in range(4) for k in range(100)
    ]
    evaluations = judge(truth, results)
    metrics = {f"{kind}/{name}": 0.0 for kind in evaluations for name in FIGURES}
    data = report_data(
        evaluations, metrics, lambda _: noise, heading={}, config={}, metrics_jsonl=None
    )
    assert [len(image["detections"]) for image in data["gallery"]["images"]] == [100] * 4
    assert 8e6 < 60 / 4 * len(json.dumps(data["gallery"])) + len(render({})) < 14e6


def test_the_page_is_packaged() -> None:
    """Its files are found beside the code in a checkout; an installed package has those that are
    named."""
    folder = Path(page.__file__).parent
    named = tomllib.loads((folder.parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    assert sorted(named["mrcnn_jax.figures.page"]) == sorted(
        file.name for file in folder.iterdir() if file.suffix not in (".py", "")
    )
