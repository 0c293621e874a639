"""Run an exported model with NumPy and jax, or with NumPy and ONNX Runtime, alone.

The export command copies this file and pixels/geometry.py into what it writes, from which Python
imports: a zip with programs for jax, or a folder with programs of ONNX. mrcnn_jax is not needed to
use it:

    import sys
    sys.path.append("model.jaxexport")  # last: nothing in the file may stand in for NumPy
    from mrcnn_exported import load

    found = load("model.jaxexport").predict(image)  # NumPy uint8 RGB [H, W, 3]

An exported file is a program: do not load one from somebody whose programs you would not run.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NotRequired, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from mrcnn_jax.pixels.geometry import (
    check_image,
    depth_in_image,
    in_image,
    paste_region,
    resize,
    resize_plan,
)

Location: TypeAlias = str | os.PathLike[str]


def load(path: Location) -> ExportedModel:
    """Load an exported model: a file for jax, or a folder for ONNX Runtime (on the CPU).

    Raises:
        OSError: there is no such file or folder, or no program in the folder.
        ValueError: it is no exported model, or a damaged one.
        ImportError: jax, or ONNX Runtime for a folder, is not installed.
    """
    return ExportedModel(path)


DIGEST = 64  # hex digits of the SHA-256 of all bytes before them: the comment at the zip's end


def checked(path: Location) -> bytes:
    """Returns the content of an exported file; ValueError unless it is the bytes that were written.

    Python imports from a zip, and jax reads programs and weights, without noticing a flipped bit.
    """
    with open(path, "rb") as file:
        content = file.read()
    if hashlib.sha256(content[:-DIGEST]).hexdigest().encode() != content[-DIGEST:]:
        raise ValueError(f"{path}: no exported file, or a damaged one: its SHA-256 differs")
    return content


_FIELDS = {"programs", "categories", "short_side", "long_side", "canvases", "paste"}
# A canvas, uint8 [H, W, 3], and int32 (height, width) of the image on it -> fields of detections.
Program = Callable[[np.ndarray, np.ndarray], dict[str, Any]]


def _for_jax(path: Location) -> tuple[dict[str, Any], list[Program]]:
    import jax
    from jax import export

    with np.load(io.BytesIO(checked(path))) as archive:
        meta = json.loads(archive["meta.json"])
        weights = jax.device_put([archive[f"weights/{name}"] for name in meta["weights"]])
        names = [f"programs/{height}x{width}" for height, width in meta["canvases"]]
        programs = [jax.jit(export.deserialize(bytearray(archive[name])).call) for name in names]
    return meta, [functools.partial(program, weights) for program in programs]


def _for_onnx(folder: Path) -> tuple[dict[str, Any], list[Program]]:
    content, programs = (folder / "meta.json").read_bytes(), []
    try:
        meta = json.loads(content)
    except ValueError:
        meta = None
    # Of an unpacked file, for example, or of another program.
    stated = meta if isinstance(meta, dict) else {}
    if not _FIELDS.issubset(stated) or not isinstance(stated["programs"], dict):
        raise ValueError(f"{folder}: no folder of `mrcnn export --format onnx`")
    for name, digest in meta["programs"].items():
        content = (folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{folder / name}: damaged, or of another export: its SHA-256 differs")
        programs.append(onnx_program(content))
    return meta, programs


def onnx_program(content: bytes) -> Program:
    """A program of ONNX, on the CPU, from the bytes of its file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # not that it removes what it does not need
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(image: np.ndarray, size: np.ndarray) -> dict[str, Any]:
        return dict(zip(names, session.run(names, {"image": image, "size": size}), strict=True))

    return run


class Found(TypedDict):
    """Detections in one image of H x W pixels: N objects, best first."""

    boxes: NDArray[np.float64]
    """[N, 4]: (x1, y1, x2, y2) in pixels, continuous in [0, W] x [0, H]."""
    labels: NDArray[np.int32]
    """[N]: the classes, 1..K."""
    category_ids: list[int]
    """N COCO ids of the classes."""
    class_names: list[str]
    """N names of the classes."""
    scores: NDArray[np.float32]
    """[N]: probabilities of the classes."""
    masks: NotRequired[NDArray[np.bool_]]
    """[N, H, W]; not of a network whose mask head was never trained."""
    mask_scores: NotRequired[NDArray[np.float32]]
    """[N]: scores * predicted IoUs of the masks, of a network with a mask-IoU head."""
    depths: NotRequired[NDArray[np.float32]]
    """[N]: metres from the camera (median over the mask), of a network with a depth head, if there
    are masks."""
    depth_map: NotRequired[NDArray[np.float32]]
    """[H, W]: metres of each pixel, NaN where it is unknown, of a network with a depth head."""


class ExportedModel:
    """One program per canvas, those of jax for the platforms in `meta`, compiled when needed."""

    def __init__(self, path: Location) -> None:
        onnx = Path(path).is_dir()
        self.meta, self._programs = _for_onnx(Path(path)) if onnx else _for_jax(path)

    def predict(self, image: NDArray[np.uint8], min_score: float = 0.0) -> Found:
        """Detect the objects in an image.

        Args:
            image: RGB [H, W, 3].
            min_score: detections below it are left out; it is compared with mask_scores, if there
                are any.

        Raises:
            ValueError: the image is not uint8 RGB of NumPy, or min_score is not in 0..1.
        """
        if not 0 <= min_score <= 1:
            raise ValueError(f"min_score: {min_score}: must be in 0..1")
        check_image(image)
        size = image.shape[0], image.shape[1]
        number, resized, scale = resize_plan(
            *size, self.meta["short_side"], self.meta["long_side"], self.meta["canvases"]
        )
        canvas = np.zeros((*self.meta["canvases"][number], 3), np.uint8)
        shrink = self.meta.get("shrink", "area")  # files without it are from before there were two
        canvas[: resized[0], : resized[1]] = resize(image, resized, shrink)
        seen = self._programs[number](canvas, np.array(resized, np.int32))
        fields = {name: np.asarray(value) for name, value in seen.items()}
        kept = fields["valid"] & (fields.get("mask_scores", fields["scores"]) >= min_score)
        boxes, clipped = in_image(fields["boxes"][kept], scale, size)
        labels = fields["labels"][kept]
        categories = [self.meta["categories"][label - 1] for label in labels.tolist()]
        found = Found(
            boxes=clipped,
            labels=labels,
            category_ids=[number for number, _ in categories],
            class_names=[name for _, name in categories],
            scores=fields["scores"][kept],
        )
        if "mask_scores" in fields:
            found["mask_scores"] = fields["mask_scores"][kept]
        if self.meta.get("masks", True):
            found["masks"] = masks = np.zeros((len(boxes), *size), bool)
            for mask, probabilities, box in zip(masks, fields["masks"][kept], boxes, strict=True):
                region, (y, x) = paste_region(probabilities, box, size, self.meta["paste"])
                mask[y : y + region.shape[0], x : x + region.shape[1]] = region
        if "depth" in fields:
            of_canvas = fields["depth"].ndim == 2
            found["depth_map"], depths = depth_in_image(
                fields["depth"] if of_canvas else fields["depth"][kept],
                fields["masks"][kept],
                boxes,
                scale,
                size,
                stride=self.meta["depth_stride"],
                style=self.meta["paste"],
            )
            if "masks" in found:
                found["depths"] = depths
        return found
