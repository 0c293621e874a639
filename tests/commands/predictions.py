"""Calls of `predict`, and what they wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mrcnn_jax.commands import predict


def predict_files(workdir: Path, paths: Sequence[Path], out: Path, **options: Any) -> None:
    predict.run(predict.Arguments(workdir=workdir, paths=tuple(paths), out=out, **options))


def results_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "detections.json").read_text())


def images_of(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "images.json").read_text())


def pictures_in(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("*.png"))


def grey_images(folder: Path, names: str) -> list[Path]:
    """Small images, each named by a letter."""
    files = [folder / f"{name}.png" for name in names]
    for file in files:
        Image.new("L", (8, 6)).save(file)
    return files
