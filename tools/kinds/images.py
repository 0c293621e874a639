"""Image files: forms whose pixels are known, and random damage to them.

The pixels are the right ones, or the file is refused, or `Kind` tells that it was converted. A
flipped bit counts where the format has checksums (PNG); elsewhere any picture may come out of it.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.pixels.decode import decode_image, image_kind
from tools.kinds import annotations
from tools.kinds.mutations import (
    HEIGHT,
    WIDTH,
    WrongError,
    mutated_bytes,
    one_line,
    with_checksums,
)

MAX_PIXELS = annotations.DATA.max_pixels


@dataclass(frozen=True)
class Case:
    content: bytes
    damage: str = "random"
    form: str = ""


@dataclass(frozen=True)
class Form:
    content: bytes
    pixels: np.ndarray
    tolerance: int = 0  # mean difference that the encoding makes
    checked: bool = False  # a flipped bit is noticed by the format


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@functools.cache
def picture() -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


@functools.cache
def forms() -> dict[str, Form]:
    """Files of the picture, of its grey version or of a part of its colours."""
    image = picture()
    grey = image.convert("L")
    rgb, level = np.asarray(image), np.asarray(grey)
    grey_rgb = np.repeat(level[..., None], 3, axis=-1)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = level.astype(np.uint16)
    alpha = image.copy()
    alpha.putalpha(grey)
    found = {
        "JPEG": Form(_encoded(image, "JPEG", quality=95), rgb, 4),
        "progressive JPEG": Form(_encoded(image, "JPEG", quality=95, progressive=True), rgb, 4),
        "turned JPEG": Form(_encoded(image, "JPEG", quality=95, exif=exif), rgb, 4),
        "grey JPEG": Form(_encoded(grey, "JPEG", quality=95), grey_rgb, 4),
        "CMYK JPEG": Form(_encoded(image.convert("CMYK"), "JPEG", quality=95), rgb, 6),
        "PNG": Form(_encoded(image, "PNG"), rgb, 0, True),
        "turned PNG": Form(_encoded(image, "PNG", exif=exif), rgb, 0, True),
        "grey PNG": Form(_encoded(grey, "PNG"), grey_rgb, 0, True),
        "palette PNG": Form(_encoded(palette, "PNG"), np.asarray(palette.convert("RGB")), 0, True),
        "bilevel PNG": Form(
            _encoded(image.convert("1"), "PNG"),
            np.asarray(image.convert("1").convert("RGB")),
            0,
            True,
        ),
        "RGBA PNG": Form(_encoded(alpha, "PNG"), rgb, 0, True),
        "16-bit PNG": Form(_encoded(Image.fromarray(wide * 257), "PNG"), grey_rgb, 1, True),
        "12 bits in a 16-bit PNG": Form(
            _encoded(Image.fromarray(wide * 16), "PNG"), grey_rgb, 3, True
        ),
        "12 bits in a 16-bit TIFF": Form(_encoded(Image.fromarray(wide * 16), "TIFF"), grey_rgb, 3),
        "TIFF": Form(_encoded(image, "TIFF"), rgb),
        "LZW TIFF": Form(_encoded(image, "TIFF", compression="tiff_lzw"), rgb),
        "float TIFF": Form(
            _encoded(Image.fromarray((level / 255).astype(np.float32)), "TIFF"), grey_rgb, 2
        ),
        "wide float TIFF": Form(
            _encoded(Image.fromarray(level.astype(np.float32)), "TIFF"), grey_rgb, 2
        ),
        "white-is-zero TIFF": Form(
            _encoded(Image.fromarray(255 - level), "TIFF", tiffinfo={262: 0}), grey_rgb
        ),
        "bilevel TIFF": Form(
            _encoded(image.convert("1"), "TIFF"), np.asarray(image.convert("1").convert("RGB"))
        ),
        "BMP": Form(_encoded(image, "BMP"), rgb),
        "WebP": Form(_encoded(image, "WEBP", lossless=True), rgb),
        "GIF": Form(_encoded(palette, "GIF"), np.asarray(palette.convert("RGB"))),
    }
    return found


@functools.cache
def stacks() -> dict[str, bytes]:
    """Files of several pictures: whichever is taken, it has to be told."""
    pages = [picture(), picture().transpose(Image.Transpose.ROTATE_180), picture()]
    return {
        "TIFF of three pages": _encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]),
        "GIF of three frames": _encoded(
            pages[0].convert("P"), "GIF", save_all=True, append_images=pages[1:]
        ),
    }


def _cut(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: rng.integers(len(content))]


def _zeros(rng: np.random.Generator, content: bytes) -> bytes:
    at = int(rng.integers(len(content)))
    return content[:at] + bytes(len(content) - at)


def _bit(rng: np.random.Generator, content: bytes) -> bytes:
    data = bytearray(content)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(data)


def _more(rng: np.random.Generator, content: bytes) -> bytes:
    return content + rng.bytes(rng.integers(1, 99))


DAMAGES: dict[str, Callable[[np.random.Generator, bytes], bytes]] = {
    "whole": lambda rng, content: content,
    "cut off": _cut,
    "zeros at the end": _zeros,
    "a bit": _bit,
    "more at the end": _more,
}


def case(seed: int, index: int) -> Case:
    """Case number `index`: half of the cases have a known damage, the others a random one."""
    rng = np.random.default_rng((seed, 1, index))
    whole = {name: form.content for name, form in forms().items()}
    if rng.random() < 0.5:
        name = list(whole)[rng.integers(len(whole))]
        encoded = mutated_bytes(rng, whole[name])
        # Right checksums let damage through to what lies behind them.
        return Case(with_checksums(encoded) if rng.random() < 0.5 else encoded, form=name)
    damage = list(DAMAGES)[rng.integers(len(DAMAGES))]
    if damage == "whole":
        whole |= stacks()
    name = list(whole)[rng.integers(len(whole))]
    return Case(DAMAGES[damage](rng, whole[name]), damage, name)


def prepare(folder: Path) -> None:
    """Writes the annotation file of the image."""
    (folder / "mutated").mkdir()
    content = annotations.mixed_file()
    content["images"] = [{**content["images"][0], "file_name": "image"}]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 7]
    (folder / "one.json").write_text(json.dumps(content))


def outcome(case: Case, folder: Path) -> str:
    """How a case ends; WrongError if it ends badly."""
    (folder / "mutated" / "image").write_bytes(case.content)
    try:
        annotations.through(folder / "one.json", folder / "mutated", folder / "cache")
        checked = "usable"
    except ConfigError as error:
        checked = one_line(error)
    try:
        pixels = decode_image(case.content, upright=False, max_pixels=MAX_PIXELS)
    except ValueError as error:
        if checked != "refused":
            raise
        if case.damage == "whole" and case.form in ("PNG", "JPEG", "TIFF", "BMP", "WebP", "GIF"):
            raise WrongError(f"{case.form}: whole, but refused: {error}") from None
        return one_line(error)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"{pixels.dtype} {pixels.shape}")
    if case.damage == "random":
        return "usable"
    kind = image_kind(case.content, max_pixels=MAX_PIXELS)
    if kind.converted is not None or kind.pages != 1:
        return "told"
    form = forms().get(case.form)
    if form is None:
        raise WrongError(f"{case.form}: {case.damage}: taken for one picture, and nothing tells")
    same = (
        pixels.shape == form.pixels.shape
        and np.abs(pixels.astype(int) - form.pixels).mean() <= form.tolerance
    )
    if same:
        return "right"
    if case.damage in ("a bit", "zeros at the end") and not form.checked:
        return "other pixels, as the format allows"
    raise WrongError(f"{case.form}: {case.damage}: other pixels, and nothing tells")
