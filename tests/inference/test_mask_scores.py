"""Mask scores on all ways of predicting, by a run whose mask-IoU head expects some IoU of each
class."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from pycocotools import mask as coco_mask

import mrcnn_jax
from mrcnn_jax.commands.export_contents import metadata, prediction
from mrcnn_jax.config.heads import MaskIoUHeadConfig
from mrcnn_jax.config.optional_heads import following_heads
from mrcnn_jax.data.report import Report
from mrcnn_jax.inference.exported import ExportedModel
from mrcnn_jax.inference.merging import detections, in_image, merge
from mrcnn_jax.inference.predicted_annotations import open_annotations
from mrcnn_jax.inference.results import Detections
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
from mrcnn_jax.pixels.windows import Window
from mrcnn_jax.runs.run import Run, load_run
from tests.inference.frames import read
from tests.inference.test_merging import LEFT, RIGHT, SIZE, box_found

IOUS = np.array([0.5, 0.8, 1.5], np.float32)  # of labels 1, 2 and 3; the last one is clipped


@pytest.fixture(scope="module")
def run(kept_run: Path) -> Run:
    """The kept run, with a head that is trained, as its checkpoint says, and gives IOUS."""
    kept = load_run(kept_run)
    head = MaskIoUHeadConfig(enabled=True, channels=4, convs=1, fcs=0)
    config = replace(kept.config, model=replace(kept.config.model, mask_iou_head=head))
    config = following_heads(config)
    canvas = config.data.canvases[0]
    fresh = jax.tree.map(
        np.array, initialise(MaskRCNN(config.model), example_batch(canvas), seed=0)
    )
    last = fresh["params"]["mask_iou_head"]["ious"]
    last["kernel"][:], last["bias"][:] = 0, IOUS
    params = kept.variables["params"] | {"mask_iou_head": fresh["params"]["mask_iou_head"]}
    meta = replace(kept.meta, stage="mask_iou", stage_index=3, stage_step=1)
    return replace(kept, config=config, meta=meta, variables={**kept.variables, "params": params})


@pytest.fixture(scope="module")
def scored(run: Run) -> mrcnn_jax.Model:
    return mrcnn_jax.Model(run)


def assert_scored(found: Detections) -> None:
    assert len(found.scores) > 3
    assert found.mask_scores is not None
    expected = found.scores * np.minimum(IOUS, 1)[found.labels - 1]
    np.testing.assert_allclose(found.mask_scores, expected, rtol=1e-5)
    assert (np.diff(found.scores) <= 0).all()  # best first, by class


def test_detections_and_views_have_mask_scores(
    scored: mrcnn_jax.Model, model: mrcnn_jax.Model, folder: Path
) -> None:
    """Boxes, classes, scores and masks are those of the run without the head, without which there
    are none."""
    image = read(folder / "0.png")
    for options in ({}, {"flip": True, "scales": (1.0, 0.8)}, {"tile": 128}):
        found, plain = scored.predict(image, **options), model.predict(image, **options)
        assert_scored(found)
        assert plain.mask_scores is None
        assert all("mask_score" not in result for result in plain.to_coco())
        for name in ("boxes", "labels", "scores"):
            np.testing.assert_array_equal(getattr(found, name), getattr(plain, name))
        results = json.loads(json.dumps(found.to_coco()))
        assert [r["mask_score"] for r in results] == found.mask_scores.tolist()
        assert [r["score"] for r in results] == found.scores.tolist()


def test_a_least_score_is_one_of_masks(scored: mrcnn_jax.Model, folder: Path) -> None:
    image = read(folder / "0.png")
    whole = scored.predict(image, rle=True)
    scores = np.sort(whole.mask_scores)
    least = float((scores[1] + scores[2]) / 2)
    kept = whole.mask_scores >= least
    assert (whole.scores[~kept] >= least).any()  # by class it would stay
    expected = [one for one, keep in zip(whole.to_coco(), kept, strict=True) if keep]
    for found in (
        whole.at_least(least),
        scored.predict(image, min_score=least, rle=True),
        scored.predict(image, min_score=least, rle=True, tile=128),
    ):
        assert found.ranking_scores.min() >= least
        assert len(found.scores) == kept.sum()
    assert whole.at_least(least).to_coco() == expected


def test_annotations_say_the_scores(scored: mrcnn_jax.Model, folder: Path, tmp_path: Path) -> None:
    """COCO's both; labelme's description, of which there is one, that of the mask."""
    file = folder / "0.png"
    found, report = scored.predict(str(file), rle=True), Report()
    for form in ("coco", "labelme"):
        with open_annotations(form, tmp_path, [file], scored.class_names, report) as made:
            made.add("0", file, None, found)
            made.end()
    written = json.loads((tmp_path / "coco" / "annotations.json").read_text())["annotations"]
    assert [one["score"] for one in written] == found.scores.tolist()
    assert [one["mask_score"] for one in written] == found.mask_scores.tolist()
    shapes = json.loads((tmp_path / "labelme" / "0.json").read_text())["shapes"]
    told = {f"{score:.3f}" for score in found.mask_scores.tolist()}
    assert {shape["description"] for shape in shapes} == told


def test_an_exported_program_has_them(run: Run, scored: mrcnn_jax.Model, folder: Path) -> None:
    image = read(folder / "0.png")
    predict = jax.jit(prediction(run.network, run.config.data.canvases[0]))
    exported = object.__new__(ExportedModel)
    exported.meta = json.loads(json.dumps(metadata(run)))
    exported._programs = [functools.partial(predict, run.variables)]
    live = scored.predict(image)
    for least, count in ((0.0, len(live.scores)), (float(np.median(live.mask_scores)), None)):
        found = exported.predict(image, min_score=least)
        kept = live.mask_scores >= least
        assert count is None or kept.sum() == count
        np.testing.assert_allclose(found["mask_scores"], live.mask_scores[kept], rtol=1e-4)
        np.testing.assert_allclose(found["scores"], live.scores[kept], rtol=1e-4)


def test_a_head_that_is_random_still_is_not_asked(run: Run, folder: Path) -> None:
    """After the masks' stage, say; then nothing speaks of it."""
    assert run.trained == {"rpn", "box", "mask", "mask_iou"}
    assert run.network == run.config.model
    before = replace(run, meta=replace(run.meta, stage="mask", stage_index=2))
    assert before.trained == {"rpn", "box", "mask"}
    assert not before.network.mask_iou_head.enabled
    found = mrcnn_jax.Model(before).predict(read(folder / "0.png"))
    assert len(found.scores) > 3
    assert found.mask_scores is None


def scored_box(
    window: Window, box: tuple[int, int, int, int], score: float, mask_score: float
) -> Detections:
    found = box_found(window, 1, box, score)
    return replace(found, mask_scores=np.array([mask_score], np.float32))


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        # Joined from both: the higher one. Scores are .9 and .5, mask scores .3 and .4.
        ((20, 20, 100, 40), (0, 20, 80, 40), 0.4),
        # Whole in one: that of its mask alone, though the other has the score.
        ((70, 20, 100, 40), (10, 20, 70, 42), 0.4),
    ],
)
def test_a_merged_mask_has_the_score_of_what_it_is_made_of(
    left: tuple[int, int, int, int], right: tuple[int, int, int, int], expected: float
) -> None:
    found = [
        *in_image(scored_box(LEFT, left, 0.9, 0.3), 0, LEFT, SIZE),
        *in_image(scored_box(RIGHT, right, 0.5, 0.4), 1, RIGHT, SIZE),
    ]
    (merged,) = merge(found, [LEFT, RIGHT], SIZE).objects
    assert (merged.score, merged.mask_score) == (pytest.approx(0.9), pytest.approx(expected))
    categories = [(5, "disc")]
    whole = detections([merged], SIZE, categories, mask_scores=True)
    assert whole.mask_scores.tolist() == [pytest.approx(expected)]
    assert coco_mask.area(whole.masks[0]) > 0
    assert len(detections([merged], SIZE, categories, mask_scores=True, min_score=0.6).scores) == 0
