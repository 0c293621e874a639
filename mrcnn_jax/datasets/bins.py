"""A generated COCO data set with depth: boxes, cylinders, capsules and ellipsoids in a bin.

- Masks are modal: what is seen of each object. One seen under 40 % of what would be seen with
  nothing in front of it is a crowd region: neither trained on, nor counted as missed or as false.
- `depth_file` of an image names its depth, from the folder of the images: a 16-bit PNG in
  millimetres along the camera's axis; 0 is unknown.
- An image is a pure function of (seed, split, index), drawn by `bin_scenes`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mrcnn_jax.cli import Failure
from mrcnn_jax.config.errors import require
from mrcnn_jax.data.records import coco_annotation
from mrcnn_jax.datasets import bin_scenes
from mrcnn_jax.datasets.bin_scenes import CLASSES, Rendering
from mrcnn_jax.datasets.shapes import MIN_VISIBLE
from mrcnn_jax.output import write_file
from mrcnn_jax.pixels.encode import write_depth, write_image
from mrcnn_jax.pixels.geometry import mask_box
from mrcnn_jax.pixels.rle import encoded

SPLITS = ("train", "val")
SIDES = (64, 2048)  # of an image, at least and at most
JPEG_QUALITY = 95


def seen_objects(rendering: Rendering) -> list[dict[str, Any]]:
    """The objects that are seen in an image, with 0 for the ids of image and annotation."""
    found = []
    for number, (label, whole) in enumerate(zip(rendering.labels, rendering.whole, strict=True), 1):
        mask = rendering.ids == number
        area, share = int(mask.sum()), mask.sum() / max(whole, 1)
        if area:
            crowd, (rle,) = bool(share < MIN_VISIBLE), encoded([mask])
            found.append(
                coco_annotation(0, 0, label, mask_box(mask), area, crowd, rle)
                | {"visible_share": round(float(share), 4)}
            )
    return found


def write_bins(
    out: Path,
    *,
    train: int,
    val: int,
    seed: int = 0,
    size: tuple[int, int] = (480, 640),
    processes: int = 1,
) -> None:
    """Writes the data set's folder, annotations last, and prints one line about it.

    Args:
        out: gets images/*.jpg, depth/*.png and annotations/instances_{train,val}.json, whose ids of
            images and annotations are unique over both splits.
        train, val: number of images.
        seed: the same seed gives the same bytes, on one kind of processor and with one version of
            MuJoCo and of Mesa.
        size: (height, width) of an image, in pixels.
        processes: that draw; how many makes no difference to the files.

    Raises:
        ConfigError: `size` or `processes` is out of range, or something is missing to draw with.
        Failure: a process has died.
        OSError: a file cannot be written; has its name.
    """
    for side in size:
        require(SIDES[0] <= side <= SIDES[1], f"size: {side}: must be {SIDES[0]} to {SIDES[1]} px")
    require(processes >= 1, f"processes: {processes}: must be at least 1")
    bin_scenes.load_mujoco()
    for name in ("images", "depth", "annotations"):
        (out / name).mkdir(parents=True, exist_ok=True)
    paths = {split: out / "annotations" / f"instances_{split}.json" for split in SPLITS}
    for path in paths.values():  # of other images, if there was a data set before
        path.unlink(missing_ok=True)
    counts = {"train": train, "val": val}
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    contents: dict[str, dict[str, Any]] = {
        split: {
            "info": {"description": f"Generated bins, split {split}, seed {seed}"},
            "images": [],
            "annotations": [],
            "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)],
        }
        for split in SPLITS
    }
    seen: Counter[str] = Counter()
    with _mapping(processes) as mapped:
        scenes = mapped(partial(_write_scene, out, seed, size), jobs)
        bar = tqdm(zip(jobs, scenes, strict=True), "bins", len(jobs), unit="img", leave=False)
        for image_id, ((split, _), (image, objects)) in enumerate(bar, 1):
            contents[split]["images"].append({"id": image_id} | image)
            for item in objects:
                name = "crowd" if item["iscrowd"] else CLASSES[item["category_id"] - 1]
                seen[name] += 1
                ids = {"id": seen.total(), "image_id": image_id}
                contents[split]["annotations"].append(item | ids)
    for split, content in contents.items():
        write_file(paths[split], json.dumps(content) + "\n")
    classes = ", ".join(f"{seen[name]} of class {name}" for name in CLASSES)
    print(
        f"{out}: {train} + {val} images of {size[0]} x {size[1]}: {classes}; "
        f"{seen['crowd']} crowd regions (seen under {MIN_VISIBLE:.0%})"
    )


def _write_scene(
    out: Path, seed: int, size: tuple[int, int], job: tuple[str, int]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An image's entry in the file, without its id, and its annotations; its files are written."""
    split, index = job
    rendering = bin_scenes.draw_scene((seed, SPLITS.index(split), index), size)
    name = f"{split}_{index:05d}"
    write_image(out / "images" / f"{name}.jpg", rendering.colour, quality=JPEG_QUALITY)
    write_depth(out / "depth" / f"{name}.png", rendering.depth)
    image = {"file_name": f"{name}.jpg", "height": size[0], "width": size[1]}
    return image | {"depth_file": f"../depth/{name}.png"}, seen_objects(rendering)


@contextlib.contextmanager
def _mapping(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` whose results come in order, of that many processes."""
    if processes == 1:
        yield map
        return
    # A scene is drawn by one thread: without this, each process would start one per core.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _end_with_parent) as pool:
        try:
            yield pool.map
        except BrokenProcessPool:
            raise Failure("a process that draws has died (out of memory?)") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Leaves Ctrl-C to the parent, and ends this process if the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
