"""What is not finite and a device without memory end a run as they should. Disks: test_disks.py."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from whole_runs import ROOT, arrays, assert_same_bits, latest, script

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config
from mrcnn_jax.data.records import ImageRecord, ObjectRecord
from mrcnn_jax.runs.arrays import flatten
from mrcnn_jax.runs.checkpoints import Checkpoints
from mrcnn_jax.runs.hub_folder import write_hub_folder
from mrcnn_jax.runs.loggers import Service
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.training import loop, programs, stop, watch
from mrcnn_jax.training import open as opening
from mrcnn_jax.training.optimizer import learning_rates
from mrcnn_jax.training.replay import read_failed, replay


def test_an_ap_that_is_undefined_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of masks, where no object has one: no checkpoint is the best by it."""
    figures = {"bbox/AP": 0.5, "segm/AP": -1.0, "segm/AR1": 0.5}
    monkeypatch.setattr(watch, "evaluate", lambda *_: SimpleNamespace(metrics=figures))
    run = SimpleNamespace(mesh=None, val_split=None)
    predictor = SimpleNamespace(load=lambda _: None)
    values = watch.Watch._evaluate(SimpleNamespace(run=run, _predictor=predictor), None, {})
    assert values == {"bbox/AP": 0.5}


def test_what_fails_in_a_validation_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that an evaluation cannot read any more, too: no mistake in what was asked for."""
    failing = Mock(side_effect=ConfigError("images/a.png: gone"))
    monkeypatch.setattr(watch, "evaluate", failing)
    run = SimpleNamespace(mesh=None, val_split=None, config=tiny.get_config())
    seen: Any = SimpleNamespace(run=run, _predictor=Mock())
    seen.end_epoch = lambda *_: watch.Watch._evaluate(seen, None, {})
    progress: Any = SimpleNamespace(stage_index=1, step=6, validated=False)
    line = (
        "stage box, validation after step 6: images/a.png: gone; the same command goes on from "
        "the last checkpoint"
    )
    for error in (ConfigError, cli.Failure):
        failing.side_effect = error("images/a.png: gone")
        with pytest.raises(cli.Failure, match=f"^{line}$"):
            loop._end_epoch(seen, progress, None, None, "")
    assert not progress.validated


def test_losses_of_masks_and_depth_are_means_over_images_that_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images without any would make them smaller."""
    with_mask = ObjectRecord(1, 1, (0.0, 0.0, 1.0, 1.0), {"size": [9, 9], "counts": ""}, False, 1.0)
    objects = [(with_mask,), (), (), (with_mask,), (replace(with_mask, rle=None),)]
    maps = ["0.png", None, "2.png", None, "4.png"]
    records = [
        ImageRecord(i, "a.png", 9, 9, one, depth_file=name)
        for i, (one, name) in enumerate(zip(objects, maps, strict=True))
    ]
    plan = [
        SimpleNamespace(images=[0, 1]),
        SimpleNamespace(images=[2, 4]),
        SimpleNamespace(images=[3]),
    ]
    losses = [(2.0, 5.0, 1.0), (4.0, 0.0, 4.0), (1.0, 8.0, 0.0)]  # of boxes, masks, depth

    def validate(*_: Any) -> Any:
        box, mask, depth = next(values)
        own = {"loss/box": box, "loss/mask": mask, "loss/mask_points": mask, "loss/depth": depth}
        return own | {"loss/total": sum(own.values())}, None

    monkeypatch.setattr(watch, "plan_once", lambda *_: plan)
    monkeypatch.setattr(watch, "batches", lambda *_: [None] * 3)
    stage: Any = SimpleNamespace(losses=("box", "mask", "depth"))
    split = SimpleNamespace(dataset=SimpleNamespace(images=records))
    # Depth of boxes is learnt within masks, so where there are both: in the first image alone.
    for kind, depth in (("dense", (1 + 2 * 4) / 3), ("roi", 1.0)):
        model = SimpleNamespace(depth_head=SimpleNamespace(kind=kind))
        config = SimpleNamespace(data=SimpleNamespace(eval_batch_size=2), model=model, seed=0)
        run: Any = SimpleNamespace(config=config, mesh=None, val_split=split)
        values = iter(losses)
        means = watch._validate(run, stage, validate, {})
        expected = {"loss/box": 13 / 5, "loss/mask": 6.5, "loss/mask_points": 6.5}
        expected["loss/depth"] = depth
        assert means == pytest.approx(expected | {"loss/total": sum(expected.values())})
    # Without any mask or depth map there is no loss of them, and none of 0.
    records[:] = [replace(record, annotations=(), depth_file=None) for record in records]
    values = iter(losses)
    assert watch._validate(run, stage, validate, {}) == pytest.approx(
        {"loss/box": 13 / 5, "loss/total": 13 / 5}
    )
    of_masks = Mock(return_value=({"loss/mask": 0.0, "loss/total": 0.0}, None))
    assert watch._validate(run, stage, of_masks, {}) == {}


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


def test_loggers_are_given_all_rows_and_one_that_fails_ends_nothing(
    mask_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With sessions in the place of services."""
    sent: list[tuple[int, dict[str, float]]] = []
    ends: list[bool] = []

    def fail(rows: Any) -> None:
        raise OSError("no route to host")

    taking = SimpleNamespace(new=True, send=sent.extend, end=ends.append)
    failing = SimpleNamespace(new=True, send=fail, end=ends.append)
    services = {"wandb": taking, "mlflow": failing}
    monkeypatch.setattr(
        watch,
        "open_loggers",
        lambda config, workdir: [
            Service(name, lambda name=name: services[name]) for name in config.loggers
        ],
    )
    monkeypatch.setattr(opening, "refuse_missing", lambda names: None)
    monkeypatch.setattr(watch, "curves", lambda *_: None)
    loop.train(replace(mask_config, loggers=("wandb", "mlflow")), tmp_path / "run")
    fields = ("stage", "step", "epoch", "split")
    rows = read_metrics(tmp_path / "run")
    assert {row["split"] for row in rows} == {"train", "val"}
    assert sent == [
        (
            row["step"],
            {f"mask/{row['split']}/{name}": row[name] for name in row if name not in fields},
        )
        for row in rows
    ]
    assert sorted(ends) == [False, True]  # the one that failed is ended too
    out = capsys.readouterr().out
    assert out.count("no route to host") == 1
    assert "\ndone; next: " in out


def test_loggers_are_opened_after_the_last_refusal(
    mask_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of another run's stage, which are met when the rows to keep are read."""
    monkeypatch.setattr(watch, "open_loggers", lambda *_: pytest.fail("a service has the run"))
    (tmp_path / "metrics.jsonl").write_text(
        '{"stage": "rpn", "step": 1, "epoch": 1, "split": "train", "loss/total": 0.5}\n'
    )
    with pytest.raises(ConfigError, match=r"stage 'rpn' is not one of this run's: mask$"):
        loop.train(mask_config, tmp_path)


def test_a_run_records_the_model_that_it_started_from(
    tiny_run: Path, mask_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every checkpoint, and also once it was resumed."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0f" * 20)
    source = load_run(tiny_run)
    write_hub_folder(snapshot, source.config, source.variables, source.meta, "")
    monkeypatch.setattr(watch, "curves", lambda *_: None)
    loop.train(replace(mask_config, init_from=str(snapshot)), tmp_path / "run")
    meta = latest(tmp_path / "run")
    digest = hashlib.sha256((snapshot / "model.safetensors").read_bytes()).hexdigest()
    wanted = {"weights": f"hf://org/name@{'0f' * 20}", "weights_sha256": digest}
    assert wanted.items() <= meta.environment.items()
    resumed = watch._started_from(SimpleNamespace(resumed_from=meta))  # type: ignore[arg-type]
    assert resumed == wanted
    # The same bits as from the run itself: every variable was loaded.
    loop.train(mask_config, tmp_path / "from_run")
    assert "weights" not in latest(tmp_path / "from_run").environment
    ours, theirs = (
        arrays(tmp_path / name / "checkpoints" / meta.name) for name in ("run", "from_run")
    )
    assert {path: leaf.tobytes() for path, leaf in ours.items()} == {
        path: leaf.tobytes() for path, leaf in theirs.items()
    }


@pytest.fixture
def broken_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps 2 and 5 of a stage give a gradient of NaN, with finite losses. No curves are drawn, to
    save time."""
    real = programs.make_train_step

    def make(*arguments: Any) -> Any:
        step = real(*arguments)

        def broken(state: Any, batch: Any, cached: Any = None) -> Any:
            updated, metrics = step(state, batch, cached)
            nan = jnp.where((state.step == 1) | (state.step == 4), jnp.nan, 0.0)
            params = jax.tree.map(
                lambda new, old: new if new is old else new + nan, updated.params, state.params
            )
            return updated.replace(params=params), metrics | {
                "gradient_norm": metrics["gradient_norm"] + nan
            }

        return broken

    monkeypatch.setattr(programs, "make_train_step", make)
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
    schedule = [float(learning_rates(config.stages[0], 6)[made]) for made in (0, 1, 1, 2, 3, 3)]
    assert [row["learning_rate"] for row in rows] == schedule

    stop_at(3)
    with pytest.raises(cli.Stopped, match="stage mask, step 3 is saved"):
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
        cli.Failure,
        match=r"stage mask, step 5: gradient_norm not finite; .*; --skip-non-finite 2 would",
    ):
        loop.train(replace(config, skip_non_finite=1), begun)
    assert latest(begun).name == "00000003-mask"


def test_work_is_saved_before_a_validation_that_may_fail(
    tiny_run: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a stage, too, if there is much to lose."""
    monkeypatch.setattr(stop, "MUCH", 0.0)
    saved: list[str] = []
    save = Checkpoints.save

    def noted(self: Any, state: Any, meta: Any, *rest: Any) -> None:
        saved.append(f"{meta.name} {'validated' if meta.validated else 'not yet'}")
        save(self, state, meta, *rest)

    monkeypatch.setattr(Checkpoints, "save", noted)
    failing = Mock(side_effect=OSError(errno.EIO, "out of sight"))
    with monkeypatch.context() as patch:
        patch.setattr(watch, "_validate", failing)
        with pytest.raises(cli.Failure, match="out of sight"):
            loop.train(tiny_config, tmp_path)
    meta = latest(tmp_path)
    assert (meta.name, meta.validated) == ("00000006-rpn", False)
    assert saved == ["00000006-rpn not yet"]
    loop.train(tiny_config, tmp_path)
    assert saved[1:3] == ["00000012-rpn not yet", "00000012-rpn validated"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == (tiny_run / "metrics.jsonl").read_bytes()
    assert_same_bits(tiny_run, tmp_path)


def test_a_device_without_memory_for_validation_loses_nothing(
    tiny_run: Path, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a stage is saved before it; validation follows when the run goes on, by another
    batch as well. A row that was written before a kill is not there twice."""
    validate, limit = watch._validate, tiny_config.data.eval_batch_size
    tried: list[int] = []

    def limited(run: Any, *rest: Any) -> dict[str, float]:
        tried.append(run.config.data.eval_batch_size)
        if tried[-1] == limit and len(tried) > 2:  # both epochs of the first stage are validated
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return validate(run, *rest)

    save, unsaved = watch.Watch.save, []

    def saved(self: Any, *arguments: Any, **options: Any) -> None:
        unsaved.append(stops[-1].unsaved)  # Ctrl-C would wait
        save(self, *arguments, **options)

    stops: list[Any] = []
    stop = loop.StopSignal

    def noted(run: Any) -> Any:
        stops.append(stop(run))
        return stops[-1]

    monkeypatch.setattr(loop, "StopSignal", noted)
    monkeypatch.setattr(watch.Watch, "save", saved)
    monkeypatch.setattr(watch, "_validate", limited)
    run = tmp_path / "run"
    line = (
        r"^stage box, validation after step 6: out of device memory with 3 images at once "
        r"\(--data.eval-batch-size 1 needs less\); the same command goes on from the last check"
    )
    for _ in range(2):
        with pytest.raises(cli.Failure, match=line):
            loop.train(tiny_config, run)
        meta = latest(run)
        assert (meta.stage, meta.stage_step) == ("box", 6)
        assert (meta.stage_complete, meta.validated) == (False, False)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "00000012-rpn",
        "00000018-box",
    }
    with (run / "metrics.jsonl").open("a") as file:  # as of a kill between it and the next save
        file.write('{"stage": "box", "step": 6, "epoch": 1, "split": "val", "loss/total": 1.0}\n')
    data = replace(tiny_config.data, eval_batch_size=1)
    loop.train(replace(tiny_config, data=data), run)
    ours, others = read_metrics(run), read_metrics(tiny_run)
    assert [row for row in ours if row["split"] == "train"] == [
        row for row in others if row["split"] == "train"
    ]
    # Means over batches of another size are others; the row of the kill is not among them.
    assert [(row["stage"], row["step"], row["split"], *row) for row in ours] == [
        (row["stage"], row["step"], row["split"], *row) for row in others
    ]
    assert ours[-1]["loss/mask"] == pytest.approx(others[-1]["loss/mask"], rel=0.5)
    assert latest(run) == latest(tiny_run)
    assert unsaved
    assert all(unsaved)


def test_a_device_without_memory_ends_the_run_with_the_need_of_its_batch(
    mask_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*arguments: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(loop, "_train_epoch", run_out)
    with pytest.raises(
        cli.Failure,
        match=r"^out of device memory: a step of batch 2 needs about \d+\.\d\d GiB",
    ) as error:
        loop.train(mask_config, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_a_state_that_is_not_finite_is_not_saved(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update can leave the range of numbers although loss and gradient did not: as if one had,
    at the second step."""

    def overflowed(state: Any) -> dict[str, Any]:
        leaves = flatten(state)
        return (
            leaves
            if state.step == 1
            else leaves | {"opt_state/nu/rpn/logits/bias": np.array([1.0, np.inf])}
        )

    monkeypatch.setattr(watch, "flatten", overflowed)
    with pytest.raises(
        cli.Failure,
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
        cli.Failure, match=r"images: .*\.png: annotation \d+: label 3 is outside 1\.\.2$"
    ) as error:
        loop.train(tiny_config, tmp_path / "run")
    assert "\n" not in str(error.value)
