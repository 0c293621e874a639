"""A run that is kept, loaded once, and three images to predict on."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
import tiny

import mrcnn_jax


@pytest.fixture(scope="session")
def model(kept_run: Path) -> mrcnn_jax.Model:
    return mrcnn_jax.load(str(kept_run))


@pytest.fixture(scope="session")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, one of them enlarged."""
    folder = tmp_path_factory.mktemp("images")
    for place, image in enumerate(tiny.read(tiny_data, "val")["images"][:3]):
        pixels = cv2.imread(str(tiny_data / "images" / image["file_name"]))
        cv2.imwrite(
            str(folder / f"{place}.png"), cv2.resize(pixels, (300, 240)) if place == 1 else pixels
        )
    return folder
