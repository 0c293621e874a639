"""Augmentation against the picture: masks are painted into the image, and the augmented objects
must match what is visible there."""

from __future__ import annotations

import colorsys
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from pycocotools import mask as rle_ops

from mrcnn_jax.config.schema import AugmentConfig, DataConfig
from mrcnn_jax.data.loader import load, open_split, plan_once
from mrcnn_jax.data.order import plan_epoch
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.pixels.augment import CanvasImage, DecodedImage, Seen, _coloured, augmented, plain
from mrcnn_jax.pixels.transforms import coverage

CANVAS = (96, 128)


def blobs(height: int, width: int, count: int, seed: int) -> list[np.ndarray]:
    """Disjoint masks, each an L in its own column: not symmetric, and without tips that vanish when
    it shrinks."""
    rng = np.random.default_rng(seed)
    column = width // count
    masks = []
    for i in range(count):
        top, tall = rng.integers(2, height // 3), rng.integers(height // 3, height // 2)
        left, wide = i * column + rng.integers(1, 4), column - 5
        mask = np.zeros((height, width), bool)
        mask[top : top + tall, left : left + wide // 2] = mask[
            top + tall // 2 : top + tall, left : left + wide
        ] = True
        masks.append(mask)
    return masks


def extent(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def picture(
    image: np.ndarray,
    masks: list[np.ndarray],
    resized: tuple[int, int] | None = None,
    **changes: Any,
) -> DecodedImage:
    counts = [rle_ops.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"] for mask in masks]
    boxes = np.array([extent(mask) for mask in masks], np.float32)
    labels, iscrowd = np.arange(1, len(masks) + 1, dtype=np.int32), np.zeros(len(masks), bool)
    values = {
        "image": image,
        "boxes": boxes,
        "labels": labels,
        "iscrowd": iscrowd,
        "counts": counts,
        **changes,
    }
    values = {"shrink": "area", **values}
    return DecodedImage(**values, resized=resized or image.shape[:2])


def nobody(_: np.random.Generator) -> DecodedImage:
    raise AssertionError("nothing is to be pasted")


def canvas_images(
    subject: DecodedImage, config: AugmentConfig, count: int, another: Any = nobody
) -> Iterator[CanvasImage]:
    return (augmented(subject, CANVAS, (0, 3, 1, i), config, another) for i in range(count))


def pasted(seen: Seen, size: tuple[int, int]) -> np.ndarray:
    """The object's crop put back into its box on the canvas, by pixel centres."""
    x1, y1, x2, y2 = seen.on_canvas
    crop = seen.crop(112)
    assert crop is not None
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    cells = [
        np.clip((112 * (at - low) / (high - low)).astype(int), 0, 111)
        for at, low, high in ((y, y1, y2), (x, x1, x2))
    ]
    return inside & (crop[cells[0], cells[1]] >= 128)


# -- mirrored --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resized", [(60, 80), (83, 111)])
def test_a_mirrored_image_is_exactly_that(resized: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    crowd = np.array([False, True, False])
    subject = picture(image, blobs(60, 80, 3, seed=1), resized, iscrowd=crowd)
    before, (after,) = plain(subject), canvas_images(subject, AugmentConfig(flip=1.0), 1)
    assert (after.pixels == before.pixels[:, ::-1]).all()
    assert (after.transform.size, after.transform.scale, after.lost) == (
        resized,
        before.transform.scale,
        0,
    )
    for a, b in ((after.objects, before.objects), (after.crowds, before.crowds)):
        assert [seen.label for seen in a] == [seen.label for seen in b]
        for new, old in zip(a, b, strict=True):
            x1, y1, x2, y2 = old.on_canvas
            assert np.allclose(new.on_canvas, [resized[1] - x2, y1, resized[1] - x1, y2], atol=1e-4)
            assert (new.crop(28) == old.crop(28)[:, ::-1]).all()
    assert (len(after.objects), len(after.crowds)) == (2, 1)
    (never,) = canvas_images(subject, AugmentConfig(flip=0.0, hue=1e-9), 1)
    assert (never.pixels == before.pixels).all()


# -- scaled and cut --------------------------------------------------------------------------------


def test_what_is_seen_of_objects_is_what_is_seen_in_the_picture() -> None:
    """Three masks, the last a crowd, are the three colours of an image that grows and shrinks."""
    masks = blobs(120, 150, 3, seed=2)
    image = np.stack([255 * mask for mask in masks], axis=-1).astype(np.uint8)
    subject = picture(image, masks, (84, 120), iscrowd=np.array([False, False, True]))
    config = AugmentConfig(flip=0.5, scale=(0.2, 2.0))
    found: Counter[str] = Counter()
    for shown in canvas_images(subject, config, 150):
        height, width = shown.transform.size
        assert shown.pixels.shape == (height, width, 3)
        factor = shown.transform.resized[0] / 84
        assert 0.19 < factor <= 2
        assert abs(shown.transform.resized[1] - factor * 120) < 1.5
        assert (height, width) == (
            min(96, shown.transform.resized[0]),
            min(128, shown.transform.resized[1]),
        )
        found["mirrored"] += shown.transform.flip
        found["shrunk"] += factor < 1
        found["lost"] += shown.lost
        by_label = {seen.label: seen for seen in shown.objects + shown.crowds}
        assert len(shown.objects) + shown.lost == 2
        for label in (1, 2, 3):
            there = shown.pixels[..., label - 1] >= 128
            if label not in by_label:
                assert not there.any() or min(np.ptp(np.argwhere(there), axis=0)) <= 2
                continue
            seen = by_label[label]
            assert np.abs(seen.on_canvas - extent(there)).max() <= 1.5
            again = pasted(seen, shown.transform.size)
            edge = (there[1:] != there[:-1]).sum() + (there[:, 1:] != there[:, :-1]).sum()
            assert (again != there).sum() <= edge
            cut = seen.box != tuple(subject.boxes[label - 1].tolist())
            found["cut"] += cut
            # And back, the way on which masks are hidden.
            known = shown.transform.from_canvas(there)
            x1, y1, x2, y2 = seen.box
            near = (slice(round(y1), round(y2)), slice(round(x1), round(x2)))
            if factor > 0.5 and min(x2 - x1, y2 - y1) > 10:
                assert (known[near] != masks[label - 1][near]).mean() < 0.1
                assert not known[: max(int(y1) - 3, 0)].any()
                assert not known[:, : max(int(x1) - 3, 0)].any()
    assert all(found[name] > 5 for name in ("mirrored", "shrunk", "lost", "cut")), found
    assert 50 < found["mirrored"] < 100


def test_augmented_images_shrink_as_the_others_do() -> None:
    """To a third, bilinearly, every third pixel is left; of what is pasted too."""
    image = np.random.default_rng(3).integers(0, 256, (120, 150, 3)).astype(np.uint8)
    masks = blobs(120, 150, 2, seed=4)
    subject = picture(image, masks, shrink="bilinear")
    assert (plain(dataclasses.replace(subject, resized=(40, 50))).pixels == image[1::3, 1::3]).all()
    (shown,) = canvas_images(subject, AugmentConfig(scale=(1 / 3, 1 / 3)), 1)
    assert (shown.pixels == image[1::3, 1::3]).all()
    other = picture(255 - image, masks, shrink="bilinear")
    config, pastes = AugmentConfig(scale=(1 / 3, 1 / 3), copy_paste=1), 0
    for shown in canvas_images(subject, config, 8, lambda _: other):
        expected = image[1::3, 1::3].copy()
        for seen in shown.objects:
            there = masks[seen.number][1::3, 1::3]
            if seen.decoded is other:
                expected[there], pastes = 255 - expected[there], pastes + 1
        assert (shown.pixels == expected).all()
    assert pastes > 4


def test_cut_objects_without_a_mask_keep_their_part_of_the_box() -> None:
    masks = blobs(120, 150, 3, seed=2)
    image = np.zeros((120, 150, 3), np.uint8)
    subject = picture(image, masks, (96, 120), counts=[b""] * 3)
    for shown in canvas_images(subject, AugmentConfig(scale=(2.0, 2.0)), 20):
        top, left = shown.transform.offset
        expected = subject.boxes * 1.6 - [left, top, left, top]
        expected = np.clip(expected, 0, [128, 96, 128, 96])
        whole = (expected[:, 2:] - expected[:, :2]).min(1) >= 1
        assert [seen.label for seen in shown.objects] == subject.labels[whole].tolist()
        assert np.allclose([seen.on_canvas for seen in shown.objects], expected[whole], atol=1e-3)
        assert all(seen.crop(28) is None for seen in shown.objects)


def test_objects_of_less_than_a_pixel_are_lost() -> None:
    """At a tenth of the size, 11 px become 1.1 px, and 9 px are lost; unaugmented, both stay."""
    masks = [np.zeros((100, 100), bool) for _ in range(3)]
    masks[0][20:31, 20:31] = masks[1][50:80, 50:59] = masks[2][60:69, 70:90] = True
    subject = picture(
        np.zeros((100, 100, 3), np.uint8), masks, iscrowd=np.array([False, False, True])
    )
    (shown,) = canvas_images(subject, AugmentConfig(scale=(0.1, 0.1)), 1)
    assert (
        [seen.label for seen in shown.objects],
        shown.crowds,
        shown.lost,
    ) == ([1], [], 1)
    assert [
        seen.label for seen in plain(dataclasses.replace(subject, resized=(10, 10))).objects
    ] == [1, 2]


def test_a_window_is_anywhere() -> None:
    subject = picture(np.zeros((90, 120, 3), np.uint8), [], boxes=np.zeros((0, 4), np.float32))
    offsets = np.array(
        [
            shown.transform.offset
            for shown in canvas_images(subject, AugmentConfig(scale=(2.0, 2.0)), 300)
        ]
    )
    assert offsets.min(0).tolist() == [0, 0]
    assert (offsets.max(0) >= [82, 110]).all()
    assert (offsets.max(0) <= [180 - 96, 240 - 128]).all()


# -- pasted over -----------------------------------------------------------------------------------


def numbered(masks: list[np.ndarray], first: int) -> np.ndarray:
    """An image whose pixels are the numbers of the objects there, 0 elsewhere."""
    image = np.zeros((*masks[0].shape, 3), np.uint8)
    for number, mask in enumerate(masks, first):
        image[mask] = number
    return image


def test_what_lies_below_is_cut_as_in_the_picture() -> None:
    """At scale 1 every pixel names its object, so masks and boxes are known to the pixel; object 4
    has no mask."""
    masks = blobs(90, 120, 4, seed=4)
    for mask in masks[
        2:
    ]:  # small ones, that are hidden now and then; what has no mask fills its box
        left, top = extent(mask)[:2]
        mask[:] = False
        mask[top : top + 6, left : left + 6] = True
    subject = picture(numbered(masks, 1), masks)
    subject = dataclasses.replace(subject, counts=[*subject.counts[:3], b""])
    others = blobs(70, 150, 5, seed=5)
    source = picture(
        numbered(others, 101),
        others,
        labels=np.arange(101, 106, dtype=np.int32),
        iscrowd=np.array([0, 0, 0, 0, 1], bool),
    )
    source = dataclasses.replace(source, counts=[source.counts[0], b"", *source.counts[2:]])
    found: Counter[str] = Counter()
    for shown in canvas_images(
        subject, AugmentConfig(flip=0.5, copy_paste=0.9), 150, lambda _: source
    ):
        there = shown.pixels[..., 0]
        labels = [seen.label for seen in shown.objects]
        assert labels == sorted(labels)
        assert not {102, 105} & set(labels), "neither what has no mask nor a crowd is pasted"
        assert set(np.unique(there)) - {0} == {
            label for label in labels if label != 4 or (there == 4).any()
        }
        assert shown.lost == len({1, 2, 3, 4} - set(labels))
        found["lost"] += shown.lost
        found["nothing"] += max(labels, default=0) < 100
        for seen in shown.objects:
            mine = there == seen.label
            if seen.label == 4:
                assert mine.any()
                found["box only"] += mine.sum() < 36
                continue
            assert seen.on_canvas.tolist() == extent(mine)
            # Cells at the border may see a pixel beyond the cut.
            inner = (seen.crop(28).astype(int) - coverage(mine.astype(np.uint8), extent(mine), 28))[
                1:-1, 1:-1
            ]
            assert np.abs(inner).max() <= 1
            found["over" if seen.label > 100 else "below"] += (
                mine.sum() < (others if seen.label > 100 else masks)[seen.label % 100 - 1].sum()
            )
            found[f"pasted {seen.label}"] += seen.label > 100
        assert all(seen.transform.size == shown.transform.size for seen in shown.objects)
    assert all(found[name] > 5 for name in ("lost", "nothing", "below", "over", "box only")), found
    assert all(45 < found[f"pasted {label}"] < 90 for label in (101, 103, 104)), found


def test_objects_are_pasted_at_a_scale_of_their_own() -> None:
    masks = blobs(60, 60, 1, seed=6)
    source = picture(numbered(masks, 200), masks)
    subject = picture(np.zeros((90, 120, 3), np.uint8), [], boxes=np.zeros((0, 4), np.float32))
    config = AugmentConfig(scale=(0.5, 1.0), copy_paste=1.0)
    widths, places, areas = [], [], []
    for shown in canvas_images(subject, config, 60, lambda _: source):
        for seen in shown.objects:
            there = shown.pixels[..., 0] >= 100
            assert np.abs(seen.on_canvas - extent(there)).max() <= 1.5
            sides = seen.on_canvas[2:] - seen.on_canvas[:2]
            assert seen.area == pytest.approx(np.prod(sides), rel=1e-4)
            areas.append(there.sum() / (masks[0].sum() * np.prod(seen.transform.scale)))
            x1, y1, x2, _ = seen.on_canvas
            widths.append((x2 - x1) / (source.boxes[0, 2] - source.boxes[0, 0]))
            places.append([y1, x1])
    assert len(widths) > 15
    assert np.mean(areas) == pytest.approx(1, abs=0.03)
    assert min(widths) < 0.65 < 0.85 < max(widths)
    assert (np.std(places, axis=0) > 8).all(), "not all at the top left"


# -- colours ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "enhance"),
    [("brightness", "Brightness"), ("contrast", "Contrast"), ("saturation", "Color")],
)
def test_colours_are_changed_as_pillow_does(field: str, enhance: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    order = ("brightness", "contrast", "saturation").index(field)
    changes = []
    for seed in range(5):
        draws = np.random.default_rng(seed)
        draws.random(order)
        factor = draws.uniform(0.4, 1.6)
        expected = np.asarray(
            getattr(ImageEnhance, enhance)(Image.fromarray(image)).enhance(factor)
        ).astype(int)
        found = _coloured(image, np.random.default_rng(seed), AugmentConfig(**{field: 0.6}))
        assert np.abs(found - expected).max() <= 2
        changes.append(np.abs(found.astype(int) - image).max())
    assert max(changes) > 40


def test_colours_are_changed_one_after_the_other() -> None:
    """All three, in floats, where nothing reaches 0 or 255; rounding errors cancel in the mean."""
    image = (
        np.random.default_rng(2)
        .integers([140, 40, 80], [160, 60, 100], (40, 60, 3))
        .astype(np.uint8)
    )
    for seed in range(5):
        brightness, contrast, saturation = np.random.default_rng(seed).uniform(0.7, 1.3, 3)
        bright = image * brightness
        mean = (bright @ [0.299, 0.587, 0.114]).mean()
        contrasted = mean + contrast * (bright - mean)
        grey = (contrasted @ [0.299, 0.587, 0.114])[..., None]
        expected = grey + saturation * (contrasted - grey)
        found = _coloured(
            image,
            np.random.default_rng(seed),
            AugmentConfig(brightness=0.3, contrast=0.3, saturation=0.3),
        )
        assert 0 < expected.min() < expected.max() < 255
        assert np.abs(found - expected).max() < 1
        assert np.abs((found - expected).mean((0, 1))).max() < 0.12


def test_hues_turn() -> None:
    image = np.random.default_rng(1).integers(30, 226, (8, 8, 3)).astype(np.uint8)
    for seed in range(4):
        draws = np.random.default_rng(seed)
        draws.random(3)
        turn = draws.uniform(-0.3, 0.3)
        found = _coloured(image, np.random.default_rng(seed), AugmentConfig(hue=0.3))
        for before, after in zip(
            image.reshape(-1, 3) / 255, found.reshape(-1, 3) / 255, strict=True
        ):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            assert (
                np.abs(after - colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)).max()
                < 0.04
            )


# -- loaded ----------------------------------------------------------------------------------------


def test_draws_are_a_pure_function_of_seed_epoch_and_image(
    mixed_file: Path, mixed_data: DataConfig
) -> None:
    """The rest of a plan gives the same batches with any threads; epochs and repeats differ; only
    training is augmented."""
    augment = AugmentConfig(flip=0.5, scale=(0.5, 2.0), brightness=0.3, copy_paste=0.5)
    data = dataclasses.replace(mixed_data, augment=augment)
    dataset = read_coco(mixed_file, mixed_file.parent / "images", data)
    split = open_split("train", dataset, cache=mixed_file.parent / "cache", data=data)
    canvases = [plan.canvas for plan in split.plans]
    repeats = np.array([3.0, *[1.0] * 6])

    def plan(epoch: int) -> list[Any]:
        return plan_epoch(canvases, 2, seed=5, epoch=epoch, shuffle=True, repeats=repeats)

    def leaves(batches: Any) -> list[list[np.ndarray]]:
        return [jax.tree.leaves(batch) for batch in batches]

    def equal(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> bool:
        return all(
            np.array_equal(x, y)
            for one, other in zip(a, b, strict=True)
            for x, y in zip(one, other, strict=True)
        )

    whole = list(load(split, plan(4), data))
    assert equal(
        leaves(whole[2:]), leaves(load(split, plan(4)[2:], dataclasses.replace(data, threads=5)))
    )
    seen = {}
    for epoch, batches in ((4, whole), (5, load(split, plan(5), data))):
        for planned, batch in zip(plan(epoch), batches, strict=True):
            assert batch.images.shape[1:3] == mixed_data.canvases[planned.canvas]
            assert batch.lost is not None
            for row in np.flatnonzero(batch.valid):
                image = split.dataset.images[batch.indices[row]]
                assert batch.original_sizes[row].tolist() == [image.height, image.width]
                key = planned.keys[row]
                assert key not in seen
                seen[key] = batch.images[row].tobytes()
                objects = sum(not record.iscrowd for record in image.annotations)
                assert batch.ground_truth.valid[row].sum() + batch.lost[row] >= objects
            assert planned.keys[int(batch.valid.sum()) :] == ((),) * int((~batch.valid).sum())
    assert len(set(seen.values())) == len(seen) == 18

    as_they_are = leaves(load(split, plan_once(split, 2), mixed_data))
    assert equal(leaves(load(split, plan_once(split, 2), data)), as_they_are)
    assert equal(
        leaves(load(split, plan(4), mixed_data)),
        leaves(load(split, [dataclasses.replace(p, keys=()) for p in plan(4)], data)),
    )


def test_what_is_over_the_limit_is_counted(mixed_file: Path, mixed_data: DataConfig) -> None:
    data = dataclasses.replace(mixed_data, augment=AugmentConfig(copy_paste=1.0), max_objects=1)
    dataset = read_coco(mixed_file, mixed_file.parent / "images", data)
    split = open_split("train", dataset, cache=mixed_file.parent / "cache", data=data)
    plan = plan_epoch([p.canvas for p in split.plans], 1, seed=0, epoch=0, shuffle=True)
    more = 0
    for batch in load(split, plan, data):
        own = sum(not record.iscrowd for record in split.dataset.images[batch.indices[0]].objects)
        assert batch.lost is not None
        if own:  # takes the one place
            more += int(batch.lost[0] + batch.ground_truth.valid[0].sum()) - own
    assert more > 0, "pasted objects that found no place"


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 40, 30),
        (0, 0, 3.5, 30),
        (36.2, 27.7, 40, 30),
        (11.3, 9.9, 12.1, 10.2),
        (8, 7, 31, 22),
    ],
)
def test_a_crop_is_that_of_the_whole_mask(box: tuple[float, ...], flip: bool) -> None:
    """To the bit, though only what is near the box is decoded."""
    mask = np.asfortranarray(np.random.default_rng(7).random((30, 40)) < 0.6, np.uint8)
    counts = rle_ops.encode(mask)["counts"]
    picture: Any = SimpleNamespace(size=(30, 40), counts=[counts])
    transform: Any = SimpleNamespace(flip=flip)
    crop = Seen(picture, transform, 0, box).crop(28)
    assert (crop == coverage(mask, box, 28)[:, :: -1 if flip else 1]).all()
