"""A trained run in a few lines of Python (docs/api.md); `mrcnn predict` uses it too.

model = mrcnn_jax.load("runs/a")
found = model.predict(image)    # a file's name, uint8 RGB pixels, an image of Pillow, or bytes
found.boxes, found.class_names, found.scores, found.masks
for found in model.predict_many("folder"):    # or a list of images, the frames of a video
    print(found.path, found.class_names)
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from mrcnn_jax.config.errors import ConfigError
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


class SupportsArray(Protocol):
    """An array of jax or torch, or another that NumPy can read."""

    def __array__(self) -> np.ndarray: ...


Pixels: TypeAlias = UInt8[np.ndarray, "h w 3"] | SupportsArray | Image.Image
Encoded: TypeAlias = bytes | bytearray | memoryview
Source: TypeAlias = Pixels | Encoded | str | os.PathLike[str]
"""An image (RGB, original pixels), or its file's bytes or name."""
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
    """A run on one device; `run` is what was loaded, its config and the checkpoint's `meta`.

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
        image: Source,
        *,
        min_score: float = 0.0,
        rle: bool = False,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        tile: int | None = None,
        overlap: int | None = None,
    ) -> Detections:
        """Detect objects in one image, of any size; `predict_many` takes several.

        Args:
            image: uint8 RGB [H, W, 3] of NumPy, jax or torch; an image of Pillow, taken as it is; a
                file's name, or its bytes.
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

        Raises:
            ConfigError: (a ValueError) a file is missing or not an image.
            ValueError: the image is none of those above, such as an array that is not uint8 RGB;
                there is no scale, or one is not positive; there are no such tiles, or other views
                besides; `overlap` without `tile`; `min_score` is not in 0..1.

        Warns:
            UserWarning: a file's pixels were changed (other than 8-bit RGB), or only the first of
                its pages was read.
        """
        detect = self._detector(min_score, rle, flip, scales, tile, overlap)
        if isinstance(image, str | os.PathLike) and os.path.isdir(image):
            raise ConfigError(f"{os.fspath(image)}: a folder: predict_many takes its images")
        if _are_several(image):
            raise ValueError(f"image: {type(image).__name__}: predict_many takes several images")
        return detect(image)

    def predict_many(
        self,
        images: Iterable[Source] | str | os.PathLike[str],
        *,
        min_score: float = 0.0,
        rle: bool = False,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        tile: int | None = None,
        overlap: int | None = None,
        progress: bool = False,
    ) -> Iterator[Detections]:
        """Detect objects in many images, of any sizes, one after the other.

        Args:
            images: images as of `predict`; or a folder, whose images are taken in the order of
                their names. Of an iterable that is no sequence (`video_frames`), one image at a
                time is in memory.
            min_score, rle, flip, scales, tile, overlap: as of `predict`.
            progress: show a progress bar.

        Returns:
            The detections of each image, which is predicted when they are asked for.

        Raises:
            ConfigError, ValueError: at once: as of `predict`, of the options and of arrays in a
                sequence; there are no images in the folder; or these are not several images. Of
                other images when their turn comes.

        Warns:
            UserWarning: as of `predict`; or files of the folder were passed over.
        """
        detect = self._detector(min_score, rle, flip, scales, tile, overlap)
        sources: Iterable[Source]
        if isinstance(images, str | os.PathLike):
            path, report = Path(images), Report()
            if path.is_file():
                raise ConfigError(
                    f"{path}: a single file: predict takes an image, and video_frames gives those "
                    "of a video"
                )
            sources = image_files([path], report)
            _warn(report)
        elif not _are_several(images):
            kind = type(images).__name__
            raise ValueError(
                f"images: {kind} is not a list, a folder or another iterable of them (of an array "
                "of images: list(images))"
            )
        elif isinstance(images, Sequence):
            # Before the first is predicted: a mistake in the last should not cost the others.
            sources = [
                image if _is_encoded(image) else image_pixels(image, Report()) for image in images
            ]
        else:
            sources = images
        return map(detect, tqdm(sources, unit="img", leave=False) if progress else sources)

    def _detector(
        self,
        min_score: float,
        rle: bool,
        flip: bool,
        scales: Sequence[float],
        tile: int | None,
        overlap: int | None,
    ) -> Callable[[Source], Detections]:
        """What is done with each image; ValueError for options as of `predict`."""
        checked = _checked_scales(scales)
        refuse_score(min_score)
        if tile is None:
            if overlap is not None:
                raise ValueError("overlap: needs tile")
            return lambda source: self._one(source, min_score, rle, flip, checked)
        tiling = Tiling.of(tile, overlap)
        if flip or checked != (1.0,):
            raise ValueError("tile: not together with flip or scales")

        def in_tiles(source: Source) -> Detections:
            found = self.predict_in_tiles(self._windowed(source), tiling, min_score=min_score)
            return replace(found, path=_path(source))

        return in_tiles

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


def _are_several(images: Any) -> TypeGuard[Iterable[Source]]:
    """Whether these may be images, and are neither one nor something that is refused as one."""
    several = isinstance(images, Iterable) and not hasattr(images, "__array__")
    return several and not (_is_encoded(images) or isinstance(images, Mapping | Set | io.IOBase))


def _warn(report: Report) -> None:
    """Python shows each text once."""
    for _, text in report.findings:
        warnings.warn(text, stacklevel=1)
