"""Suffixes and headers of image files say what they hold."""

from __future__ import annotations

from pathlib import Path

from pictures import encoded
from PIL import Image

from mrcnn_jax.pixels.headers import FORMATS, SUFFIXES, header_size


def test_suffixes_are_those_of_the_formats() -> None:
    known = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
    assert known | {".mpo"} == SUFFIXES


def test_the_size_of_the_upright_picture_is_in_the_header(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for form in ("JPEG", "PNG", "WEBP", "TIFF"):
        (tmp_path / form).write_bytes(encoded(Image.new("RGB", (30, 20)), form, exif=exif))
        assert header_size(tmp_path / form, upright=True) == (30, 20)
        assert header_size(tmp_path / form) == ((30, 20) if form == "TIFF" else (20, 30))
