"""A run that is interrupted ends with the bits of one that was not, and tells what it waits for."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from whole_runs import ENDS, KINDS, arrays, assert_same_bits, latest, script

from mrcnn_jax import cli
from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import (
    load_config_json,
    resolve_paths,
)
from mrcnn_jax.config.heads import DepthHeadConfig
from mrcnn_jax.config.optional_heads import following_heads
from mrcnn_jax.config.schema import Config
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.training import loop, watch

# -- resuming --------------------------------------------------------------------------------------


def test_an_uninterrupted_run_leaves_what_it_should(tiny_run: Path, tiny_config: Config) -> None:
    assert {path.name for path in (tiny_run / "checkpoints").iterdir()} == ENDS
    rows = read_metrics(tiny_run)
    for stage, steps in tiny.STAGES.items():
        trained = [row for row in rows if row["stage"] == stage and row["split"] == "train"]
        assert [row["step"] for row in trained] == list(range(1, steps + 1))
        assert [row["epoch"] for row in trained] == [
            1 + step // tiny.STEPS for step in range(steps)
        ]
        validated = [row for row in rows if row["stage"] == stage and row["split"] == "val"]
        assert [row["step"] for row in validated] == list(range(tiny.STEPS, steps + 1, tiny.STEPS))
        assert all(("recall@16" in row) == (stage == "rpn") for row in validated)
        assert latest(tiny_run).stage == "mask"
        assert (tiny_run / "figures" / f"curves_{stage}.png").is_file()
        assert list((tiny_run / "tensorboard" / stage / "val").iterdir())
    assert load_config_json(tiny_run / "config.json") == resolve_paths(tiny_config)
    assert load_config_json(
        tiny_run / "checkpoints" / sorted(ENDS)[0] / "config.json"
    ) == resolve_paths(tiny_config)

    # Each stage trained its own part, and what an earlier one trained stayed as it was.
    rpn, box, mask = (arrays(tiny_run / "checkpoints" / name) for name in sorted(ENDS))
    for before, after, trained in ((rpn, box, "box_head"), (box, mask, "mask_head")):
        changed = [
            path
            for path in before
            if path.startswith(KINDS) and (before[path] != after[path]).any()
        ]
        assert {path.split("/")[1] for path in changed} == {trained}


def test_interrupted_runs_end_with_the_same_bits(
    tiny_run: Path,
    tiny_config: Config,
    tmp_path: Path,
    stop_at: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the middle of an epoch (5 of 6 steps), at its end before and after validation, and
    in the next stage; resumed with other runtime fields."""
    run = tmp_path / "run"
    stop_at(5)
    with pytest.raises(cli.Stopped, match="stage rpn, step 5 is saved"):
        loop.train(tiny_config, run)
    assert latest(run).name == "00000005-rpn"
    assert not latest(run).stage_complete
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    with monkeypatch.context() as patch:  # after the 6th step
        patch.setattr(watch, "append_timing", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(cli.Stopped, match="stage rpn, step 6 is saved"):
            loop.train(tiny_config, run)
    assert not latest(run).validated
    assert read_metrics(run)[-1]["split"] == "train"

    with monkeypatch.context() as patch:  # after its validation
        patch.setattr(watch, "curves", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(cli.Stopped, match="stage rpn, step 6 is saved"):
            loop.train(tiny_config, run)
    assert latest(run).name == "00000006-rpn"
    assert latest(run).validated

    stop_at(9)  # 6 steps of the first stage were left
    with pytest.raises(cli.Stopped, match="stage box, step 3 is saved"):
        loop.train(tiny_config, run)
    assert latest(run).name == "00000015-box"

    # A kill without warning leaves rows of steps that the checkpoint does not know.
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"stage": "box", "step": 4, "epoch": 1, "split": "train", "loss/total": 0.5}\n'
            '{"stage": "box", "st'
        )
    data = replace(tiny_config.data, threads=1)
    loop.train(
        replace(tiny_config, data=data, save_every_steps=4, keep_checkpoints=1, profile=True), run
    )
    assert [path.name for path in (run / "profile").iterdir()] == [
        "mask"
    ]  # of box, three steps were left
    assert (run / "commands.txt").read_text() == 5 * f"{cli.command_line()}\n"  # one for each start
    assert {path.name for path in (run / "checkpoints").iterdir()} == {*ENDS, "00000022-mask"}
    assert_same_bits(run, tiny_run)


def test_the_option_of_a_rate_is_one_of_the_command_line(tiny_config: Config) -> None:
    """By the row's number in the file; rows that were added for heads have none."""
    assert loop.optimizer_option(tiny_config, 2) == "--stages.2.optimizer"
    head = replace(tiny_config.model.mask_iou_head, enabled=True)
    added = following_heads(
        replace(tiny_config, model=replace(tiny_config.model, mask_iou_head=head))
    )
    assert loop.optimizer_option(added, 3) == "stages.mask_iou.optimizer"
    model = replace(tiny_config.model, depth_head=DepthHeadConfig("dense"))
    deep = following_heads(replace(tiny_config, model=model))
    assert loop.optimizer_option(deep, 3) == "stages.depth.optimizer"


def test_a_finished_run_is_left_as_it_is(
    tiny_run: Path, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    loop.train(tiny_config, run)
    told = capsys.readouterr().out
    assert "resumed from stage mask, step 6" in told
    truth = tiny.read(Path(tiny_config.data.root or ""), "train")["annotations"]
    counts = Counter(a["image_id"] for a in truth if not a["iscrowd"])
    over = [n for n in counts.values() if n > tiny_config.model.mask_head.samples]
    assert (
        f"model.mask_head.samples = 4: images with more objects: {len(over)} (up to {max(over)} in "
        f"one): the mask head does not train on the rest; set it to {max(over)} or more (" in told
    )
    assert_same_bits(run, tiny_run)


def test_ctrl_c_to_the_script_saves_and_another_process_resumes(
    tiny_run: Path,
    tiny_config: Config,
    tmp_path: Path,
    stop_at: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing but the folder is handed over; while the script trains in it, it takes no other run.
    Before the first step it leaves at once."""
    run = tmp_path / "run"
    # A shell's background jobs ignore SIGINT, and what they start does too.
    command = ["env", "--default-signal=INT", *script(tiny_config), "--workdir", str(run)]

    def interrupted(when: Callable[[], bool], here: Callable[[], None]) -> tuple[str, str]:
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                deadline = time.monotonic() + 120
                while not when():
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                here()
                process.send_signal(signal.SIGINT)
                output, errors = process.communicate(timeout=120)
            finally:
                process.kill()
        assert process.returncode == 130, errors
        return output, errors

    def other() -> None:
        with pytest.raises(ConfigError, match="another run is training in this folder"):
            loop.train(tiny_config, run)

    _, errors = interrupted(lambda: (run / ".lock").exists(), lambda: None)
    assert errors.replace("\r", "\n").splitlines()[-1] == "interrupted: nothing is lost"
    assert not (run / "checkpoints").exists()
    output, errors = interrupted(
        lambda: (run / "metrics.jsonl").exists() and bool(read_metrics(run)), other
    )
    assert "saving after this step; again to leave at once" in errors
    assert "Traceback" not in errors
    stopped_at = latest(run)
    assert output.rstrip().endswith(
        f"stopped by SIGINT: stage {stopped_at.stage}, step {stopped_at.stage_step} is saved in "
        f"{run}; to go on: python train.py --resume {run}"
    )
    assert stopped_at.step < sum(tiny.STAGES.values())
    assert read_metrics(run)[-1]["step"] == stopped_at.stage_step

    stop_at(2)
    with pytest.raises(cli.Stopped):
        loop.train(tiny_config, run)
    assert (
        f"resumed from stage {stopped_at.stage}, step {stopped_at.stage_step}"
        in capsys.readouterr().out
    )
    assert latest(run).step == stopped_at.step + 2
    assert (tiny_run / "metrics.jsonl").read_text().startswith((run / "metrics.jsonl").read_text())


def test_updates_of_several_steps_averages_and_ap_survive_interruptions(
    tiny_run: Path,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Twelve steps make three updates, of 5, 5 and 2 steps. A kill leaves the checkpoint between
    two of them, and rows of what followed."""
    monkeypatch.setattr(watch, "curves", lambda *_: None)
    mask = tiny_config.stages[2]
    optimizer = replace(mask.optimizer, accumulate_steps=5, schedule="step", milestones=(0.5,))
    stages = (replace(mask, epochs=2, ema_decay=0.5, optimizer=optimizer),)
    config = replace(
        tiny_config,
        init_from=str(tiny_run),
        stages=stages,
        evaluate_every_epochs=1,
        save_every_steps=4,
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    loop.train(replace(config, keep_checkpoints=9), whole)
    shutil.copytree(whole, run)
    for name in ("00000006-mask", "00000008-mask", "00000012-mask"):
        shutil.rmtree(run / "checkpoints" / name)
    assert (latest(run).name, latest(run).ap) == ("00000004-mask", None)
    loop.train(replace(config, keep_checkpoints=2), run)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "00000006-mask",
        "00000008-mask",
        "00000012-mask",
    }
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("00000006-mask", "00000012-mask"):
        ours, theirs = (arrays(folder / "checkpoints" / name) for folder in (run, whole))
        assert {path: leaf.tobytes() for path, leaf in ours.items()} == {
            path: leaf.tobytes() for path, leaf in theirs.items()
        }
        assert (run / "checkpoints" / name / "meta.json").read_text() == (
            whole / "checkpoints" / name / "meta.json"
        ).read_text()

    rows = read_metrics(whole)
    assert [row["learning_rate"] for row in rows if row["split"] == "train"] == [
        np.float32(0.01)
    ] * 10 + [np.float32(0.001)] * 2
    middle, end = (
        arrays(whole / "checkpoints" / name) for name in ("00000006-mask", "00000012-mask")
    )
    counts = [
        {path.split("/")[-1]: leaf.item() for path, leaf in found.items() if path.endswith("_step")}
        for found in (middle, end)
    ]
    assert counts == [{"mini_step": 1, "gradient_step": 1}, {"mini_step": 0, "gradient_step": 3}]
    # The average is of what the stage trains, nine tenths of it of the first update's.
    trained = {path.removeprefix("params/") for path in end if path.startswith("params/mask_head/")}
    assert {path.removeprefix("ema/") for path in end if path.startswith("ema/")} == trained
    start = arrays(tiny_run / "checkpoints" / "00000024-mask")
    for path in trained:  # one update by step 6
        np.testing.assert_allclose(
            middle[f"ema/{path}"],
            0.1 * start[f"params/{path}"] + 0.9 * middle[f"params/{path}"],
            atol=1e-6,
        )

    measured = {row["step"]: row for row in rows if row["split"] == "val"}
    assert measured.keys() == {6, 12}
    best = Checkpoints(run, keep=1).best()
    assert best is not None
    told = f"best AP: {best.ap:.4f}, of checkpoint {best.name} (--checkpoint best); the newest is"
    assert (told in capsys.readouterr().out) == (best.step != 12)
    assert best.ap == max(row["segm/AP"] for row in measured.values())
    assert measured[best.step]["bbox/AP"] > 0
    evaluation.run(
        evaluation.Arguments(
            workdir=run, checkpoint="best", figures=0, report_images=0, out=tmp_path / "eval"
        )
    )
    found, averaged = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("eval", "eval_ema")
    )
    names = {"bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75"}
    assert {name: found[name] for name in names} == {
        name: measured[best.step][name] for name in names
    }
    assert averaged["bbox/AP"] == found["bbox/AP"]  # masks alone were trained
    kept = flatten_dict(load_run(run, "best", "ema").variables["params"], sep="/")
    saved = arrays(run / "checkpoints" / best.name)
    for path, leaf in kept.items():
        assert leaf.tobytes() == saved[f"{'ema' if path in trained else 'params'}/{path}"].tobytes()


def test_a_stage_that_ends_within_an_epoch(
    mask_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its schedule ends there too, and its end is validated, evaluated and saved. Resumed in the
    middle of the part, it ends with the same bits."""
    monkeypatch.setattr(watch, "curves", lambda *_: None)
    (mask,) = mask_config.stages
    optimizer = replace(mask.optimizer, schedule="cosine")
    config = replace(
        mask_config,
        stages=(replace(mask, epochs=1.5, optimizer=optimizer),),
        save_every_steps=4,
        keep_checkpoints=9,
        evaluate_every_epochs=3,
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    loop.train(config, whole)
    rows = read_metrics(whole)
    trained = [row for row in rows if row["split"] == "train"]
    assert [(row["step"], row["epoch"]) for row in trained] == [
        *((step, 1) for step in range(1, 7)),
        *((step, 2) for step in range(7, 10)),
    ]
    np.testing.assert_allclose(
        [row["learning_rate"] for row in trained],
        [0.01 * (1 + np.cos(np.pi * done / 9)) / 2 for done in range(9)],
        rtol=1e-5,
    )
    validated = {row["step"]: "segm/AP" in row for row in rows if row["split"] == "val"}
    assert validated == {6: False, 9: True}
    end = "00000009-mask"
    assert (latest(whole).name, latest(whole).stage_complete) == (end, True)

    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / end)
    assert latest(run).name == "00000008-mask"
    loop.train(config, run)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    ours, theirs = (arrays(folder / "checkpoints" / end) for folder in (run, whole))
    assert {path: leaf.tobytes() for path, leaf in ours.items()} == {
        path: leaf.tobytes() for path, leaf in theirs.items()
    }
    meta = [(folder / "checkpoints" / end / "meta.json").read_text() for folder in (run, whole)]
    assert meta[0] == meta[1]


def test_each_annotation_file_is_parsed_once_a_run(
    mask_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation and evaluation included; `json.load` calls `json.loads`."""
    files = {
        name: Path(getattr(resolve_paths(mask_config).data, f"{name}_annotations")).read_bytes()
        for name in ("train", "val")
    }
    parsed, real = [], json.loads

    def loads(content: Any, **options: Any) -> Any:
        raw = content if isinstance(content, bytes) else content.encode()
        parsed.extend(name for name, file in files.items() if file == raw)
        return real(content, **options)

    monkeypatch.setattr(json, "loads", loads)
    monkeypatch.setattr(watch, "curves", lambda *_: None)
    loop.train(replace(mask_config, evaluate_every_epochs=1), tmp_path / "run")
    assert "bbox/AP" in read_metrics(tmp_path / "run")[-1]
    assert sorted(parsed) == ["train", "val"]


# -- what a run waits for --------------------------------------------------------------------------


def test_waiting_for_data_is_reported(
    mask_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Each batch of the second run comes a tenth of a second late; its numbers are the same."""
    real, delay = watch.load, 0.1

    def late(split: Any, plan: Any, data: Any, **options: Any) -> Iterator[Any]:
        for batch in real(split, plan, data, **options):
            time.sleep(delay)
            yield batch

    monkeypatch.setattr(watch, "curves", lambda *_: None)
    loop.train(mask_config, tmp_path / "soon")
    monkeypatch.setattr(watch, "load", late)
    capsys.readouterr()
    beside_the_bar: list[str] = []
    monkeypatch.setattr(
        loop.tqdm, "set_postfix_str", lambda self, text, refresh: beside_the_bar.append(text)
    )
    loop.train(mask_config, tmp_path / "late")
    soon, waiting = (
        json.loads((tmp_path / name / "timing.jsonl").read_text()) for name in ("soon", "late")
    )
    assert 0 < soon["waited_seconds"] < soon["seconds"]
    assert tiny.STEPS * delay < waiting["waited_seconds"] < waiting["seconds"]
    (share,) = re.findall(
        r"mask epoch 1/1: [\d.]+ s, ([\d.]+)% of it waiting for data  validation: ",
        capsys.readouterr().out,
    )
    # the line has a tenth of a percent; the file has both numbers in whole milliseconds
    assert float(share) == pytest.approx(
        100 * waiting["waited_seconds"] / waiting["seconds"], abs=0.05 + 0.1 / waiting["seconds"]
    )
    assert len(beside_the_bar) == tiny.STEPS
    assert all(re.search(r"^mask \d\.\d{3}  .*  data [1-9]\d*%$", text) for text in beside_the_bar)
    assert (tmp_path / "soon" / "metrics.jsonl").read_bytes() == (
        tmp_path / "late" / "metrics.jsonl"
    ).read_bytes()


def test_what_is_left_is_told_in_minutes() -> None:
    told = [loop.as_minutes(seconds) for seconds in (9, 60, 540, 9000)]
    assert told == ["under a minute", "about 1 min", "about 9 min", "about 150 min"]
