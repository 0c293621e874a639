"""Depth maps: files whose metres are known, and random damage to them.

The metres are the right ones, or the map is refused and `check` tells that its image has none. A
flipped bit counts where the format has checksums (PNG); an .npy file may hold any numbers. What is
read is metres in any case: finite, not negative, and of the size that the header gave.
"""

from __future__ import annotations

import functools
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.depth_files import check_depth
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.pixels.depth import decode_depth, depth_size
from tools.kinds import annotations, images
from tools.kinds.mutations import HEIGHT, WIDTH, WrongError, mutated_bytes, one_line, with_checksums

DATA = annotations.DATA


@dataclass(frozen=True)
class Case:
    content: bytes
    damage: str = "random"
    form: str = ""


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@functools.cache
def millimetres() -> np.ndarray:
    """A slope of 1 to 3 metres with a hole."""
    rows, columns = np.indices((HEIGHT, WIDTH))
    depth = 1000 + 30 * rows + 7 * columns
    depth[10:20, 30:50] = 0
    return depth.astype(np.uint16)


@functools.cache
def forms() -> dict[str, bytes]:
    """Name -> a file of these depths; the first few are PNGs."""
    depth = millimetres()
    metres = depth / 1000
    holes = np.where(depth == 0, np.nan, metres)
    png = io.BytesIO()
    Image.fromarray(depth).save(png, "PNG")
    return {
        "PNG": png.getvalue(),
        "float32": _npy(metres.astype(np.float32)),
        "float64 with NaN": _npy(holes),
        "float16 by columns": _npy(np.asfortranarray(metres.astype(np.float16))),
        "big-endian": _npy(metres.astype(">f4")),
    }


def case(seed: int, index: int) -> Case:
    """Case number `index`: half of the cases have a known damage, the others a random one."""
    rng = np.random.default_rng((seed, 5, index))
    name = list(forms())[rng.integers(len(forms()))]
    whole = forms()[name]
    if rng.random() < 0.5:
        encoded = mutated_bytes(rng, whole)
        return Case(with_checksums(encoded) if rng.random() < 0.5 else encoded, form=name)
    damage = list(images.DAMAGES)[rng.integers(len(images.DAMAGES))]
    return Case(images.DAMAGES[damage](rng, whole), damage, name)


def prepare(folder: Path) -> None:
    """Writes an image and its annotation file, whose depth is in one file or the other."""
    place = folder / "depth"
    place.mkdir()
    images.picture().save(place / "image.png")
    content: dict[str, Any] = annotations.mixed_file()
    record = {**content["images"][0], "file_name": "image.png"}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == record["id"]]
    for suffix in ("png", "npy"):
        content["images"] = [record | {"depth_file": f"map.{suffix}"}]
        (place / f"{suffix}.json").write_text(json.dumps(content))


def outcome(case: Case, folder: Path) -> str:
    """How a case ends; WrongError if it ends badly."""
    place, suffix = folder / "depth", "png" if case.form == "PNG" else "npy"
    path = place / f"map.{suffix}"
    path.write_bytes(case.content)
    try:
        dataset = read_coco(place / f"{suffix}.json", place, DATA, depth=True)
        has_depth = check_depth(dataset, folder / "cache", DATA).images[0].depth_file is not None
        refused = ""
    except ConfigError as error:
        has_depth, refused = False, one_line(error)
    try:
        metres = decode_depth(case.content, scale=DATA.depth_scale, max_pixels=DATA.max_pixels)
    except ValueError as error:
        if has_depth:
            raise WrongError(
                f"{case.form}: {case.damage}: check takes what cannot be read"
            ) from None
        return one_line(error)
    if metres.shape != depth_size(path) or metres.dtype != np.float32:
        raise ValueError(f"{metres.dtype} {metres.shape}, but a header of {depth_size(path)}")
    if not np.isfinite(metres).all() or (metres < 0).any():
        raise ValueError("depths that are none")
    if metres.shape != (HEIGHT, WIDTH):
        if not refused:
            raise WrongError(f"{case.form}: {case.damage}: another size than the image's")
        return "refused"
    tolerance = 1e-2 if "float16" in case.form else 1e-6
    if np.allclose(metres, millimetres() / 1000, rtol=tolerance):
        return "right"
    if case.form == "PNG" and case.damage != "random":
        raise WrongError(f"PNG: {case.damage}: other depths, and nothing tells")
    return "other depths, as the format allows"
