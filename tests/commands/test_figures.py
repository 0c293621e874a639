"""`mrcnn figures`: every figure from a run's folder, and one line for what cannot be
shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mrcnn_jax.commands import figures
from mrcnn_jax.commands.figures import Arguments, column_titles, draw
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json, save_config
from mrcnn_jax.config.heads import DepthHeadConfig
from mrcnn_jax.config.optional_heads import with_cascade, with_depth
from mrcnn_jax.data import loader
from mrcnn_jax.figures.png_pages import PAGE_WIDTH
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.runs.run import Run, load_run
from mrcnn_jax.runs.state import TrainState


def _variant(run: Path, folder: Path, **changes: Any) -> Path:
    """The run once more, with another newest checkpoint: the same weights, but `Meta` changed."""
    source = load_run(run)
    _saved(folder, replace(source.meta, **changes), source.variables)
    shutil.copy(run / "config.json", folder)
    return folder


def _saved(folder: Path, meta: Meta, variables: Variables) -> Path:
    nothing: dict[str, Any] = {
        "opt_state": (),
        "step": jnp.int32(0),
        "key": jnp.zeros(2, jnp.uint32),
    }
    state = TrainState(params=variables["params"], batch_stats=variables["batch_stats"], **nothing)
    Checkpoints(folder, keep=1).save(state, meta)
    return folder


def _read(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


def test_a_figure_of_two_runs_by_command(
    kept_run: Path,
    tiny_data: Path,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    titles: list[str],
) -> None:
    """The second run has come no further than stage 1, which is enough for proposals: the same
    weights, so the same picture."""
    other = _variant(kept_run, tmp_path / "first stage", stage="rpn", stage_index=0)
    truth = tiny.read(tiny_data, "val")
    ids = [truth["images"][i]["id"] for i in (4, 1)]
    command = ("figures", "proposals", kept_run, other, "--out", tmp_path / "out")
    assert mrcnn(*command, "--images", *ids, "--titles", "a", "b") == 0
    (path,) = capsys.readouterr().out.split()
    page = _read(Path(path))
    assert Path(path) == tmp_path / "out" / "proposals_1.png"
    assert page.shape == (32 + 2 * (30 + 588 + 6), PAGE_WIDTH, 3)
    for row in range(2):
        top = 32 + row * 624 + 30
        np.testing.assert_array_equal(page[top : top + 588, 6:594], page[top : top + 588, 606:1194])
    assert (page[62:650, 6:594] != page[686:1274, 6:594]).mean() > 0.2  # another image
    objects = [sum(a["image_id"] == number for a in truth["annotations"]) for number in ids]
    assert [title.split(": ")[0] for title in titles] == ["a", "b", "a", "b"]
    assert [int(title.split(" of ")[1].split()[0]) for title in titles[::2]] == objects


def test_fpn_and_c4_stand_side_by_side(kept_run: Path, tmp_path: Path, titles: list[str]) -> None:
    """The C4 network is as it was initialised: what it sees means nothing, but it is drawn."""
    run = load_run(kept_run)
    config = replace(run.config, model=replace(run.config.model, backbone="c4"))
    variables = jax.jit(MaskRCNN(config.model).init)(jax.random.key(0), example_batch((128, 128)))
    save_config(config, _saved(tmp_path / "c4", run.meta, variables) / "config.json")
    draw(
        Arguments(
            "proposals",
            (kept_run, tmp_path / "c4"),
            tmp_path / "out",
            titles=("FPN", "C4"),
            count=1,
        )
    )
    draw(Arguments("rpn_targets", (tmp_path / "c4",), tmp_path / "out", count=1))
    assert [title.split(":")[0] for title in titles[:2]] == ["FPN", "C4"]
    assert titles[3].startswith("C4: ")
    page = _read(tmp_path / "out" / "proposals_1.png")
    assert (page[62:650, 6:594] != page[62:650, 606:1194]).any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("masks", ["masks_1.png"]),
        ("detections", ["detections_1.png"]),
        ("rpn_targets", ["rpn_targets_1.png", "rpn_targets_2.png"]),
        ("box_targets", ["box_targets_1.png"]),
        ("curves", ["curves_rpn.png", "curves_box.png", "curves_mask.png"]),
    ],
)
def test_every_figure_of_one_run(
    name: figures.Name, expected: list[str], kept_run: Path, tmp_path: Path
) -> None:
    paths = draw(Arguments(name, (kept_run,), tmp_path / "out", count=2))
    assert [path.name for path in paths] == expected
    for path in paths:
        page = _read(path)
        assert page.shape[1] == (900 if name == "curves" else PAGE_WIDTH)
        assert len(np.unique(page.reshape(-1, 3), axis=0)) > 100


def test_columns_are_named_by_what_tells_the_runs_apart(tmp_path: Path) -> None:
    def titles(*runs: str, **more: Any) -> tuple[str, ...]:
        return column_titles(
            Arguments("proposals", tuple(tmp_path / run for run in runs), tmp_path, **more)
        )

    assert titles("report/fpn", "report/c4") == ("fpn", "c4")
    assert titles("a/fpn", "b/fpn") == ("a/fpn", "b/fpn")
    assert titles("report/fpn") == ("fpn",)
    assert titles("a", "b", titles=("FPN", "C4")) == ("FPN", "C4")
    for wrong, line in (
        (lambda: titles("a", "a"), "--titles: two columns are named 'a'"),
        (lambda: titles("a", "b", titles=("x",)), "--titles: 1 for 2 runs"),
        (lambda: titles("a", count=0), "--count: 0: must be at least 1"),
        (
            lambda: column_titles(Arguments("curves", (tmp_path, tmp_path), tmp_path)),
            "curves: of one run, but 2 are given",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            wrong()
        assert str(error.value) == line


def test_a_head_that_is_not_trained_is_not_shown(kept_run: Path, tmp_path: Path) -> None:
    box = _variant(kept_run, tmp_path / "box", stage="box", stage_index=1)
    with pytest.raises(ConfigError) as error:
        draw(Arguments("masks", (kept_run, box), tmp_path / "out"))
    line = "its mask head is not trained yet (checkpoint 00000072-box)"
    assert str(error.value) == f"{box}: masks: {line}"
    assert not (tmp_path / "out").exists()
    draw(Arguments("detections", (kept_run, box), tmp_path / "out", count=1))  # boxes alone
    assert list((tmp_path / "out").glob("*.png"))


def test_which_heads_are_trained(kept_run: Path) -> None:
    whole = load_run(kept_run)

    def trained(stages: tuple[int, ...], **meta: Any) -> set[str]:
        table = tuple(whole.config.stages[i] for i in stages)
        return set(
            Run(replace(whole.config, stages=table), replace(whole.meta, **meta), {}).trained
        )

    assert trained((0, 1, 2)) == {"rpn", "box", "mask"}
    assert trained((0, 1, 2), stage_index=1) == {"rpn", "box"}
    assert trained((0, 1, 2), stage_index=1, stage_step=0) == {"rpn"}
    assert trained((2,), stage_index=0) == {
        "rpn",
        "box",
        "mask",
    }  # it was started from a run that had the others
    assert trained((), stage_index=0, stage_step=0) == {"rpn", "box", "mask"}  # imported
    began_with = {"stage_index": 0, "loaded": ("resnet", "fpn", "rpn", "box_head")}
    assert trained((0,), **began_with) == {"rpn", "box"}
    assert trained((0,), **began_with, stage_step=0) == {"rpn", "box"}


def test_a_cascade_predicts_by_the_heads_that_are_trained(kept_run: Path) -> None:
    whole = load_run(kept_run)
    box_head = replace(whole.config.model.box_head, class_agnostic=True, cascade=(0.6, 0.7))
    config = replace(whole.config, model=replace(whole.config.model, box_head=box_head))
    config = replace(config, stages=with_cascade(config.stages, 2))
    found = {}
    for index, row in enumerate(config.stages):
        run = Run(config, replace(whole.meta, stage_index=index, stage_step=1), {})
        found[row.name] = (run.network.box_head.cascade, set(run.trained))
    assert found == {
        "rpn": ((), {"rpn"}),
        "box": ((), {"rpn", "box"}),
        "box2": ((0.6,), {"rpn", "box", "box2"}),
        "box3": ((0.6, 0.7), {"rpn", "box", "box2", "box3"}),
        "mask": ((0.6, 0.7), {"rpn", "box", "box2", "box3", "mask"}),
    }
    # A depth head added to a run that had them all.
    depth = replace(config.model, depth_head=DepthHeadConfig("dense"))
    added = replace(config, model=depth, stages=with_depth(config.stages)[-1:])
    began_with = tuple(f"{name}_head" for name in ("box", "mask"))
    began_with += ("resnet", "fpn", "rpn", "box_head2", "box_head3")
    meta = replace(whole.meta, stage_index=0, stage_step=1, loaded=began_with)
    assert Run(added, meta, {}).network.box_head.cascade == (0.6, 0.7)
    assert Run(added, meta, {}).trained == {"rpn", "box", "box2", "box3", "mask", "depth"}

    before = Run(replace(config, model=depth), replace(whole.meta, stage_index=1, loaded=()), {})
    assert before.network.depth_head.kind == "none"
    line = "checkpoint 00000072-mask: not trained yet, so random: box2, box3, depth, mask; masks"
    assert before.untrained_line == f"{line} and distances are left out"
    assert Run(added, meta, {}).untrained_line is None

    imported = replace(config, stages=())
    assert Run(imported, whole.meta, {}).network == config.model
    assert whole.network == whole.config.model


def test_runs_of_other_data_are_not_compared(
    kept_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(kept_run, tmp_path / "other")
    config = load_config_json(other / "config.json")
    content = tiny.read(tiny_data, "val")
    content["annotations"].pop()
    (tmp_path / "fewer.json").write_text(json.dumps(content))
    save_config(
        replace(config, data=replace(config.data, val_annotations=str(tmp_path / "fewer.json"))),
        other / "config.json",
    )
    with pytest.raises(ConfigError, match=f"^{other}: has other validation data than {kept_run}$"):
        draw(Arguments("proposals", (kept_run, other), tmp_path / "out"))

    meta: Meta = load_run(kept_run).meta
    renamed = _variant(
        kept_run, tmp_path / "renamed", categories=(*meta.categories[:2], (90, "wedge"))
    )
    with pytest.raises(ConfigError, match=rf"^{renamed}: has other categories than {kept_run}$"):
        draw(Arguments("proposals", (kept_run, renamed), tmp_path / "out"))


def test_a_mistake_is_one_line(
    tmp_path: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert mrcnn("figures", "curves", tmp_path, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no loss is recorded yet\n"
    assert mrcnn("figures", "masks", tmp_path / "nowhere", "--out", tmp_path / "out") == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path}/nowhere/config.json: no such file (is this a run's folder?)\n"
    )


@pytest.mark.parametrize("name", ["rpn_targets", "detections"])
def test_an_image_that_cannot_be_decoded_any_more_is_one_line(
    name: str,
    kept_run: Path,
    tiny_data: Path,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a batch, and by itself."""

    def decode_image(*_: Any, **__: Any) -> None:
        raise ValueError("cut off")

    monkeypatch.setattr(loader, "decode_image", decode_image)
    truth = tiny.read(tiny_data, "val")["images"][1]
    command = ("figures", name, kept_run, "--out", tmp_path / "out", "--images", truth["id"])
    assert mrcnn(*command) == 1
    line = f"error: {tiny_data}/images: {truth['file_name']}: cut off\n"
    assert capsys.readouterr().err == line
