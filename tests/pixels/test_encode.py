"""Pictures are written whole, or a line says which was not."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mrcnn_jax.cli import Failure
from mrcnn_jax.pixels import encode
from mrcnn_jax.pixels.encode import encode_image, write_depth, write_image

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)


def test_pixels_come_back_by_another_decoder(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", PICTURE)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == PICTURE).all()
    smooth = cv2.resize(PICTURE[:3, :4], (64, 48))
    sizes = []
    for quality in (95, 20):
        write_image(tmp_path / "a.jpg", smooth, quality=quality)
        read = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int)
        assert np.abs(read - smooth).mean() < 20
        sizes.append((tmp_path / "a.jpg").stat().st_size)
    assert sizes[0] > sizes[1]
    assert sorted(os.listdir(tmp_path)) == ["a.jpg", "a.png"]


def test_what_cannot_be_written_is_named_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=r"No such file or directory: .*none/a.png"):
        write_image(tmp_path / "none" / "a.png", PICTURE)
    with pytest.raises(OSError, match=r"File name too long: .*x.png"):
        write_image(tmp_path / f"{'x' * 300}.png", PICTURE)
    with pytest.raises(ValueError, match="encoded"):
        encode_image(np.zeros((1, 70_000, 3), np.uint8), ".jpg")
    with pytest.raises(Failure, match=r"a.jpg: cannot be written: .*encoded"):
        write_image(tmp_path / "a.jpg", np.zeros((1, 70_000, 3), np.uint8))
    write_image(tmp_path / "a.png", PICTURE)

    def full(path: Path, content: bytes) -> None:
        path.open("wb").write(content[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode.Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a.png"):
        write_image(tmp_path / "a.png", 255 - PICTURE)
    assert (np.asarray(Image.open(tmp_path / "a.png")) == PICTURE).all()
    assert os.listdir(tmp_path) == ["a.png"]


def test_depth_comes_back_in_millimetres(tmp_path: Path) -> None:
    """By another decoder; what a 16-bit PNG cannot hold is unknown, never another depth."""
    exact = {0.001: 1, 0.0006: 1, 0.5: 500, 1.2344: 1234, 1.2346: 1235, 65.534: 65534}
    unknown = (0.0, 0.0004, -1.0, np.nan, np.inf, -np.inf, 65.535, 70.0)
    metres = np.array([*exact, *unknown], np.float64)[None]
    for kind in (np.float64, np.float32):
        assert write_depth(tmp_path / "a.png", metres.astype(kind)) == 2  # known, but beyond
        read = np.asarray(Image.open(tmp_path / "a.png"))
        assert read.tolist() == [[*exact.values(), *[0] * len(unknown)]], kind
    ramp = np.arange(1, 65535).reshape(2, -1)
    write_depth(tmp_path / "b.png", (ramp / 1000).astype(np.float32))
    assert (np.asarray(Image.open(tmp_path / "b.png")) == ramp).all()
    with pytest.raises(OSError, match=r"No such file or directory: .*none/a.png"):
        write_depth(tmp_path / "none" / "a.png", metres)
