"""A run exported to ONNX predicts without jax and mrcnn_jax, and sees what the run sees."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mrcnn_jax.commands import export as export_command
from mrcnn_jax.commands import export_onnx
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.inference import exported
from tests.inference.alone import assert_sees_the_same

needs_converter = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax2onnx", "onnx", "onnxruntime")),
    reason="jax2onnx, onnx and onnxruntime are not installed (docs/api.md)",
)


@pytest.fixture(scope="module")
def artefact(kept_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artefact") / "model_onnx"
    export_command.run(export_command.Arguments(workdir=kept_run, out=path, format="onnx"))
    assert list(path.parent.iterdir()) == [path]
    return path


@needs_converter
def test_it_sees_what_the_run_sees_without_jax(
    artefact: Path, kept_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    without = ("cv2", "jax", "flax", "pycocotools", "mrcnn_jax", "jax2onnx")
    assert assert_sees_the_same(artefact, kept_run, tiny_data, tmp_path, without) == ""


@needs_converter
def test_a_file_says_all_that_is_needed_to_use_it_alone(artefact: Path, kept_run: Path) -> None:
    """And nothing of the machine it was made on."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        artefact / "128x128.onnx", providers=["CPUExecutionProvider"]
    )
    inputs = {each.name: (each.shape, each.type) for each in session.get_inputs()}
    assert inputs == {
        "image": ([128, 128, 3], "tensor(uint8)"),
        "size": ([2], "tensor(int32)"),
    }
    shapes = {each.name: each.shape for each in session.get_outputs()}
    assert shapes == {
        "boxes": [8, 4],
        "labels": [8],
        "scores": [8],
        "valid": [8],
        "masks": [8, 8, 8],
    }
    inside = json.loads(session.get_modelmeta().custom_metadata_map["mrcnn_jax"])
    beside = json.loads((artefact / "meta.json").read_text())
    assert inside.pop("canvas") == [128, 128]
    assert list(beside.pop("programs")) == ["128x128.onnx"]
    assert inside == beside
    assert inside["categories"] == [[5, "disc"], [7, "rectangle"], [90, "triangle"]]
    assert set(inside["versions"]) == {"jax", "jax2onnx", "onnx"}
    assert "disc (5), rectangle (7), triangle (90)" in (artefact / "README.md").read_text()
    for path in artefact.rglob("*"):
        for folder in (kept_run.parent, Path(__file__).parents[2]):
            assert path.is_dir() or str(folder).encode() not in path.read_bytes()


def test_another_folder_is_refused(tmp_path: Path) -> None:
    """A file for jax, unpacked."""
    (tmp_path / "meta.json").write_text('{"format": 1, "platforms": ["cpu"]}')
    with pytest.raises(ValueError, match=r"no folder of `mrcnn export --format onnx`"):
        exported.load(tmp_path)


@needs_converter
def test_flipped_bits_are_found(artefact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "flipped"
    folder.mkdir()
    (folder / "meta.json").write_bytes((artefact / "meta.json").read_bytes())
    whole = (artefact / "128x128.onnx").read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (folder / "128x128.onnx").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"128x128\.onnx: damaged, or of another export"):
            exported.load(folder)


def brightness(image: Any, size: Any) -> dict[str, Any]:
    """A network of its own: one box of two, whose score is the mean of what lies on the canvas."""
    import jax.numpy as jnp

    return {
        "boxes": jnp.float32(size)[None].repeat(2, 1).repeat(2, 0),
        "scores": jnp.mean(image / 255.0)[None].repeat(2),
        "valid": jnp.mean(image) > jnp.array([0.0, 255.0]),
    }


@needs_converter
def test_a_program_that_detects_something_else_is_refused() -> None:
    """Each field within its tolerance, also if what is there is not a number."""
    content = export_onnx.converted(brightness, (8, 16), "8x16.onnx").SerializeToString()
    image = export_onnx.picture((8, 16))
    assert image.std() > 10
    found = exported.onnx_program(content)(image, np.array([8, 16], np.int32))
    np.testing.assert_allclose(found["scores"], [image.mean() / 255] * 2, rtol=1e-6)
    np.testing.assert_array_equal(found["boxes"], [[8, 8, 16, 16]] * 2)
    np.testing.assert_array_equal(found["valid"], [True, False])

    for field, change, ok in (
        ("scores", 5e-5, True),
        ("scores", 2e-4, False),
        ("boxes", 5e-3, True),
        ("boxes", -2e-2, False),
        ("boxes", np.nan, False),
        ("boxes", np.array([[0.0], [1.0]]), True),  # of the box that is none
        ("scores", np.array([1.0, 0.0]), False),
    ):

        def other(image: Any, size: Any, field: str = field, change: Any = change) -> Any:
            found = brightness(image, size)
            return found | {field: found[field] + change}

        if ok:
            export_onnx.refuse_other_detections(content, other, image, "8x16.onnx")
        else:
            with pytest.raises(ConfigError, match=rf"8x16\.onnx: the converted program's {field}"):
                export_onnx.refuse_other_detections(content, other, image, "8x16.onnx")


@needs_converter
def test_what_jax2onnx_does_not_know_is_refused_in_one_line() -> None:
    import jax

    def determinant(image: Any, size: Any) -> dict[str, Any]:
        return {"boxes": jax.pure_callback(lambda: np.float32(0), jax.numpy.float32(0))}

    with pytest.raises(ConfigError) as caught:
        export_onnx.converted(determinant, (4, 4), "4x4.onnx")
    assert "cannot convert this network: NotImplementedError: " in str(caught.value)
    assert "pure_callback" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_onnx_runtime_refuses_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an older one does with a newer program."""

    def too_new(content: bytes) -> Any:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL :\nUnsupported model IR version: 99")

    monkeypatch.setattr(exported, "onnx_program", too_new)
    with pytest.raises(ConfigError) as caught:
        export_onnx.refuse_other_detections(b"", brightness, np.zeros((2, 2, 3)), "2x2.onnx")
    assert str(caught.value) == (
        "--format onnx: 2x2.onnx: ONNX Runtime does not run what jax2onnx made of this network: "
        "RuntimeError: [ONNXRuntimeError] : 1 : FAIL : Unsupported model IR version: 99"
    )


def test_jax_without_its_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX_PLATFORMS=cuda on a GPU, where jax raises this."""

    def devices(platform: str) -> list[Any]:
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr("jax.devices", devices)
    with pytest.raises(ConfigError, match=r"which \$JAX_PLATFORMS leaves out \(add ,cpu\)$"):
        export_onnx._cpu()


def test_missing_packages_are_named_with_what_installs_them(
    kept_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mrcnn: Callable[..., int],
) -> None:
    find, hidden = importlib.util.find_spec, {"jax2onnx", "onnx", "onnxruntime", "onnx_ir"}
    there = ModuleSpec("there", None, origin="there")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name in hidden else find(name, *rest) or there,
    )
    monkeypatch.chdir(tmp_path)
    export = ("export", "--workdir", kept_run, "--out", "new", "--format", "onnx")
    assert mrcnn(*export) == 2
    assert capsys.readouterr().err == (
        "error: --format onnx: jax2onnx, onnx, onnx_ir, onnxruntime are not installed (pip install "
        "'onnx>=1.20' 'onnx-ir>=1' 'onnxruntime>=1.24'; "
        "pip install --no-deps 'jax2onnx>=0.17.1')\n"
    )
    hidden -= {"onnx", "onnxruntime", "onnx_ir"}
    assert mrcnn(*export) == 2
    assert capsys.readouterr().err == (
        "error: --format onnx: jax2onnx is not installed (pip install --no-deps "
        "'jax2onnx>=0.17.1')\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_but_of_no_use_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of packages' names, which Python takes for such; a package that lacks another."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("onnx", "onnx_ir", "onnxruntime", "jax2onnx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=r"jax2onnx, onnx, onnx_ir, onnxruntime are not inst"):
        export_onnx.refuse_missing_packages()
    for name in ("onnx", "onnx_ir", "onnxruntime", "jax2onnx"):
        (tmp_path / name / "__init__.py").write_text("import none_such" * (name == "onnx_ir"))
    importlib.invalidate_caches()
    with pytest.raises(ConfigError) as caught:
        export_onnx.refuse_missing_packages()
    assert str(caught.value) == (
        "--format onnx: onnx_ir does not import: ModuleNotFoundError: No module named 'none_such'"
    )


def test_mistakes_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mrcnn: Callable[..., int],
) -> None:
    """Before the run is read. What is there stays."""
    monkeypatch.setattr(export_onnx, "refuse_missing_packages", lambda: None)
    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    Path("old/file").write_text("old")
    for out, message in (
        ("model.onnx", "model.onnx: what is written is a folder (name it model_onnx)"),
        (".", ".: name a new folder (choose another --out)"),
        ("old", "old: exists and is not an empty folder (choose another --out)"),
        ("new", "nowhere/config.json: no such file (is this a run's folder?)"),
    ):
        assert mrcnn("export", "--workdir", "nowhere", "--out", out, "--format", "onnx") == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
