"""Annotations for tools: by hand, and read again by the converters."""

from __future__ import annotations

import base64
import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from exports import HEIGHT, PICTURES, WIDTH, block, checked, disc, objects, picture
from PIL import Image

from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.labelme import Labelme
from mrcnn_jax.convert.write import convert
from mrcnn_jax.convert.yolo import Yolo
from mrcnn_jax.inference.annotations import labelme_content, yolo_lines
from mrcnn_jax.pixels.rle import encoded, moved_rle

BOXES = np.array([[10.0, 20.0, 23.0, 30.0]])
PARTS = block(2, 2, 12, 9) | block(40, 30, 50, 38)
NONE = np.zeros((HEIGHT, WIDTH), bool)
MASKS = {
    "disc": disc(20, 20, 12),
    "parts": PARTS,
    "ring": disc(20, 20, 14) & ~disc(22, 19, 6),
    "rectangle": block(0, 0, 30, 40),
    "small": block(7, 7, 9, 8),
    "much": PICTURES["a.png"][0][1],
}


def test_labelme_by_hand() -> None:
    ring = block(1, 1, 4, 4) & ~block(2, 2, 3, 3)
    masks = encoded([block(4, 6, 14, 9), PARTS, ring, NONE])
    boxes = np.repeat(BOXES, 4, axis=0)
    content = labelme_content("../a.png", (40, 52), list("abcd"), boxes, masks, [0.5, 1, 0, 0.25])
    assert [content[key] for key in ("imagePath", "imageHeight", "imageWidth", "imageData")] == [
        "../a.png",
        40,
        52,
        None,
    ]
    square, large, small, drawn, box = content["shapes"]
    assert (square["label"], square["group_id"], square["description"]) == ("a", None, "0.500")
    assert sorted(square["points"]) == [[4, 6], [4, 9], [14, 6], [14, 9]]
    assert (large["label"], large["group_id"]) == (small["label"], small["group_id"]) == ("b", 2)
    assert max(large["points"]) == [50, 38]
    assert (drawn["shape_type"], drawn["points"]) == ("mask", [[1, 1], [3, 3]])
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn["mask"]))))
    assert pixels.tolist() == [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    assert (box["shape_type"], box["points"]) == ("rectangle", [[10, 20], [23, 30]])
    json.dumps(content)


def test_yolo_by_hand() -> None:
    """Ultralytics would read the four numbers of a box beside a polygon as two points."""
    masks = [*encoded([block(13, 10, 26, 20)]), None]
    square, box = yolo_lines((40, 52), [3, 0], np.repeat(BOXES, 2, 0), masks, corners=True)
    number, *values = square.split()
    assert number == "3"
    pairs = sorted(zip(map(float, values[::2]), map(float, values[1::2]), strict=True))
    assert pairs == [(0.25, 0.25), (0.25, 0.5), (0.5, 0.25), (0.5, 0.5)]
    points = (10, 20), (23, 20), (23, 30), (10, 30)
    assert box == " ".join(["0", *(f"{x / 52:.6f} {y / 40:.6f}" for x, y in points)])
    (box,) = yolo_lines((40, 52), [0], BOXES, [None], corners=False)
    assert box == f"0 {16.5 / 52:.6f} 0.625000 0.250000 0.250000"


def test_objects_in_huge_images_are_outlined_without_their_pixels() -> None:
    """In 20,000 x 20,000 pixels as in a small image, in its place."""
    size, (y, x) = (20_000, 20_000), (18_000, 15_000)
    small = encoded([block(4, 6, 14, 9), block(1, 1, 4, 4) & ~block(2, 2, 3, 3)])
    large = [moved_rle(rle, (y, x), size) for rle in small]
    boxes, names = np.repeat(BOXES, 2, axis=0), list("ab")
    tracemalloc.start()
    try:
        content = labelme_content("a.tif", size, names, boxes, large, [0.5, 0.5])
        lines = yolo_lines(size, [0, 1], boxes, large, corners=True)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    square, ring = content["shapes"]
    corners = [[x + 4, y + 6], [x + 4, y + 9], [x + 14, y + 6], [x + 14, y + 9]]
    assert sorted(square["points"]) == corners
    assert ring["points"] == [[x + 1, y + 1], [x + 3, y + 3]]
    values = np.array(lines[0].split()[1:], float).reshape(-1, 2) * 20_000
    assert sorted(np.round(values, 3).tolist()) == corners


@pytest.mark.parametrize("form", ["labelme", "yolo"])
def test_the_converters_read_the_masks_again(form: str, tmp_path: Path) -> None:
    names, masks = list(MASKS), encoded(MASKS.values())
    boxes, scores = np.repeat(BOXES, len(names), axis=0), [0.5] * len(names)
    picture(tmp_path / "images" / "a.png")
    options: Options
    if form == "labelme":
        content = labelme_content("images/a.png", (HEIGHT, WIDTH), names, boxes, masks, scores)
        (tmp_path / "a.json").write_text(json.dumps(content))
        options = Labelme(tmp_path / "a.json", tmp_path / "out.json", images=tmp_path / "images")
    else:
        size = HEIGHT, WIDTH
        lines = yolo_lines(size, range(len(names)), boxes, masks, corners=True)
        (tmp_path / "labels").mkdir()
        (tmp_path / "labels" / "a.txt").write_text("\n".join(lines))
        (tmp_path / "data.yaml").write_text(f"train: images\nnames: {json.dumps(names)}\n")
        options = Yolo(tmp_path, tmp_path / "out.json")
    convert(options)
    found = dict(objects(checked(options, tmp_path / "cache"), "a.png"))
    assert found.keys() == MASKS.keys()
    for name, mask in MASKS.items():
        overlap = (found[name] & mask).sum() / (found[name] | mask).sum()
        assert overlap >= 0.95, (name, overlap)
    if form == "labelme":  # as a mask
        assert (found["ring"] == MASKS["ring"]).all()
