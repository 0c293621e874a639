"""Files of other formats given where a COCO file is expected: named, with what to do."""

from __future__ import annotations

import json
import os
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from exports import (
    PICTURES,
    Drawn,
    as_cvat,
    as_datumaro,
    as_label_studio,
    as_labelme,
    as_supervisely,
    as_via,
    as_voc,
    as_yolo,
)

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.convert.common import Options
from mrcnn_jax.data.reading import read_coco


def refusal(path: Path, images: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read_coco(path, images or path.parent, DataConfig())
    return str(caught.value)


@pytest.mark.parametrize(
    ("write", "pattern", "name"),
    [
        (as_labelme, "**/*.json", "labelme's"),
        (as_cvat, "**/annotations.xml", "CVAT's"),
        (as_voc, "Annotations/*.xml", "Pascal VOC's"),
        (as_yolo, "data.yaml", "YOLO's"),
        (as_via, "*.json", "VIA's"),
        (as_label_studio, "*.json", "Label Studio's"),
        (as_supervisely, "*/ann/*.json", "Supervisely's"),
        (as_datumaro, "annotations/*.json", "Datumaro's"),
        (as_yolo, "labels/a.txt", "labels of YOLO's"),
    ],
)
def test_the_command_that_is_named_converts(
    write: Callable[[Path, Drawn], Options],
    pattern: str,
    name: str,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = write(tmp_path / "export", PICTURES)
    file = sorted((tmp_path / "export").glob(pattern))[0]
    found, _, command = refusal(file).rpartition(": ")
    assert found == f"{file}: no COCO file, but {name}"
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command.partition("mrcnn_jax ")[2] or command.removeprefix("mrcnn "))
    assert mrcnn(*words, "--images", options.image_folder()) == 0
    read_coco(tmp_path / "annotations.json", options.image_folder(), DataConfig())


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("data.yaml", "train: ../images\nnc: 2\nnames: ['a', 'b']\n", "YOLO's: {} data.yaml"),
        ("my.yml", "path: .\nnames:\n  0: a\n", "YOLO's: {} my.yml"),
        ("labels/a.txt", "0 0.5 0.5 0.25 0.125\n", "labels of YOLO's: {} labels"),
        ("labels/a.txt", "12 0.5 0.5 0.25 0.125 0.3 0.7 1 1\r\n", "labels of YOLO's: {} labels"),
    ],
)
def test_yolo(
    name: str, content: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("labels").mkdir()
    Path(name).write_text(content)
    told = told.format("python -m mrcnn_jax convert yolo")
    line = f"{name}: no COCO file, but {told} --out annotations.json"
    assert refusal(Path(name)) == line
    if name.startswith("labels"):
        Path("data.yaml").touch()
        assert refusal(Path(name)) == line.replace("yolo labels", "yolo .")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"a": {"filename": "a", "regions": []}}, "VIA's: {} via a.json"),
        ({"_via_img_metadata": {"a": {"regions": {}}}}, "VIA's: {} via a.json"),
        ([{"id": 1, "annotations": []}], "Label Studio's: {} label-studio a.json"),
    ],
)
def test_json_of_other_tools(
    content: object, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(json.dumps(content))
    told = told.format("python -m mrcnn_jax convert")
    assert refusal(Path("a.json")) == f"a.json: no COCO file, but {told} --out annotations.json"


def test_a_csv_of_via(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("filename,region_shape_attributes,region_attributes\n")
    told = "python -m mrcnn_jax convert via a.csv --out annotations.json"
    assert refusal(Path("a.csv")) == f"a.csv: no COCO file, but VIA's: {told}"


def test_archives_and_videos(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "coco.json", "w") as archive:
        archive.writestr("annotations.xml", "<annotations/>")
    assert "but a zip archive: unpack it" in refusal(tmp_path / "coco.json")
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "a.json").write_text(
        '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}'
    )
    told = f"{tmp_path / 'clip.mp4'}: no folder, but a video, which predict takes"
    assert refusal(tmp_path / "a.json", tmp_path / "clip.mp4") == told
    assert refusal(tmp_path / "clip.mp4") == told.replace("folder", "COCO file")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ""),
        ("a.json", "{"),
        ("a.json", "[1]"),
        ("a.json", '{"shapes": []}'),
        ("a.xml", "<html><body></body></html>"),
        ("notes.txt", "3 apples\n"),
        ("notes.txt", "2024\n"),
        ("config.yaml", "a: 1\n"),
    ],
)
def test_what_is_not_known_is_told_as_before(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert "but" not in refusal(tmp_path / name).removeprefix(str(tmp_path))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert "not a file, but a pipe" in refusal(tmp_path / "a.json")


def test_projects_of_via_3_are_named(tmp_path: Path) -> None:
    keys = ("project", "config", "attribute", "file", "metadata", "view")
    (tmp_path / "x.json").write_text(json.dumps({key: {} for key in keys}))
    assert refusal(tmp_path / "x.json").endswith("VIA 3's: not read (VIA 1 and 2 are)")
