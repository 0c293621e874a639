"""A training that ends in time: by a simulated clock, and from the command line up to a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrcnn_jax.choices import minutes, speed
from mrcnn_jax.choices.minutes import Fit, fitted, late
from mrcnn_jax.choices.speed import Speed
from mrcnn_jax.commands import own_folder
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_file, load_config_json
from mrcnn_jax.config.schema import Config
from mrcnn_jax.training import loop
from mrcnn_jax.training.programs import Prepared, Programs

SPEED = Speed(step=1.0, loading=0.0, compiling=40.0, validation=5.0, evaluation=0.0, saving=0.0)


def config_of(**stage: Any) -> Config:
    """configs/finetune.py with other values in its stage, validated twice as often as trained."""
    config = load_config_file("finetune")
    (usual,) = config.stages
    return replace(config, stages=(replace(usual, **{"epochs": 20} | stage),))


def fit(
    minutes: float = 15, speed: Speed = SPEED, *, config: Config | None = None, **options: Any
) -> Fit:
    """With 50 steps an epoch, when 35 s are used."""
    options = {"used": 35.0, "steps_per_epoch": 50} | options
    return fitted(config or config_of(), speed, minutes=minutes, **options)


def simulated(config: Config, speed: Speed, *, steps_per_epoch: int, used: float) -> float:
    """Seconds until such a training ends, by the loop's rules."""
    clock, steps = used + speed.compiling, round(config.stages[0].epochs * steps_per_epoch)
    for step in range(1, steps + 1):
        clock += speed.step + (speed.loading if step % steps_per_epoch == 1 else 0)
        epoch, within = divmod(step, steps_per_epoch)
        validates, evaluates = (
            step == steps or (every > 0 and not within and epoch % every == 0)
            for every in (config.validate_every_epochs, config.evaluate_every_epochs)
        )
        clock += validates * speed.validation + evaluates * speed.evaluation
        ends = step == steps or (evaluates and config.evaluate_every_epochs > 0)
        saves = 2 if ends else step % config.save_every_steps == 0
        clock += saves * speed.saving
    return clock


def test_by_hand() -> None:
    """15 minutes less a twentieth, 35 s, 40 s and 5 s are 775 s. A validation every other epoch is
    a twentieth of its steps: 738 steps of 1.05 s are 774.9 s."""
    found = fit()
    (stage,) = found.config.stages
    assert (stage.epochs, found.config.validate_every_epochs) == (14.76, 2)
    assert stage.optimizer.warmup_steps == 73
    assert found.why == "15 minutes: 738 steps fit, 1 s each"
    assert found.spent == (
        "--minutes 15: 1 s a step, 738 steps; 35 s were used, 40 s are for compiling evaluation, "
        "5 s are for validation and saving at the end, 45 s stay in reserve; the 1000 steps that "
        "are usual need about --minutes 20"  # (80 + 1050) / .95 s
    )
    same = replace(stage, epochs=20, optimizer=config_of().stages[0].optimizer)
    assert (same,) == config_of().stages  # nothing else is changed


@pytest.mark.parametrize("seconds", [1.0, 0.13, 3.7])
@pytest.mark.parametrize("validation", [0.2, 5.0, 60.0])
@pytest.mark.parametrize("steps_per_epoch", [7, 50, 3000])
def test_a_simulated_training_ends_in_time(
    seconds: float, validation: float, steps_per_epoch: int
) -> None:
    """And uses its time; no more than a twentieth of it for validation before the end."""
    rates = replace(SPEED, step=seconds, validation=validation, loading=seconds / 9, saving=2.0)
    config = config_of(epochs=10**5 / steps_per_epoch)
    found = fit(20, rates, config=config, steps_per_epoch=steps_per_epoch).config
    ends = simulated(found, rates, steps_per_epoch=steps_per_epoch, used=35.0)
    assert 0.9 * 0.95 * 1200 < ends <= 0.95 * 1200
    steps = round(found.stages[0].epochs * steps_per_epoch)
    without = replace(rates, validation=0.0)
    of_steps = simulated(found, without, steps_per_epoch=steps_per_epoch, used=35.0)
    assert ends - of_steps - validation <= 0.05 * steps * seconds + 1e-6


@pytest.mark.parametrize("every", [1, 3])
def test_what_the_user_asks_between_is_counted(every: int) -> None:
    rates = replace(SPEED, validation=9.0, evaluation=30.0, saving=3.0)
    config = replace(config_of(), evaluate_every_epochs=2, validate_every_epochs=every)
    found = fit(speed=rates, config=config, given={"validate_every_epochs"})
    assert found.config.validate_every_epochs == every
    ends = simulated(found.config, rates, steps_per_epoch=50, used=35.0)
    assert 0.9 * 0.95 * 900 < ends <= 0.95 * 900
    assert "45 s are for validation, evaluation and saving at the end" in found.spent


def test_no_more_than_four_times_the_usual() -> None:
    found = fit(600)
    assert found.config.stages[0].epochs == 80
    assert found.config.stages[0].optimizer.warmup_steps == 400
    assert found.why.endswith(" steps fit, 1 s each; at most 4 times the usual 1000")
    assert fit(600, config=config_of(epochs=300)).config.stages[0].optimizer.warmup_steps == 500


def test_a_part_of_an_epoch_is_enough() -> None:
    found = fit(steps_per_epoch=5000).config
    assert (found.stages[0].epochs, found.validate_every_epochs) == (775 / 5000, 1)


def test_given_fields_stay() -> None:
    (stage,) = config_of().stages
    optimizer = replace(stage.optimizer, warmup_steps=7, accumulate_steps=4)
    config = config_of(optimizer=optimizer)
    (found,) = fit(config=config, given={"stages.0.optimizer.warmup_steps"}).config.stages
    assert found.optimizer == optimizer
    (found,) = fit(config=config).config.stages
    assert found.optimizer.warmup_steps == 18  # a tenth of 738 / 4 updates


def test_too_short_a_time_is_refused_with_the_least() -> None:
    """80 s, twenty steps and the reserve are 105 s: 2 minutes, and a tenth for good measure."""
    line = (
        r"^--minutes 1: too short: 20 steps of 1 s and 80 s for all else \(5 s of them for "
        r"validation and saving at the end\) need --minutes 2$"
    )
    with pytest.raises(ConfigError, match=line):
        fit(1)
    with pytest.raises(ConfigError, match=r"need --minutes 2$"):
        fit(0.01)
    assert fit(2).config.stages[0].epochs * 50 == math.floor(0.95 * 120 - 80)
    with pytest.raises(ConfigError, match=r"20 steps of 100 s and 80 s .* --minutes 41$"):
        fit(speed=replace(SPEED, step=100.0))


def test_five_seconds_are_kept_at_least() -> None:
    """Of a minute a twentieth would be 3 s."""
    rates = replace(SPEED, step=0.01, compiling=0.0, validation=0.0)
    assert round(fit(1, rates, used=35).config.stages[0].epochs * 50) == 2000
    with pytest.raises(ConfigError, match=r"need --minutes 2$"):
        fit(1, rates, used=55)


def test_a_late_end_is_told() -> None:
    assert late(15, 16.4 * 60) is None
    assert late(15, 16.6 * 60) == "--minutes 15: it took 16.6 minutes"


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the command reads from its clock: when it was asked, after measuring, and at its end."""
    times = [100.0, 130.0, 233.0]
    monkeypatch.setattr(own_folder, "time", SimpleNamespace(monotonic=lambda: times.pop(0)))
    return times


def test_a_run_keeps_the_epochs_that_it_began_with(
    tiny_data: Path,
    kept_run: Path,
    programs: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: list[float],
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its speed is measured once. Of 120 s there are 114 - 30 - 10 - 4 for 140 steps of half a
    second, and 6 steps are an epoch."""
    opened: list[int] = []
    prepared = Prepared({"params": {}}, Programs(step=None, validate=None))

    def measured(run: Any) -> tuple[Speed, Prepared]:
        opened.append(run.steps_per_epoch)
        return replace(SPEED, step=0.5, compiling=10.0, validation=4.0), prepared

    monkeypatch.setattr(speed, "measure", measured)
    trained: list[int] = []
    handed_on: list[bool] = []

    def stage(
        watch: Any, stop: Any, progress: Any, variables: Any, state: Any, programs: Any
    ) -> Any:
        trained.append(watch.run.total_steps(progress.stage_index))
        handed_on.append(variables is prepared.variables and programs is prepared.programs)
        return variables

    monkeypatch.setattr(loop, "_train_stage", stage)
    run = tmp_path / "run"
    words = ("train", tiny_data, "--workdir", run, "--init-from", kept_run, "--minutes", 2)
    assert mrcnn(*words) == 0
    config = load_config_json(run / "config.json")
    assert (opened, trained, clock) == ([6], [140], [])
    assert handed_on == [True]
    assert config.stages[0].epochs == 23.333333
    assert config.stages[0].optimizer.warmup_steps == 14
    assert config.validate_every_epochs == 24  # at the end alone
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("validation "))
    assert "of losses; 5% of the time at most" in row
    (row,) = (line for line in lines if line.startswith("epochs "))
    assert re.split("  +", row) == [
        "epochs",
        "23.3333 of 11 images",
        "2 minutes: 140 steps fit, 0.5 s each",
        "--minutes",
    ]
    assert any("a tenth of the updates" in line and "warm-up 14" in line for line in lines)
    assert "--minutes 2: it took 2.2 minutes" in lines

    clock.append(999.0)  # of parsing; nothing else asks for the time
    before = (run / "config.json").read_bytes()
    assert mrcnn(*words) == 0
    assert (opened, trained, clock) == ([6], [140, 140], [])
    assert (run / "config.json").read_bytes() == before
    assert "--minutes: the run keeps the epochs that it began with\n" in capsys.readouterr().out


def test_a_time_that_is_too_short_takes_no_folder(
    tiny_data: Path,
    kept_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(speed, "measure", lambda run: (replace(SPEED, compiling=3600.0), None))
    words = ("train", tiny_data, "--workdir", tmp_path / "run", "--init-from", kept_run)
    assert mrcnn(*words, "--minutes", 15) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --minutes 15: too short: 20 steps of 1 s and 36")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("my", "--minutes", "0"), "--minutes: must be positive and finite"),
        (("my", "--minutes", "nan"), "--minutes: must be positive and finite"),
        (("my", "--minutes=inf"), "--minutes: must be positive and finite"),
        (
            ("my", "--minutes", "5", "--stages.0.epochs", "3"),
            "--minutes: not with --stages.0.epochs, which it sets",
        ),
        (
            ("--config", "shapes", "--workdir", "run", "--minutes", "5"),
            "--minutes: goes with a folder of data: ",
        ),
    ],
)
def test_mistakes(
    words: tuple[str, ...],
    line: str,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    assert mrcnn("train", *words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {line}")
    assert errors.count("\n") == 1


def test_a_table_of_two_stages_is_refused(
    tiny_data: Path,
    kept_run: Path,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Which that of a folder becomes where masks alone are trained, and a head for their IoU."""
    words = ("--weights", kept_run, "--stages.0.losses", "mask", "--model.mask-iou-head.enabled")
    workdir = tmp_path / "run"
    assert mrcnn("train", tiny_data, "--workdir", workdir, *words, "--minutes", 15) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --minutes: fits the epochs of one stage, but there are 2 (")
    assert not (workdir / "config.json").exists()


def test_cached_features_are_refused(
    tiny_data: Path,
    kept_run: Path,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are another argument of a step, which would be compiled again."""
    words = ("--weights", kept_run, "--minutes", 15, "--cache-features", "float32")
    workdir = tmp_path / "run"
    assert mrcnn("train", tiny_data, "--workdir", workdir, *words) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --minutes: steps are measured without features that are kept")
    assert not workdir.exists()


def test_a_run_that_goes_on_takes_no_minutes(
    kept_run: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert mrcnn("train", "--resume", kept_run, "--minutes", "5") == 2
    assert "a run that goes on keeps its own" in capsys.readouterr().err


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    minutes.refuse_several_processes()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"^--minutes: measures in a single .* has 2: give"):
        minutes.refuse_several_processes()
