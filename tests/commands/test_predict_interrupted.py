"""`predict` that is ended early, by a signal or a full disk: what is done is kept, and no more."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrcnn_jax.inference.inputs import image_files
from mrcnn_jax.pixels import encode
from tests.commands.predictions import grey_images, images_of, predict_files, results_of
from tests.inference.stand_ins import load_stand_in

DETECTION = {"image_id": 1, "bbox": [0, 0, 1, 1], "score": 0.1, "category_id": 1}


def test_a_full_disk_ends_it_in_a_line(
    kept_run: Path,
    programs: None,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And detections.json, which grows image by image, has all that was found, as has the list of
    the images."""
    files = sorted((tiny_data / "images").glob("val*.png"))[:3]
    growing = []
    write = encode.Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        (unfinished,) = (tmp_path / "out").glob("*detections.json*")
        growing.append(unfinished.stat().st_size)
        if len(growing) == 3:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(encode.Path, "write_bytes", full)
    with pytest.raises(OSError, match=rf"No space left on device: .*00003_{files[2].stem}.png"):
        predict_files(kept_run, files, tmp_path / "out")
    assert growing == sorted(set(growing))
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    pictures = [f"0000{n}_{file.stem}.png" for n, file in enumerate(files, 1)]
    assert left == [*pictures[:2], "detections.json", "images.json"]
    assert "ended early, but kept: 3 images, " in capsys.readouterr().out
    listed = images_of(tmp_path / "out")
    assert [image["pictures"] for image in listed] == [[name] for name in pictures]
    assert {result["image_id"] for result in results_of(tmp_path / "out")} <= {1, 2, 3}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_done(
    number: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """So that a second call into the folder of the images takes no overlay of the first for one;
    one that did nothing leaves what an earlier call wrote."""
    grey_images(tmp_path, "abc")
    found, calls = SimpleNamespace(to_coco=lambda _: [DETECTION]), []

    def predicted(*_: Any, **__: Any) -> SimpleNamespace:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return found

    load_stand_in(monkeypatch, predicted)
    before = signal.getsignal(number)
    request.addfinalizer(lambda: signal.signal(number, before))
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, usual)  # another command may have set one

    def again() -> int:
        return mrcnn("predict", tmp_path, "--workdir", tmp_path, "--out", tmp_path)

    def images() -> list[str]:
        return [Path(image["file_name"]).name for image in images_of(tmp_path)]

    assert again() == 128 + number
    assert signal.getsignal(number) == usual
    assert "ended early, but kept: 2 images, 2 detections: " in capsys.readouterr().out
    assert images() == ["a.png", "b.png"]
    assert len(results_of(tmp_path)) == 2
    assert [file.name for file in image_files([tmp_path])] == ["a.png", "b.png", "c.png"]
    calls[:] = [1, 1]
    assert again() == 128 + number
    assert images() == ["a.png", "b.png"]
    assert again() == 0
    assert images() == ["a.png", "b.png", "c.png"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_killed_call_leaves_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mrcnn: Callable[..., int]
) -> None:
    """The folder at one instant is what SIGKILL would leave. A call into it takes no overlay for a
    photograph; while it runs, the lists are still those of the first."""
    folder = tmp_path / "photos"
    folder.mkdir()
    grey_images(folder, "abc")
    killed: list[Path] = []

    def predicted(number: int) -> list[dict[str, Any]]:
        if number == 3:
            killed.append(tmp_path / f"killed {len(killed)}")
            shutil.copytree(folder, killed[-1])
        return [DETECTION | {"image_id": number}]

    seen = SimpleNamespace(to_coco=predicted)
    load_stand_in(monkeypatch, lambda *_, **__: seen)
    for images in (2, 3):
        assert mrcnn("predict", folder, "--workdir", ".", "--out", folder) == 0
        left = killed[-1]
        assert [image["id"] for image in images_of(left)] == [1, 2, 3][:images]
        assert [result["image_id"] for result in results_of(left)] == [1, 2, 3][:images]
        assert [file.name for file in image_files([left])] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("overlays", [True, False])
def test_what_is_interrupted_replaces_no_earlier_results(
    overlays: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of more images. Pictures of other names are removed, where none was before."""
    files = grey_images(tmp_path, "abcd")
    found, left = SimpleNamespace(to_coco=lambda _: [DETECTION]), [9]

    def predicted(*_: Any, **__: Any) -> SimpleNamespace:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return found

    load_stand_in(monkeypatch, predicted)
    out = tmp_path / "out"

    def predict_some(paths: list[Path]) -> None:
        predict_files(tmp_path, paths, out, overlays=overlays)

    predict_some(files[:3])
    mine = out / "00001_d.png"
    mine.write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    line = f"ended early: the earlier results in {out} stay"
    for paths, done, counts in (
        (files[:3], 1, " (pictures drawn again: 1, new ones removed: 0)"),
        ([files[0], files[2], files[1]], 2, " (pictures drawn again: 1, new ones removed: 1)"),
        (files[:3], 0, ""),
    ):
        left[0] = done
        with pytest.raises(KeyboardInterrupt):
            predict_some(paths)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert capsys.readouterr().out == f"{line}{counts if overlays else ''}\n"
    left[0] = 1
    with pytest.raises(KeyboardInterrupt):
        predict_some([files[3], files[0]])
    assert mine.exists()  # what was there is not removed, even where it was drawn over
    # More than there was is kept.
    left[0] = 4
    with pytest.raises(KeyboardInterrupt):
        predict_some([*files, *grey_images(tmp_path, "e")])
    assert len(images_of(out)) == 4


def test_a_disk_too_full_for_the_lists_keeps_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mrcnn: Callable[..., int], capfd: Any
) -> None:
    """Whole images, and the list that could not grow is named."""
    grey_images(tmp_path, "abc")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def found(number: int) -> list[dict[str, Any]]:
        if number == 3:
            size = max(path.stat().st_size for path in (tmp_path / "out").iterdir())
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 300, hard))
        return 2 * [DETECTION | {"image_id": number, "bbox": 20 * [0]}]

    seen = SimpleNamespace(to_coco=found)
    load_stand_in(monkeypatch, lambda *_, **__: seen)
    out = tmp_path / "out"
    try:
        assert mrcnn("predict", tmp_path, "--workdir", ".", "--out", out, "--no-overlays") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = capfd.readouterr()
    assert told.err == f"error: {out / 'detections.json'}: File too large\n"
    assert "ended early, but kept: 2 images, 4 detections: " in told.out
    assert [result["image_id"] for result in results_of(out)] == [1, 1, 2, 2]
    assert [image["id"] for image in images_of(out)] == [1, 2]
