"""Prediction on image files: COCO results and overlays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.figures.draw import draw_instances
from mrcnn_jax.inference import api
from mrcnn_jax.inference.inputs import image_files, read_image
from mrcnn_jax.runs.checkpoints import Weights
from mrcnn_jax.runs.run import Choice, make_folder


def predict_files(
    workdir: Path,
    paths: Sequence[Path],
    *,
    out: Path,
    min_score: float,
    checkpoint: Choice = "newest",
    weights: Weights = "raw",
) -> list[str]:
    """Writes `out`/detections.json and an overlay an image; image ids count the files from 1.
    `checkpoint`, `weights`: as in `load_run`.

    Returns:
        One line for every file that could not be read; the others are done.
    """
    files = image_files(paths)
    model = api.load(workdir, checkpoint=checkpoint, weights=weights)
    make_folder(out)
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for number, file in enumerate(tqdm(files, unit="img", leave=False, disable=None), start=1):
        try:
            image = read_image(file, model.run.config.data)
        except ConfigError as error:
            failed.append(str(error))
            continue
        found = model.predict(image, rle=True).coco_results(number)
        results += [{"file_name": str(file), **result} for result in found]
        shown = [result for result in found if result["score"] >= min_score]
        overlay = draw_instances(image, shown, model.class_names)
        # The number keeps files of one name in two folders apart.
        cv2.imwrite(str(out / f"{number:05d}_{file.stem}.png"), overlay[..., ::-1])
    (out / "detections.json").write_text(json.dumps(results))
    print(
        f"{len(files) - len(failed)} images, {len(results)} detections: {out / 'detections.json'}, overlays in {out}"
    )
    return failed
