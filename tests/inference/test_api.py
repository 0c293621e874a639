"""The Python API on a run that is kept: one road with predict.py, and views of an image merged as
NumPy merges them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
from pycocotools import mask as rle_ops

import mrcnn_jax
from mrcnn_jax.commands.predict_files import predict_files
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.inference.test_time import scaled

ROOT = Path(__file__).parents[2]
NMS_IOU = 0.5  # of the kept run's box head, which keeps 8 boxes
WIDTH = 128


@pytest.fixture(scope="module")
def model(kept_run: Path) -> mrcnn_jax.Model:
    return mrcnn_jax.load(str(kept_run))


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, one of them enlarged."""
    folder = tmp_path_factory.mktemp("images")
    for place, image in enumerate(tiny.read(tiny_data, "val")["images"][:3]):
        pixels = cv2.imread(str(tiny_data / "images" / image["file_name"]))
        cv2.imwrite(
            str(folder / f"{place}.png"), cv2.resize(pixels, (300, 240)) if place == 1 else pixels
        )
    return folder


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


def write_video(path: Path, frames: Sequence[np.ndarray]) -> None:
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 5, (WIDTH, WIDTH))
    for frame in frames:
        video.write(np.ascontiguousarray(frame[..., ::-1]))
    video.release()


def test_it_is_what_predict_writes(
    model: mrcnn_jax.Model, kept_run: Path, folder: Path, tmp_path: Path
) -> None:
    """A folder through the API and through predict.py, to the bit; and the fields say the same as
    COCO's results."""
    predict_files(kept_run, [folder], out=tmp_path, min_score=0.5)
    written = json.loads((tmp_path / "detections.json").read_text())
    found = list(model.predict(folder, progress=True))
    assert [detections.path for detections in found] == sorted(folder.iterdir())
    results = [
        result
        for number, detections in enumerate(found, 1)
        for result in detections.coco_results(number)
    ]
    assert results == [
        {key: value for key, value in result.items() if key != "file_name"} for result in written
    ]
    assert len(results) > 10

    for number, (detections, pixels) in enumerate(
        zip(found, map(read, sorted(folder.iterdir())), strict=True), 1
    ):
        assert detections.size == pixels.shape[:2]
        of_image = [result for result in written if result["image_id"] == number]
        x1, y1, x2, y2 = detections.boxes.T
        np.testing.assert_allclose(
            np.stack([x1, y1, x2 - x1, y2 - y1], axis=1), [result["bbox"] for result in of_image]
        )
        assert detections.category_ids == tuple(
            (5, 7, 90)[label - 1] for label in detections.labels
        )
        assert detections.class_names == tuple(
            model.class_names[number] for number in detections.category_ids
        )
        np.testing.assert_array_equal(
            detections.masks, [rle_ops.decode(result["segmentation"]) for result in of_image]
        )
        assert detections.masks.dtype == bool
        assert (np.diff(detections.scores) <= 0).all()


def test_one_image_a_list_and_an_iterator(model: mrcnn_jax.Model, folder: Path) -> None:
    """The same each way; an iterator's images are taken one at a time."""
    paths = sorted(folder.iterdir())
    one = model.predict(read(paths[1]))
    assert one.path is None
    taken = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal taken
        for path in paths:
            taken += 1
            yield read(path)

    stream = model.predict(frames())
    assert taken == 0
    streamed = []
    for number, detections in enumerate(stream, 1):
        assert taken == number
        streamed.append(detections)
    listed = model.predict([str(paths[0]), read(paths[1]), paths[2]])
    assert isinstance(listed, list)
    for ours, theirs in zip(listed, streamed, strict=True):
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
    np.testing.assert_array_equal(one.masks, listed[1].masks)


def test_low_scores_are_left_out_and_masks_may_be_rles(
    model: mrcnn_jax.Model, folder: Path
) -> None:
    every = model.predict(folder / "0.png")
    threshold = float(every.scores[3])
    best = model.predict(folder / "0.png", min_score=threshold, rle=True)
    assert len(best.scores) == 4 < len(every.scores)
    np.testing.assert_array_equal(best.boxes, every.boxes[:4])
    np.testing.assert_array_equal([rle_ops.decode(rle) for rle in best.masks], every.masks[:4])
    assert best.coco_results(3) == every.coco_results(3)[:4]


def test_sizes_share_one_program_a_canvas(model: mrcnn_jax.Model) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8)
    for height, width in ((200, 300), (31, 30), (128, 128), (1, 77)):
        assert model.predict(noise[:height, :width]).masks.shape[1:] == (height, width)
    assert model._predictor._apply._cache_size() == 1


def test_mistakes_are_named(model: mrcnn_jax.Model, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nowhere/config\.json: no such file \(is this a run's folder\?\)"
    ):
        mrcnn_jax.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"nowhere\.jpg: No such file or directory$"):
        model.predict(tmp_path / "nowhere.jpg")
    with pytest.raises(ConfigError, match="no images in this folder"):
        model.predict(tmp_path)
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"broken\.png: not an image that can be decoded"):
        model.predict([tmp_path / "broken.png"])
    for wrong, told in (
        (
            np.zeros((5, 7, 3), np.float32),
            r"image: float32 \[5, 7, 3\] is not uint8 RGB \[H, W, 3\]",
        ),
        (np.zeros((5, 7), np.uint8), r"uint8 \[5, 7\]"),
        (np.zeros((5, 7, 4), np.uint8), r"uint8 \[5, 7, 4\]"),
        (np.zeros((0, 7, 3), np.uint8), r"uint8 \[0, 7, 3\]"),
        ([[1, 2]], "image: list is no NumPy array"),
    ):
        with pytest.raises(ValueError, match=told):
            model.predict(wrong)
    for scales in ((), (1.0, 0.0), (float("nan"),)):
        with pytest.raises(ValueError, match="scales: "):
            model.predict(np.zeros((5, 7, 3), np.uint8), scales=scales)


def test_what_the_documentation_says_runs(
    model: mrcnn_jax.Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first part, on the run that is loaded already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mrcnn_jax, "load", {"runs/a": model}.__getitem__, raising=False)
    shutil.copytree(folder, "folder")
    for name in ("image.jpg", "a.jpg", "b.jpg"):
        cv2.imwrite(name, cv2.imread(str(folder / "0.png")))
    write_video(tmp_path / "clip.avi", [read(folder / "0.png")])
    part = (ROOT / "docs" / "api.md").read_text().partition("## One file")[0]
    blocks = [block.partition("```")[0] for block in part.split("```python\n")[1:]]
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert len(names["several"]) == 2
    assert names["overlay"].std() > 0


def test_importing_it_costs_nothing() -> None:
    """A command's typo is answered before jax is imported."""
    code = "import sys, mrcnn_jax; assert not {'jax', 'flax', 'cv2'} & set(sys.modules); assert not hasattr(mrcnn_jax, 'nothing')"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# -- views of an image: at a scale of 0.8 the canvas, and so the programs, are those of 1 ----------


def iou(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    return shared / (float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])) - shared)


def mirrored(boxes: np.ndarray) -> np.ndarray:
    return np.array([[WIDTH - x2, y1, WIDTH - x1, y2] for x1, y1, x2, y2 in boxes])


def test_boxes_of_all_views_go_through_one_nms_a_class(
    model: mrcnn_jax.Model, folder: Path
) -> None:
    image = read(folder / "0.png")
    seen: list[tuple[float, int, np.ndarray]] = []
    for scale in (1.0, 0.8):
        plain, turned = model.predict([image, image[:, ::-1]], scales=(scale,))
        for detections, boxes in ((plain, plain.boxes), (turned, mirrored(turned.boxes))):
            seen += zip(detections.scores.tolist(), detections.labels.tolist(), boxes, strict=True)
    expected: list[tuple[float, int, np.ndarray]] = []
    for score, label, box in sorted(seen, key=lambda one: -one[0]):
        if not any(label == other and iou(box, kept) > NMS_IOU for _, other, kept in expected):
            expected.append((score, label, box))
    merged = model.predict(image, flip=True, scales=(1.0, 0.8))
    assert len(merged.scores) == min(8, len(expected)) > 4
    for found, (score, label, box) in zip(
        zip(merged.scores, merged.labels, merged.boxes, strict=True), expected, strict=False
    ):
        assert found[:2] == (pytest.approx(score, abs=1e-6), label)
        np.testing.assert_allclose(found[2], box, atol=1e-3)


def test_views_of_a_mirrored_image_are_the_same_mirrored(
    model: mrcnn_jax.Model, folder: Path
) -> None:
    """Holds for masks only if each view's are turned back, and count the same."""
    image = read(folder / "0.png")
    ours, theirs = model.predict([image, image[:, ::-1]], flip=True, scales=(1.0, 0.8))
    np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-6)
    np.testing.assert_allclose(ours.boxes, mirrored(theirs.boxes), atol=1e-3)
    shared = (ours.masks & theirs.masks[:, :, ::-1]).sum((1, 2)) / (
        ours.masks | theirs.masks[:, :, ::-1]
    ).sum((1, 2))
    assert ours.masks.any((1, 2)).all()
    assert (shared > 0.99).all()
    plain = model.predict(image)
    assert plain.boxes.shape != ours.boxes.shape or np.abs(plain.boxes - ours.boxes).max() > 0.1


def test_a_view_twice_changes_nothing(model: mrcnn_jax.Model, folder: Path) -> None:
    """Boxes are no more, and masks are a mean."""
    image = read(folder / "2.png")
    once, twice = model.predict(image), model.predict(image, scales=(1.0, 1.0))
    np.testing.assert_allclose(once.scores, twice.scores, atol=1e-6)
    np.testing.assert_allclose(once.boxes, twice.boxes, atol=1e-3)
    assert (once.masks != twice.masks).mean() < 1e-3


def test_scaled_canvases_hold_scaled_images() -> None:
    half, larger = scaled(DataConfig(), 0.5), scaled(DataConfig(), 1.3)
    assert (half.short_side, half.long_side, half.canvases) == (400, 544, ((416, 544), (544, 416)))
    assert (larger.short_side, larger.long_side, larger.canvases) == (
        1040,
        1414,
        ((1056, 1440), (1440, 1056)),
    )


# -- videos ----------------------------------------------------------------------------------------


def test_a_video_is_predicted_frame_by_frame(
    model: mrcnn_jax.Model, folder: Path, tmp_path: Path
) -> None:
    """Its frames are those that were written, in RGB, but for the compression."""
    image = read(folder / "0.png")
    frames = [np.roll(image, 9 * number, axis=1) for number in range(3)]
    frames[0][:40, :40] = (250, 20, 20)
    write_video(tmp_path / "a.avi", frames)
    back = list(mrcnn_jax.video_frames(tmp_path / "a.avi"))
    assert len(back) == 3
    for ours, theirs in zip(back, frames, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 12
    assert np.abs(back[0][5:35, 5:35].mean((0, 1)) - (250, 20, 20)).max() < 12
    found = list(model.predict(mrcnn_jax.video_frames(tmp_path / "a.avi")))
    for detections, frame in zip(found, back, strict=True):
        np.testing.assert_array_equal(detections.boxes, model.predict(frame).boxes)

    (tmp_path / "b.avi").write_text("no video")
    with pytest.raises(ConfigError, match=r"b\.avi: not a video that OpenCV can read$"):
        mrcnn_jax.video_frames(tmp_path / "b.avi")
    with pytest.raises(ConfigError, match=r"c\.avi: no such file$"):
        mrcnn_jax.video_frames(tmp_path / "c.avi")
