"""Detect and segment objects in images and folders of images with a trained run.

    mrcnn predict image.jpg folder/ --workdir runs/a --out out/ [--checkpoint best] [--weights ema]

Writes out/detections.json (COCO results, with file names) and one overlay per image. A file that
cannot be read is named, and the exit status is 2; the others are done.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from mrcnn_jax.commands.arguments import OfWeights
from mrcnn_jax.config.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Arguments(OfWeights):
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Images, and folders of images."""
    out: Path = Path("predictions")
    """The folder of the results."""
    min_score: float = 0.5
    """Lowest score of the detections drawn (detections.json has them all)."""


def run(arguments: Arguments) -> None:
    """Predicts and writes; image ids count the files from 1.

    Raises:
        ConfigError: no such run, file or image folder, or `out` cannot be made.
        SystemExit: status 2, after the other files are done, if some could not be read.
    """
    import cv2
    from tqdm import tqdm

    from mrcnn_jax.figures.draw import draw_instances
    from mrcnn_jax.inference import api
    from mrcnn_jax.inference.inputs import image_files, read_image
    from mrcnn_jax.runs.run import make_folder

    files, out = image_files(arguments.paths), arguments.out
    model = api.load(arguments.workdir, checkpoint=arguments.checkpoint, weights=arguments.weights)
    make_folder(out)
    results: list[dict[str, Any]] = []
    failed: list[ConfigError] = []
    for number, file in enumerate(tqdm(files, unit="img", leave=False, disable=None), start=1):
        try:
            image = read_image(file, model.run.config.data)
        except ConfigError as error:
            failed.append(error)
            continue
        found = model.predict(image, rle=True).coco_results(number)
        results += [{"file_name": str(file), **result} for result in found]
        drawn = [result for result in found if result["score"] >= arguments.min_score]
        overlay = draw_instances(image, drawn, model.class_names)
        # The number keeps files of one name in two folders apart.
        cv2.imwrite(str(out / f"{number:05d}_{file.stem}.png"), overlay[..., ::-1])
    (out / "detections.json").write_text(json.dumps(results))
    print(
        f"{len(files) - len(failed)} images, {len(results)} detections: "
        f"{out / 'detections.json'}, overlays in {out}"
    )
    if failed:
        print("\n".join(f"error: {line}" for line in failed), file=sys.stderr)
        sys.exit(2)
