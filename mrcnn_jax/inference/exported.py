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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mrcnn_jax.pixels.geometry import (
    check_image,
    depth_in_image,
    in_image,
    paste_region,
    resize,
    resize_plan,
)


def load(path: Any) -> ExportedModel:
    """Load an exported model: a file for jax, or a folder for ONNX Runtime (on the CPU).

    Raises:
        OSError, ValueError: `path` is neither, or damaged.
    """
    return ExportedModel(path)


DIGEST = 64  # hex digits of the SHA-256 of all bytes before them: the comment at the zip's end


def checked(path: Any) -> bytes:
    """Returns the content of an exported file; ValueError unless it is the bytes that were written.

    Python imports from a zip, and jax reads programs and weights, without noticing a flipped bit.
    """
    with open(path, "rb") as file:
        content = file.read()
    if hashlib.sha256(content[:-DIGEST]).hexdigest().encode() != content[-DIGEST:]:
        raise ValueError(f"{path}: no exported file, or a damaged one: its SHA-256 differs")
    return content


# A canvas, uint8 [H, W, 3], and int32 (height, width) of the image on it -> fields of detections.
Program = Callable[[np.ndarray, np.ndarray], dict[str, Any]]


def _for_jax(path: Any) -> tuple[dict[str, Any], list[Program]]:
    import jax
    from jax import export

    with np.load(io.BytesIO(checked(path))) as archive:
        meta = json.loads(archive["meta.json"])
        weights = jax.device_put([archive[f"weights/{name}"] for name in meta["weights"]])
        names = [f"programs/{height}x{width}" for height, width in meta["canvases"]]
        programs = [jax.jit(export.deserialize(bytearray(archive[name])).call) for name in names]
    return meta, [functools.partial(program, weights) for program in programs]


def _for_onnx(folder: Path) -> tuple[dict[str, Any], list[Program]]:
    meta, programs = json.loads((folder / "meta.json").read_text()), []
    if "programs" not in meta:  # an unpacked file, for example
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


class ExportedModel:
    """One program per canvas, those of jax for the platforms in `meta`, compiled when needed."""

    def __init__(self, path: Any) -> None:
        onnx = Path(path).is_dir()
        self.meta, self._programs = _for_onnx(Path(path)) if onnx else _for_jax(path)

    def predict(self, image: np.ndarray, min_score: float = 0.0) -> dict[str, Any]:
        """Detect the objects in an image.

        Args:
            image: uint8 RGB [H, W, 3].
            min_score: detections below it are left out; it is compared with mask_scores, if there
                are any.

        Returns:
            A dict of N detections, best first:
                boxes: float64 [N, 4], (x1, y1, x2, y2) in pixels, continuous in [0, W] x [0, H].
                labels: int32 [N], 1..K.
                category_ids: list of N COCO ids.
                class_names: list of N names.
                scores: float32 [N], probabilities.
                masks: bool [N, H, W]; not of a network whose mask head was never trained.
            If the network has a mask-IoU head:
                mask_scores: float32 [N], scores * predicted IoUs of the masks.
            If the network has a depth head:
                depths: float32 [N], metres from the camera (median over the mask), if there are
                    masks.
                depth_map: float32 [H, W], metres of each pixel, NaN where it is unknown.

        Raises:
            ValueError: the image is not uint8 RGB, or min_score is not in 0..1.
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
        found = {name: np.asarray(value) for name, value in seen.items()}
        kept = found["valid"] & (found.get("mask_scores", found["scores"]) >= min_score)
        boxes, clipped = in_image(found["boxes"][kept], scale, size)
        labels = found["labels"][kept]
        categories = [self.meta["categories"][label - 1] for label in labels.tolist()]
        more = {"mask_scores": found["mask_scores"][kept]} if "mask_scores" in found else {}
        if self.meta.get("masks", True):
            more["masks"] = masks = np.zeros((len(boxes), *size), bool)
            for mask, probabilities, box in zip(masks, found["masks"][kept], boxes, strict=True):
                region, (y, x) = paste_region(probabilities, box, size, self.meta["paste"])
                mask[y : y + region.shape[0], x : x + region.shape[1]] = region
        if "depth" in found:
            of_canvas = found["depth"].ndim == 2
            more["depth_map"], depths = depth_in_image(
                found["depth"] if of_canvas else found["depth"][kept],
                found["masks"][kept],
                boxes,
                scale,
                size,
                stride=self.meta["depth_stride"],
                style=self.meta["paste"],
            )
            if "masks" in more:
                more["depths"] = depths
        return more | {
            "boxes": clipped,
            "labels": labels,
            "category_ids": [number for number, _ in categories],
            "class_names": [name for _, name in categories],
            "scores": found["scores"][kept],
        }
