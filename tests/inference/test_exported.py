"""An exported run predicts where mrcnn_jax cannot be imported, and sees what the run sees."""

from __future__ import annotations

import json
import typing
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny
from jax import export

from mrcnn_jax.commands import export as export_command
from mrcnn_jax.config.files import with_fields
from mrcnn_jax.inference import exported
from mrcnn_jax.inference.exported import Found
from mrcnn_jax.inference.predictor import Predictor
from mrcnn_jax.runs.run import load_run
from tests.inference import typed_user
from tests.inference.alone import assert_sees_the_same


@pytest.fixture(scope="module")
def artefact(kept_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the place of another file."""
    path = tmp_path_factory.mktemp("artefact") / "model.jaxexport"
    path.write_text("old")
    export_command.run(export_command.Arguments(workdir=kept_run, out=path))
    assert list(path.parent.iterdir()) == [path]
    return path


@pytest.mark.parametrize(
    ("suffix", "hint"),
    [
        (".onnx", "--format onnx --out model_onnx writes a folder of such programs"),
        (".ONNX", "--format onnx --out model_onnx writes a folder of such programs"),
        (".pt", "name it model.jaxexport"),
    ],
)
def test_another_format_is_refused_before_the_run_is_read(
    suffix: str,
    hint: str,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / f"model{suffix}"
    assert mrcnn("export", "--workdir", tmp_path / "nowhere", "--out", out) == 2
    assert capsys.readouterr().err == (
        f"error: {out}: what is written is a program for jax, not {suffix.lower()} ({hint})\n"
    )
    assert not out.exists()


def test_no_folder_of_this_machine_is_in_it(
    artefact: Path, kept_run: Path, tiny_data: Path
) -> None:
    """Neither of the run and its data nor of the source, which programs name."""
    content = artefact.read_bytes()
    assert b"mask_head.py" in content  # in a program: nothing is compressed
    for folder in (kept_run.parent, tiny_data, Path(__file__).parents[2]):
        assert str(folder).encode() not in content


def test_it_sees_what_the_run_sees_without_mrcnn_jax(
    artefact: Path, kept_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    without = ("cv2", "flax", "optax", "orbax", "pycocotools", "mrcnn_jax")
    assert_sees_the_same(artefact, kept_run, tiny_data, tmp_path, without)


def test_it_shrinks_images_as_the_run_does(artefact: Path, kept_run: Path, tiny_data: Path) -> None:
    """Of another config only what is written beside the programs changes; files from before it was
    written are of runs that average."""
    run = load_run(kept_run)
    bilinear = replace(run, config=with_fields(run.config, {"data.shrink": "bilinear"}))
    name = tiny.read(tiny_data, "val")["images"][2]["file_name"]
    image = cv2.resize(cv2.imread(str(tiny_data / "images" / name))[..., ::-1], (301, 222))
    for of, styles in ((run, ("area", None)), (bilinear, ("bilinear",))):
        meta = json.loads(next(export_command.contents(of, ""))[1])
        assert meta["shrink"] == of.config.data.shrink == styles[0]
        live = Predictor(of).detections(image, min_score=0.05)
        model = exported.load(artefact)
        for style in styles:
            model.meta.pop("shrink")
            model.meta |= {} if style is None else {"shrink": style}
            found = model.predict(image, min_score=0.05)
            np.testing.assert_allclose(found["scores"], live.scores, atol=1e-5)
            np.testing.assert_allclose(found["boxes"], live.boxes, rtol=1e-5, atol=1e-3)
        assert len(live.scores) > 3


def test_without_masks_there_is_a_depth_map_alone(artefact: Path) -> None:
    """Of a dense head; objects have no depth, which would be read through masks."""
    model = exported.load(artefact)
    seen = {
        "boxes": np.array([[8, 8, 40, 40]], np.float32),
        "labels": np.array([1]),
        "scores": np.array([0.9], np.float32),
        "valid": np.array([True]),
        "masks": np.ones((1, 28, 28), np.float32),
        "depth": np.full((32, 32), 3, np.float32),
    }
    model._programs = [lambda *_: seen] * len(model._programs)
    image = np.zeros((128, 128, 3), np.uint8)
    with pytest.raises(ValueError, match=r"^min_score: 50: must be in 0\.\.1$"):
        model.predict(image, min_score=50)
    assert {"masks", "depths", "depth_map"} <= model.predict(image).keys()
    model.meta["masks"] = False
    found = model.predict(image)
    assert found.keys().isdisjoint({"masks", "depths"})
    assert (found["depth_map"] == 3).all()


def test_what_mypy_checks_runs(artefact: Path, tiny_data: Path) -> None:
    name = tiny.read(tiny_data, "val")["images"][0]["file_name"]
    pixels = np.ascontiguousarray(cv2.imread(str(tiny_data / "images" / name))[..., ::-1])
    found = typed_user.use_an_export(artefact, pixels)
    assert len(found["scores"]) > 0
    types = typing.get_type_hints(Found)
    for field, value in found.items():
        if isinstance(value, np.ndarray):
            of_array = typing.get_args(types[field])[1]  # numpy.dtype[numpy.float64]
            assert value.dtype == typing.get_args(of_array)[0], field
        else:
            assert [type(each) for each in value] == len(value) * [*typing.get_args(types[field])]
    for image in (pixels.astype(np.float32), pixels[..., 0], pixels.tolist(), None):
        with pytest.raises(ValueError, match=r"^image: "):
            exported.load(artefact).predict(image)


def test_a_folder_without_programs_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"meta\.json"):
        exported.load(tmp_path)
    whole = {"categories": [], "short_side": 8, "long_side": 8, "canvases": [], "paste": "cells"}
    for content in ("{", "7", "[]", "{}", '{"programs": []}', '{"programs": {}}', "\udcff"):
        (tmp_path / "meta.json").write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(ValueError, match=rf"^{tmp_path}: no folder of `mrcnn export"):
            exported.load(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(whole | {"programs": {"8x8.onnx": "0"}}))
    with pytest.raises(FileNotFoundError, match=r"8x8\.onnx"):
        exported.load(tmp_path)


def test_its_programs_are_for_three_platforms_and_choose_there(artefact: Path) -> None:
    """NMS and RoIAlign have a form for CPUs and one for the others: neither may be fixed by the
    machine that exports."""
    with zipfile.ZipFile(artefact) as archive:
        names = archive.namelist()
        meta = json.loads(archive.read("meta.json"))
        program = export.deserialize(bytearray(archive.read("programs/128x128")))
    assert program.platforms == ("cpu", "cuda", "tpu")
    text = program.mlir_module()
    assert text.count("stablehlo.case") > 2
    assert text.count("stablehlo.while") > 2
    assert "custom_call" not in text  # which only some versions and platforms know
    assert [number for number, _ in meta["categories"]] == [5, 7, 90]
    with zipfile.ZipFile(artefact) as archive:
        assert (
            "disc (5), rectangle (7), triangle (90)" in archive.read("README.md").decode()
        )  # the model card
    assert [f"weights/{name}.npy" for name in meta["weights"]] == [
        name for name in names if name.startswith("weights/")
    ]


def test_any_flipped_bit_is_found_before_anything_is_run(artefact: Path, tmp_path: Path) -> None:
    """Python's import from a zip looks at no checksum, and NumPy at those of what it reads."""
    whole = artefact.read_bytes()
    assert exported.checked(artefact) == whole
    path = tmp_path / "flipped.jaxexport"
    random = np.random.default_rng(0)
    for place in [0, len(whole) - 1, *random.integers(len(whole), size=40).tolist()]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"flipped\.jaxexport: no exported file, or a damaged"):
            exported.load(path)
    for content in (b"", whole[:-1], whole + b"0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            exported.load(path)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [("a", "b"), ("c", b"d" * 3_000_000)]
    for name in ("1", "2"):
        export_command.write(tmp_path / name, iter(files))
    assert exported.checked(tmp_path / "1") == exported.checked(tmp_path / "2")
    with zipfile.ZipFile(tmp_path / "1") as archive:
        assert archive.testzip() is None
        assert archive.read("c") == files[1][1]


def test_mistakes_are_one_line(
    kept_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mrcnn: Callable[..., int],
) -> None:
    """And what was there stays."""
    monkeypatch.chdir(tmp_path)
    Path("old").write_text("old")
    for workdir, out, message in (
        ("nowhere", "old", "nowhere/config.json: no such file (is this a run's folder?)"),
        (str(kept_run), ".", ".: is a folder"),
        (str(kept_run), "old/new", "old: cannot be created: File exists"),
    ):
        assert mrcnn("export", "--workdir", workdir, "--out", out) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert Path("old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
