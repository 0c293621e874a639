from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

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
        _, drawn = shapes.draw_image(1, "train", index, 128)
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
