"""Images to predict on, from files, folders, videos and other libraries."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mrcnn_jax.config.errors import ConfigError, refuse_pipe
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.images import report_kind
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.inference.drawn import drawn_in
from mrcnn_jax.pixels.decode import decode_with_kind, pillow_pixels
from mrcnn_jax.pixels.geometry import check_image
from mrcnn_jax.pixels.headers import (
    HEIF_SUFFIXES,
    SUFFIXES,
    VIDEO_SUFFIXES,
    header_size,
    is_camera_raw,
    suffix_of,
)

AT_ONCE = 200_000_000  # pixels that are decoded at once, 600 MB: the most of data.max_pixels
TILES = "tile=1024"  # of the Python API


def image_files(paths: Sequence[Path], report: Report | None = None) -> list[Path]:
    """List the given files, and the images directly in the given folders.

    Images are the files with a suffix of an image, and others that begin like one. Hidden files
    (such as macOS's "._a.jpg") are passed over, and what an earlier prediction drew.

    Args:
        paths: files and folders.
        report: counts what is passed over in folders, and why.

    Raises:
        ConfigError: a path does not exist or is no regular file, a folder has no images, or nothing
            was given.
    """
    report = Report() if report is None else report
    files: list[Path] = []
    for path in paths:
        try:
            if path.is_dir():
                files += _in_folder(path, report)
            elif path.is_file():
                files.append(path)
            else:
                refuse_pipe(path)
                raise ConfigError(f"{path}: no such file or folder")
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None
    if not files:
        raise ConfigError("paths: no image or folder was named")
    return _each_once(files, report)


def _each_once(files: Sequence[Path], report: Report) -> list[Path]:
    """Without files that are named a second time; a link of another name is another image."""
    found: dict[Path, Path] = {}
    for file in files:
        place = file.parent.resolve() / file.name
        if found.setdefault(place, file) is not file:
            report.add(Reason.PASSED_OVER, file.name, what="files that were named before")
    return list(found.values())


def _in_folder(folder: Path, report: Report) -> list[Path]:
    found = []
    passed: list[tuple[str, str]] = []
    earlier: Collection[str] = ()
    with suppress(ValueError):
        earlier = drawn_in(folder)
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):
            passed.append(("hidden files", file.name))
        elif file.is_dir():
            passed.append(("folders (name them to predict on their images)", file.name))
        elif not os.path.isfile(file):
            # Opening a pipe that nobody writes to would never end.
            passed.append(("pipes, sockets, devices and broken links", file.name))
        elif file.name in earlier:
            passed.append(("pictures that an earlier prediction drew", file.name))
        elif file.suffix.lower() not in SUFFIXES and is_camera_raw(file):
            passed.append(("cameras' raw files (save them as JPEG or PNG)", file.name))
        elif file.suffix.lower() in SUFFIXES or _begins_like_an_image(file):
            found.append(file)
        elif file.suffix.lower() in VIDEO_SUFFIXES:
            passed.append(("videos (name them to predict on their frames)", file.name))
        elif file.suffix.lower() in HEIF_SUFFIXES:
            passed.append(("HEIC and AVIF files (save them as JPEG or PNG)", file.name))
        else:
            passed.append(("files that are no images", file.name))
    for what, name in passed:
        report.add(Reason.PASSED_OVER, name, what=what)
    if not found:
        counts = Counter(what for what, _ in passed).items()
        there = ", ".join(f"{count} {what}" for what, count in counts)
        raise ConfigError(f"{folder}: no images in this folder" + (there and f", but {there}"))
    return found


def _begins_like_an_image(file: Path) -> bool:
    try:
        header_size(file)
    except ValueError:
        return False
    return True


def read_pictures(
    path: Path,
    data: DataConfig,
    report: Report,
    tell: Callable[[str], object] = warnings.warn,
    tiles: str = TILES,
) -> Iterator[tuple[int | None, UInt8[np.ndarray, "h w 3"]]]:
    """Iterate over the pictures of a file: one of an image, each frame of a video, told by suffix.

    Args:
        path, data, report, tiles: as of `read_image`.
        tell: as of `video_frames`.

    Returns:
        The number of the frame, from 0 (None: an image), and the pixels.

    Raises:
        ConfigError: at once, as of `read_image` and `video_frames`.
    """
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return iter(enumerate(video_frames(path, tell)))
    return iter([(None, read_image(path, data, report, tiles))])


def read_image(
    path: Path, data: DataConfig, report: Report | None = None, tiles: str = TILES
) -> UInt8[np.ndarray, "h w 3"]:
    """Read an image as RGB, upright as its EXIF says.

    Args:
        path: the file.
        data: its `max_pixels` is the limit.
        report: counts how the pixels differ from those of the file.
        tiles: what a user gives to look at a large image in tiles, for messages.

    Raises:
        ConfigError: the file cannot be read or decoded, or has more than data.max_pixels (by its
            header, before it is read).
    """
    refuse_pipe(path)
    _refuse_by_header(path, data, tiles)
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    report = Report() if report is None else report
    return read_encoded(encoded, data, report, str(path), path.name)


def _refuse_by_header(path: Path, data: DataConfig, tiles: str) -> None:
    """ConfigError for what should not be read into memory: a video, or too large an image.

    Args:
        tiles: what a user gives to look at a large image in tiles.
    """
    try:
        height, width = header_size(path)
    except ValueError as error:
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file():
            raise ConfigError(
                f"{path}: {error} (the frames of a video: mrcnn_jax.video_frames)"
            ) from None
        return  # decoding it will say more
    if height * width > data.max_pixels:
        way = f"{tiles} looks at it in tiles"
        if height * width > AT_ONCE and suffix_of(path) != ".tiff":
            way = f"saved as a TIFF of 8 or 16 bits in tiles or strips, {way}"
        raise ConfigError(
            f"{path}: {height} x {width} is over {data.max_pixels} pixels (data.max_pixels): {way}"
        )


def read_encoded(
    encoded: bytes, data: DataConfig, report: Report, where: str = "image", name: str = "bytes"
) -> UInt8[np.ndarray, "h w 3"]:
    """Read an image file's bytes, as `read_image` does; `where` is named in errors."""
    try:
        pixels, kind = decode_with_kind(encoded, upright=True, max_pixels=data.max_pixels)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    report_kind(report, name, kind)
    return pixels


def image_pixels(image: Any, report: Report) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of an image in memory.

    Args:
        image: a NumPy array, or another that becomes one (jax, torch): uint8 RGB [H, W, 3]; or an
            image of Pillow, taken as it is: not turned, and of the page that it is at.
        report: counts how the pixels of an image of Pillow are changed.

    Raises:
        ValueError: it is none of these; one line.
    """
    kind = type(image).__name__
    try:
        if isinstance(image, Image.Image):
            image, found = pillow_pixels(image)
            report_kind(report, kind, found)
        elif not isinstance(image, np.ndarray) and hasattr(image, "__array__"):
            image = np.asarray(image)
    except Exception as error:  # whatever another library raises, for arrays of a GPU and so on
        raise ValueError(f"image: {kind}: {' '.join(str(error).split())}") from None
    check_image(image)
    return image


def video_frames(
    path: str | Path, tell: Callable[[str], object] = warnings.warn
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Iterate over the frames of a video, RGB.

    Args:
        path: the file.
        tell: is called with a line, by default a warning, if many fewer frames can be decoded than
            the file states, as of one that is cut off.

    Raises:
        ConfigError: at once, if OpenCV cannot read the file.
    """
    if Path(path).is_fifo():  # OpenCV would wait for its writer; a camera is a device
        raise ConfigError(f"{path}: not a file, but a pipe")
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        exists = Path(path).is_file()
        reason = "not a video that OpenCV can read" if exists else "no such file"
        raise ConfigError(f"{path}: {reason}")
    return _frames(capture, Path(path).name, tell)


def _frames(
    capture: cv2.VideoCapture, name: str, tell: Callable[[str], object]
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    # Some formats only say how long they are, others (then negative) nothing.
    stated, count = capture.get(cv2.CAP_PROP_FRAME_COUNT), 0
    try:
        while True:
            read, frame = capture.read()
            if not read:
                break
            count += 1
            yield np.ascontiguousarray(frame[..., ::-1])
    finally:
        capture.release()
    if stated - count > max(1.0, stated / 100):
        tell(f"{name}: {count} of the {stated:.0f} frames that it states could be decoded")
