"""Every path that a command takes may be missing, empty, binary, a folder, a loop of links, a pipe
that nobody writes to, too long a name or no text: each is answered by one line, before anything is
compiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from mrcnn_jax.__main__ import COMMANDS

COCO = ("--annotations", "JSON", "--images", "IMAGES")
TRAIN = ("train", "--config", "TINY", "--workdir", "NEW", "--data.root", "DATA")
CASES: tuple[tuple[str, ...], ...] = (
    ("train", "--config", "BAD", "--workdir", "NEW"),
    ("train", "--config", "TINY", "--workdir", "BADFILE", "--data.root", "DATA"),
    ("train", "--config", "TINY", "--workdir", "NEW", "--data.root", "BAD"),
    (*TRAIN, "--data.train-annotations", "BAD"),
    (*TRAIN, "--data.val-images", "BADFOLDER"),
    (*TRAIN, "--init-from", "BAD"),
    (*TRAIN, "--weights", "BAD"),
    (*TRAIN, "--data.cache", "BADFILE"),
    ("eval", "--workdir", "BAD"),
    ("eval", "--workdir", "RUN", "--annotations", "BAD", "--images", "IMAGES"),
    ("eval", "--workdir", "RUN", "--annotations", "JSON", "--images", "BADFOLDER"),
    ("eval", "--workdir", "RUN", "--out", "BADFILE"),
    ("predict", "IMAGE", "--workdir", "BAD", "--out", "NEW"),
    ("predict", "BAD", "--workdir", "RUN", "--out", "NEW"),
    ("predict", "IMAGE", "--workdir", "RUN", "--out", "BADFILE"),
    ("check", "--annotations", "BAD", "--images", "IMAGES", "--cache", "NEW"),
    ("check", "--annotations", "JSON", "--images", "BADFOLDER", "--cache", "NEW"),
    ("check", *COCO, "--cache", "BADFILE"),
    ("check", *COCO, "--cache", "NEW", "--config", "BAD"),
    ("check", *COCO, "--cache", "NEW", "--contact-sheet", "BADNEW"),
    ("convert", "labelme", "BAD", "--out", "NEW.json"),
    ("convert", "cvat", "BAD", "--out", "NEW.json"),
    ("convert", "voc", "BAD", "--out", "NEW.json"),
    ("convert", "masks", "BAD", "--out", "NEW.json"),
    ("convert", "via", "BAD", "--out", "NEW.json"),
    ("convert", "supervisely", "BAD", "--out", "NEW.json"),
    ("convert", "datumaro", "BAD", "--out", "NEW.json"),
    ("import", "BAD", "--out", "NEW"),
    ("export", "--workdir", "BAD", "--out", "NEW"),
    ("share", "--workdir", "BAD", "--out", "NEW"),
    ("share", "--workdir", "RUN", "--out", "BADFILE"),
    ("figures", "curves", "BAD", "--out", "NEW"),
    ("figures", "detections", "BAD", "--out", "NEW"),
    ("figures", "curves", "RUN", "--out", "BADFILE"),
    ("experiments", "--workdir", "NEW", "--recipe", "BAD"),
    ("experiments", "--workdir", "BADFILE", "--recipe", "TINY", "--data-root", "DATA"),
    ("replay", "BAD"),
    ("generate", "shapes", "--out", "BADFILE", "--train", "1", "--val", "1"),
    ("generate", "bins", "--out", "BADFILE", "--train", "1", "--val", "0"),
    ("generate", "coco300", "--coco", "BAD", "--out", "NEW"),
)
BAD = ("missing", "empty", "binary", "text", "folder", "loop", "long", "notdir", "pipe")
# Which of them are as good as any, by the word that stands for a bad path in a command.
FINE: dict[str, tuple[str, ...]] = {
    "BAD": (),
    "BADFOLDER": ("folder",),  # a folder to read
    "BADNEW": ("missing", "empty", "binary", "text", "pipe"),  # a file to write
    "BADFILE": ("missing", "folder"),  # a folder to write
}


@pytest.fixture
def places(tiny_data: Path, kept_run: Path, tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "text").write_text("{\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    return {
        "TINY": Path(tiny.__file__),
        "DATA": tiny_data,
        "JSON": tiny.annotations(tiny_data, "val"),
        "IMAGES": tiny_data / "images",
        "IMAGE": next((tiny_data / "images").iterdir()),
        "RUN": kept_run,
        "NEW": tmp_path / "new",
        "NEW.json": tmp_path / "new" / "new.json",
        "missing": tmp_path / "missing",
        "empty": tmp_path / "empty",
        "binary": tmp_path / "binary",
        "text": tmp_path / "text",
        "folder": tmp_path / "folder",
        "loop": tmp_path / "loop",
        "long": tmp_path / ("a" * 300),
        "pipe": tmp_path / "pipe",
        "notdir": tmp_path / "empty" / "below",
    }


def test_every_command_is_tried() -> None:
    assert {command for command, *_ in CASES} == COMMANDS.keys()


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_a_bad_path_is_one_line(
    words: tuple[str, ...],
    places: dict[str, Path],
    mrcnn: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    (kind,) = {word for word in words if word in FINE}
    wrong = []
    slow = words[-2] in ("--init-from", "--data.cache")  # after the shapes of all weights
    for bad in ("binary", "notdir") if slow else BAD:
        if bad in FINE[kind]:
            continue
        status = mrcnn(*(places[bad] if word == kind else places.get(word, word) for word in words))
        errors = capfd.readouterr().err
        if status not in (1, 2) or not errors.startswith("error: ") or errors.count("\n") != 1:
            wrong.append((bad, status, errors))
    assert wrong == []
