"""Shared by all formats: rectangles, ellipses, folders of images, XML files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from exports import (
    block,
    checked,
    cvat_file,
    cvat_image,
    labelme_file,
    labelme_shape,
    objects,
    picture,
)

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.convert.common import ellipse, instances, read_xml, rectangle
from mrcnn_jax.convert.cvat import Cvat
from mrcnn_jax.convert.labelme import Labelme
from mrcnn_jax.convert.write import convert


def test_rectangles_are_masks_if_they_are_said_to_be(tmp_path: Path) -> None:
    picture(tmp_path / "x.png")
    labelme_file(tmp_path / "x.json", "x.png", [labelme_shape("rectangle", [[40, 30], [10, 20]])])
    cvat_file(
        tmp_path / "annotations.xml",
        cvat_image("x.png", '<box label="x" xtl="10" ytl="20" xbr="40" ybr="30"/>'),
    )
    for options in (
        Labelme(tmp_path / "x.json", tmp_path / "l.json", rectangles="mask"),
        Cvat(tmp_path / "annotations.xml", tmp_path / "c.json", rectangles="mask"),
    ):
        convert(options)
        ((_, mask),) = objects(checked(options, tmp_path / "cache"), "x.png")
        assert (mask == block(10, 20, 40, 30)).all()


def test_the_polygon_of_an_ellipse_lies_just_inside_it() -> None:
    for rx, ry in ((0.01, 0.01), (3, 1), (400, 250)):
        points = np.array(ellipse(10, 20, rx, ry, 90)).reshape(-1, 2) - (10, 20)
        assert np.allclose(np.hypot(points[:, 1] / rx, points[:, 0] / ry), 1, atol=0.1)
        middles = (points + np.roll(points, 1, axis=0)) / 2
        assert (1 - np.hypot(middles[:, 1] / rx, middles[:, 0] / ry)).max() * max(rx, ry) < 0.051


def test_turns_are_clockwise_on_the_screen() -> None:
    assert rectangle((0, 0, 4, 2), 90) == [3, -1, 3, 3, 1, 3, 1, -1]


def test_an_instance_keeps_no_more_than_its_pixels() -> None:
    values = np.zeros((100, 100), np.int64)
    values[3:5, 7:9] = 4
    ((_, patch),) = instances(values)
    assert patch.pixels.base is None
    assert patch.pixels.shape == (2, 2)


def test_a_document_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<!DOCTYPE a><a/>")
    with pytest.raises(ConfigError, match="refused"):
        read_xml(tmp_path / "a.xml", "a")
