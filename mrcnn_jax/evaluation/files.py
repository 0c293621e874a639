"""Prediction on image files: COCO results and overlays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm

from mrcnn_jax.config import ConfigError
from mrcnn_jax.data.decode import decode_image
from mrcnn_jax.evaluation.predict import Choice, Predictor, batch_of_one, load_run, make_folder
from mrcnn_jax.training.checkpoints import Weights
from mrcnn_jax.visualization.draw import draw_instances

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths`, with the images of each folder in it (not deeper); ConfigError names what is not there or empty."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
            if not found:
                raise ConfigError(f"{path}: no images in this folder")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"{path}: no such file or folder")
    if not files:
        raise ConfigError("paths: no image or folder was named")
    return files


def predict_files(
    workdir: Path, paths: Sequence[Path], *, out: Path, min_score: float, checkpoint: Choice = "newest", weights: Weights = "raw"
) -> list[str]:
    """Writes `out`/detections.json and an overlay an image; image ids count the files from 1. `checkpoint`, `weights`: as in `load_run`.

    Returns:
        One line for every file that could not be read; the others are done.
    """
    files = image_files(paths)
    run = load_run(workdir, checkpoint, weights)
    make_folder(out)
    predictor = Predictor(run)
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for number, file in enumerate(tqdm(files, unit="img", leave=False, disable=None), start=1):
        try:
            image = decode_image(file.read_bytes(), upright=True, max_pixels=run.config.data.max_pixels)
        except (OSError, ValueError) as error:
            failed.append(f"{file}: {error}")
            continue
        batch = batch_of_one(image, run.config.data)
        found = predictor.results(batch, predictor(batch), [number])
        results += [{"file_name": str(file), **result} for result in found]
        shown = [result for result in found if result["score"] >= min_score]
        overlay = draw_instances(image, shown, run.class_names)
        # The number keeps files of one name in two folders apart.
        cv2.imwrite(str(out / f"{number:05d}_{file.stem}.png"), overlay[..., ::-1])
    (out / "detections.json").write_text(json.dumps(results))
    print(f"{len(files) - len(failed)} images, {len(results)} detections: {out / 'detections.json'}, overlays in {out}")
    return failed
