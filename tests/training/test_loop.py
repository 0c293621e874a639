"""A run that is interrupted ends with the bits of one that was not; what may not be mixed up is
refused."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from flax.traverse_util import flatten_dict

from mrcnn_jax import cli
from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import (
    load_config_file,
    load_config_json,
    resolve_paths,
    save_config,
)
from mrcnn_jax.config.model import MaskHeadConfig
from mrcnn_jax.config.schema import Config, ParamGroup
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, example_batch
from mrcnn_jax.runs import checkpoints
from mrcnn_jax.runs.checkpoints import Checkpoints, Meta
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.training import loop, watch
from mrcnn_jax.training import open as opening
from mrcnn_jax.training.initial import initial_variables
from mrcnn_jax.training.optimizer import learning_rate
from mrcnn_jax.training.replay import read_failed, replay

ROOT = Path(__file__).parents[2]
KINDS = ("params", "batch_stats")
ENDS = {
    "00000012-rpn",
    "00000018-box",
    "00000024-mask",
}  # the checkpoints that end the tiny run's stages


def arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    """Everything in a checkpoint, as it lies on the disk: parameters, batch statistics, optimiser
    state, step and key."""
    reader = ocp.PyTreeCheckpointer()
    return {
        path: np.asarray(leaf)
        for item in ("model", "training")
        for path, leaf in reader.restore(checkpoint / item).items()
    }


def assert_same_bits(run: Path, reference: Path) -> None:
    """All that two runs leave behind, but the times."""
    assert (run / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    for name in ENDS:
        ours, theirs = arrays(run / "checkpoints" / name), arrays(reference / "checkpoints" / name)
        assert ours.keys() == theirs.keys()
        kinds = {path.split("/")[0] for path in ours}
        assert kinds == {"params", "batch_stats", "opt_state", "step", "skipped", "key"}
        different = [
            path
            for path in ours
            if (ours[path].dtype, ours[path].tobytes())
            != (theirs[path].dtype, theirs[path].tobytes())
        ]
        assert different == []
        meta, other = (
            json.loads((folder / "checkpoints" / name / "meta.json").read_text())
            for folder in (run, reference)
        )
        assert meta == other


def latest(run: Path) -> Meta:
    meta = Checkpoints(run, keep=1).latest()
    assert meta is not None
    return meta


def script(config: Config) -> list[str]:
    """train.py with the config and the data of the tiny run."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "tests" / "tiny.py")]
    return [*command, "--data.root", str(config.data.root), "--data.cache", str(config.data.cache)]


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`stop_at(step)`: this process gets SIGTERM while the batch of that step (counted from now) is
    made."""
    real = watch.load

    def arm(step: int) -> None:
        made = 0

        def load(split: Any, plan: Any, data: Any) -> Iterator[Any]:
            nonlocal made
            for batch in real(split, plan, data):
                if split.name == "train":
                    made += 1
                    if made == step:
                        os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        monkeypatch.setattr(watch, "load", load)

    return arm


@pytest.fixture
def mask_config(tiny_run: Path, tiny_config: Config) -> Config:
    """The last stage of the tiny run, from the run itself: an epoch of the smallest programs, which
    the run has compiled."""
    return replace(tiny_config, init_from=str(tiny_run), stages=tiny_config.stages[2:])


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
    best = {
        json.loads((tiny_run / "checkpoints" / name / "meta.json").read_text())["best_metric"]
        for name in ENDS
    }
    losses = [row["loss/total"] for row in rows if row["split"] == "val"]
    assert best == {min(losses[:2]), losses[2], losses[3]}

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
    """Stopped in the middle of an epoch (5 of 6 steps), between two epochs and in the next stage;
    resumed with other runtime fields."""
    run = tmp_path / "run"
    stop_at(5)
    with pytest.raises(loop.Stopped, match="stage rpn, step 5 is saved"):
        loop.train(tiny_config, run)
    assert latest(run).name == "00000005-rpn"
    assert not latest(run).stage_complete
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    with monkeypatch.context() as patch:  # after the 6th step and its validation
        patch.setattr(watch, "curves", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(loop.Stopped, match="stage rpn, step 6 is saved"):
            loop.train(tiny_config, run)
    assert latest(run).name == "00000006-rpn"

    stop_at(9)  # 6 steps of the first stage were left
    with pytest.raises(loop.Stopped, match="stage box, step 3 is saved"):
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
    assert (run / "commands.txt").read_text() == 4 * f"{cli.command_line()}\n"  # one for each start
    assert {path.name for path in (run / "checkpoints").iterdir()} == {*ENDS, "00000022-mask"}
    assert_same_bits(run, tiny_run)


def test_a_finished_run_is_left_as_it_is(
    tiny_run: Path, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    loop.train(tiny_config, run)
    assert "resumed from stage mask, step 6" in capsys.readouterr().out
    assert_same_bits(run, tiny_run)


def test_sigterm_to_the_script_saves_and_another_process_resumes(
    tiny_run: Path,
    tiny_config: Config,
    tmp_path: Path,
    stop_at: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing but the folder is handed over; while the script trains in it, it takes no other
    run."""
    run = tmp_path / "run"
    with subprocess.Popen(
        [*script(tiny_config), "--workdir", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not ((run / "metrics.jsonl").exists() and read_metrics(run)):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(ConfigError, match="another run is training in this folder"):
                loop.train(tiny_config, run)
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    stopped_at = latest(run)
    assert output.rstrip().endswith(
        f"stage {stopped_at.stage}, step {stopped_at.stage_step} is saved in {run}"
    )
    assert stopped_at.step < sum(tiny.STAGES.values())
    assert read_metrics(run)[-1]["step"] == stopped_at.stage_step

    stop_at(2)
    with pytest.raises(loop.Stopped):
        loop.train(tiny_config, run)
    assert (
        f"resumed from stage {stopped_at.stage}, step {stopped_at.stage_step}"
        in capsys.readouterr().out
    )
    assert latest(run).step == stopped_at.step + 2
    assert (tiny_run / "metrics.jsonl").read_text().startswith((run / "metrics.jsonl").read_text())


def test_updates_of_several_steps_averages_and_ap_survive_interruptions(
    tiny_run: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert (latest(run).name, latest(run).mask_ap) == ("00000004-mask", None)
    loop.train(replace(config, keep_checkpoints=1), run)
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
    # The average is of what the stage trains, half of it of the last update's.
    trained = {path.removeprefix("params/") for path in end if path.startswith("params/mask_head/")}
    assert {path.removeprefix("ema/") for path in end if path.startswith("ema/")} == trained
    start = arrays(tiny_run / "checkpoints" / "00000024-mask")
    for path in trained:  # one update by step 6
        np.testing.assert_allclose(
            middle[f"ema/{path}"],
            (start[f"params/{path}"] + middle[f"params/{path}"]) / 2,
            atol=1e-6,
        )

    measured = {row["step"]: row for row in rows if row["split"] == "val"}
    assert measured.keys() == {6, 12}
    best = Checkpoints(run, keep=1).best()
    assert best is not None
    assert best.mask_ap == max(row["segm/AP"] for row in measured.values())
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

    def late(split: Any, plan: Any, data: Any) -> Iterator[Any]:
        for batch in real(split, plan, data):
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
    assert float(share) == pytest.approx(
        100 * waiting["waited_seconds"] / waiting["seconds"], abs=0.1
    )
    assert len(beside_the_bar) == tiny.STEPS
    assert all(re.search(r"^mask \d\.\d{3}  .*  data [1-9]\d*%$", text) for text in beside_the_bar)
    assert (tmp_path / "soon" / "metrics.jsonl").read_bytes() == (
        tmp_path / "late" / "metrics.jsonl"
    ).read_bytes()


# -- what is refused -------------------------------------------------------------------------------


def test_another_config_in_the_same_folder_is_refused(tiny_run: Path, tiny_config: Config) -> None:
    before = sorted(
        (path, path.stat().st_mtime_ns)
        for path in tiny_run.rglob("*")
        if path.is_file() and path.name != ".lock"
    )
    other = replace(tiny_config, seed=1, model=replace(tiny_config.model, fpn_channels=8))
    with pytest.raises(ConfigError) as error:
        loop.train(other, tiny_run)
    assert str(error.value) == (
        f"{tiny_run}: holds a run of another config: "
        "model.fpn_channels: 16 -> 8; seed: 0 -> 1 (choose another --workdir)"
    )
    assert (
        sorted(
            (path, path.stat().st_mtime_ns)
            for path in tiny_run.rglob("*")
            if path.is_file() and path.name != ".lock"
        )
        == before
    )


def without_mask_head(config: Config) -> Config:
    """A mistake in the last stage's table."""
    last = config.stages[2]
    return replace(
        config,
        stages=(
            *config.stages[:2],
            replace(last, frozen=tuple(p for p in last.frozen if p != "rpn/.*")),
        ),
    )


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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda config: replace(config, stages=()), "stages: the config has none"),
        (
            lambda config: replace(config, model=replace(config.model, num_classes=80)),
            r"model\.num_classes: 80, but .* has 3: disc",
        ),
        (without_mask_head, r"stages\.mask: parameter rpn/.* matches no pattern"),
    ],
)
def test_a_config_that_cannot_be_trained_takes_no_folder(
    wrong: Any, message: str, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every refusal comes before compiling, and the folder stays free for the corrected config."""
    monkeypatch.setattr(loop, "initialise", lambda *_, **__: pytest.fail("something was compiled"))
    with pytest.raises(ConfigError, match=message) as error:
        loop.train(wrong(tiny_config), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


# -- what is not finite ----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run(
    tiny_run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    """Every step is saved; a huge learning rate breaks the second one, and the checkpoint of the
    first stays."""
    (tmp_path / "broken.py").write_text(
        "from dataclasses import replace\n"
        "import tiny\n"
        "def get_config():\n"
        "    config = tiny.get_config()\n"
        "    mask = config.stages[2]\n"
        "    huge = replace(mask.optimizer, learning_rate=1e38)\n"
        f"    config = replace(config, init_from={str(tiny_run)!r})\n"
        "    return replace(config, stages=(replace(mask, optimizer=huge),))\n"
    )
    command = [
        *script(tiny_config),
        "--config",
        "broken.py",
        "--workdir",
        "run",
        "--save-every-steps",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.rstrip().replace("\r", "\n").split("\n")[-1].strip()
    match = re.fullmatch(
        r"error: stage mask, step 2: (?:[a-z_/]+, )*loss/total(?:, [a-z_/]+)* not finite; "
        r"(image .*); the batch is kept in run/failed_batch-mask-2\.npz "
        r"\(python -m mrcnn_jax replay FILE\);"
        r" --skip-non-finite 1 would leave it out and go on from the last checkpoint",
        last,
    )
    assert match, last
    assert "Traceback" not in done.stderr
    content = tiny.read(Path(str(tiny_config.data.root)), "train")
    named = {}
    for image, ids in re.findall(
        r"image (\d+) \((?:annotations ([\d, ]+)|no annotations)\)", match[1]
    ):
        named[int(image)] = [int(number) for number in ids.split(", ") if number]
    assert len(named) in (1, 2)
    assert named == {
        image: [a["id"] for a in content["annotations"] if a["image_id"] == image]
        for image in named
    }
    assert latest(tmp_path / "run").name == "00000001-mask"
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1]
    assert all(
        np.isfinite(leaf).all()
        for leaf in arrays(tmp_path / "run" / "checkpoints" / "00000001-mask").values()
    )

    # The step again, from that file alone: not finite, with the parameters of the checkpoint before
    # it.
    (all_images, *alone) = replay(tmp_path / "run" / "failed_batch-mask-2.npz")
    assert not np.isfinite(all_images[1]["loss/total"])
    assert len(alone) == len(named)
    failed, _, batch, state = read_failed(tmp_path / "run" / "failed_batch-mask-2.npz")
    assert (failed.stage_index, failed.step, dict(failed.images)) == (0, 2, named)
    assert batch.ground_truth.valid.sum(axis=1).tolist()[: len(named)] == [
        len(ids) for ids in named.values()
    ]
    saved = arrays(tmp_path / "run" / "checkpoints" / "00000001-mask")
    kept = flatten_dict({"params": state.params, "batch_stats": state.batch_stats}, sep="/")
    assert {path: leaf.tobytes() for path, leaf in kept.items()} == {
        path: saved[path].tobytes() for path in kept
    }
    assert state.key.tobytes() == saved["key"].tobytes()


@pytest.fixture
def broken_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 2 and 5 of a stage give a gradient of NaN, with finite losses. No curves are drawn, to
    save time."""
    real = loop.make_train_step

    def make(*arguments: Any) -> Any:
        step = real(*arguments)

        def broken(state: Any, batch: Any) -> Any:
            updated, metrics = step(state, batch)
            nan = jnp.where((state.step == 1) | (state.step == 4), jnp.nan, 0.0)
            params = jax.tree.map(
                lambda new, old: new if new is old else new + nan, updated.params, state.params
            )
            return updated.replace(params=params), metrics | {
                "gradient_norm": metrics["gradient_norm"] + nan
            }

        return broken

    monkeypatch.setattr(loop, "make_train_step", make)
    monkeypatch.setattr(watch, "curves", lambda *_: None)


@pytest.mark.usefixtures("broken_gradients")
def test_steps_that_are_not_finite_are_skipped_and_counted_across_runs(
    mask_config: Config, tmp_path: Path, stop_at: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(mask_config, skip_non_finite=2, deterministic=True)
    whole, run = tmp_path / "whole", tmp_path / "run"
    loop.train(config, whole)
    output = capsys.readouterr().out
    assert "deterministic: no option needed, CPU runs are bit-equal" in output
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    for line, step, count in zip(warnings, (2, 5), (1, 2), strict=True):
        assert line.startswith(
            f"warning: stage mask, step {step}: gradient_norm not finite; image "
        )
        assert line.endswith(f"; left out, {count} of at most 2")
        assert (whole / f"failed_batch-mask-{step}.npz").is_file()
    saved = arrays(whole / "checkpoints" / "00000006-mask")
    assert saved["skipped"] == 2
    assert saved["step"] == 6
    assert {saved[path].item() for path in saved if path.endswith("count")} == {
        4
    }  # updates that were made
    rows = [row for row in read_metrics(whole) if row["split"] == "train"]
    assert [bool(np.isfinite(row["gradient_norm"])) for row in rows] == [
        True,
        False,
        True,
        True,
        False,
        True,
    ]
    schedule = [float(learning_rate(config.stages[0], made, 6)) for made in (0, 1, 1, 2, 3, 3)]
    assert [row["learning_rate"] for row in rows] == schedule

    stop_at(3)
    with pytest.raises(loop.Stopped, match="stage mask, step 3 is saved"):
        loop.train(config, run)
    begun = shutil.copytree(run, tmp_path / "begun")
    loop.train(config, run)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    ours = arrays(run / "checkpoints" / "00000006-mask")
    assert {path: leaf.tobytes() for path, leaf in ours.items()} == {
        path: leaf.tobytes() for path, leaf in saved.items()
    }

    # Fewer are allowed from here on: the one before the checkpoint counts.
    with pytest.raises(ConfigError, match=r"skip_non_finite: 0, but .* has skipped 1 "):
        loop.train(replace(config, skip_non_finite=0), begun)
    with pytest.raises(
        loop.TrainingError,
        match=r"stage mask, step 5: gradient_norm not finite; .*; --skip-non-finite 2 would",
    ):
        loop.train(replace(config, skip_non_finite=1), begun)
    assert latest(begun).name == "00000003-mask"


def test_a_device_without_memory_ends_the_run_with_the_need_of_its_batch(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*arguments: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(loop, "_train_epoch", run_out)
    with pytest.raises(
        loop.TrainingError,
        match=r"^out of device memory: a step of batch 2 needs about \d+\.\d\d GiB",
    ) as error:
        loop.train(tiny_config, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_state_that_is_not_finite_is_not_saved(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update can leave the range of numbers although loss and gradient did not: as if one had,
    at the second step."""

    def flatten(state: Any) -> dict[str, Any]:
        leaves = checkpoints.flatten(state)
        return (
            leaves
            if state.step == 1
            else leaves | {"opt_state/nu/rpn/logits/bias": np.array([1.0, np.inf])}
        )

    monkeypatch.setattr(watch, "flatten", flatten)
    with pytest.raises(
        loop.TrainingError,
        match=r"^stage rpn, step 2: not saved: opt_state/nu/rpn/logits/bias not finite "
        r"\(1 in all\)",
    ):
        loop.train(replace(tiny_config, save_every_steps=1), tmp_path / "run")
    assert latest(tmp_path / "run").name == "00000001-rpn"


def test_a_label_out_of_range_ends_the_run_on_the_host(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = opening.open_split

    def open_split(*arguments: Any, **options: Any) -> Any:
        split = real(*arguments, **options)
        return replace(
            split, dataset=replace(split.dataset, categories=split.dataset.categories[:2])
        )

    monkeypatch.setattr(opening, "open_split", open_split)
    with pytest.raises(
        loop.TrainingError, match=r"images: .*\.png: annotation \d+: label 3 is outside 1\.\.2$"
    ) as error:
        loop.train(tiny_config, tmp_path / "run")
    assert "\n" not in str(error.value)


# -- disks -----------------------------------------------------------------------------------------


def test_the_checkpoints_must_find_room_before_the_first_step(
    tiny_run: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three stages' last ones, two between and one being written, of the sizes of what a finished
    run holds."""
    sizes = [
        sum(leaf.nbytes for leaf in arrays(tiny_run / "checkpoints" / name).values())
        for name in ENDS
    ]
    needed = sum(sizes) + 3 * max(sizes)
    usage = shutil.disk_usage(tmp_path)
    compiled = "something was compiled"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "initialise", lambda *_, **__: pytest.fail(compiled))
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(
            ConfigError,
            match=r"run: its checkpoints need \d MiB of disk, and \d MiB are free "
            r"\(--keep-checkpoints is 2\)",
        ):
            loop.train(tiny_config, tmp_path / "run")
        assert not (tmp_path / "run" / "config.json").exists()
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
        with pytest.raises(pytest.fail.Exception, match=compiled):
            loop.train(tiny_config, tmp_path / "run")
    # A run that has its checkpoints needs less.
    run = shutil.copytree(tiny_run, tmp_path / "done")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * max(sizes)))
    loop.train(tiny_config, run)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of orbax's threads, after they failed
def test_a_disk_that_fills_up_ends_the_run_and_a_freed_one_resumes_it(
    tiny_run: Path,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: Any,
) -> None:
    """The second save may write no file of more than 50,000 bytes: the system itself refuses."""
    run, saves = tmp_path / "run", 0
    real = Checkpoints.save
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save(self: Checkpoints, *arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            real(self, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(loop.TrainingError) as error:
            loop.train(replace(tiny_config, save_every_steps=2), run)
    assert str(error.value) == (
        f"{run}/checkpoints/00000004-rpn: {os.strerror(errno.EFBIG)} "
        "(the same command goes on from the last checkpoint)"
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["00000002-rpn"]
    stop_at(3)
    with pytest.raises(loop.Stopped, match="stage rpn, step 5 is saved"):
        loop.train(tiny_config, run)
    assert (tiny_run / "metrics.jsonl").read_text().startswith((run / "metrics.jsonl").read_text())


def test_folders_that_cannot_be_written_are_refused(tiny_config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/run: cannot be written to: Not a directory$"):
        loop.train(tiny_config, tmp_path / "file" / "run")
    mount = tmp_path / "mount"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(mount)], capture_output=True, check=False
    ).returncode:
        pytest.skip("the read-only half: this user may not mount")
    try:
        with pytest.raises(
            ConfigError, match=r"mount/run: cannot be written to: Read-only file system$"
        ):
            loop.train(tiny_config, mount / "run")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_damaged_checkpoint_is_passed_over_with_a_message(
    tiny_run: Path,
    tiny_config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    harmed = max(
        (run / "checkpoints" / "00000024-mask" / "model").rglob("*"),
        key=lambda path: path.stat().st_size * path.is_file(),
    )
    content = bytearray(harmed.read_bytes())
    content[len(content) // 2] ^= 16
    harmed.write_bytes(content)
    loop.train(tiny_config, run)
    (record,) = caplog.records
    assert (
        record.getMessage()
        == f"{harmed}: damaged: not the bytes that were saved (SHA-256 differs): skipped"
    )
    assert "resumed from stage box, step 6" in capsys.readouterr().out
    assert_same_bits(run, tiny_run)


# -- starting from other weights -------------------------------------------------------------------


def shapes(config: Config) -> Variables:
    model = MaskRCNN(config.model)
    return jax.eval_shape(
        lambda batch: model.init(jax.random.key(0), batch), example_batch(config.data.canvases[0])
    )


def test_a_folder_that_was_copied_in_part_is_left_as_it_is(
    tiny_run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    """Without manifests, or without checkpoints, it looked like a new run, which began by removing
    the rows and the folders."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for path in run.glob("checkpoints/*/manifest.json"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"00000012-rpn: no checkpoint: it has no manifest.json"):
        loop.train(tiny_config, run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="holds metrics up to stage mask, step 6, but no checkpo"):
        loop.train(tiny_config, run)
    left = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    kept = {path: time for path, time in before.items() if "checkpoints" not in path.parts}
    assert {path: left[path] for path in kept if path.name != ".lock"} == {
        path: time for path, time in kept.items() if path.name != ".lock"
    }


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    tiny_run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tiny_run / "config.json", run)
    lines = (tiny_run / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [line for line in lines if '"stage": "rpn"' in line]
    (run / "metrics.jsonl").write_text("".join(rows))  # all of the first stage, but its checkpoint
    opening.refuse_lost_checkpoints(tiny_config, run)
    (run / "metrics.jsonl").write_text("")
    opening.refuse_lost_checkpoints(tiny_config, run)
    save_config(replace(tiny_config, save_every_steps=11), run / "config.json")
    (run / "metrics.jsonl").write_text("".join(rows))
    with pytest.raises(ConfigError, match="up to stage rpn, step 12, but no checkpoint"):
        opening.refuse_lost_checkpoints(tiny_config, run)


def test_metrics_that_were_harmed_are_refused_on_resume(
    tiny_run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    path = run / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"step": 3', '"step": 7', 1))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: damaged: its first \d+ bytes are not"):
        loop.train(tiny_config, run)


def test_a_run_starts_from_another(
    tiny_run: Path, mask_config: Config, tmp_path: Path, stop_at: Any
) -> None:
    """Trains the last stage only, on top of a whole run: what that stage freezes is the source's to
    the bit."""
    stop_at(1)
    with pytest.raises(loop.Stopped):
        loop.train(mask_config, tmp_path / "run")
    source = arrays(tiny_run / "checkpoints" / "00000024-mask")
    begun = arrays(tmp_path / "run" / "checkpoints" / "00000001-mask")
    paths = [path for path in source if path.startswith(KINDS)]
    different = [path for path in paths if source[path].tobytes() != begun[path].tobytes()]
    assert different
    assert all(path.startswith("params/mask_head/") for path in different)
    # One small step away, not somewhere else.
    assert all(np.abs(source[path] - begun[path]).max() < 0.1 for path in different)


def test_a_partial_load_is_listed(
    tiny_run: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Into a network with a convolution more in its mask head and without batch norm in its RPN."""
    model = tiny_config.model
    model = replace(
        model,
        mask_head=MaskHeadConfig(channels=8, convs=2),
        rpn=replace(model.rpn, batch_norm=False),
    )
    config = replace(tiny_config, init_from=str(tiny_run), model=model)
    wanted = set(flatten_dict(shapes(config), sep="/"))
    loaded = flatten_dict(initial_variables(shapes(config), config), sep="/")
    source = {
        path: leaf
        for path, leaf in arrays(tiny_run / "checkpoints" / "00000024-mask").items()
        if path.startswith(KINDS)
    }
    random, unused = sorted(wanted - set(source)), sorted(set(source) - wanted)
    assert {"params/mask_head/conv2/kernel", "params/mask_head/conv2/bias"} <= set(random)
    assert {
        path for path in unused if not path.startswith(tuple(f"{kind}/rpn/" for kind in KINDS))
    } == set()
    assert set(loaded) == wanted & set(source)
    assert all(np.array_equal(leaf, source[path]) for path, leaf in loaded.items())
    counts = f"{len(loaded)} of {len(wanted)} tensors loaded"
    assert (
        capsys.readouterr().out
        == f"{tiny_run}: {counts}; random: {', '.join(random)}; not used: {', '.join(unused)}\n"
    )


def test_other_shapes_are_refused(tiny_run: Path, tiny_config: Config, tmp_path: Path) -> None:
    config = replace(tiny_config, init_from=str(tiny_run))
    config = replace(
        config, model=replace(config.model, mask_head=MaskHeadConfig(channels=4, convs=1))
    )
    with pytest.raises(
        ConfigError,
        match=r"init_from: .*: 5 shapes differ: params/mask_head/conv1/bias \(8,\) -> \(4,\), ",
    ) as error:
        loop.train(config, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_run_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = replace(tiny_config, init_from=str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"init_from: .*empty: holds no checkpoint"):
        initial_variables(shapes(config), config)


def test_the_resnet_comes_from_a_weights_file(
    data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = resolve_paths(load_config_file(ROOT / "configs" / "coco300_cpu.py"))
    wanted = flatten_dict(shapes(config), sep="/")
    loaded = flatten_dict(initial_variables(shapes(config), config), sep="/")
    assert set(loaded) == {path for path in wanted if path.split("/")[1] == "resnet"}
    assert all(leaf.shape == wanted[path].shape for path, leaf in loaded.items())
    assert "box_head, fpn, mask_head, rpn: random" in capsys.readouterr().out
    with np.load(data_folder / "weights" / "pqf_resnet50_large.npz") as file:
        assert np.array_equal(
            loaded["params/resnet/stem/kernel"], file["conv1.weight"].transpose(2, 3, 1, 0)
        )
        assert np.array_equal(
            loaded["batch_stats/resnet/layer4/block2/conv3/var"], file["layer4.2.bn3.running_var"]
        )


def test_what_would_fail_or_lie_late_is_refused_early(tiny_config: Config, tmp_path: Path) -> None:
    rpn, box, mask = tiny_config.stages
    late = replace(mask, optimizer=replace(mask.optimizer, warmup_steps=1000))
    with pytest.raises(
        ConfigError,
        match=r"stages.mask.optimizer.warmup_steps: 1000, but the stage has only 6 updates",
    ):
        loop.train(replace(tiny_config, stages=(rpn, box, late)), tmp_path / "late")
    with pytest.raises(
        ConfigError, match=r"stages.mask: frozen at random initialisation: box_head "
    ):
        loop.train(replace(tiny_config, stages=(rpn, mask)), tmp_path / "random")
    part = replace(
        rpn,
        train=(ParamGroup("resnet/layer.*"), *rpn.train[1:]),
        frozen=("resnet/stem/.*", *rpn.frozen),
    )
    with pytest.raises(
        ConfigError, match=r"stages.rpn: resnet has live batch norm and is trained in part"
    ):
        loop.train(replace(tiny_config, stages=(part, box, mask)), tmp_path / "part")
    assert not (tmp_path / "late" / "config.json").exists()


def test_categories_of_both_files_are_compared_before_anything_is_built(
    tiny_config: Config, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids that differ are matched by name, which the report says; other names end it."""
    content = tiny.read(tiny_data, "val")
    path = tmp_path / "val.json"

    def split_of(categories: list[dict[str, Any]]) -> Any:
        path.write_text(json.dumps(content | {"categories": categories}))
        data = replace(tiny_config.data, val_annotations=str(path), cache=str(tmp_path / "cache"))
        with opening.open_run(replace(tiny_config, data=data), tmp_path / "run") as run:
            return run.val_split

    (tmp_path / "run").mkdir()
    kept = split_of(content["categories"])
    # The same file with ids 2, 1, 0 instead of 5, 7, 90.
    ids = {category["id"]: 2 - place for place, category in enumerate(content["categories"])}
    for annotation in content["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    renumbered = [{**c, "id": ids[c["id"]]} for c in content["categories"]]
    capsys.readouterr()
    matched = split_of(renumbered)
    assert matched.dataset.images == kept.dataset.images
    assert matched.dataset.to_coco() == kept.dataset.to_coco()
    labels = [
        [list(record["objects"]["label"]) for record in split.source] for split in (matched, kept)
    ]
    assert labels[0] == labels[1]
    printed = capsys.readouterr().out
    assert "repaired 3: categories with other ids in" in printed
    assert printed.count("labels follow their order") == 1  # in the training file

    built = sorted((tmp_path / "cache").iterdir())
    renumbered[0]["name"] = "circle"
    with pytest.raises(
        ConfigError, match=r"val.json: categories that \S+ does not have: 2 'circle'"
    ):
        split_of(renumbered)
    content["annotations"] = []
    with pytest.raises(ConfigError, match=r"val.json: 'categories' lacks 'disc' of \S+"):
        split_of(renumbered[1:])
    assert sorted((tmp_path / "cache").iterdir()) == built


def test_a_training_file_without_objects_is_refused(
    tiny_config: Config, tiny_data: Path, tmp_path: Path
) -> None:
    content = tiny.read(tiny_data, "train")
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    config = replace(tiny_config, data=replace(tiny_config.data, train_annotations=str(path)))
    with pytest.raises(ConfigError, match=r"train.json: no object to train on: all its \d+ anno"):
        loop.train(config, tmp_path / "run")


def test_validation_images_that_are_trained_on_are_noticed(
    tiny_config: Config, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(
        tiny_config,
        data=replace(tiny_config.data, val_annotations=str(tiny.annotations(tiny_data, "train"))),
    )
    with opening.open_run(config, tmp_path / "run"):
        pass
    assert f"noticed {tiny.TRAIN}: images that are in " in capsys.readouterr().out
