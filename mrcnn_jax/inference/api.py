"""A trained run in a few lines of Python (docs/api.md); `mrcnn predict` uses it too.

model = mrcnn_jax.load("runs/a")
found = model.predict(image)    # a file's name, uint8 RGB pixels, an image of Pillow, or bytes
found.boxes, found.class_names, found.scores, found.masks
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.report import Report
from mrcnn_jax.inference.inputs import (
    image_files,
    image_pixels,
    read_encoded,
    read_image,
    video_frames,
)
from mrcnn_jax.inference.predictor import Predictor
from mrcnn_jax.inference.results import Detections, refuse_score
from mrcnn_jax.inference.test_time import MergedViews
from mrcnn_jax.inference.tiles import Tiling, detect_in_tiles
from mrcnn_jax.inference.windowed_images import ArrayImage, WindowedImage, limits, open_windowed
from mrcnn_jax.pixels.rle import decoded
from mrcnn_jax.runs import hub
from mrcnn_jax.runs.checkpoints import Weights
from mrcnn_jax.runs.run import CheckpointName, Run, load_run

__all__ = ["Detections", "Model", "load", "video_frames"]

Source: TypeAlias = UInt8[np.ndarray, "h w 3"] | Image.Image | bytes | str | os.PathLike[str]
"""An image (RGB, original pixels; also an array of jax or torch), or its file's bytes or name."""
_BYTES = (bytes, bytearray, memoryview)


def load(
    run: str | Path, *, checkpoint: CheckpointName = "newest", weights: Weights = "raw"
) -> Model:
    """Load a run.

    Args:
        run: its folder (the --workdir of training, the --out of an import of weights, the --to of
            `share`), or a model of the Hugging Face Hub, hf://org/name or hf://org/name@revision,
            which is fetched unless huggingface_hub's cache holds it.
        checkpoint: the newest intact one, or the one of the best mask AP (box AP where no object
            has a mask), if the run measured it.
        weights: the parameters themselves ("raw"), or their moving average ("ema").

    Raises:
        ConfigError: (a ValueError) one line that names the file: the folder holds no config, no
            such checkpoint or weights, a damaged one, or no more than a backbone; or there is no
            such model on the Hub, or huggingface_hub is not installed.
        cli.Failure: (a RuntimeError) the Hub cannot be reached.

    Warns:
        UserWarning: heads of the run are not trained yet, so random; it says which.
    """
    folder = hub.fetch(run) if isinstance(run, str) and run.startswith(hub.SCHEME) else Path(run)
    model = Model(load_run(folder, checkpoint, weights))
    if (line := model.run.untrained_line) is not None:
        warnings.warn(line, stacklevel=2)
    return model


class Model:
    """A run on one device.

    Programs are compiled when an image first needs them: one for each of the run's canvases; with
    test-time augmentation, two for each canvas and scale and one for each number of views. Their
    number does not depend on the sizes of the images.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._predictor = Predictor(run)
        self._views = MergedViews(self._predictor)

    @property
    def class_names(self) -> dict[int, str]:
        """COCO category id -> name."""
        return self.run.class_names

    def predict(
        self,
        images: Source | Iterable[Source],
        *,
        min_score: float = 0.0,
        rle: bool = False,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        tile: int | None = None,
        overlap: int | None = None,
        progress: bool = False,
    ) -> Any:
        """Detect objects in one image or in many, of any sizes.

        Args:
            images: an image (uint8 RGB [H, W, 3] of NumPy, jax or torch; an image of Pillow, taken
                as it is; a file's name, or its bytes); a list or tuple of images; a folder; or
                another iterable of images (`video_frames`), of which one at a time is in memory.
            min_score: detections below it are left out, as are those below the run's
                model.box_head.score_threshold; where a mask-IoU head gives mask scores, it is
                compared with these.
            rle: give masks as compressed COCO RLEs, not arrays: smaller, and quicker to make.
            flip: evaluate the mirrored image too, and merge (`MergedViews`).
            scales: evaluate each image at these multiples of the run's image size, and merge.
            tile: look at each image in tiles of so many pixels' side, each at the run's image size,
                and merge (`inference.merging`). Masks are then always RLEs, there is no depth map,
                and a TIFF is read by windows.
            overlap: pixels that neighbouring tiles share at least; by default an eighth of `tile`.
            progress: show a progress bar for several images.

        Returns:
            `Detections` for one image; a list of them for a list or tuple; otherwise an iterator,
            which predicts an image when its result is asked for.

        Raises:
            ConfigError: (a ValueError) a file is missing or not an image, or a folder is empty.
            ValueError: an image is none of those above, such as an array that is not uint8 RGB (in
                a list, before any is predicted); there is no scale, or one is not positive; there
                are no such tiles, or other views besides; `overlap` without `tile`; `min_score` is
                not in 0..1.

        Warns:
            UserWarning: a file's pixels were changed (other than 8-bit RGB), only the first of its
                pages was read, or files of a folder were passed over.
        """
        scales = _checked_scales(scales)
        refuse_score(min_score)
        tiling = None if tile is None else Tiling.of(tile, overlap)
        if tiling is None and overlap is not None:
            raise ValueError("overlap: needs tile")
        if tiling is not None and (flip or scales != (1.0,)):
            raise ValueError("tile: not together with flip or scales")

        def one(source: Source) -> Detections:
            if tiling is not None:
                found = self.predict_in_tiles(self._windowed(source), tiling, min_score=min_score)
                return replace(found, path=_path(source))
            return self._one(source, min_score, rle, flip, scales)

        many: Any = images
        if isinstance(images, str | os.PathLike) and os.path.isdir(images):
            report = Report()
            many = image_files([Path(images)], report)
            _warn(report)
        elif isinstance(images, list | tuple):
            # Before the first is predicted: a mistake in the last should not cost the others.
            many = [
                image if _is_encoded(image) else image_pixels(image, Report()) for image in images
            ]
        elif _is_one(images):
            return one(images)  # type: ignore[arg-type]
        found = map(one, tqdm(many, unit="img", leave=False) if progress else many)
        return list(found) if isinstance(images, list | tuple) else found

    def predict_in_tiles(
        self,
        image: WindowedImage,
        tiling: Tiling,
        *,
        min_score: float = 0.0,
        progress: bool = False,
    ) -> Detections:
        """Detect objects in the tiles of one image, and merge them (`predict` with `tile`).

        Args:
            image: the image, as `inference.windowed_images` opens it.
            tiling: its tiles.
            min_score: merged detections below it are left out.
            progress: show a progress bar.

        Raises:
            ConfigError: a tile cannot be read, or the image has too many pixels for run lengths.
        """
        config, like = self.run.config, (tiling.tile, tiling.tile)
        return detect_in_tiles(
            image,
            tiling,
            lambda images: self._predictor.detections_of_parts(images, like=like),
            self.run.meta.categories,
            batch=config.data.eval_batch_size,
            limit=config.model.box_head.detections,
            min_score=min_score,
            progress=progress,
        )

    def _windowed(self, source: Source) -> WindowedImage:
        path, data = _path(source), self.run.config.data
        if path is None:
            return ArrayImage(self._pixels(source, limits(data)))
        report = Report()
        image = open_windowed(path, data, report)
        _warn(report)
        return image

    def _pixels(self, image: Any, data: DataConfig) -> UInt8[np.ndarray, "h w 3"]:
        report, path = Report(), _path(image)
        if path is not None:
            pixels = read_image(path, data, report)
        elif isinstance(image, _BYTES):
            pixels = read_encoded(bytes(image), data, report)
        else:
            pixels = image_pixels(image, report)
        _warn(report)
        return pixels

    def _one(
        self, source: Source, min_score: float, rle: bool, flip: bool, scales: tuple[float, ...]
    ) -> Detections:
        image = self._pixels(source, self.run.config.data)
        if flip or scales != (1.0,):
            found = self._views.detections(image, flip=flip, scales=scales, min_score=min_score)
        else:
            found = self._predictor.detections(image, min_score=min_score)
        masks = found.masks
        if isinstance(masks, tuple) and not rle:
            masks = decoded(masks, found.size)
        return replace(found, path=_path(source), masks=masks)


def _checked_scales(scales: Any) -> tuple[float, ...]:
    try:
        found = tuple(scales)
        right = bool(found) and all(math.isfinite(scale) and scale > 0 for scale in found)
    except TypeError:  # a number alone, or what is none
        found, right = scales, False
    if not right:
        raise ValueError(f"scales: {found!r}: must be a list of positive numbers, at least one")
    return found


def _path(source: Any) -> Path | None:
    return Path(source) if isinstance(source, str | os.PathLike) else None


def _is_encoded(source: Any) -> bool:
    return isinstance(source, (str, os.PathLike, Image.Image, *_BYTES))


def _is_one(images: Any) -> bool:
    """Whether this is one image, or something that is refused as one."""
    several = isinstance(images, Iterable) and not hasattr(images, "__array__")
    return not several or _is_encoded(images) or isinstance(images, Mapping | Set | io.IOBase)


def _warn(report: Report) -> None:
    """Python shows each text once."""
    for _, text in report.findings:
        warnings.warn(text, stacklevel=1)
