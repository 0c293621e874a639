"""torchvision's side of benchmarks/equal_minutes.py, as far as it needs no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import peer_recipe
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.records import CocoDataset, ImageRecord, ObjectRecord
from mrcnn_jax.data.report import Report

SIZE = (6, 10)


@pytest.mark.parametrize(
    ("step", "share", "epoch_steps", "expected"),
    [
        (0, 0.0, 150, 2.5e-6),
        (149, 0.5, 150, 2.5e-3),
        (74, 0.1, 149, 1.25125e-3),  # half of 148 steps
        (500, 0.1, 5000, 1.25125e-3),  # half of 1000 steps
        (1000, 0.1, 5000, 2.5e-3),
        (0, 0.0, 1, 2.5e-3),
        (900, 0.615, 150, 2.5e-3),
        (900, 0.616, 150, 2.5e-4),
        (900, 0.846, 150, 2.5e-4),
        (900, 0.847, 150, 2.5e-5),
        (15, 0.847, 151, 2.5e-3 * (1e-3 + 0.999 * 0.1) / 100),  # in both
    ],
)
def test_rates_are_the_references(
    step: int, share: float, epoch_steps: int, expected: float
) -> None:
    assert peer_recipe.learning_rate(step, share, epoch_steps) == pytest.approx(expected)


def test_aspect_groups_lie_between_powers_of_the_cube_root_of_two() -> None:
    sizes = [(300, 100), (400, 300), (300, 300), (300, 400), (300, 470), (300, 480), (100, 300)]
    assert peer_recipe.aspect_groups(sizes) == [0, 2, 4, 5, 5, 6, 7]


def test_batches_are_of_one_group_and_show_every_image_that_fits() -> None:
    groups = [0] * 7 + [1] * 4 + [2] * 3 + [5]
    rng = np.random.default_rng(0)
    epochs = [peer_recipe.epoch_batches(groups, rng) for _ in range(20)]
    for batches in epochs:
        assert len(batches) == 7  # 15 // 2: 3 + 2 + 1 whole ones, and one that is filled up
        assert all(len(batch) == 2 and len({groups[i] for i in batch}) == 1 for batch in batches)
        shown = Counter(i for batch in batches[:6] for i in batch)
        assert set(shown.values()) == {1}
        assert len(shown.keys() | set(batches[6])) == 13
    assert len({str(batches) for batches in epochs}) == 20
    assert {i for batches in epochs for batch in batches for i in batch} == set(range(15))
    first, second = (peer_recipe.endless_batches(groups, 3) for _ in range(2))
    assert [next(first) for _ in range(20)] == [next(second) for _ in range(20)]


def record(x1: int, y1: int, x2: int, y2: int, *, crowd: bool = False) -> ObjectRecord:
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    box = (float(x1), float(y1), float(x2), float(y2))
    return ObjectRecord(1, 2, box, coco_mask.encode(mask), crowd, float(mask.sum()))


def extents(masks: np.ndarray) -> list[list[int]]:
    places = [np.nonzero(mask) for mask in masks]
    return [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in places]


def test_an_example_is_read_without_crowds_and_mirrored(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    objects = (record(1, 2, 4, 5), record(0, 0, 9, 6, crowd=True), record(5, 0, 10, 3))
    image = ImageRecord(3, "a.png", *SIZE, objects)
    example = peer_recipe.read_example(image, tmp_path, DataConfig())
    np.testing.assert_array_equal(example.image, pixels)
    assert example.boxes.tolist() == extents(example.masks) == [[1, 2, 4, 5], [5, 0, 10, 3]]
    assert example.labels.tolist() == [2, 2]
    flipped = peer_recipe.mirrored(example)
    assert flipped.boxes.tolist() == extents(flipped.masks) == [[6, 2, 9, 5], [0, 0, 5, 3]]
    for y, x in ((0, 0), (2, 7)):
        np.testing.assert_array_equal(flipped.image[y, 9 - x], pixels[y, x])


def test_images_without_objects_are_left_out_and_missing_masks_refused(tmp_path: Path) -> None:
    lists = [(record(1, 2, 4, 5),), (), (record(1, 2, 4, 5, crowd=True),)]
    images = tuple(ImageRecord(i, "a.png", *SIZE, objects) for i, objects in enumerate(lists))
    dataset = CocoDataset((), images, Report(), tmp_path / "train.json", tmp_path, 3)
    assert peer_recipe.trained_images(dataset) == [images[0]]
    boxed = replace(images[0], annotations=(replace(record(1, 2, 4, 5), rle=None),))
    with pytest.raises(ConfigError, match="annotation 1: has no mask"):
        peer_recipe.trained_images(replace(dataset, images=(*images, boxed)))
