"""The Python API on a run that is kept: it gives what predict.py writes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle_ops

import mrcnn_jax
from mrcnn_jax.commands import predict
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs import hub
from mrcnn_jax.runs.hub_folder import write_hub_folder
from mrcnn_jax.runs.run import load_run, write_run
from tests.inference import typed_user
from tests.inference.frames import read, write_video

ROOT = Path(__file__).parents[2]


def test_it_is_what_predict_writes(
    model: mrcnn_jax.Model, kept_run: Path, folder: Path, tmp_path: Path
) -> None:
    """A folder through the API and through predict.py, to the bit; and the fields say the same as
    COCO's results."""
    predict.run(predict.Arguments(workdir=kept_run, paths=(folder,), out=tmp_path))
    written = json.loads((tmp_path / "detections.json").read_text())
    found = list(model.predict_many(folder, progress=True))
    assert [detections.path for detections in found] == sorted(folder.iterdir())
    results = [
        result
        for number, detections in enumerate(found, 1)
        for result in detections.to_coco(number)
    ]
    assert results == [
        {key: value for key, value in result.items() if key != "file_name"} for result in written
    ]
    assert len(results) > 10

    for number, (detections, pixels) in enumerate(
        zip(found, map(read, sorted(folder.iterdir())), strict=True), 1
    ):
        assert detections.size == pixels.shape[:2]
        of_image = [result for result in written if result["image_id"] == number]
        x1, y1, x2, y2 = detections.boxes.T
        np.testing.assert_allclose(
            np.stack([x1, y1, x2 - x1, y2 - y1], axis=1), [result["bbox"] for result in of_image]
        )
        assert detections.category_ids == tuple(
            (5, 7, 90)[label - 1] for label in detections.labels
        )
        assert detections.class_names == tuple(
            model.class_names[number] for number in detections.category_ids
        )
        np.testing.assert_array_equal(
            detections.masks, [rle_ops.decode(result["segmentation"]) for result in of_image]
        )
        assert detections.masks.dtype == bool
        assert (np.diff(detections.scores) <= 0).all()


def test_one_image_a_sequence_and_an_iterator(model: mrcnn_jax.Model, folder: Path) -> None:
    """The same each way; an iterator's images are taken one at a time."""
    paths = sorted(folder.iterdir())
    one = model.predict(read(paths[1]))
    assert one.path is None
    taken = 0

    def frames() -> Iterator[np.ndarray]:
        nonlocal taken
        for path in paths:
            taken += 1
            yield read(path)

    stream = model.predict_many(frames())
    assert taken == 0
    streamed = []
    for number, detections in enumerate(stream, 1):
        assert taken == number
        streamed.append(detections)
    listed = list(model.predict_many([str(paths[0]), read(paths[1]), paths[2]]))
    for ours, theirs in zip(listed, streamed, strict=True):
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
    np.testing.assert_array_equal(one.masks, listed[1].masks)


def test_arrays_of_jax_images_of_pillow_and_bytes_are_images(
    model: mrcnn_jax.Model, folder: Path
) -> None:
    """As the array of NumPy, alone and in a list."""
    pixels, file = read(folder / "0.png"), folder / "0.png"
    expected = model.predict(pixels)
    assert len(expected.scores) > 0
    encoded = file.read_bytes()
    sources = [jnp.asarray(pixels), Image.open(file), encoded, bytearray(encoded)]
    for found in (*map(model.predict, sources), *model.predict_many(tuple(sources))):
        np.testing.assert_array_equal(found.masks, expected.masks)
        np.testing.assert_array_equal(found.boxes, expected.boxes)
        assert found.path is None


def test_what_is_no_image_is_refused_at_once(model: mrcnn_jax.Model, folder: Path) -> None:
    """Not when a result is asked for; in a list, before the first is predicted."""
    pixels = read(folder / "0.png")
    with (folder / "0.png").open("rb") as file:
        for wrong, told in (
            (jnp.zeros((5, 7, 3)), r"image: float32 \[5, 7, 3\] is not uint8 RGB"),
            (np.stack([pixels, pixels]), r"image: uint8 \[2, 128, 128, 3\] is not"),
            (b"\x89PNG", "image: not an image that can be decoded"),
            (file, "image: BufferedReader is not"),
            ({"a": pixels}, "image: dict is not"),
            (None, "image: NoneType is not"),
            (7, "image: int is not"),
        ):
            with pytest.raises(ValueError, match=told):
                model.predict(wrong)
    for several in ([pixels], (folder / "0.png",), iter([pixels]), [[1, 2]]):
        with pytest.raises(ValueError, match=r"^image: \w+: predict_many takes several images$"):
            model.predict(several)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=rf"^{folder}: a folder: predict_many takes its images$"):
        model.predict(folder)
    for one in (pixels, jnp.asarray(pixels), Image.fromarray(pixels), b"png", {"a": pixels}, None):
        with pytest.raises(
            ValueError, match=r"^images: \w+ is not a list, a folder or another iter"
        ):
            model.predict_many(one)  # type: ignore[arg-type]
    for one in (folder / "0.png", str(file.name)):
        with pytest.raises(
            ConfigError, match=r": a single file: predict takes an image, and video"
        ):
            model.predict_many(one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_one", lambda *_: pytest.fail("one was predicted"))
        with pytest.raises(ValueError, match=r"image: uint8 \[5, 7\] is not"):
            model.predict_many(deque([pixels, folder / "0.png", np.zeros((5, 7), np.uint8)]))
        with pytest.raises(ValueError, match="min_score: 2: must be in"):
            model.predict_many([pixels], min_score=2)


def test_changed_pixels_are_warned_of(model: mrcnn_jax.Model, tmp_path: Path) -> None:
    pages = [Image.new("L", (60, 50), grey) for grey in (9, 200)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    (tmp_path / "notes.txt").touch()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        list(model.predict_many(tmp_path, rle=True))
    told = [str(warning.message) for warning in warned if warning.category is UserWarning]
    assert told == [
        "files that are no images: passed over",
        "images that are grey: converted to 8-bit RGB",
        "images with 2 pages or frames: only the first is read",
    ]


def test_random_heads_are_warned_of_and_told_by_the_command_once(
    kept_run: Path, tmp_path: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = load_run(kept_run), tmp_path / "run"
    meta = replace(source.meta, stage="box", stage_index=1, loaded=())
    write_run(run, source.config, source.variables, meta)
    line = "checkpoint 00000072-box: not trained yet, so random: mask; masks are left out"
    with pytest.warns(UserWarning, match=f"^{line}$") as warned:
        mrcnn_jax.load(run)
    assert [warning.filename for warning in warned] == [__file__]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "out").touch()  # which ends it before anything is predicted
    capsys.readouterr()
    words = tmp_path / "a.png", "--workdir", run, "--out", tmp_path / "out"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "checkpoint")
        assert mrcnn("predict", *words) == 2
    assert capsys.readouterr().out == f"{line}\n"


def test_low_scores_are_left_out_and_masks_may_be_rles(
    model: mrcnn_jax.Model, folder: Path
) -> None:
    every = model.predict(folder / "0.png")
    threshold = float(every.scores[3])
    best = model.predict(folder / "0.png", min_score=threshold, rle=True)
    assert len(best.scores) == 4 < len(every.scores)
    np.testing.assert_array_equal(best.boxes, every.boxes[:4])
    np.testing.assert_array_equal([rle_ops.decode(rle) for rle in best.masks], every.masks[:4])
    assert best.to_coco(3) == every.to_coco(3)[:4]


def test_mistakes_are_named(model: mrcnn_jax.Model, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"nowhere/config\.json: no such file \(is this a run's folder\?\)"
    ):
        mrcnn_jax.load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"nowhere\.jpg: No such file or directory$"):
        model.predict(tmp_path / "nowhere.jpg")
    with pytest.raises(ConfigError, match="no images in this folder"):
        model.predict_many(tmp_path)
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"broken\.png: not an image that can be decoded"):
        next(model.predict_many([tmp_path / "broken.png"]))
    for wrong, told in (
        (
            np.zeros((5, 7, 3), np.float32),
            r"image: float32 \[5, 7, 3\] is not uint8 RGB \[H, W, 3\]",
        ),
        (np.zeros((5, 7), np.uint8), r"uint8 \[5, 7\]"),
        (np.zeros((5, 7, 4), np.uint8), r"uint8 \[5, 7, 4\]"),
        (np.zeros((0, 7, 3), np.uint8), r"uint8 \[0, 7, 3\]"),
    ):
        with pytest.raises(ValueError, match=told):
            model.predict(wrong)
    for scales in ((), (1.0, 0.0), (float("nan"),), np.zeros(2), 0.5, "0.5", None):
        with pytest.raises(ValueError, match=r"^scales: .*: must be a list of positive numbers"):
            model.predict(np.zeros((5, 7, 3), np.uint8), scales=scales)
    for tile in (1024.0, "1024", {"overlap": 8.0}):
        options: Any = tile if isinstance(tile, dict) else {"tile": tile}
        told = r"^(tile: '?1024|overlap: 8\.0).*: must be a whole number of pixels$"
        with pytest.raises(ValueError, match=told):
            model.predict(np.zeros((5, 7, 3), np.uint8), **{"tile": 64, **options})
    for score in (50, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"^min_score: {score}: must be in 0\.\.1$"):
            model.predict(np.zeros((5, 7, 3), np.uint8), min_score=score)
    with pytest.raises(ValueError, match="overlap: needs tile"):
        model.predict(np.zeros((5, 7, 3), np.uint8), overlap=8)


def test_what_the_documentation_says_runs(
    model: mrcnn_jax.Model, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first part, on the run that is loaded already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mrcnn_jax, "load", {"runs/a": model}.__getitem__, raising=False)
    shutil.copytree(folder, "folder")
    for name in ("image.jpg", "a.jpg", "b.jpg"):
        cv2.imwrite(name, cv2.imread(str(folder / "0.png")))
    write_video(tmp_path / "clip.avi", [read(folder / "0.png")])
    part = (ROOT / "docs" / "api.md").read_text().partition("## One file")[0]
    blocks = [block.partition("```")[0] for block in part.split("```python\n")[1:]]
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    exec("\n".join(blocks), names)
    assert isinstance(names["several"], list)
    assert len(names["several"]) == 2
    assert names["overlay"].std() > 0


def test_what_mypy_checks_runs(model: mrcnn_jax.Model, kept_run: Path, folder: Path) -> None:
    assert len(typed_user.use_a_run(kept_run, folder)) == 3


def test_importing_it_costs_nothing() -> None:
    """A command's typo is answered before jax is imported."""
    code = (
        "import sys, mrcnn_jax; assert not {'jax', 'flax', 'cv2'} & set(sys.modules);"
        " assert not hasattr(mrcnn_jax, 'nothing')"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_model_of_the_hub_is_fetched_and_recorded(
    kept_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the download, which tests/runs/test_hub.py has."""
    source = load_run(kept_run)
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0f" * 20)
    write_hub_folder(snapshot, source.config, source.variables, source.meta, "")
    asked: list[str] = []
    monkeypatch.setattr(hub, "fetch", lambda address: (asked.append(address), snapshot)[1])
    model = mrcnn_jax.load("hf://org/name@v1")
    assert asked == ["hf://org/name@v1"]
    assert model.class_names == {5: "disc", 7: "rectangle", 90: "triangle"}
    assert model.run.source is not None
    assert model.run.source.name == f"hf://org/name@{'0f' * 20}"
    image = np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8)
    ours, theirs = model.predict(image), mrcnn_jax.load(kept_run).predict(image)
    assert len(ours.scores) > 0
    for name in ("boxes", "scores", "masks"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    mrcnn_jax.load(str(snapshot))
    assert len(asked) == 1
