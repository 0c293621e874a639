# mypy: warn-unused-ignores
"""What users write with the Python API; mypy, which checks this file too, has to know its types."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import jax
import numpy as np
from numpy.typing import NDArray
from PIL import Image

import mrcnn_jax
from mrcnn_jax.figures.draw import draw_instances
from mrcnn_jax.inference import exported
from mrcnn_jax.inference.exported import Found


def use_a_run(run: Path, folder: Path) -> list[mrcnn_jax.Detections]:
    """Every kind of image alone, and several: `folder` holds three."""
    model = assert_type(mrcnn_jax.load(run), mrcnn_jax.Model)
    assert_type(model.class_names, dict[int, str])
    file = folder / "0.png"
    pixels = np.asarray(Image.open(file).convert("RGB"))
    found = assert_type(model.predict(pixels), mrcnn_jax.Detections)
    assert_type(model.predict(str(file)), mrcnn_jax.Detections)
    assert_type(model.predict(file.read_bytes(), tile=128), mrcnn_jax.Detections)
    assert_type(model.predict(Image.open(file), rle=True), mrcnn_jax.Detections)
    assert_type(model.predict(jax.numpy.asarray(pixels)), mrcnn_jax.Detections)
    assert_type(found.to_coco(), list[dict[str, Any]])
    assert_type(found.class_names, tuple[str, ...])
    if not isinstance(found.masks, tuple | None):
        assert_type(found.masks, np.ndarray)
    draw_instances(pixels, found.at_least(0.5).to_coco(), model.class_names)

    for one in model.predict_many([pixels, file, str(file)], progress=True):
        assert_type(one, mrcnn_jax.Detections)
    paths: list[Path] = sorted(folder.iterdir())
    assert_type(next(model.predict_many(path for path in paths)), mrcnn_jax.Detections)
    assert_type(list(model.predict_many(paths)), list[mrcnn_jax.Detections])
    return list(model.predict_many(folder))


def wrong(model: mrcnn_jax.Model, pixels: np.ndarray) -> None:
    """Mistakes that are found without running it."""
    model.predict([pixels])  # type: ignore[arg-type]
    model.predict(pixels, progress=True)  # type: ignore[call-arg]
    model.predict(7)  # type: ignore[arg-type]
    model.predict_many([7])  # type: ignore[list-item]
    model.predict_many(b"png")  # type: ignore[arg-type]
    mrcnn_jax.load("run", weights="average")  # type: ignore[arg-type]
    model.predict(pixels).masks.sum()  # type: ignore[union-attr]
    exported.load("file").predict(pixels)["mask"]  # type: ignore[typeddict-item]


def use_an_export(path: Path, pixels: np.ndarray) -> Found:
    found = assert_type(exported.load(path).predict(pixels, min_score=0.05), Found)
    assert_type(found["class_names"], list[str])
    assert_type(found["boxes"], NDArray[np.float64])
    if "masks" in found:
        assert_type(found["masks"], NDArray[np.bool_])
    return found
