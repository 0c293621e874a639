"""Depth maps of a data set: found, checked, cached, loaded. (Their files: pixels/test_depth.py.)"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.heads import DepthHeadConfig
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import AugmentConfig, Config, DataConfig
from mrcnn_jax.data import depth_files
from mrcnn_jax.data.depth_files import depth_source
from mrcnn_jax.data.images import check_split
from mrcnn_jax.data.loader import Split, depth_of, load, open_split, plan_once
from mrcnn_jax.data.order import plan_epoch
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.data.report import Reason
from mrcnn_jax.pixels.depth import depth_cells
from mrcnn_jax.pixels.transforms import Transform

OWN = {Reason.CATEGORY_IDS, Reason.RUN_LIST}  # what mixed_content has by itself


def metres_of(number: int, size: tuple[int, int]) -> np.ndarray:
    """Whole millimetres, a quarter unknown."""
    rng = np.random.default_rng(number)
    metres = rng.integers(400, 3000, size) / 1000
    metres[: size[0] // 4] = 0
    return metres.astype(np.float32)


def write_png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), values)


def write_maps(content: dict[str, Any], root: Path, folder: str = "depth") -> dict[int, np.ndarray]:
    """A map for each image in `folder` beside that of the images, by image id."""
    maps = {}
    for image in content["images"]:
        maps[image["id"]] = metres = metres_of(image["id"], (image["height"], image["width"]))
        stem = image["file_name"].removesuffix(".png")
        write_png(root / folder / f"{stem}.png", np.rint(metres * 1000).astype(np.uint16))
        image["depth_file"] = f"../{folder}/{stem}.png"
    return maps


@pytest.fixture
def maps(mixed_content: dict[str, Any], tmp_path: Path) -> dict[int, np.ndarray]:
    return write_maps(mixed_content, tmp_path)


@dataclass(frozen=True)
class Mixed:
    """The content of an annotation file beside `images`, and what reads it."""

    root: Path
    content: dict[str, Any]
    data: DataConfig

    @property
    def path(self) -> Path:
        path, text = self.root / "instances.json", json.dumps(self.content)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        return path

    def read(self, depth: Path | bool = True, *, lost: bool = False) -> CocoDataset:
        return read_coco(self.path, self.root / "images", self.data, lost_images=lost, depth=depth)

    def check(self, depth: Path | bool = True, **change: Any) -> CocoDataset:
        dataset, data = self.read(depth, lost=True), replace(self.data, **change)
        return check_split(dataset, cache=self.root / "cache", data=data, keep_empty=True)[0]

    def opened(self, depth: Path | bool = True) -> Split:
        return open_split("train", self.read(depth), cache=self.root / "cache", data=self.data)


@pytest.fixture
def mixed(tmp_path: Path, mixed_content: dict[str, Any], mixed_data: DataConfig) -> Mixed:
    return Mixed(tmp_path, mixed_content, mixed_data)


def found(dataset: CocoDataset) -> dict[str, tuple[int, list[Any]]]:
    return {
        text: (finding.count, finding.first_ids)
        for (reason, text), finding in dataset.report.findings.items()
        if reason not in OWN
    }


# -- where maps are looked up ----------------------------------------------------------------------


def test_depth_is_read_for_a_network_with_a_depth_head_only() -> None:
    data = DataConfig(train_depth="/data/depth")
    assert depth_source(Config(data=data), "train") is False
    for kind in ("dense", "roi"):
        model = ModelConfig(depth_head=DepthHeadConfig(kind=kind))
        config = Config(data=data, model=model)
        assert depth_source(config, "train") == Path("/data/depth")
        assert depth_source(config, "val") is True
        assert depth_source(config) is True  # of another data set


def test_without_asking_nothing_is_looked_for(maps: dict[int, np.ndarray], mixed: Mixed) -> None:
    for image in mixed.content["images"]:
        image["depth_file"] = "nowhere.png"
    split = mixed.opened(depth=False)
    assert not split.dataset.has_depth
    assert split.dataset.depth is None
    assert found(split.dataset) == {}
    assert depth_of(split, 0, mixed.data) is None
    assert all(batch.depth is None for batch in load(split, plan_once(split, 2), mixed.data))


def test_names_in_the_file_are_relative_to_the_image_folder(
    maps: dict[int, np.ndarray], mixed: Mixed, tmp_path: Path
) -> None:
    by_id = {image["id"]: image for image in mixed.content["images"]}
    by_id[11]["depth_file"] = "..\\depth\\photo 0.png"
    (tmp_path / "images" / "inside").mkdir()
    (tmp_path / "depth" / "photo 1.png").rename(tmp_path / "images" / "inside" / "1.png")
    by_id[12]["depth_file"] = "inside/1.png"
    by_id[13]["depth_file"] = None  # not listed, like one that has no such field
    del by_id[14]["depth_file"]
    dataset = mixed.check()
    files = {image.id: image.depth_file for image in dataset.images}
    assert files == {
        11: "../depth/photo 0.png",
        12: "inside/1.png",
        13: None,
        14: None,
        **{number: f"../depth/photo {number - 11}.png" for number in (15, 16, 17)},
    }
    assert found(dataset) == {}
    assert dataset.listed_depth == 5
    assert dataset.depth is not None
    assert dataset.depth.maps == 5


@pytest.mark.parametrize("name", ["../depth/none.png", "/etc/hostname", 7, ["x"], "../depth", "p"])
def test_a_missing_map_costs_its_image_nothing_else(
    name: Any, maps: dict[int, np.ndarray], mixed: Mixed, tmp_path: Path
) -> None:
    """A name that is absolute, no text, a folder or a pipe (opening it would take forever)."""
    os.mkfifo(tmp_path / "images" / "p")
    mixed.content["images"][0]["depth_file"] = name  # of image 17
    dataset = mixed.check()
    assert found(dataset) == {Reason.MISSING_DEPTH.text: (1, [17])}
    assert [image.depth_file for image in dataset.images][-1] is None
    assert len(dataset.images) == 7
    line = r"1 of 7 depth maps are lost \(at most 1 % may be\): .* \(no such file, looked up from"
    for refused in (dataset.refuse_lost_images, lambda: mixed.read()):
        with pytest.raises(ConfigError, match=line):
            refused()


def test_a_folder_has_maps_of_the_images_names(
    maps: dict[int, np.ndarray], mixed: Mixed, tmp_path: Path
) -> None:
    """Instead of what the file says; through a link, as .npy, and not for every image."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "depth").rename(tmp_path / "elsewhere" / "depth")
    folder = tmp_path / "linked"
    folder.symlink_to(tmp_path / "elsewhere" / "depth")
    (folder / "photo 2.png").unlink()
    np.save(folder / "photo 2.npy", maps[13].astype(np.float64))
    (folder / "photo 3.png").unlink()
    split = mixed.opened(folder)
    dataset = split.dataset
    assert found(dataset) == {Reason.NO_DEPTH.text.format(folder=folder): (1, [14])}
    for index, image in enumerate(dataset.images):
        metres = depth_of(split, index, mixed.data)
        if image.id == 14:
            assert metres is None
        else:
            assert (dataset.images_dir / str(image.depth_file)).is_file()
            np.testing.assert_array_equal(metres, maps[image.id])
    with pytest.raises(ConfigError, match=r"none: no such folder of depth maps$"):
        mixed.read(tmp_path / "none")


def test_maps_may_lie_beside_their_images(mixed: Mixed, tmp_path: Path) -> None:
    """x.npy beside x.png, which is no depth map of itself."""
    for image in mixed.content["images"][1:]:
        metres = metres_of(image["id"], (image["height"], image["width"]))
        np.save(tmp_path / "images" / image["file_name"].replace(".png", ".npy"), metres)
    dataset = mixed.check(tmp_path / "images")
    assert [image.depth_file for image in dataset.images] == [
        *(f"photo {number}.npy" for number in range(6)),
        None,
    ]


# -- the check -------------------------------------------------------------------------------------


def test_the_numbers_of_a_data_set(maps: dict[int, np.ndarray], mixed: Mixed) -> None:
    mixed.content["images"][0]["depth_file"] = ""  # of image 17
    depth = mixed.check().depth
    values = np.concatenate([metres for number, metres in maps.items() if number != 17], axis=None)
    known = values[values > 0]
    assert depth is not None
    assert depth.maps == 6
    assert depth.known_share == known.size / values.size
    assert depth.metres == (known.min(), known.max())
    assert depth.quantiles is not None
    expected = np.quantile(known, [0.01, 0.5, 0.99])
    assert list(depth.quantiles.values()) == pytest.approx(expected.tolist(), rel=0.003)
    assert depth.line(7).startswith("depth: 6 of 7 images; 75.")


def test_a_map_of_another_size_is_refused(
    maps: dict[int, np.ndarray], mixed: Mixed, tmp_path: Path
) -> None:
    """The turned one too: a map has the size of the annotations."""
    write_png(tmp_path / "depth" / "photo 0.png", np.full((80, 60), 500, np.uint16))
    with pytest.raises(ConfigError) as error:
        mixed.check()
    assert str(error.value) == (
        f"{tmp_path}/images/../depth/photo 0.png: the depth map is 80 x 60, but its image 11 "
        "(photo 0.png) is 60 x 80 (height x width)"
    )


def test_a_map_that_cannot_be_decoded_is_told_and_tried_again(
    maps: dict[int, np.ndarray], mixed: Mixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "depth" / "photo 4.png"
    write_png(file, np.full((50, 96, 3), 90, np.uint8))
    for _ in range(2):  # from the files, then from the cache
        dataset = mixed.check()
        assert found(dataset) == {Reason.UNDECODABLE_DEPTH.text: (1, [15])}
        assert [i.id for i in dataset.images if i.depth_file is None] == [15]
        assert dataset.depth is not None
        assert dataset.depth.maps == 6
        with pytest.raises(
            ConfigError,
            match=r"1 of 7 depth maps are lost \(at most 1 % may be\): ../depth/photo 4.png "
            r"\(a PNG of 8 bits, RGB: a picture to look at has no metres; .*\)$",
        ):
            dataset.refuse_lost_images()

    # A disk that was away for a moment: only its map is read again.
    write_png(file, np.rint(maps[15] * 1000).astype(np.uint16))
    original, decoded = depth_files.decode_depth, []

    def away(encoded: bytes, **options: Any) -> np.ndarray:
        decoded.append(encoded)
        if encoded == file.read_bytes():
            raise OSError(5, "Input/output error")
        return original(encoded, **options)

    with monkeypatch.context() as patch:
        patch.setattr(depth_files, "decode_depth", away)
        assert mixed.check().lost_depth == ("../depth/photo 4.png (Input/output error)",)
        assert len(decoded) == 7
        mixed.check()
        assert len(decoded) == 8
    again = mixed.check()
    assert again.lost_depth == ()
    assert again.depth is not None
    assert again.depth.maps == 7


def test_decoded_once_for_a_scale_and_a_range(
    maps: dict[int, np.ndarray], mixed: Mixed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mixed.check()
    changes: list[Any] = [{"depth_scale": 2000.0}, {"depth_range": (0.1, 2.0)}]
    others = [mixed.check(**change).depth for change in changes]
    assert first.depth is not None
    assert others[0] is not None
    assert first.depth.metres is not None
    assert others[0].metres == tuple(metres / 2 for metres in first.depth.metres)
    assert others[1] is not None
    assert others[1].metres == (first.depth.metres[0], 2.0)

    with monkeypatch.context() as patch:
        patch.setattr(depth_files, "decode_depth", None)
        assert mixed.check() == first
        assert [mixed.check(**change).depth for change in changes] == others
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("depth-*.json"))) == 3
    mixed.check(depth=False)
    os.utime(tmp_path / "depth" / "photo 2.png", (1, 1))
    mixed.check()
    assert len(list((tmp_path / "cache").iterdir())) == 3  # another key each


def test_an_absurd_scale_is_refused(
    maps: dict[int, np.ndarray], mixed: Mixed, tmp_path: Path
) -> None:
    for _ in range(2):  # also from the cache
        with pytest.raises(ConfigError) as error:
            mixed.check(depth_scale=1.0)
        text = str(error.value)
        assert text.startswith(f"{mixed.path}: data.depth_scale 1 gives a median depth of 1.")
        assert "e+03 m, and 100% of all beyond data.depth_range (0.02 to 100 m): 1000 (1." in text
        assert text.endswith(" m) would look right")
    for file in (tmp_path / "depth").iterdir():
        np.save(file.with_suffix(".npy"), cv2.imread(str(file), cv2.IMREAD_UNCHANGED))
        file.unlink()
    with pytest.raises(ConfigError, match=r"files \.npy hold metres, whatever the scale$"):
        mixed.check(tmp_path / "depth")


# -- loading ---------------------------------------------------------------------------------------


def test_batches_have_depth(maps: dict[int, np.ndarray], mixed: Mixed) -> None:
    """Of each image its cells; 0 where it has no map, on the padding, and in empty rows."""
    del mixed.content["images"][0]["depth_file"]  # of image 17
    split = mixed.opened()
    # Stages without a depth loss do not ask for it, and pay nothing.
    assert next(load(split, plan_once(split, 4), mixed.data)).depth is None
    seen = []
    for batch in load(split, plan_once(split, 4), mixed.data, depth=True):
        height, width = batch.images.shape[1:3]
        assert batch.depth.dtype == np.float32
        assert batch.depth.shape == (4, height // 4, width // 4)
        assert not batch.depth[~batch.valid].any()
        for row in np.flatnonzero(batch.valid):
            number = split.dataset.images[batch.indices[row]].id
            seen.append(number)
            size = tuple(batch.image_sizes[row].tolist())
            if number == 17:
                assert not batch.depth[row].any()
                continue
            transform = Transform(maps[number].shape, size, size)
            expected = depth_cells(maps[number], transform, (height, width))
            np.testing.assert_array_equal(batch.depth[row], expected)
            outside = -(-size[0] // 4), -(-size[1] // 4)
            assert not batch.depth[row, outside[0] :].any()
            assert not batch.depth[row, :, outside[1] :].any()
            assert 0.6 < (batch.depth[row, : outside[0], : outside[1]] > 0).mean() < 0.9
    assert sorted(seen) == list(range(11, 18))


@pytest.mark.parametrize("follows", [False, True])
def test_depth_moves_with_its_augmented_image(follows: bool, mixed: Mixed, tmp_path: Path) -> None:
    """Each image is painted in the grey of its depth, so that both show the same wherever they go.
    With `depth_follows_scale` the product of metres and size stays."""
    for image in mixed.content["images"]:
        rows = np.linspace(40, 200, image["height"]).astype(np.uint8)[:, None]
        ramp = np.maximum(rows, np.linspace(20, 240, image["width"]).astype(np.uint8))
        write_png(tmp_path / "images" / image["file_name"], np.repeat(ramp[..., None], 3, 2))
        write_png(tmp_path / "depth" / image["file_name"], ramp.astype(np.uint16) * 10)
    augment = AugmentConfig(flip=0.5, scale=(0.5, 2.0), depth_follows_scale=follows)
    data = replace(mixed.data, augment=augment)
    split = replace(mixed, data=data).opened(tmp_path / "depth")
    canvases = [plan.canvas for plan in split.plans]
    factors = []
    for epoch in range(3):
        plan = plan_epoch(canvases, 2, seed=0, epoch=epoch, shuffle=True)
        for batch in load(split, plan, data, depth=True):
            for row in np.flatnonzero(batch.valid):
                plan_scale = split.plans[batch.indices[row]].scale
                factor = float(np.sqrt(np.prod(batch.scales[row]) / np.prod(plan_scale)))
                factors.append(factor)
                grey = batch.images[row].astype(float)[..., 0]
                seen = grey.reshape(grey.shape[0] // 4, 4, -1, 4).mean(axis=(1, 3)) / 100
                inside = (grey > 0).reshape(grey.shape[0] // 4, 4, -1, 4).all(axis=(1, 3))
                metres = batch.depth[row] * (factor if follows else 1)
                assert np.abs(metres - seen)[inside].max() < 0.25
                assert np.abs(metres - seen)[inside].mean() < 0.05
                assert ((batch.depth[row] > 0) | ~inside).all()
    assert min(factors) < 0.7
    assert max(factors) > 1.4


def test_a_record_without_the_map_that_is_there_now_is_noticed(
    maps: dict[int, np.ndarray], mixed: Mixed
) -> None:
    """The disk was away when the records were built."""
    split = mixed.opened()
    record = {**split.source[0], "depth": b""}
    broken = replace(split, source=[record])
    line = r"photo 0\.png: the record has no depth map: delete the data cache"
    with pytest.raises(ConfigError, match=line):
        depth_of(broken, 0, mixed.data)
    with pytest.raises(RuntimeError, match=line):
        next(load(broken, plan_once(broken, 1, limit=1), mixed.data, depth=True))


def test_real_rooms(data_folder: Path, tmp_path: Path) -> None:
    """SUN RGB-D's raw maps of 30 photographs: their own size, holes and metres."""
    root = data_folder / "sunrgbd30"
    data = DataConfig(
        depth_scale=8000.0,
        short_side=256,
        long_side=384,
        canvases=((256, 384), (384, 256)),
    )
    for split in ("train", "val"):
        files = sorted((root / split / "color").iterdir())
        maps = sorted((root / f"{split}_depth_raw").iterdir())
        images = [
            {
                "id": number,
                "file_name": file.name,
                "height": 530,
                "width": 730,
                "depth_file": os.path.relpath(depth, root / split / "color"),
            }
            for number, (file, depth) in enumerate(zip(files, maps, strict=True), 1)
        ]
        content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "room"}]}
        path = tmp_path / f"{split}.json"
        path.write_text(json.dumps(content))
        dataset = read_coco(path, root / split / "color", data, depth=True)
        opened = open_split(split, dataset, cache=tmp_path / "cache", data=data)
        raw = [cv2.imread(str(depth), cv2.IMREAD_UNCHANGED) for depth in maps]
        summary = opened.dataset.depth
        assert summary is not None
        assert summary.maps == 15
        assert summary.known_share == pytest.approx(np.mean([(r > 0).mean() for r in raw]))
        least, most = min(r[r > 0].min() for r in raw), max(r.max() for r in raw)
        assert summary.metres == pytest.approx((least / 8000, most / 8000))
        np.testing.assert_allclose(depth_of(opened, 3, data), raw[3] / 8000, rtol=1e-6)
        batch = next(load(opened, plan_once(opened, 2, limit=2), data, depth=True))
        for row, values in enumerate(raw[:2]):
            height, width = batch.image_sizes[row] // 4
            cells = batch.depth[row, :height, :width]
            assert set(np.rint(cells[cells > 0] * 8000).astype(int)) <= set(values.flat)
            assert (cells > 0).mean() > (values > 0).mean()  # a cell needs one known pixel
            size = np.array(values.shape) * 4 / batch.image_sizes[row]  # of a cell
            errors = []
            for y, x in np.argwhere(cells > 0)[::25]:
                below = values[int(y * size[0]) : math.ceil((y + 1) * size[0])]
                near = below[:, int(x * size[1]) : math.ceil((x + 1) * size[1])] / 8000
                assert near[near > 0].min() - 1e-6 <= cells[y, x] <= near.max() + 1e-6
                errors.append(abs(cells[y, x] - np.median(near[near > 0])))
            assert len(errors) > 100
            assert np.median(errors) < 0.005
    with pytest.raises(ConfigError, match=r"\(0\.02 to 100 m\): 1000 \(\d+ m\) or 8000 \(\d"):
        check_split(
            dataset, cache=tmp_path / "cache", data=replace(data, depth_scale=1.0), keep_empty=True
        )
