"""Windows of images in files and in memory, and the smaller picture that is kept of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.report import Report
from mrcnn_jax.inference import windowed_images
from mrcnn_jax.inference.windowed_images import (
    ArrayImage,
    ImageWithOverview,
    TiffImage,
    open_windowed,
)
from mrcnn_jax.pixels.windows import Window, windows

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
SMALL = DataConfig(max_pixels=100)


@pytest.mark.parametrize(("name", "kind"), [("a.tif", TiffImage), ("a.png", ArrayImage)])
def test_files_are_windowed_images(tmp_path: Path, name: str, kind: type) -> None:
    """Whatever data.max_pixels says."""
    Image.fromarray(PIXELS).save(tmp_path / name)
    report = Report()
    image = open_windowed(tmp_path / name, SMALL, report)
    assert isinstance(image, kind)
    assert image.size == (60, 90)
    np.testing.assert_array_equal(image.read(Window(10, 20, 30, 70)), PIXELS[10:30, 20:70])
    assert not report.findings


def test_files_are_told_of(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS).convert("L")
    image.save(tmp_path / "a.tif", save_all=True, append_images=[image])
    report = Report()
    open_windowed(tmp_path / "a.tif", SMALL, report)
    assert sorted(text for _, text in report.findings) == [
        "images that are grey: converted to 8-bit RGB",
        "images with 2 pages or frames: only the first is read",
    ]


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"missing\.tif: No such file or directory"):
        open_windowed(tmp_path / "missing.tif", SMALL, Report())
    (tmp_path / "b.tif").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"b\.tif: not an image that can be decoded"):
        open_windowed(tmp_path / "b.tif", SMALL, Report())
    for name in ("c.tif", "c.png"):
        Image.fromarray(PIXELS).save(tmp_path / name, tiffinfo={278: 60})
    monkeypatch.setattr(windowed_images, "AT_ONCE", 60 * 90 - 1)
    with pytest.raises(
        ConfigError, match=r"c\.png: 60 x 90 is over 5399 pixels, .* TIFF of 8 or 16 bits"
    ):
        open_windowed(tmp_path / "c.png", SMALL, Report())
    for number, (mode, options, why) in enumerate(
        (
            ("RGB", {"tiffinfo": {274: 6}}, "turned by its orientation"),
            ("1", {"compression": "group4"}, "in compression 4"),
            ("F", {}, "of more than 16 bits"),
        )
    ):
        path = tmp_path / f"{number}.tif"
        Image.fromarray(PIXELS).convert(mode).save(path, **options)
        told = rf"(60 x 90|90 x 60) is over 5399 pixels, .* windows, being {why}: save it upright"
        with pytest.raises(ConfigError, match=told):
            open_windowed(path, SMALL, Report())
    image = open_windowed(tmp_path / "c.tif", SMALL, Report())
    told = r"c\.tif: its strips are too large: 60 x 90 .* in smaller strips$"
    with pytest.raises(ConfigError, match=told):
        image.read(Window(0, 0, 60, 90))
    (tmp_path / "c.tif").unlink()
    with pytest.raises(ConfigError, match=r"c\.tif: .*No such file"):
        image.read(Window(0, 0, 9, 9))


def test_a_smaller_picture_is_kept() -> None:
    """The mean of each square, by a loop, wherever the windows end; small images as they are."""
    image = ImageWithOverview(ArrayImage(PIXELS), 18)
    for window in windows(image.size, 33, 10):
        image.read(window)
    expected = np.array(
        [
            [PIXELS[y : y + 5, x : x + 5].mean((0, 1)) for x in range(0, 90, 5)]
            for y in range(0, 60, 5)
        ]
    )
    np.testing.assert_allclose(image.overview, expected, atol=0.51)
    coarse = PIXELS[:12, :18]
    image = ImageWithOverview(ArrayImage(coarse.repeat(5, axis=0).repeat(5, axis=1)), 18)
    assert image.step == 5
    for window in windows(image.size, 37, 0):
        assert image.read(window).shape == (37, 37, 3)
    np.testing.assert_array_equal(image.overview, coarse)
    image = ImageWithOverview(ArrayImage(PIXELS), 90)
    for window in windows(image.size, 33, 10):
        image.read(window)
    np.testing.assert_array_equal(image.overview, PIXELS)
