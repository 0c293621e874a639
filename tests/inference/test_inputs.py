"""Files, folders, videos and images in memory: what is taken, and what is said of the rest."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

import mrcnn_jax
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.report import Reason, Report
from mrcnn_jax.inference import inputs
from mrcnn_jax.inference.inputs import image_files, image_pixels, read_image, read_pictures
from mrcnn_jax.inference.windowed_images import open_windowed
from tests.inference.frames import read, write_video


def test_a_video_is_predicted_frame_by_frame(
    model: mrcnn_jax.Model, folder: Path, tmp_path: Path
) -> None:
    """Its frames are those that were written, in RGB, but for the compression."""
    image = read(folder / "0.png")
    frames = [np.roll(image, 9 * number, axis=1) for number in range(3)]
    frames[0][:40, :40] = (250, 20, 20)
    write_video(tmp_path / "a.avi", frames)
    back = list(mrcnn_jax.video_frames(tmp_path / "a.avi"))
    assert len(back) == 3
    for ours, theirs in zip(back, frames, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 12
    assert np.abs(back[0][5:35, 5:35].mean((0, 1)) - (250, 20, 20)).max() < 12
    found = list(model.predict_many(mrcnn_jax.video_frames(tmp_path / "a.avi")))
    for detections, frame in zip(found, back, strict=True):
        np.testing.assert_array_equal(detections.boxes, model.predict(frame).boxes)


def test_videos_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "b.avi").write_text("no video")
    with pytest.raises(ConfigError, match=r"b\.avi: not a video that OpenCV can read$"):
        mrcnn_jax.video_frames(tmp_path / "b.avi")
    with pytest.raises(ConfigError, match=r"c\.avi: no such file$"):
        mrcnn_jax.video_frames(tmp_path / "c.avi")
    os.mkfifo(tmp_path / "d.avi")
    with pytest.raises(ConfigError, match=r"d\.avi: not a file, but a pipe$"):
        mrcnn_jax.video_frames(tmp_path / "d.avi")


def test_frames_that_a_video_lacks_are_told(tmp_path: Path) -> None:
    """Of one that is cut off in the middle; one that lacks the last frame alone is as it may be."""
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (64, 64, 3)).astype(np.uint8) for _ in range(30)]
    write_video(tmp_path / "clip.avi", frames)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(mrcnn_jax.video_frames(tmp_path / "clip.avi"))) == 30
    content = (tmp_path / "clip.avi").read_bytes()
    (tmp_path / "clip.avi").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"^clip\.avi: 1\d of the 30 frames that it states"):
        seen = list(mrcnn_jax.video_frames(tmp_path / "clip.avi"))
    told: list[str] = []
    assert len(list(read_pictures(tmp_path / "clip.avi", DataConfig(), Report(), told.append))) == (
        len(seen)
    )
    assert told == [f"clip.avi: {len(seen)} of the 30 frames that it states could be decoded"]
    with pytest.raises(ConfigError, match=r"clip\.avi: not an image .* mrcnn_jax\.video_frames\)$"):
        read_image(tmp_path / "clip.avi", DataConfig())


@pytest.mark.parametrize("suffix", [".ts", ".asf", ".vob", ".mxf", ".MJPEG"])
def test_videos_are_known_by_suffix(suffix: str, tmp_path: Path) -> None:
    codec = "MJPG" if suffix in (".asf", ".MJPEG") else "MPG2"
    path = tmp_path / f"clip{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    write_video(path, 3 * [noise], codec)
    told: list[str] = []
    frames = list(read_pictures(path, DataConfig(), Report(), told.append))
    assert [number for number, _ in frames] == [0, 1, 2]
    assert not told


def test_a_folder_gives_what_can_be_read_and_a_line_for_the_rest(tmp_path: Path) -> None:
    """By suffix, or, without one of an image, by how a file begins; a pipe is not opened."""
    picture = Image.new("RGB", (9, 7), "red")
    taken = ("a.JPG", "b.jfif", "c.jpe", "d.gif", "e.jp2", "f.ppm", "g.webp", "h.tif", "i.bmp")
    for name in taken:
        picture.save(tmp_path / name)
    picture.save(tmp_path / "no suffix", "PNG")
    picture.save(tmp_path / "odd.dat", "JPEG")
    picture.save(tmp_path / "sent.heic", "JPEG")
    (tmp_path / "empty.png").touch()  # its error is told when it is read
    for name in ("._a.JPG", ".DS_Store", "notes.txt", "labels.json"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    for name in ("a.HEIC", "b.avif", "clip.MP4"):
        (tmp_path / name).touch()
    (tmp_path / "deeper.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.JPG")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.jpg"))
    report = Report()
    files = image_files([tmp_path], report)
    expected = sorted((*taken, "no suffix", "odd.dat", "sent.heic", "empty.png", "link.png"))
    assert [file.name for file in files] == expected
    told = {
        text.removesuffix(": passed over"): (found.count, found.first_ids)
        for (reason, text), found in report.findings.items()
        if reason is Reason.PASSED_OVER
    }
    assert told == {
        "hidden files": (2, [".DS_Store", "._a.JPG"]),
        "files that are no images": (2, ["labels.json", "notes.txt"]),
        "folders (name them to predict on their images)": (1, ["deeper.png"]),
        "HEIC and AVIF files (save them as JPEG or PNG)": (2, ["a.HEIC", "b.avif"]),
        "videos (name them to predict on their frames)": (1, ["clip.MP4"]),
        "pipes, sockets, devices and broken links": (3, ["gone.png", "pipe.png", "socket.jpg"]),
    }
    red = [read_image(file, DataConfig()) for file in files if file.name != "empty.png"]
    assert all(np.abs(pixels.astype(int) - (255, 0, 0)).max() < 9 for pixels in red)
    (tmp_path / "deeper.png" / ".hidden").touch()
    with pytest.raises(ConfigError, match=r"no images in this folder, but 1 hidden files$"):
        image_files([tmp_path / "deeper.png"])
    for reads in (lambda path: image_files([path]), lambda path: read_image(path, DataConfig())):
        with pytest.raises(ConfigError, match=r"pipe.png: not a file, but a pipe, socket or devi"):
            reads(tmp_path / "pipe.png")


def test_images_of_a_folder_are_in_order_and_not_from_deeper(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.tiff", "d.txt", "deep/e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = image_files([tmp_path / "d.txt", tmp_path])
    assert [file.name for file in found] == ["d.txt", "a.png", "b.JPG", "c.tiff"]


def test_videos_and_large_images_are_refused_by_their_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before gigabytes are read into memory."""
    frames = 2 * [np.zeros((64, 64, 3), np.uint8)]
    write_video(tmp_path / "clip.avi", frames)
    Image.new("L", (30, 20)).save(tmp_path / "large.png")
    assert read_image(tmp_path / "large.png", DataConfig(max_pixels=600)).shape == (20, 30, 3)

    def fail(path: Path) -> bytes:
        raise AssertionError(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    told = r"clip\.avi: not an image .* \(the frames of a video: mrcnn_jax\.video_frames\)$"
    with pytest.raises(ConfigError, match=told):
        read_image(tmp_path / "clip.avi", DataConfig())
    told = r"large\.png: 20 x 30 is over 599 pixels .*: tile=1024 looks at it in tiles$"
    with pytest.raises(ConfigError, match=told):
        read_image(tmp_path / "large.png", DataConfig(max_pixels=599))
    monkeypatch.setattr(inputs, "AT_ONCE", 599)  # tiles would be cut from all of its pixels
    told = r"large\.png: 20 x 30 is over 599 pixels .*: saved as a TIFF .*, tile=1024 looks at it"
    with pytest.raises(ConfigError, match=told):
        read_image(tmp_path / "large.png", DataConfig(max_pixels=599))
    monkeypatch.undo()
    for name, told in (("gone.mp4", "No such file"), ("", "Is a directory")):
        with pytest.raises(ConfigError, match=told):
            read_image(tmp_path / name, DataConfig())


def test_a_cameras_raw_file_is_not_its_thumbnail(tmp_path: Path) -> None:
    """A TIFF with the picture below its first page; the later pages of a pyramid are no reason."""
    picture, small = Image.new("RGB", (12, 8), "red"), Image.new("RGB", (6, 4), "red")
    thumbnail = TiffImagePlugin.ImageFileDirectory_v2()
    thumbnail[254], thumbnail[330] = 1, 8
    small.save(tmp_path / "a.NEF", "TIFF", tiffinfo=thumbnail)
    picture.save(tmp_path / "pyramid.dat", "TIFF", save_all=True, append_images=[small])
    report = Report()
    assert [file.name for file in image_files([tmp_path], report)] == ["pyramid.dat"]
    assert report.lines()[1:] == [
        "left out 1: cameras' raw files (save them as JPEG or PNG): passed over (a.NEF)"
    ]
    assert read_image(tmp_path / "pyramid.dat", DataConfig()).shape == (8, 12, 3)
    (tmp_path / "b.tif").write_bytes((tmp_path / "a.NEF").read_bytes())
    told = r": not an image that can be decoded: a camera's raw file, which holds a thumbnail \(sav"
    for name in ("a.NEF", "b.tif"):
        with pytest.raises(ConfigError, match=told):
            read_image(tmp_path / name, DataConfig())
        with pytest.raises(ConfigError, match=told):
            open_windowed(tmp_path / name, DataConfig(), Report())


def test_a_file_that_is_named_twice_is_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever path, as of a folder and a file in it: the first name stays."""
    photos, other = tmp_path / "photos", tmp_path / "other"
    for folder in (photos, other):
        folder.mkdir()
        Image.new("L", (8, 6)).save(folder / "a.png")
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    report = Report()
    named = [Path("photos/a.png"), photos, Path("link"), other, Path("other/../photos/a.png")]
    assert image_files(named, report) == [named[0], other / "a.png"]
    assert report.lines()[1:] == [
        "left out 3: files that were named before: passed over (a.png, a.png, a.png)"
    ]


class Tensor:
    """An array of another library."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        if self.values.size == 0:
            raise TypeError("can't convert cuda:0 device type tensor to numpy.\nUse Tensor.cpu()")
        return self.values


def test_images_in_memory_are_what_they_are() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    report = Report()
    for image in (pixels, Tensor(pixels), Image.fromarray(pixels)):
        assert (image_pixels(image, report) == pixels).all()
    assert not report.findings
    grey = Image.fromarray(pixels[..., 0])
    assert (image_pixels(grey, report) == pixels[..., :1]).all()
    assert [text for _, text in report.findings] == ["images that are grey: converted to 8-bit RGB"]
    for wrong, told in (
        (Tensor(pixels.astype(np.float32)), r"image: float32 \[7, 9, 3\] is not uint8 RGB"),
        (Tensor(pixels.transpose(2, 0, 1)), r"image: uint8 \[3, 7, 9\] is not uint8 RGB"),
        (Tensor(pixels[:0]), r"image: Tensor: can't convert cuda:0 .* numpy. Use Tensor.cpu\(\)"),
        (Image.new("F", (3, 3)), "image: Image: not an image .* floats"),
        (None, "image: NoneType is not"),
        ({"image": pixels}, "image: dict is not"),
    ):
        with pytest.raises(ValueError, match=told) as caught:
            image_pixels(wrong, report)
        assert "\n" not in str(caught.value)
