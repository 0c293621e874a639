"""The page's images: which are shown, and outlines as a browser would fill them."""

from __future__ import annotations

import base64
import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from report_cases import NAMES, SIZE, answers_of, case, data_of, instance, picture

from mrcnn_jax.evaluation.at_score import at_score
from mrcnn_jax.evaluation.average_precision import FIGURES, match_results
from mrcnn_jax.evaluation.matches import image_qualities
from mrcnn_jax.figures.page import render
from mrcnn_jax.figures.page.contents import report_data
from mrcnn_jax.figures.page.gallery import outline

TRUTH, RESULTS = case()
CATEGORIES = sorted(NAMES)


def test_gallery_holds_the_worst_and_the_best() -> None:
    data = data_of(TRUTH, RESULTS)
    names = {image["id"]: image["file_name"] for image in TRUTH["images"]}
    ranked = list(image_qualities(match_results(TRUTH, RESULTS)["segm"]))
    assert [image["name"] for image in data["gallery"]["images"]] == [names[i] for i in ranked]
    part = data_of(TRUTH, RESULTS, images=5)["gallery"]
    assert [image["name"] for image in part["images"]] == [
        names[i] for i in (*ranked[:3], *ranked[-2:])
    ]
    assert part["ranked"] == len(ranked)
    assert data_of(TRUTH, RESULTS, images=0)["gallery"]["images"] == []

    answers = answers_of(TRUTH, RESULTS)
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
    assert outline(None, scale) == ""


def test_a_line_of_pixels_is_not_lost() -> None:
    mask = np.zeros((100, 100), bool)
    mask[50, 20:70] = True
    drawn = outline(instance(mask, 0, 3)["segmentation"], 1.0)
    assert drawn.count("M") == 1
    assert len(drawn.split()) >= 2


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
    evaluations = match_results(truth, results)
    metrics = {f"{kind}/{name}": 0.0 for kind in evaluations for name in FIGURES}
    counts = at_score(evaluations["segm"], "segm", 0.5)
    data = report_data(evaluations, metrics, counts, lambda _: noise, heading={}, config={})
    assert [len(image["detections"]) for image in data["gallery"]["images"]] == [100] * 4
    assert 8e6 < 60 / 4 * len(json.dumps(data["gallery"])) + len(render({})) < 14e6
