"""`predict --format` with a stand-in for the network, and what converters make of its files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from exports import HEIGHT, RING, WIDTH, block, objects, picture
from PIL import Image

from mrcnn_jax.commands import predict_pictures
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.convert.labelme import Labelme
from mrcnn_jax.convert.write import convert
from mrcnn_jax.convert.yolo import Yolo
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.inference import api
from mrcnn_jax.inference.results import Detections, TileCounts
from mrcnn_jax.inference.windowed_images import WindowedImage
from mrcnn_jax.pixels.rle import encoded
from mrcnn_jax.pixels.windows import Window
from tests.inference.frames import write_video
from tests.inference.stand_ins import load_stand_in

SQUARE, NONE = block(5, 6, 25, 30), np.zeros((HEIGHT, WIDTH), bool)
FOUND = Detections(
    size=(HEIGHT, WIDTH),
    boxes=np.array([[5.0, 6, 25, 30], [2, 3, 26, 27], [1, 2, 9, 8], [0, 0, 4, 4]]),
    labels=np.array([2, 1, 2, 1], np.int32),
    category_ids=(90, 7, 90, 7),
    class_names=("bee", "ape", "bee", "ape"),
    scores=np.array([0.9, 0.8, 0.5, 0.4], np.float32),
    masks=tuple(encoded([SQUARE, RING, NONE, SQUARE])),
)


@pytest.fixture
def predict(
    mrcnn: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Of the files of two folders with one name."""

    def predict_in_tiles(image: WindowedImage, *_: Any, **__: Any) -> Detections:
        image.read(Window(0, 0, *image.size))
        return replace(FOUND, tiles=TileCounts(1, 0, 0, 0, ()))

    names = {7: "ape", 90: "bee"}
    methods = {"predict": lambda *_, **__: FOUND, "predict_in_tiles": predict_in_tiles}
    load_stand_in(monkeypatch, class_names=names, **methods)
    monkeypatch.chdir(tmp_path)
    for folder in ("one", "two"):
        picture(Path("photos", folder, "x.png"))

    def call(*words: Any) -> int:
        return mrcnn("predict", *words, "--workdir", "runs/a", "--out", "out")

    return call


FILES = "photos/one", "photos/two/x.png"


def command(told: str) -> list[str]:
    """The words behind the program of the command that a line ends with."""
    return re.split("once corrected: .*mrcnn(?:_jax)? ", told.splitlines()[-1])[1].split()


def assert_found(
    annotations: Path, images: Path, files: list[str], overlap: float, *, corners: bool = False
) -> None:
    """`corners`: the object without a pixel has the mask of its box."""
    dataset = read_coco(annotations, images, DataConfig())
    assert sorted(image.file_name for image in dataset.images) == files
    for file in files:
        found = sorted(objects(dataset, file), key=lambda pair: -int(pair[1].sum()))
        assert [label for label, _ in found] == ["bee", "ape", "bee"]
        for (_, mask), expected in zip(found, (SQUARE, RING), strict=False):
            assert (mask & expected).sum() / (mask | expected).sum() >= overlap
        mask = block(1, 2, 9, 8) if corners else np.zeros_like(SQUARE)
        assert (found[2][1] == mask).all()
    boxes = [o.box for o in dataset.images[0].annotations]
    assert (1.0, 2.0, 9.0, 8.0) in [tuple(np.round(box, 3).tolist()) for box in boxes]


def test_labelme(
    predict: Callable[..., int], mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is read again is not the data set that may lie in this folder."""
    Path("annotations.json").write_text("mine")
    assert predict(*FILES, "--format", "labelme", "--min-score", "0.85") == 0
    told = capsys.readouterr().out
    assert mrcnn(*command(told)) == 0
    categories = json.loads(Path("out/labelme.json").read_text())["categories"]
    # All classes in their order, though only bees were found.
    assert categories == [{"id": 1, "name": "ape"}, {"id": 2, "name": "bee"}]
    assert Path("annotations.json").read_text() == "mine"
    shutil.rmtree("out")
    capsys.readouterr()
    assert predict(*FILES, "--format", "labelme") == 0
    told = capsys.readouterr().out
    assert "noticed 2: objects found whose mask has no pixel: annotated by their boxes (" in told
    names = [path.name for path in sorted(Path("out/labelme").iterdir())]
    assert names == ["00001_x.json", "00002_x.json", "labels.txt"]
    content = json.loads(Path("out/labelme/00002_x.json").read_text())
    assert content["imagePath"] == "../../photos/two/x.png"
    assert mrcnn(*command(told)) == 0
    files = ["one/x.png", "two/x.png"]
    assert_found(Path("out/labelme.json"), Path("photos"), files, 0.98)
    # Annotations are not overwritten: somebody may have corrected them.
    assert predict(*FILES, "--format", "labelme") == 2
    line = "error: out/labelme: there are annotations of an earlier call (choose another --out, or "
    assert capsys.readouterr().err.startswith(line)
    assert predict(*FILES) == 0
    convert(Labelme(Path("out/labelme"), Path("o.json"), images=Path("photos")))


def test_yolo(
    predict: Callable[..., int], mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(*FILES, "--format", "yolo") == 0
    told = capsys.readouterr().out
    content = yaml.safe_load(Path("out/yolo/data.yaml").read_text())
    # Ultralytics refuses a file without train or val; both are relative to it.
    assert content == {"train": "images", "val": "images", "names": {0: "ape", 1: "bee"}}
    assert mrcnn(*command(told)) == 0
    assert "not converted" not in capsys.readouterr().out
    files = ["00001_x.png", "00002_x.png"]
    assert_found(Path("out/yolo.json"), Path("out/yolo/images"), files, 0.95, corners=True)
    assert Yolo(Path("out/yolo"), Path("o.json")).class_names() == ("ape", "bee")


def test_an_image_without_a_suffix_gets_one(predict: Callable[..., int]) -> None:
    """By what it is; otherwise nobody takes it for an image."""
    Path("photos/one/x.png").rename("photos/one/IMG0001")
    assert predict("photos/one", "--format", "yolo") == 0
    assert [path.name for path in Path("out/yolo/images").iterdir()] == ["00001_IMG0001.png"]


def test_an_image_without_a_suffix_is_found_again(
    predict: Callable[..., int], mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside another one, whose name it begins."""
    shutil.copy("photos/one/x.png", "photos/one/IMG0001.png")
    Path("photos/one/x.png").rename("photos/one/IMG0001")
    assert predict("photos/one", "--format", "labelme") == 0
    assert mrcnn(*command(capsys.readouterr().out)) == 0
    images = json.loads(Path("out/labelme.json").read_text())["images"]
    assert sorted(image["file_name"] for image in images) == ["IMG0001", "IMG0001.png"]


def test_no_picture_replaces_an_image_that_is_to_be_read(
    predict: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The overlay of the second image, in its own folder, has the name of the first one."""
    picture(Path("out/00002_y.png"))
    picture(Path("out/y.png"))
    before = Path("out/00002_y.png").read_bytes()
    assert predict("out") == 2
    line = "error: out/y.png: its picture would replace out/00002_y.png (another --out)"
    assert line in capsys.readouterr().err
    assert Path("out/00002_y.png").read_bytes() == before


def test_a_mask_that_fills_little_of_its_box_has_its_own(
    predict: Callable[..., int],
    mrcnn: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Many such would be taken for masks of other objects."""
    boxes = np.array([[0.0, 0, 60, 40], [2, 3, 26, 27], [1, 2, 9, 8], [0, 0, 4, 4]])
    monkeypatch.setitem(globals(), "FOUND", replace(FOUND, boxes=boxes))
    assert predict(*FILES, "--format", "coco", "--min-score", "0.6") == 0
    assert mrcnn(*command(capsys.readouterr().out), "--cache", "cache") == 0
    written = json.loads(Path("out/coco/annotations.json").read_text())["annotations"]
    assert [a["bbox"] for a in written[:2]] == [[5, 6, 20, 24], [2, 3, 24, 24]]


def test_coco(
    predict: Callable[..., int], mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(*FILES, "--format", "coco", "--min-score", "0.45") == 0
    told = capsys.readouterr().out
    content = json.loads(Path("out/coco/annotations.json").read_text())
    assert content["categories"] == [{"id": 7, "name": "ape"}, {"id": 90, "name": "bee"}]
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert [a["score"] for a in content["annotations"][:3]] == pytest.approx([0.9, 0.8, 0.5])
    assert [a["area"] for a in content["annotations"][:3]] == [480.0, float(RING.sum()), 48.0]
    assert mrcnn(*command(told), "--cache", "cache") == 0
    files = ["one/x.png", "two/x.png"]
    assert_found(Path("out/coco/annotations.json"), Path("photos"), files, 1.0)
    assert [path.name for path in Path("out/coco").iterdir()] == ["annotations.json"]


@pytest.mark.parametrize("form", ["labelme", "yolo", "coco"])
def test_a_call_that_was_killed_is_no_obstacle(
    form: str, predict: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder as it is at the second image, at which another call fails."""
    calls = []

    def second(*_: Any, **__: Any) -> Detections:
        calls.append(1)
        if len(calls) == 1:
            return FOUND
        assert not Path("out", form).exists()
        shutil.copytree("out", "killed")
        raise OSError(28, "No space left on device")

    whole = api.load(Path("runs/a"))
    with monkeypatch.context() as patch:
        patch.setattr(
            api, "load", lambda *_, **__: SimpleNamespace(**vars(whole) | {"predict": second})
        )
        assert predict(*FILES, "--format", form) == 1
    assert not Path("out", form).exists()
    shutil.rmtree("out")
    Path("killed").rename("out")
    assert [path for path in Path("out").iterdir() if form in path.name]
    assert predict(*FILES, "--format", form) == 0
    names = {path.name for path in Path("out").iterdir()}
    pictures = {"00001_x.png", "00002_x.png"}
    assert names == {form, "detections.json", "images.json", *pictures}


@pytest.mark.parametrize("form", ["labelme", "yolo", "coco"])
def test_a_kill_between_two_renames_is_no_obstacle(
    form: str, predict: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder as it is at each rename: the annotations' own, which a later call would refuse,
    comes last."""
    moments: list[Path] = []

    def watched(rename: Any) -> Any:
        def call(self: Path, target: Path) -> Path:
            if Path(target).parent == Path("out"):
                moments.append(Path(f"killed{len(moments)}"))
                shutil.copytree("out", moments[-1])
            return rename(self, target)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, watched(getattr(Path, name)))
        assert predict(*FILES, "--format", form) == 0
    whole = {path.name for path in Path("out").rglob("*")}
    assert len(moments) >= 3
    last = {path.name for path in moments[-1].iterdir() if not path.name.startswith(".")}
    assert last == {path.name for path in Path("out").iterdir()} - {form}
    for folder in moments:
        shutil.rmtree("out")
        folder.rename("out")
        assert predict(*FILES, "--format", form) == 0
        assert {path.name for path in Path("out").rglob("*")} == whole


@pytest.mark.parametrize(
    ("form", "place"),
    [("labelme", "out/labelme"), ("yolo", "out/yolo/images"), ("coco", "out/coco")],
)
def test_frames_are_written(
    form: str,
    place: str,
    predict: Callable[..., int],
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    frames = [np.full((HEIGHT, WIDTH, 3), value, np.uint8) for value in (30, 200)]
    Path("clips").mkdir()
    write_video(Path("clips/clip.avi"), frames)
    assert predict("clips/clip.avi", "--format", form) == 0
    told = capsys.readouterr().out
    # Not the whole folder that holds both the clips and the results.
    if form != "yolo":
        assert f"--images out/{form}" in told
    pictures = sorted(Path(place).glob("*.png"))
    assert [path.name for path in pictures] == ["00001_clip_000000.png", "00002_clip_000001.png"]
    for path, value in zip(pictures, (30, 200), strict=True):
        assert np.abs(np.asarray(Image.open(path)).astype(int) - value).max() < 20
    more = ("--cache", "cache") if form == "coco" else ()
    assert mrcnn(*command(told), *more) == 0
    assert "kept 2 images, 6 objects" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["labelme", "yolo", "coco"])
def test_images_in_tiles_are_annotated_at_their_own_size(
    form: str,
    predict: Callable[..., int],
    mrcnn: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their overlays are smaller. Of a TIFF, and of the frames of a video."""
    monkeypatch.setattr(predict_pictures, "LONGEST_SIDE", 30)
    pixels = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    Image.fromarray(pixels).save("photos/scan.tif")
    write_video(Path("photos/clip.avi"), [pixels])
    files = "photos/scan.tif", "photos/clip.avi"
    assert predict(*files, "--format", form, "--tile", "64") == 0
    told, name = capsys.readouterr().out, "00002_clip_000000"
    assert f"drawn at 1/2 of the size (00001_scan.png, {name}.png)\n" in told
    (frame,) = Path("out", form).rglob("*.png")
    assert frame.stem == name
    assert np.abs(np.asarray(Image.open(frame)).astype(int) - pixels).max() < 20
    more = ("--cache", "cache") if form == "coco" else ()
    assert mrcnn(*command(told), *more) == 0
    again, images, files = {
        "labelme": ("out/labelme.json", ".", [f"out/labelme/{name}.png", "photos/scan.tif"]),
        "yolo": ("out/yolo.json", "out/yolo/images", ["00001_scan.tif", f"{name}.png"]),
        "coco": ("out/coco/annotations.json", ".", [f"out/coco/{name}.png", "photos/scan.tif"]),
    }[form]
    assert_found(Path(again), Path(images), files, 0.95, corners=form == "yolo")


def test_nothing_found_is_annotated_too(predict: Callable[..., int]) -> None:
    assert predict(*FILES, "--format", "coco", "--min-score", "1") == 0
    content = json.loads(Path("out/coco/annotations.json").read_text())
    assert content["annotations"] == []
    assert len(content["images"]) == 2
