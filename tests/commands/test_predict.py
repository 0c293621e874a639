"""A run is used on files from its folder alone, and detects what it detects in an evaluation."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import tiny
from PIL import Image
from pycocotools import mask as rle_ops

from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.commands import predict_pictures
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.heads import DepthHeadConfig
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.inference import api
from tests.commands.predictions import images_of, pictures_in, predict_files, results_of
from tests.inference.frames import read, write_video
from tests.inference.stand_ins import load_stand_in


def test_files_and_folders_are_predicted_like_the_split(
    kept_run: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image alone gives what it gives in a batch of the evaluation, also if it is stored upside
    down and its EXIF says so; a file that is no image is named, the others are done."""
    truth = tiny.read(tiny_data, "val")
    folder = tmp_path / "folder"
    folder.mkdir()
    for image in truth["images"][1:]:
        shutil.copy(tiny_data / "images" / image["file_name"], folder)
    (folder / "notes.txt").write_text("not an image by its name")
    (tmp_path / "broken.jpg").write_bytes(b"not an image by its content")
    single = tmp_path / truth["images"][0]["file_name"]
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(tiny_data / "images" / single.name).rotate(180).save(single, exif=exif)
    paths = [single, tmp_path / "broken.jpg", folder]
    with pytest.raises(SystemExit) as stop:
        predict_files(kept_run, paths, tmp_path / "out", min_score=0.0)
    assert stop.value.code == 2
    broken = f"{tmp_path / 'broken.jpg'}: not an image that can be decoded: unknown format"
    told, errors = capsys.readouterr()
    assert errors == f"error: {broken}\n"

    expected = [
        f"{number:05d}_{Path(image['file_name']).stem}.png"
        for number, image in zip((1, *range(3, 10)), truth["images"], strict=True)
    ]
    assert pictures_in(tmp_path / "out") == sorted(expected)
    pictures = [cv2.imread(str(tmp_path / "out" / name)) for name in expected]
    assert all(picture.std() > 0 for picture in pictures)
    plain = cv2.imread(str(single))
    assert pictures[0].shape[1] / pictures[0].shape[0] == plain.shape[1] / plain.shape[0]

    found, reference = defaultdict(list), defaultdict(list)
    for result in results_of(tmp_path / "out"):
        found[Path(result["file_name"]).name].append(result)
    full = sum(
        len(results) == tiny.get_config().model.box_head.detections for results in found.values()
    )
    assert full
    assert (
        f"model.box_head.detections = 8: images with as many objects of score 0 or more: {full}: "
        "no more can be found; train with a larger one" in told
    )
    names = {image["id"]: image["file_name"] for image in truth["images"]}
    evaluation.run(
        evaluation.Arguments(workdir=kept_run, figures=0, report_images=0, out=tmp_path / "eval")
    )
    for result in results_of(tmp_path / "eval"):
        reference[names[result["image_id"]]].append(result)
    assert found.keys() == reference.keys() == set(names.values())
    for name, results in found.items():
        assert len({result["image_id"] for result in results}) == 1
        for ours, theirs in zip(results, reference[name], strict=True):
            assert ours["category_id"] == theirs["category_id"]
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
            assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-2)
            assert rle_ops.iou([ours["segmentation"]], [theirs["segmentation"]], [0])[0, 0] > 0.99
    assert all(
        result["file_name"] == str(single)
        for result in results_of(tmp_path / "out")
        if result["image_id"] == 1
    )


def test_results_are_in_pixels_of_the_file(kept_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """An image enlarged three times is seen as the one it was made from, on a canvas of the same
    size: boxes are three times as large."""
    image = cv2.imread(
        str(tiny_data / "images" / tiny.read(tiny_data, "val")["images"][0]["file_name"])
    )
    cv2.imwrite(str(tmp_path / "a.png"), image)
    cv2.imwrite(
        str(tmp_path / "b.png"),
        cv2.resize(image, None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST),
    )
    predict_files(kept_run, [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out")
    results = results_of(tmp_path / "out")
    small, large = (
        [result for result in results if result["image_id"] == number] for number in (1, 2)
    )
    assert small
    for one, three in zip(small, large, strict=True):
        assert three["bbox"] == pytest.approx([3 * value for value in one["bbox"]], abs=0.1)
        assert three["segmentation"]["size"] == [384, 384]


def test_a_folder_may_be_predicted_into_itself(
    kept_run: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was drawn into it is not predicted on; other results are not replaced."""
    name = tiny.read(tiny_data, "val")["images"][0]["file_name"]
    shutil.copy(tiny_data / "images" / name, tmp_path)
    for _ in range(2):
        predict_files(kept_run, [tmp_path], tmp_path)
        (listed,) = images_of(tmp_path)
        assert listed["file_name"] == str(tmp_path / name)
    assert "pictures that an earlier prediction drew" in capsys.readouterr().out
    (tmp_path / "images.json").unlink()
    with pytest.raises(ConfigError, match=r"detections\.json: not written by predict \(choose "):
        predict_files(kept_run, [tmp_path / name], tmp_path)


def test_files_that_are_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "load_run", lambda _: pytest.fail("the run was read first"))
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([tmp_path / "nowhere.jpg"], "nowhere.jpg: no such file or folder"),
        ([tmp_path / "empty"], "empty: no images in this folder"),
        ([], "paths: no image or folder was named"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict_files(tmp_path, paths, tmp_path / "out")


def test_files_are_told_of_once_per_kind_and_long_names_are_shortened(
    kept_run: Path, programs: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And images of one name in two folders have an overlay each."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (60, 50), 90).save(tmp_path / name / "x.png")
    (tmp_path / "a" / "._x.png").touch()
    Image.new("RGB", (60, 50)).save(tmp_path / "b" / f"{'é' * 120}.png")
    predict_files(kept_run, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    told = capsys.readouterr().out.splitlines()[:-1]
    short = f"00003_{'é' * 95}.png"
    assert told == [
        "left out 1: hidden files: passed over (._x.png)",
        "repaired 2: images that are grey: converted to 8-bit RGB (x.png, x.png)",
        f"repaired 1: pictures whose file's name is too long for theirs: shortened ({short})",
    ]
    assert pictures_in(tmp_path / "out") == ["00001_x.png", "00002_x.png", short]


def test_a_video_is_predicted_frame_by_frame(
    kept_run: Path, programs: None, tiny_data: Path, tmp_path: Path
) -> None:
    """Each frame like the image that it is; image ids go on after it."""
    names = [image["file_name"] for image in tiny.read(tiny_data, "val")["images"][:2]]
    write_video(tmp_path / "clip.avi", [read(tiny_data / "images" / name) for name in names])
    (tmp_path / "empty.mp4").touch()
    files = [tmp_path / "clip.avi", tmp_path / "empty.mp4", tiny_data / "images" / names[0]]
    with pytest.raises(SystemExit) as stop:
        predict_files(kept_run, files, tmp_path / "out")
    assert stop.value.code == 2
    images = images_of(tmp_path / "out")
    assert [(image["id"], image["file_name"], image.get("frame")) for image in images] == [
        (1, str(files[0]), 0),
        (2, str(files[0]), 1),
        (4, str(files[2]), None),
    ]
    assert {(image["height"], image["width"]) for image in images} == {(128, 128)}
    pictures = ["00001_clip_000000.png", "00002_clip_000001.png", f"00004_{files[2].stem}.png"]
    assert [image["pictures"] for image in images] == [[name] for name in pictures]
    assert pictures_in(tmp_path / "out") == pictures
    found = defaultdict(list)
    for result in results_of(tmp_path / "out"):
        found[result["image_id"]].append(result)
        assert result.get("frame") == {1: 0, 2: 1, 4: None}[result["image_id"]]
    model = api.load(kept_run)
    for number, pixels in enumerate(api.video_frames(files[0]), 1):
        expected = model.predict(pixels, rle=True).to_coco(number)
        assert [{**e, **r} for e, r in zip(expected, found[number], strict=True)] == found[number]
        assert [r["segmentation"] for r in found[number]] == [e["segmentation"] for e in expected]


def test_a_second_call_leaves_no_picture_of_the_first(
    kept_run: Path,
    programs: None,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """But what no list names stays, and is told; so does what is an input."""
    out, files = tmp_path / "out", sorted((tiny_data / "images").glob("val*.png"))[:3]
    predict_files(kept_run, files, out)
    assert "prediction" not in capsys.readouterr().out
    mine = out / "00009_mine.png"
    shutil.copy(files[0], mine)
    shutil.copy(files[0], out / "photo.png")
    predict_files(kept_run, [files[2]], out)
    first, second, third = (f"0000{n}_{file.stem}.png" for n, file in enumerate(files, 1))
    new = f"00001_{files[2].stem}.png"
    assert pictures_in(out) == [new, mine.name, "photo.png"]
    told = capsys.readouterr().out
    assert (
        "repaired 3: pictures of the earlier prediction in this folder: removed "
        f"({first}, {second}, {third})\n" in told
    )
    assert (
        "noticed 1: pictures of neither this prediction nor the one before: left in the folder "
        f"({mine.name})\n" in told
    )
    predict_files(kept_run, [out / new, mine], out)
    assert (out / new).exists()
    (out / "images.json").write_text('[{"pictures": ["../out/photo.png", "photo.png"]}]')
    predict_files(kept_run, [files[0]], out)
    assert (out / new).exists()
    assert (out / "photo.png").exists()
    (out / "images.json").write_text("[3]")
    with pytest.raises(ConfigError, match=r"images\.json: not written by predict"):
        predict_files(kept_run, [files[0]], out)
    assert (out / "images.json").read_text() == "[3]"


def test_no_overlays_a_low_score_and_depth_that_is_too_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The depth maps alone are drawn; their pixels over 65.534 m are counted."""
    Image.new("L", (8, 6)).save(tmp_path / "a.png")
    depth = np.full((6, 8), 3, np.float32)
    depth[0, :5], depth[1, 0] = (65.535, 65.536, 70, np.nan, np.inf), 0
    found = SimpleNamespace(to_coco=lambda _: [], depth_map=depth)
    network = replace(ModelConfig(), depth_head=DepthHeadConfig("dense"))
    load_stand_in(monkeypatch, lambda *_, **__: found, network)
    threshold = "model.box_head.score_threshold = 0.05"
    out = tmp_path / "out"
    predict_files(tmp_path, [tmp_path / "a.png"], out)
    told = capsys.readouterr().out
    assert "overlays in " in told
    assert "score_threshold" not in told
    options = {"overlays": False, "depth_maps": True, "min_score": 0.01}
    predict_files(tmp_path, [tmp_path / "a.png"], out, **options)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"--min-score 0.01: nothing below the run's {threshold} is found"
    assert told[-2:] == [
        "--depth-maps: 3 pixels over 65.534 m, written as 0",
        f"1 images, 0 detections: {out / 'detections.json'}",
    ]
    names = ["00001_a_depth.png", "detections.json", "images.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    (listed,) = images_of(out)
    assert listed["pictures"] == names[:1]


def test_no_images_make_an_empty_list(kept_run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as stop:
        predict_files(kept_run, [tmp_path / "a.png"], tmp_path / "out")
    assert stop.value.code == 2
    assert results_of(tmp_path / "out") == []


def test_results_need_a_folder(kept_run: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Said before any image is looked at."""
    taken = tmp_path / "taken"
    taken.touch()
    with pytest.raises(ConfigError, match="taken: cannot be created: File exists"):
        predict_files(kept_run, [tiny_data / "images"], taken)


def test_large_images_are_looked_at_in_tiles(
    kept_run: Path,
    programs: None,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As from Python; overlays are smaller, and what was merged is told. A TIFF may be larger than
    data.max_pixels; one that ends too early is named, and the others are done."""
    files = sorted((tiny_data / "images").glob("val*.png"))[:4]
    rows = [np.concatenate([read(file) for file in files[i : i + 2]], axis=1) for i in (0, 2)]
    scene = Image.fromarray(np.concatenate(rows))
    scene.save(tmp_path / "a.tif", tiffinfo={278: 16})
    whole = (tmp_path / "a.tif").read_bytes()
    start = int.from_bytes(whole[4:8], "little")
    assert start == 8  # its tags come first
    (tmp_path / "b.tif").write_bytes(whole[:-9])
    scene.save(tmp_path / "c.png")
    config = json.loads((kept_run / "config.json").read_text())
    config["data"]["max_pixels"] = 256 * 256 - 1
    shutil.copytree(kept_run, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(predict_pictures, "LONGEST_SIDE", 100)
    out = tmp_path / "out"
    paths = [tmp_path / name for name in ("a.tif", "b.tif", "c.png")]
    with pytest.raises(SystemExit):
        predict_files(tmp_path / "run", paths, out, min_score=0.0, tile=128, overlap=32)
    told, errors = capsys.readouterr()
    assert errors == f"error: {tmp_path / 'b.tif'}: not an image that can be decoded: cut off\n"
    found = api.load(kept_run).predict(tmp_path / "c.png", tile=128, overlap=32)
    results = results_of(out)
    for number, name in ((1, "a.tif"), (3, "c.png")):
        expected = found.to_coco(number)
        assert len(expected) > 8
        source = {"file_name": str(tmp_path / name)}
        assert [r for r in results if r["image_id"] == number] == [source | r for r in expected]
    images = images_of(out)
    assert [(i["id"], i["height"], i["width"]) for i in images] == [(1, 256, 256), (3, 256, 256)]
    for image in images:
        picture = cv2.imread(str(out / image["pictures"][0]))
        assert picture.shape[0] == picture.shape[1]
        assert picture.std() > 0
    counts = found.tiles
    assert counts is not None
    assert counts.tiles == 9
    assert (
        f"18 tiles of 128 x 128 pixels, overlap 32: {2 * counts.joined} objects joined from "
        f"pieces, {2 * counts.repeated} detections of objects seen in another tile left out, "
        f"{2 * counts.cut} cut objects without another piece kept\n"
    ) in told
    reduced = "00001_a.png, 00003_c.png"
    assert f"pictures of images too large for one: drawn at 1/3 of the size ({reduced})\n" in told
    full = 2 * len(counts.full)
    assert full
    assert f"detections = 8: tiles with as many objects of score 0 or more: {full}:" in told


def test_an_image_that_needs_tiles_is_told_of_them(
    kept_run: Path,
    programs: None,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is found by its header; the others are predicted."""
    small = min((tiny_data / "images").glob("val*.png"))
    for name in ("large.png", "large.tif"):
        Image.new("1", (20_000, 20_000)).save(tmp_path / name)
    paths = (tmp_path / "large.png", tmp_path / "large.tif", small)
    with pytest.raises(SystemExit):
        predict_files(kept_run, paths, tmp_path / "out")
    too_large, way = "20000 x 20000 is over 100000000 pixels (data.max_pixels)", "--tile 1024 looks"
    assert capsys.readouterr().err == (
        f"error: {paths[0]}: {too_large}: saved as a TIFF of 8 or 16 bits in tiles or strips, "
        f"{way} at it in tiles\nerror: {paths[1]}: {too_large}: {way} at it in tiles\n"
    )
    images = images_of(tmp_path / "out")
    assert [image["file_name"] for image in images] == [str(small)]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"overlap": 8}, "--overlap: needs --tile"),
        ({"tile": 128, "depth_maps": True}, "--depth-maps: not with --tile"),
        ({"tile": 16}, "tile: 16: at least 32 pixels"),
        ({"tile": 64, "overlap": 64}, r"overlap: 64: must be in 0\.\.63"),
        ({"min_score": 50.0}, r"--min-score: 50\.0: must be in 0\.\.1"),
    ],
)
def test_options_that_cannot_be_are_refused_first(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        predict_files(tmp_path, [tmp_path], tmp_path / "out", **options)
