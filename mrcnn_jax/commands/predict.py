"""Detect and segment objects in images and folders of images with a trained run.

    mrcnn predict image.jpg folder/ --workdir runs/a --out out/ [--checkpoint best] [--weights ema]

Writes out/detections.json (COCO results, with file names, and with a depth head the distance of
each object) and one overlay per image, and prints what was converted to 8-bit RGB or passed over. A
file that cannot be read is named, and the exit status is 2; the others are done.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from mrcnn_jax.commands.arguments import OfWeights
from mrcnn_jax.config.errors import ConfigError

if TYPE_CHECKING:
    from mrcnn_jax.data.report import Report

LONGEST = 200  # bytes of an overlay's name: file systems have 255, and files are written under more


@dataclass(frozen=True, kw_only=True)
class Arguments(OfWeights):
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Images, and folders of images."""
    out: Path = Path("predictions")
    """The folder of the results."""
    min_score: float = 0.5
    """Lowest score of the detections drawn (detections.json has them all)."""
    depth_maps: bool = False
    """Also write the depth of every pixel, if the run has a depth head: 16-bit PNG in millimetres,
    0 where it is unknown."""


def run(arguments: Arguments) -> None:
    """Predicts and writes; image ids count the files from 1.

    Raises:
        ConfigError: no such run, file or image folder, or `out` cannot be made.
        OSError: a result cannot be written; has its name.
        SystemExit: status 2, after the other files are done, if some could not be read.
    """
    from tqdm import tqdm

    from mrcnn_jax.data.caps import found_limit
    from mrcnn_jax.data.report import Report
    from mrcnn_jax.figures.draw import draw_instances
    from mrcnn_jax.inference import api
    from mrcnn_jax.inference.inputs import image_files, read_image
    from mrcnn_jax.output import whole_file
    from mrcnn_jax.pixels.encode import write_depth, write_image
    from mrcnn_jax.runs.run import make_folder

    report, out = Report(), arguments.out
    files = image_files(arguments.paths, report)
    model = api.load(arguments.workdir, checkpoint=arguments.checkpoint, weights=arguments.weights)
    if arguments.depth_maps and model.run.config.model.depth_head.kind == "none":
        raise ConfigError(f"--depth-maps: {arguments.workdir}: the run has no depth head")
    make_folder(out)
    limit = model.run.config.model.box_head.detections
    count = full = failed = 0
    # It gets its name when it is whole.
    with whole_file(out / "detections.json") as part, part.open("w") as results:
        results.write("[")
        for number, file in enumerate(tqdm(files, unit="img", leave=False, disable=None), start=1):
            try:
                image = read_image(file, model.run.config.data, report)
            except ConfigError as error:
                tqdm.write(f"error: {error}", file=sys.stderr)
                failed += 1
                continue
            seen = model.predict(image, rle=True)
            found = seen.coco_results(number)
            for result in found:
                results.write(",\n" if count else "")
                results.write(json.dumps({"file_name": str(file), **result}))
                count += 1
            results.flush()
            drawn = [result for result in found if result["score"] >= arguments.min_score]
            full += len(drawn) == limit
            overlay = draw_instances(image, drawn, model.class_names)
            name = _overlay_name(number, file, report)
            write_image(out / f"{name}.png", overlay)
            if arguments.depth_maps:
                write_depth(out / f"{name}_depth.png", seen.depth_map)
        results.write("]\n")
    for line in report.lines()[1:]:
        print(line)
    if full:
        print(found_limit(limit, full, arguments.min_score))
    print(
        f"{len(files) - failed} images, {count} detections: "
        f"{out / 'detections.json'}, overlays in {out}"
    )
    if failed:
        sys.exit(2)


def _overlay_name(number: int, file: Path, report: Report) -> str:
    """Without suffix; the number keeps files of one name in two folders apart."""
    from mrcnn_jax.data.report import Reason

    start, end = f"{number:05d}_", ".png"
    stem = file.stem.encode(errors="surrogateescape")
    room = LONGEST - len(start) - len(end)
    if len(stem) <= room:
        return f"{start}{file.stem}"
    name = f"{start}{stem[:room].decode(errors='ignore')}"
    report.add(Reason.SHORTENED, f"{name}.png")
    return name
