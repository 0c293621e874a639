"""A run goes on in its folder as it was begun, and in no other way."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import save_config
from mrcnn_jax.config.schema import Config
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.training import loop, resume
from mrcnn_jax.training import open as opening
from mrcnn_jax.training.open import open_run


def written(folder: Path) -> dict[Path, int]:
    """When each file was written, but for that of the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.stat().st_mtime_ns for path in files}


def test_another_config_in_the_same_folder_is_refused(tiny_run: Path, tiny_config: Config) -> None:
    before = written(tiny_run)
    other = replace(tiny_config, seed=1, model=replace(tiny_config.model, fpn_channels=8))
    with pytest.raises(ConfigError) as error:
        loop.train(other, tiny_run)
    assert str(error.value) == (
        f"{tiny_run}: holds a run of another config: "
        "model.fpn_channels: 16 -> 8; seed: 0 -> 1 (choose another --workdir)"
    )
    assert written(tiny_run) == before


def test_differences_that_are_not_named_are_counted(tiny_config: Config, tmp_path: Path) -> None:
    save_config(tiny_config, tmp_path / "config.json")
    model = replace(tiny_config.model, fpn_channels=8, remat=True)
    other = replace(tiny_config, seed=1, model=model, data=replace(tiny_config.data, mask_crop=9))
    with pytest.raises(
        ConfigError, match=r"config: data\.mask_crop: .*; .*; .* and 1 more \(choose"
    ):
        resume.refuse_another_config(other, tmp_path)


def test_a_checkpoint_of_another_config_is_refused_without_its_config_json(
    tiny_run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    (copy / "config.json").unlink()
    with pytest.raises(
        ConfigError, match=r"checkpoint 00000024-mask is of another config: seed: 0 -> 1 \("
    ):
        loop.train(replace(tiny_config, seed=1), copy)


def test_a_run_of_a_version_with_fewer_fields_is_gone_on_with(
    tiny_run: Path,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    monkeypatch.setattr(opening, "config_hash", lambda _: "of the same config with another field")
    loop.train(tiny_config, run)
    assert "resumed from stage mask, step 6" in capsys.readouterr().out


def test_a_folder_that_was_copied_in_part_is_left_as_it_is(
    tiny_run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    """Without manifests, or without checkpoints, it looked like a new run, which began by removing
    the rows and the folders."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for path in run.glob("checkpoints/*/manifest.json"):
        path.unlink()
    before = written(run)
    with pytest.raises(ConfigError, match=r"00000012-rpn: no checkpoint: it has no manifest.json"):
        loop.train(tiny_config, run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="holds metrics up to stage mask, step 6, but no checkpo"):
        loop.train(tiny_config, run)
    kept = {path: time for path, time in before.items() if "checkpoints" not in path.parts}
    assert kept
    assert kept.items() <= written(run).items()


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    tiny_run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tiny_run / "config.json", run)
    lines = (tiny_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [line for line in lines if '"stage": "rpn"' in line]
    end = [line for line in rows if '"epoch": 2, "split": "val"' in line]
    rows = [line for line in rows if line not in end]
    (run / "metrics.jsonl").write_text("".join(rows))  # all of the first stage, but its checkpoint
    resume.refuse_lost_checkpoints(tiny_config, run)
    (run / "metrics.jsonl").write_text("")
    resume.refuse_lost_checkpoints(tiny_config, run)
    (run / "metrics.jsonl").write_text("".join(rows + end))  # it was validated, so it had one
    with pytest.raises(ConfigError, match="up to stage rpn, step 12, but no checkpoint"):
        resume.refuse_lost_checkpoints(tiny_config, run)
    save_config(replace(tiny_config, save_every_steps=11), run / "config.json")
    (run / "metrics.jsonl").write_text("".join(rows))
    with pytest.raises(ConfigError, match="up to stage rpn, step 12, but no checkpoint"):
        resume.refuse_lost_checkpoints(tiny_config, run)


def test_metrics_that_were_harmed_are_refused_on_resume(
    tiny_run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    path = run / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"step": 3', '"step": 7', 1))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: damaged: its first \d+ bytes are not"):
        loop.train(tiny_config, run)


def test_other_training_images_are_refused_and_other_annotations_told(
    tiny_config: Config, tmp_path: Path, stop_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps, epochs and rates are counted in those that the run began with; its weights may go."""
    data = shutil.copytree(str(tiny_config.data.root), tmp_path / "data")
    stop_at(1)
    rpn = tiny_config.stages[0]
    run = tmp_path / "run"
    of_rare_classes = replace(tiny_config.data, root=str(data), repeat_threshold=0.5)
    first = replace(tiny_config, stages=(rpn,), data=of_rare_classes)
    with pytest.raises(cli.Stopped):
        loop.train(first, run)
    start = shutil.copytree(run, tmp_path / "start")
    begun = replace(first, init_from=str(start))
    stop_at(1)
    with pytest.raises(cli.Stopped):
        loop.train(begun, tmp_path / "second")
    shutil.rmtree(start)
    with open_run(begun, tmp_path / "second"):
        pass

    path = tiny.annotations(data, "train")
    content = json.loads(path.read_text())
    capsys.readouterr()
    with open_run(first, run):
        pass
    assert "changed since" not in capsys.readouterr().out
    content["annotations"][0]["bbox"][2] += 1
    path.write_text(json.dumps(content))
    val = tiny.annotations(data, "val")
    val.write_text(val.read_text() + "\n")
    with open_run(first, run):
        pass
    told = capsys.readouterr().out
    assert f"{path}: changed since 00000001-rpn was saved: what is left" in told
    assert f"{val}: changed since 00000001-rpn was saved: it validates on what is there" in told

    line = r"instances_train\.json: not the training images that .*run began with, or not repeated"
    others = content["annotations"][1:]  # a class in one image less
    path.write_text(json.dumps(content | {"annotations": others}))
    with pytest.raises(ConfigError, match=line):
        loop.train(first, run)
    gone = content["images"].pop()["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != gone]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=line):
        loop.train(first, run)


def test_annotations_are_recorded_as_they_were_read(tiny_config: Config, tmp_path: Path) -> None:
    """A run that is being opened has read them: what is saved from then on is another file."""
    data = shutil.copytree(str(tiny_config.data.root), tmp_path / "data")
    path, images = tiny.annotations(data, "train"), data / "images"
    content = path.read_bytes()
    dataset = read_coco(path, images, tiny_config.data)
    path.write_bytes(content + b"\n")
    digest = hashlib.sha256(content).hexdigest()[:16]
    assert resume.annotation_hashes({"train": dataset}, None) == {"train": digest}
