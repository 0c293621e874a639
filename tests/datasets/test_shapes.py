from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle_ops

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.datasets import shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bounds")
    shapes.write_shapes(path, train=100, val=40, seed=1)
    return path


def _content(folder: Path, split: str) -> dict:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def _by_image(content: dict) -> dict[int, list[dict]]:
    return {
        image["id"]: [a for a in content["annotations"] if a["image_id"] == image["id"]]
        for image in content["images"]
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_written_annotations_keep_the_bounds(folder: Path, split: str) -> None:
    content = _content(folder, split)
    counts, crowds, short_sides, shares = [], 0, [], []
    for items in _by_image(content).values():
        covered = np.zeros((128, 128), int)
        for a in items:
            mask = rle_ops.decode(a["segmentation"])
            covered += mask
            rows, columns = np.nonzero(mask)
            left, top = columns.min(), rows.min()
            assert a["bbox"] == [left, top, columns.max() + 1 - left, rows.max() + 1 - top]
            assert a["area"] == mask.sum()
            assert a["visible_share"] >= 0.4
            if not a["iscrowd"]:
                short_sides.append(min(a["bbox"][2:]))
                shares.append(a["visible_share"])
        assert covered.max(initial=0) <= 1, "masks are modal: no pixel belongs to two"
        counts.append(sum(not a["iscrowd"] for a in items))
        crowds += sum(a["iscrowd"] for a in items)
    assert min(short_sides) >= 12
    assert max(short_sides) <= 64
    assert max(counts) <= 8
    assert max(counts) >= 6
    assert min(shares) < 0.7, "there is occlusion"
    assert 0 < counts.count(0) <= 0.05 * len(counts) + 1
    assert 0 < crowds <= 0.05 * len(counts) + 1
    assert {a["category_id"] for a in content["annotations"]} == {1, 2, 3}
    assert content["categories"] == [
        {"id": 1, "name": "disc"},
        {"id": 2, "name": "rectangle"},
        {"id": 3, "name": "triangle"},
    ]


def test_visible_share_is_of_the_whole_shape(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the exact areas of all outlines (shoelace formula) in a fresh drawing."""
    drawn_patches: list[tuple[int, float, float]] = []
    coverage = shapes._coverage

    def spy(outline: np.ndarray) -> tuple[np.ndarray, int, int]:
        patch, left, top = coverage(outline)
        ahead = np.roll(outline, -1, axis=0)
        area = abs(np.sum(outline[:, 0] * ahead[:, 1] - outline[:, 1] * ahead[:, 0])) / 2
        drawn_patches.append(
            (int((patch >= 0.5).sum()), area, float(np.linalg.norm(ahead - outline, axis=1).sum()))
        )
        return patch, left, top

    monkeypatch.setattr(shapes, "_coverage", spy)
    written = list(_by_image(_content(folder, "train")).values())
    excess = []
    for index in range(20):
        drawn_patches.clear()
        _, drawn, _ = shapes.draw_image(1, "train", index, 128)
        assert len(drawn) == len(written[index])
        for item, annotation in zip(drawn, written[index], strict=True):
            if item.iscrowd:
                continue
            exact = [
                (area, perimeter)
                for pixels, area, perimeter in drawn_patches
                if pixels == item.whole_area
            ]
            assert exact
            excess.append(min(abs(item.whole_area - area) / perimeter for area, perimeter in exact))
            assert annotation["visible_share"] == pytest.approx(
                annotation["area"] / item.whole_area, abs=1e-4
            )
    assert len(excess) > 40
    # In pixels along the outline: fillPoly includes its border, and whole pixels are counted.
    assert np.mean(excess) < 0.1
    assert max(excess) < 0.3


def test_images_show_what_the_masks_say(folder: Path) -> None:
    """Across the border of a mask the picture changes far more than elsewhere."""
    content = _content(folder, "train")
    across, elsewhere = [], []
    for image in content["images"][:30]:
        pixels = cv2.imread(str(folder / "images" / image["file_name"])).astype(float)
        owner = np.zeros((128, 128), int)
        for number, a in enumerate(_by_image(content)[image["id"]], 1):
            if a["iscrowd"]:  # of many colours inside
                owner[rle_ops.decode(a["segmentation"]) > 0] = -1
            else:
                owner[rle_ops.decode(a["segmentation"]) > 0] = number
        step = np.abs(pixels[:, 2:] - pixels[:, :-2]).sum(-1)
        border, known = owner[:, 2:] != owner[:, :-2], (owner[:, 2:] >= 0) & (owner[:, :-2] >= 0)
        across.extend(step[border & known])
        elsewhere.extend(step[~border & known])
    assert np.median(across) > 4 * np.median(elsewhere)


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        shapes.write_shapes(tmp_path / name, train=6, val=3, seed=seed)
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) == 6 + 3 + 2
    for file in files:
        content = (tmp_path / "a" / file).read_bytes()
        assert content == (tmp_path / "b" / file).read_bytes(), file
        assert content != (tmp_path / "c" / file).read_bytes(), file


def test_data_sets_of_a_seed_stay_what_they_were(folder: Path) -> None:
    """What was measured on them, with `write_shapes` of 2026-11: the annotations to the byte."""
    content = (folder / "annotations" / "instances_val.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == (
        "b880a388151173eae451f271e44e90c0db3668c29e59bc5e4553bca205d2ac5d"
    )
    pixels = [cv2.imread(str(path)) for path in sorted((folder / "images").glob("val_*"))]
    assert np.mean(pixels) == pytest.approx(133.434, abs=0.01)


def test_splits_share_nothing(folder: Path) -> None:
    contents = [p.read_bytes() for p in (folder / "images").iterdir()]
    assert len(set(contents)) == len(contents) == 140
    first, second = _content(folder, "train"), _content(folder, "val")
    for key in ("images", "annotations"):
        assert not {item["id"] for item in first[key]} & {item["id"] for item in second[key]}


def test_one_line_and_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes.write_shapes(tmp_path, train=2, val=1, size=160)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert cv2.imread(str(tmp_path / "images" / "val_00000.png")).shape == (160, 160, 3)
    with pytest.raises(ConfigError, match="size: 100"):
        shapes.write_shapes(tmp_path, train=1, val=1, size=100)


def test_an_interrupted_call_leaves_no_annotations_of_other_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes.write_shapes(tmp_path, train=2, val=1)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.write_shapes(tmp_path, train=2, val=1, seed=1)
    assert list((tmp_path / "annotations").iterdir()) == []


def test_a_full_disk_ends_it_in_a_line(
    tmp_path: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether an image or an annotation file cannot be written: none is reported as written."""
    write = Path.write_bytes
    for name in ("train_00001.png", "_val.json"):

        def full(path: Path, content: bytes, name: str = name) -> int:
            if name in path.name:
                raise OSError(28, "No space left on device")
            return write(path, content)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            assert mrcnn("generate", "shapes", "--out", tmp_path, "--train", 2, "--val", 1) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"error: {tmp_path}")
        assert err.endswith(": No space left on device\n")
        assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "annotations" / "instances_val.json").exists()


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `folder`, with depth."""
    path = tmp_path_factory.mktemp("depth")
    shapes.write_shapes(path, train=40, val=3, seed=1, depth=True)
    return path


def _metres(folder: Path, image: dict) -> np.ndarray:
    found = cv2.imread(str(folder / "images" / image["depth_file"]), cv2.IMREAD_UNCHANGED)
    assert found.dtype == np.uint16
    return found / 1000


def test_depth_leaves_the_objects_as_they_are(folder: Path, deep: Path) -> None:
    with_depth, without = _content(deep, "train"), _content(folder, "train")
    count = len(with_depth["annotations"])
    assert count > 100
    assert with_depth["annotations"] == without["annotations"][:count]
    assert with_depth["categories"] == without["categories"]
    for image, plain in zip(with_depth["images"], without["images"], strict=False):
        name = image.pop("depth_file")
        assert name == f"../depth/{image['file_name']}"
        assert image == plain
        assert "depth_file" not in plain
    assert not (folder / "depth").exists()


def test_depth_is_a_plane_for_each_object_before_the_floor(deep: Path) -> None:
    content = _content(deep, "train")
    objects = _by_image(content)
    y, x = np.mgrid[0:128, 0:128]
    spread, slopes = [], []
    for image in content["images"]:
        metres, free = _metres(deep, image), np.ones((128, 128), bool)
        for a in objects[image["id"]]:
            mask = rle_ops.decode(a["segmentation"]) > 0
            free &= ~mask
            here = metres[mask]
            assert 1 <= here.min() <= here.max() <= 5.5
            terms = np.stack([x[mask], y[mask], np.ones(mask.sum())], axis=1)
            plane = np.linalg.lstsq(terms, here, rcond=None)[0]
            np.testing.assert_allclose(terms @ plane, here, atol=0.001)  # rounded to millimetres
            spread.append(np.median(here))
            slopes.append(np.ptp(here))
            assert not a["iscrowd"] or np.ptp(here) == 0
        floor = np.linspace(8, 6, 128)[:, None] * np.ones(128)
        np.testing.assert_allclose(metres[free], floor[free], atol=0.001)
    assert np.quantile(spread, 0.1) < 2
    assert np.quantile(spread, 0.9) > 4
    assert 0.02 < np.median(slopes) < 0.5


def test_what_covers_is_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of objects, where their whole outlines overlap: also what is hidden in the end."""
    whole: list[tuple[np.ndarray, np.ndarray]] = []
    plane = shapes._plane

    def spy(rng: np.random.Generator, limits: np.ndarray, outline: np.ndarray, size: int) -> Any:
        found = plane(rng, limits, outline, size)
        whole.append((shapes._on_canvas(*shapes._coverage(outline), size) >= 0.5, found))
        return found

    monkeypatch.setattr(shapes, "_plane", spy)
    pairs = 0
    for index in range(30):
        whole.clear()
        _, drawn, metres = shapes.draw_image(1, "train", index, 128, depth=True)
        objects = [item for item in drawn if not item.iscrowd]
        assert len(objects) == len(whole)
        for number, (mask, near) in enumerate(whole):
            visible = objects[number].visible
            np.testing.assert_array_equal(metres[visible], near[visible])
            for below, far in whole[:number]:
                overlap = mask & below
                assert (near[overlap] < far[overlap]).all()
                pairs += bool(overlap.any())
            for crowd in drawn[:1] if drawn and drawn[0].iscrowd else []:
                assert near[mask].max() < metres[crowd.visible].min()
    assert pairs > 50


def test_the_depth_file_is_what_was_drawn(deep: Path) -> None:
    for index, image in enumerate(_content(deep, "val")["images"]):
        picture, _, metres = shapes.draw_image(1, "val", index, 128, depth=True)
        np.testing.assert_allclose(_metres(deep, image), metres, atol=0.000501)
        pixels = cv2.imread(str(deep / "images" / image["file_name"]))[..., ::-1]
        np.testing.assert_array_equal(pixels, picture)


def test_depth_can_be_told_from_the_haze(deep: Path) -> None:
    """By the haze's own formula, from the darkest channel inside each object; and the farther, the
    closer to its colour."""
    haze, content = np.array([200.0, 208.0, 216.0]), _content(deep, "train")
    told, true, difference = [], [], []
    objects = _by_image(content)
    for image in content["images"]:
        pixels = cv2.imread(str(deep / "images" / image["file_name"]))[..., ::-1]
        metres = _metres(deep, image)
        for a in objects[image["id"]]:
            inside = cv2.erode(rle_ops.decode(a["segmentation"]), np.ones((3, 3))) > 0
            if a["iscrowd"] or not inside.any():
                continue
            share = np.percentile((pixels[inside] / haze).min(axis=-1), 20)
            told.append(-6 * np.log(1 - share))
            true.append(np.median(metres[inside]))
            difference.append(np.linalg.norm(pixels[inside] - haze, axis=-1).mean())
    true, told = np.array(true), np.array(told)
    assert np.mean(np.abs(told - true) / true) < 0.06
    assert np.mean(np.abs(np.median(true) - true) / true) > 0.3
    near, middle, far = np.array_split(np.array(difference)[np.argsort(true)], 3)
    assert near.mean() > 1.15 * middle.mean() > 1.3 * far.mean()
