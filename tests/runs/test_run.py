"""A run that an earlier version of this project wrote (tests/write_run_fixture.py) is still one."""

from __future__ import annotations

import functools
import json
import operator
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict, unflatten_dict
from write_run_fixture import EXPECTED, FOLDER, digest, get_config, seen

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import differences
from mrcnn_jax.config.heads import DepthHeadConfig
from mrcnn_jax.data.loader import depth_of
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.runs.run import load_run, open_data, write_run


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((FOLDER / EXPECTED).read_text())


def test_its_config_means_what_it_meant() -> None:
    """But for where its data was."""
    changed = [line.split(": ")[0] for line in differences(load_run(FOLDER).config, get_config())]
    assert [name for name in changed if not name.startswith(("data.train_", "data.val_"))] == []


def test_it_holds_no_moving_average() -> None:
    with pytest.raises(
        ConfigError,
        match=r"checkpoint \d+-mask holds no moving average of its weights "
        r"\(stages.mask.ema_decay\)",
    ):
        load_run(FOLDER, weights="ema")


@pytest.mark.parametrize(
    ("address", "command"),
    [
        ("hf://org/name", "hf download org/name --local-dir DIR"),
        ("hf://org/name@v1", "hf download org/name --revision v1 --local-dir DIR"),
    ],
)
def test_an_address_on_the_hub_is_no_folder(address: str, command: str) -> None:
    """As of predict --workdir, whose value is a path."""
    with pytest.raises(ConfigError) as error:
        load_run(Path(address))
    assert str(error.value) == f"hf://org/name: a folder is needed here: {command}"


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return shutil.copytree(FOLDER, tmp_path / "run")


def change(run: Path, **fields: Any) -> None:
    """Changes fields of the run's own config.json, as "data.cache" or "seed"."""
    content = json.loads((run / "config.json").read_text())
    for name, value in fields.items():
        *groups, last = name.split("__")
        functools.reduce(operator.getitem, groups, content)[last] = value
    (run / "config.json").write_text(json.dumps(content))


def test_a_config_that_is_not_the_checkpoints_is_an_error_that_names_the_fields(
    copied: Path,
) -> None:
    change(copied, model__box_head__score_threshold=0.51, seed=5)
    with pytest.raises(
        ConfigError,
        match=r"run/config\.json: differs from that of checkpoint 00000072-mask \(.*\): "
        r"model\.box_head\.score_threshold: 0\.01 -> 0\.51; seed: 0 -> 5$",
    ):
        load_run(copied)
    change(copied, model__box_head__nms_iou=0.51, model__box_head__detections=7)
    with pytest.raises(ConfigError, match=r"box_head\.detections: 8 -> 7; .*; .* and 1 more$"):
        load_run(copied)


def test_what_may_differ_on_resume_is_the_checkpoints(copied: Path) -> None:
    saved = load_run(copied).config
    change(copied, data__max_pixels=1, data__threads=7, keep_checkpoints=9)
    assert load_run(copied).config == saved


def test_data_that_was_moved_is_found_where_the_runs_config_says(copied: Path) -> None:
    saved = load_run(copied).config
    here = copied / "metrics.jsonl"
    change(copied, data__val_annotations=str(here), data__cache=str(copied))
    expected = replace(saved.data, val_annotations=str(here), cache=str(copied))
    assert load_run(copied).config == replace(saved, data=expected)
    change(copied, data__cache=str(copied / "not there"))
    assert load_run(copied).config.data.cache == saved.data.cache
    for nowhere in ("/nowhere/val.json", "a" * 5000, "\0"):
        change(copied, data__val_annotations=nowhere)
        with pytest.raises(ConfigError, match=r"config\.json: differs .*data\.val_annotations: "):
            load_run(copied)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b'{"seed": 1, "seed": 1}', b'{"seed": NaN}'],
)
def test_a_config_that_cannot_be_read_is_one_line(content: bytes, copied: Path) -> None:
    (copied / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run/config\.json: .") as caught:
        load_run(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("params/resnet/.*/kernel", np.nan, "not finite"),
        ("batch_stats/.*/var", -1.0, "negative"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    path: str, value: float, fault: str, tmp_path: Path
) -> None:
    run = load_run(FOLDER)
    flat = {name: np.array(leaf) for name, leaf in flatten_dict(run.variables, sep="/").items()}
    name = next(name for name in flat if re.fullmatch(path, name))
    flat[name].flat[0] = value
    write_run(tmp_path / "bad", run.config, unflatten_dict(flat, sep="/"), run.meta)
    with pytest.raises(
        ConfigError, match=rf"bad: checkpoint 00000072-mask: {name}: 1 of \d+ numbers are {fault}"
    ):
        load_run(tmp_path / "bad")


def test_its_rows_are_read(expected: dict[str, Any]) -> None:
    rows = read_metrics(FOLDER)
    assert len(rows) == expected["rows"]
    assert rows[-1] == expected["last"]


def test_its_training_state_is_restored_to_the_bit(expected: dict[str, Any]) -> None:
    assert digest(FOLDER) == expected["sha256"]


def test_it_sees_what_it_saw(expected: dict[str, Any]) -> None:
    found = seen(FOLDER)
    assert found.keys() == expected["seen"].keys()
    assert len(found["scores"]) > 3
    for name, values in expected["seen"].items():
        # On another processor the last bits differ; boxes are in pixels.
        np.testing.assert_allclose(
            found[name], values, atol=0.05 if name == "boxes" else 1e-3, err_msg=name
        )


def test_a_run_with_a_depth_head_opens_its_data_with_depth(
    kept_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Its own split from its folder of maps, and another data set as that one's file says."""
    content = tiny.read(tiny_data, "val")
    for image in content["images"]:
        path = tmp_path / "depth" / Path(image["file_name"]).with_suffix(".npy")
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.full((image["height"], image["width"]), image["id"] / 100))
        image["depth_file"] = os.path.relpath(path, tiny_data / "images")
    del content["images"][0]["depth_file"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    run = load_run(kept_run)
    data = replace(run.config.data, val_depth=str(tmp_path / "depth"))
    model = replace(run.config.model, depth_head=DepthHeadConfig(kind="dense"))
    colour = replace(run, config=replace(run.config, data=data))
    deep = replace(colour, config=replace(colour.config, model=model))
    for run, more, maps in (
        (colour, (), 0),
        (deep, (), tiny.VAL),
        (deep, (other, tiny_data / "images"), tiny.VAL - 1),
    ):
        split = open_data(run, kept_run, "val", *more)
        assert sum(image.depth_file is not None for image in split.dataset.images) == maps
        last = depth_of(split, tiny.VAL - 1, run.config.data)
        if maps == 0:
            assert last is None
        else:
            assert np.unique(last).tolist() == [np.float32(split.dataset.images[-1].id / 100)]
