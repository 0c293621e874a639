"""A depth head added to a trained run: trained, evaluated, and used in every way that a run is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny

import mrcnn_jax
from mrcnn_jax.commands import eval as eval_command
from mrcnn_jax.commands import export as export_command
from mrcnn_jax.commands import predict as predict_command
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json
from mrcnn_jax.config.heads import DepthHeadConfig
from mrcnn_jax.config.optional_heads import with_depth
from mrcnn_jax.config.schema import Config
from mrcnn_jax.datasets.shapes import write_shapes
from mrcnn_jax.evaluation.depth_errors import NAMES
from mrcnn_jax.inference.exported import load
from mrcnn_jax.pixels.encode import depth_millimetres
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.training.loop import train

TRAIN, VAL = 4, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("depth_data")
    write_shapes(root, train=TRAIN, val=VAL, depth=True)
    return root


def config_of(data: Path, kept_run: Path) -> Config:
    base = load_config_json(kept_run / "config.json")
    plain = tiny.get_config().data
    return replace(
        base,
        data=replace(plain, root=str(data)),
        model=replace(base.model, depth_head=DepthHeadConfig("dense", channels=8)),
        stages=with_depth(base.stages, epochs=2)[-1:],
        init_from=str(kept_run),
        evaluate_every_epochs=2,
    )


@pytest.fixture(scope="module")
def run(data: Path, kept_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("depth") / "run"
    train(config_of(data, kept_run), workdir)
    return workdir


@pytest.fixture(scope="module")
def model(run: Path) -> mrcnn_jax.Model:
    return mrcnn_jax.load(run)


def image_of(data: Path, number: int = 0) -> Path:
    return data / "images" / f"val_{number:05d}.png"


def test_training_logs_the_loss_and_measures_depth(run: Path) -> None:
    rows = read_metrics(run)
    trained = [row for row in rows if row["split"] == "train"]
    assert len(trained) == 4
    assert all(row["loss/depth"] == row["loss/total"] > 0 for row in trained)
    (last,) = [row for row in rows if row["split"] == "val" and "depth/AbsRel" in row]
    assert last["epoch"] == 2
    assert last["depth/AbsRel"] > 0
    assert 0 <= last["depth/delta1"] <= 1
    assert last["segm/AP"] >= -1
    assert (run / "figures" / "curves_depth.png").is_file()


def test_boxes_and_masks_stay_as_they_were(
    model: mrcnn_jax.Model, kept_run: Path, data: Path
) -> None:
    """To the bit, beside the run that the head was added to, which knows no depth."""
    before, after = mrcnn_jax.load(kept_run).predict(image_of(data)), model.predict(image_of(data))
    assert len(after.scores) > 3
    for field in ("boxes", "labels", "scores", "masks"):
        np.testing.assert_array_equal(getattr(after, field), getattr(before, field))
    assert before.depths is None
    for mask, depth in zip(after.masks, after.depths, strict=True):
        under = after.depth_map[mask]
        assert depth == np.median(under) if mask.any() else np.isnan(depth)
    assert (after.depth_map > 0).all()


def test_eval_compares_depth_with_the_data_sets(
    run: Path, data: Path, model: mrcnn_jax.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pixel by pixel as a loop over images does."""
    metrics = eval_command.run(eval_command.Arguments(workdir=run))
    written = json.loads((run / "eval" / "metrics.json").read_text())
    errors = []
    for number in range(VAL):
        png = cv2.imread(str(data / "depth" / f"val_{number:05d}.png"), cv2.IMREAD_UNCHANGED)
        true = png.astype(np.float64) / 1000
        seen = model.predict(image_of(data, number)).depth_map.astype(np.float64)
        errors.append((np.abs(seen - true) / true)[true > 0].mean())
    assert metrics["depth/AbsRel"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert written["depth/AbsRel"] == metrics["depth/AbsRel"]
    assert written["depth/images"] == VAL
    assert written["depth/covered"] == 1
    assert {f"depth/true_masks/{name}" for name in NAMES} < written.keys()
    out = capsys.readouterr().out
    assert "mean over images" in out
    assert "depth_1.png" in out
    assert (run / "figures" / "depth_1.png").is_file()
    results = json.loads((run / "eval" / "detections.json").read_text())
    assert all(result["depth"] is None or result["depth"] > 0 for result in results)
    assert '"depth":' in (run / "eval" / "report.html").read_text()


def test_predict_writes_distances_and_depth_maps(
    run: Path, kept_run: Path, data: Path, model: mrcnn_jax.Model, tmp_path: Path
) -> None:
    arguments: Any = {"paths": (image_of(data),), "out": tmp_path / "out", "depth_maps": True}
    predict_command.run(predict_command.Arguments(workdir=run, **arguments))
    (path,) = (tmp_path / "out").glob("*_depth.png")
    found = model.predict(image_of(data))
    np.testing.assert_array_equal(
        cv2.imread(str(path), cv2.IMREAD_UNCHANGED), depth_millimetres(found.depth_map)
    )
    results = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [result["depth"] for result in results] == [
        float(depth) if np.isfinite(depth) else None for depth in found.depths
    ]
    with pytest.raises(ConfigError, match=r"--depth-maps: .*: the run has no trained depth head"):
        predict_command.run(predict_command.Arguments(workdir=kept_run, **arguments))


def test_an_exported_model_has_the_same_depth(
    run: Path, data: Path, model: mrcnn_jax.Model, tmp_path: Path
) -> None:
    path = tmp_path / "model.jaxexport"
    export_command.run(export_command.Arguments(workdir=run, out=path))
    image = cv2.imread(str(image_of(data)))[..., ::-1]
    ours, theirs = model.predict(image), load(path).predict(image)
    np.testing.assert_allclose(theirs["depths"], ours.depths, rtol=1e-5)
    np.testing.assert_allclose(theirs["depth_map"], ours.depth_map, rtol=1e-5)


def test_depth_of_merged_views_is_their_mean(model: mrcnn_jax.Model, data: Path) -> None:
    image = cv2.imread(str(image_of(data)))[..., ::-1]
    plain, turned = (model.predict(pixels).depth_map for pixels in (image, image[:, ::-1]))
    merged = model.predict(image, flip=True)
    np.testing.assert_allclose(merged.depth_map, (plain + turned[:, ::-1]) / 2, rtol=1e-5)
    for mask, depth in zip(merged.masks, merged.depths, strict=True):
        assert not mask.any() or depth == np.median(merged.depth_map[mask])


def test_data_without_depth_is_refused_before_compiling(
    kept_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"depth_file"):
        train(config_of(tiny_data, kept_run), tmp_path / "run")
