"""The data set of bins as files, from made-up views; test_bin_scenes.py has those of MuJoCo."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_ops

from mrcnn_jax.datasets import bin_scenes, bins
from mrcnn_jax.datasets.bin_scenes import Rendering

SIZE = (72, 96)
SEEN = """
..11122
..11122
33.1.22
3....44
"""


def made_up(stream: tuple[int, ...], size: tuple[int, int]) -> Rendering:
    """Three rectangles: seen in full, by 40 % and by less; and an object that is hidden."""
    rng = np.random.default_rng(stream)
    ids = np.zeros(size, np.int32)
    for number, top in enumerate((5, 25, 45), 1):
        ids[top : top + 10, 10 * number : 10 * number + 20] = number
    return Rendering(
        colour=rng.integers(0, 256, (*size, 3)).astype(np.uint8),
        depth=rng.uniform(0.3, 1.2, size).astype(np.float32),
        ids=ids,
        labels=(1, 2, 3, 4),
        whole=(200, 500, 501, 70),
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bin_scenes, "load_mujoco", lambda: None)
    monkeypatch.setattr(bin_scenes, "draw_scene", made_up)


def _content(folder: Path, split: str) -> dict[str, Any]:
    return json.loads((folder / "annotations" / f"instances_{split}.json").read_text())


def test_masks_are_what_is_seen() -> None:
    """Against the picture, character by character."""
    rows = SEEN.split()
    ids = np.array([[int(c.replace(".", "0")) for c in row] for row in rows], np.int32)
    rendering = Rendering(
        colour=np.zeros((*ids.shape, 3), np.uint8),
        depth=np.ones(ids.shape, np.float32),
        ids=ids,
        labels=(3, 1, 4, 2, 2),
        whole=(7, 15, 8, 2, 30),
    )
    found = bins.seen_objects(rendering)
    assert [item["category_id"] for item in found] == [3, 1, 4, 2], "the fifth is not seen at all"
    boxes = [[2, 0, 3, 3], [5, 0, 2, 3], [0, 2, 2, 2], [5, 3, 2, 1]]
    assert [item["bbox"] for item in found] == boxes
    for number, item in enumerate(found, 1):
        mask = rle_ops.decode(item["segmentation"])
        places = {(y, x) for y in range(4) for x in range(7) if rows[y][x] == str(number)}
        assert {(y, x) for y in range(4) for x in range(7) if mask[y, x]} == places
        assert item["area"] == len(places)
    # 7 of 7, 6 of 15 (40 % is enough), 3 of 8, 2 of 2.
    assert [item["visible_share"] for item in found] == [1.0, 0.4, 0.375, 1.0]
    assert [item["iscrowd"] for item in found] == [0, 0, 1, 0]


@pytest.mark.usefixtures("drawn")
def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bins.write_bins(tmp_path, train=3, val=2, seed=4, size=SIZE)
    assert capsys.readouterr().out == (
        f"{tmp_path}: 3 + 2 images of 72 x 96: 5 of class box, 5 of class cylinder,"
        " 0 of class capsule, 0 of class ellipsoid; 5 crowd regions (seen under 40%)\n"
    )
    numbers: dict[str, list[int]] = {"images": [], "annotations": []}
    for place, (split, count) in enumerate((("train", 3), ("val", 2))):
        content = _content(tmp_path, split)
        assert [c["name"] for c in content["categories"]] == list(bin_scenes.CLASSES)
        assert len(content["images"]) == count
        for key, ids in numbers.items():
            ids.extend(item["id"] for item in content[key])
        known = {image["id"] for image in content["images"]}
        assert {item["image_id"] for item in content["annotations"]} == known
        for index, image in enumerate(content["images"]):
            rendering = made_up((4, place, index), SIZE)
            assert (image["height"], image["width"]) == SIZE
            assert Image.open(tmp_path / "images" / image["file_name"]).size == (96, 72)
            depth = Image.open(tmp_path / "images" / image["depth_file"])
            assert depth.mode == "I;16"
            millimetres = [[round(1000 * float(z)) for z in row] for row in rendering.depth]
            np.testing.assert_array_equal(np.asarray(depth), millimetres)
    assert numbers == {"images": [1, 2, 3, 4, 5], "annotations": list(range(1, 16))}
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["annotations", "depth", "images"]


@pytest.mark.usefixtures("drawn")
def test_the_reader_takes_all_of_it(
    tmp_path: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bins"
    words = ("--train", 2, "--val", 1, "--size", *SIZE)
    assert mrcnn("generate", "bins", "--out", out, *words) == 0
    names = ("--annotations", out / "annotations" / "instances_train.json", "--images")
    capsys.readouterr()
    assert mrcnn("check", *names, out / "images", "--cache", tmp_path / "cache", "--strict") == 0
    assert "dropped" not in capsys.readouterr().out


@pytest.mark.usefixtures("drawn")
def test_a_seed_and_a_place_decide(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        bins.write_bins(tmp_path / name, train=2, val=1, seed=seed, size=SIZE)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 3 + 3 + 2
    for file in files:
        content = (tmp_path / "a" / file).read_bytes()
        assert content == (tmp_path / "b" / file).read_bytes()
        assert content != (tmp_path / "c" / file).read_bytes()
    pictures = [path.read_bytes() for path in (tmp_path / "a" / "images").iterdir()]
    assert len(set(pictures)) == 3, "splits share nothing"


@pytest.mark.usefixtures("drawn")
def test_stopped_half_way_there_are_no_annotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither new ones, nor those of the images that were there before."""
    bins.write_bins(tmp_path, train=2, val=1, size=SIZE)

    def stopped(stream: tuple[int, ...], size: tuple[int, int]) -> Rendering:
        if stream[-2:] == (1, 0):
            raise KeyboardInterrupt
        return made_up(stream, size)

    monkeypatch.setattr(bin_scenes, "draw_scene", stopped)
    with pytest.raises(KeyboardInterrupt):
        bins.write_bins(tmp_path, train=2, val=1, seed=1, size=SIZE)
    assert list((tmp_path / "annotations").iterdir()) == []
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "63", "640"), "size: 63: must be 64 to 2048 px"),
        (("--size", "480", "3000"), "size: 3000: must be 64 to 2048 px"),
        (("--processes", "0"), "processes: 0: must be at least 1"),
        (("--train", "-1"), "--train: must be at least 0"),
        (("--seed", "-1"), "--seed: must be at least 0"),
    ],
)
@pytest.mark.usefixtures("drawn")
def test_refusals(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert mrcnn("generate", "bins", "--out", tmp_path / "new", *words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "new").exists()


def _without_mujoco() -> None:
    return None


def _without_osmesa() -> ModuleType:
    """As PyOpenGL fails if libOSMesa is missing."""
    module = ModuleType("mujoco")
    module.__spec__ = importlib.machinery.ModuleSpec("mujoco", None)

    def missing(name: str) -> None:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    module.__getattr__ = missing  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (_without_mujoco, "mujoco is not installed (pip install mujoco)\n"),
        (_without_osmesa, "mujoco cannot draw with MUJOCO_GL=osmesa; the default, osmesa, needs"
         " OSMesa (Debian: apt-get install libosmesa6): 'NoneType' object has no"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(
    module: Callable[[], ModuleType | None],
    message: str,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", module())
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    assert mrcnn("generate", "bins", "--out", tmp_path / "new") == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: generate bins: {message}")
    assert errors.count("\n") == 1
    assert not (tmp_path / "new").exists()
