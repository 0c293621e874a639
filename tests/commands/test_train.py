"""Going on with a run: what `--resume` and `--epochs` take, do and refuse; canvases for sides."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from training.conftest import stop_at
from whole_runs import ENDS, arrays, assert_same_bits, latest

from mrcnn_jax import cli
from mrcnn_jax.commands import train
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import differences, load_config_json, save_config
from mrcnn_jax.config.schema import DistributedConfig
from mrcnn_jax.runs.metrics import read_metrics

__all__ = ["stop_at"]

TINY = tiny.__file__


def parse(*words: str | Path) -> train.Arguments:
    return train.parse([str(word) for word in words], "mrcnn train")


def refused(*words: str | Path) -> str:
    with pytest.raises(ConfigError) as error:
        parse(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- options ---------------------------------------------------------------------------------------


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    known = "names the run's config and folder: leave out"
    assert refused("--resume", "a", "--config", TINY) == f"--resume: {known} --config"
    assert refused("--resume", "a", "--workdir", "a") == f"--resume: {known} --workdir"
    empty = tmp_path / "empty"
    assert refused("--resume", empty) == f"--resume: {empty}: no config.json there (is this a run?)"
    assert refused("--config", TINY, "--workdir", "a", "--epochs", "3") == (
        "--epochs: goes with --resume; of a new run: --stages.0.epochs N"
    )


def test_an_option_turns_a_head_on_with_its_training() -> None:
    """A stage of its own, or a loss beside the others; a line says so."""
    head = ("--model.mask-iou-head.enabled", "--model.mask-iou-head.channels", "8")
    parsed = parse("--config", TINY, "--workdir", "a", *head)
    config = parsed.config
    assert (config.model.mask_iou_head.enabled, config.model.mask_iou_head.channels) == (True, 8)
    assert [stage.name for stage in config.stages] == ["rpn", "box", "mask", "mask_iou"]
    assert parsed.notes == (
        "stages: rpn (rpn), box (box), mask (mask), mask_iou (mask_iou), with the heads of the "
        "network",
    )
    (stage,) = parse("--config", "finetune", "--workdir", "a", *head).config.stages
    assert stage.losses == ("rpn", "box", "mask", "mask_iou")
    assert "mask_iou_head/.*" in {group.pattern for group in stage.train}
    config = parse("--config", TINY, "--workdir", "a", "--model.mask-iou-head.channels", "8").config
    assert config.stages == tiny.get_config().stages


def test_a_run_gives_its_config(tmp_path: Path) -> None:
    """All of it but how its processes found each other; options go before it."""
    config = replace(
        tiny.get_config(), distributed=DistributedConfig("host:1", processes=2, index=1), seed=5
    )
    save_config(config, tmp_path / "config.json")
    config = replace(config, distributed=DistributedConfig())
    found = parse("--resume", tmp_path, "--data.threads", "1", "--epochs", "3")
    assert found.config == replace(config, data=replace(config.data, threads=1))
    assert (found.workdir, found.epochs, found.notes) == (tmp_path, 3, ())
    new = parse("--config", tmp_path / "config.json", "--workdir", "b")
    assert (new.config, new.workdir, new.resumed) == (config, Path("b"), False)


def test_the_table_follows_a_cascade() -> None:
    """On the command line; a config that names the heads stays as it is."""
    words = "--model.box-head.class-agnostic --model.box-head.cascade 0.6 0.7"
    start = "--config", "shapes", "--workdir", "a"
    parsed = parse(*start, *words.split())
    assert [row.name for row in parsed.config.stages] == ["rpn", "box", "box2", "box3", "mask"]
    assert parsed.notes == (
        "stages: rpn (rpn), box (box), box2 (box2), box3 (box3), mask (mask), with the heads of "
        "the network",
    )
    assert parse("--config", "shapes_cascade", "--workdir", "a").notes == ()
    assert parse(*start).notes == ()


@pytest.mark.parametrize(
    ("words", "canvases"),
    [
        ("--data.short-side 96 --data.long-side 160", ((96, 160), (160, 96))),
        ("--data.long_side=200", ((128, 224), (224, 128))),
        ("--data.short-side 96 --data.long-side 160 --data.canvases 160 160", ((160, 160),)),
        ("--data.short-side 128", ((128, 128),)),  # as it is
        ("--seed 1", ((128, 128),)),
    ],
)
def test_canvases_are_chosen_for_sides(words: str, canvases: Any) -> None:
    found = parse("--config", TINY, "--workdir", "a", *words.split())
    assert found.config.data.canvases == canvases
    data = found.config.data
    chosen = ", ".join(f"{height} x {width}" for height, width in canvases)
    line = f"canvases {chosen}, chosen for images of {data.short_side} x {data.long_side} "
    assert found.notes == ((f"{line}(--data.canvases)",) if len(canvases) == 2 else ())


# -- runs ------------------------------------------------------------------------------------------


def test_a_run_that_is_no_run_yet(
    tmp_path: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    save_config(tiny.get_config(), tmp_path / "config.json")
    assert mrcnn("train", "--resume", tmp_path) == 2
    assert capsys.readouterr().err == (
        f"error: --resume: {tmp_path}: no checkpoint there yet; to begin: {cli.command('train')} "
        f"--config {tmp_path}/config.json --workdir {tmp_path}\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_shared_model_is_no_run_to_go_on_with(
    kept_run: Path, tmp_path: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    assert mrcnn("share", "--workdir", kept_run, "--to", model) == 0
    capsys.readouterr()
    assert mrcnn("train", "--resume", model) == 2
    assert capsys.readouterr().err == (
        f"error: --resume: {model}: a shared model; to train from it: --config FILE "
        f"--workdir DIR --weights {model}\n"
    )


def test_imported_weights_are_no_run_to_go_on_with(
    tiny_run: Path, tmp_path: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "the weights")
    save_config(replace(load_config_json(run / "config.json"), stages=()), run / "config.json")
    assert mrcnn("train", "--resume", run) == 2
    assert capsys.readouterr().err == (
        f"error: --resume: {run}: imported weights; to train from them: --config FILE "
        f"--workdir DIR --weights '{run}'\n"
    )


def test_another_config_is_refused_with_the_command_that_takes_it(
    tiny_run: Path, tmp_path: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """All options are kept; what the run itself began with is not."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run_2").mkdir()
    config = replace(load_config_json(run / "config.json"), init_from=str(tiny_run))
    save_config(replace(config, init_without_classes=True), run / "config.json")
    options = ("--seed", 7, "--data.threads", 1)
    assert mrcnn("train", "--resume", run, "--init-from", "elsewhere", *options) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: init_from: elsewhere: no such file or run")
    assert mrcnn("train", "--resume", run, *options) == 2
    line, _, command = capsys.readouterr().err.rstrip("\n").partition("; from its weights: ")
    assert line == (
        f"error: {run}: holds a run of another config: seed: 0 -> 7 (choose another --workdir)"
    )
    assert command == (
        f"{cli.command('train')} --config {run}/config.json --init-from {run} "
        f"--workdir {tmp_path}/run_3 --no-init-without-classes --seed 7 --data.threads 1"
    )
    found = parse(*shlex.split(command.partition(" train ")[2]))
    assert [
        line.split(":")[0]
        for line in differences(load_config_json(run / "config.json"), found.config)
    ] == ["init_from", "init_without_classes", "seed"]
    assert found.config.init_from == str(run)

    file = shutil.move(run / "config.json", tmp_path)  # the checkpoints have their own
    assert mrcnn("train", "--config", file, "--workdir", run, "--seed", 7) == 2
    assert f"; from its weights: {cli.command('train')} --config {file}" in (
        capsys.readouterr().err
    )
    shutil.move(file, run)

    shutil.rmtree(run / "checkpoints")  # no weights, no way
    assert mrcnn("train", "--config", run / "config.json", "--workdir", run, "--seed", 7) == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_a_finished_run_goes_on_with_more_epochs(
    tiny_run: Path,
    tmp_path: Path,
    stop_at: Any,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a stage of its own, which is stopped and goes on; its curves, evaluation and copy are
    told apart from those of the stage that it repeats."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    assert mrcnn("train", "--resume", run) == 0
    again = cli.command("train", "--resume", run)
    assert f"\nto train the last stage longer: {again} --epochs N\n" in capsys.readouterr().out
    assert_same_bits(run, tiny_run)
    assert mrcnn("train", "--resume", run, "--epochs", 1) == 2
    assert capsys.readouterr().err == "error: --epochs 1: stage mask has 1 already\n"

    stop_at(3)
    assert mrcnn("train", "--resume", run, "--epochs", 2) == 143
    assert capsys.readouterr().out.endswith(
        f"stopped by SIGTERM: stage mask_2, step 3 is saved in {run}; to go on: {again}\n"
    )
    assert latest(run).name == "00000027-mask_2"
    assert mrcnn("train", "--resume", run, "--epochs", 3) == 2
    assert capsys.readouterr().err == (
        f"error: --epochs: {run} is not finished (stage mask_2, step 3); first: {again}\n"
    )
    assert mrcnn("train", "--resume", run) == 0
    end = latest(run)
    assert (end.name, end.stage_complete) == ("00000030-mask_2", True)
    assert mrcnn("train", "--resume", run) == 0
    assert "nothing is left to train: the run was finished before" in capsys.readouterr().out
    assert_same_bits_of_ends(run, tiny_run)

    save_config(load_config_json(tiny_run / "config.json"), tmp_path / "first.json")
    assert mrcnn("train", "--config", tmp_path / "first.json", "--workdir", run) == 2
    assert capsys.readouterr().err.endswith(f"; it has more stages by now: {again}\n")

    stages = load_config_json(run / "config.json").stages
    assert stages[3] == replace(stages[2], name="mask_2")
    rows = read_metrics(run)
    old = read_metrics(tiny_run)
    assert rows[: len(old)] == old
    assert [(row["stage"], row["step"], row["split"]) for row in rows[len(old) :]] == [
        *(("mask_2", step, "train") for step in range(1, tiny.STEPS + 1)),
        ("mask_2", tiny.STEPS, "val"),
    ]
    curves = {path.name for path in (run / "figures").glob("curves_*")}
    assert curves == {f"curves_{name}.png" for name in ("rpn", "box", "mask", "mask_2")}

    assert mrcnn("eval", "--workdir", run, "--figures", 1, "--report-images", 1) == 0
    found = json.loads((run / "eval" / "metrics.json").read_text())
    assert found["checkpoint"] == end.name
    assert '"stage": "mask_2"' in (run / "eval" / "report.html").read_text().replace('":"', '": "')
    assert mrcnn("share", "--workdir", run, "--out", tmp_path / "shared") == 0
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "| mask | mask | 1 | sgd | 0.01 |\n| mask_2 | mask | 1 | sgd | 0.01 |\n" in card


def assert_same_bits_of_ends(run: Path, reference: Path) -> None:
    for name in ENDS:
        ours, theirs = arrays(run / "checkpoints" / name), arrays(reference / "checkpoints" / name)
        assert {path: leaf.tobytes() for path, leaf in ours.items()} == {
            path: leaf.tobytes() for path, leaf in theirs.items()
        }
