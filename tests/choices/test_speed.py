"""Speeds by a clock that the programs themselves move; measuring leaves a run as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrcnn_jax.choices import speed
from mrcnn_jax.choices.speed import Speed, measure
from mrcnn_jax.config.schema import Config
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.training import loop, watch
from mrcnn_jax.training.open import OpenRun, open_run
from mrcnn_jax.training.programs import Prepared, Programs

CANVASES = ((64, 96), (96, 64), (96, 96))


class Timed:
    """Stand for the programs of a run, and move the clock as if they were slow."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: Counter[str] = Counter()
        self.shapes: set[tuple[str, tuple[int, ...]]] = set()

    def _called(self, name: str, batch: Any, compiling: float, seconds: float) -> None:
        self.now += seconds if self.calls[name] else compiling + seconds
        self.calls[name] += 1
        self.shapes.add((name, batch.images.shape))

    def step(self, lengths: Any, state: Any, batch: Any) -> Any:
        self._called("step", batch, 30.0, 2.0)
        return state, {"loss/total": 0.0}

    def validate(self, variables: Any, batch: Any, key: Any) -> Any:
        self._called("validate", batch, 10.0, 0.5)
        return {"loss/total": 0.0}, None

    def __call__(self, batch: Any) -> None:
        """Predicts."""
        self._called("predict", batch, 8.0, 6.0)

    def found(self, batch: Any, prediction: None) -> list[Any]:
        return []

    def compare(self, config: Config, split: Any, compared: int) -> None:
        """Half a second an image."""
        self.now += compared / 2

    def save(self, run: OpenRun, state: Any) -> float:
        return 4.0

    def first_variables(self, run: OpenRun) -> Any:
        self.now += 3.0
        return {"params": {}, "batch_stats": {}}


@pytest.fixture
def several(tiny_config: Config, tmp_path: Path) -> Iterator[OpenRun]:
    """A run of one stage on images of three canvases, of 3, 2 and 1 batches in an epoch."""
    data = replace(tiny_config.data, cache=str(tmp_path / "cache"))
    config = replace(tiny_config, data=data, stages=tiny_config.stages[:1])
    with open_run(config, tmp_path / "run") as run:
        data = replace(data, short_side=64, long_side=96, canvases=CANVASES)
        sides = {0: (64, 90), 1: (90, 64), 2: (90, 90)}

        def of(split: Any, canvases: list[int]) -> Any:
            plans = zip(split.plans, canvases, strict=True)
            changed = (plan._replace(canvas=c, resized=sides[c]) for plan, c in plans)
            return replace(split, plans=tuple(changed))

        yield replace(
            run,
            config=replace(config, data=data),
            train_split=of(run.train_split, [0] * 6 + [1] * 4 + [2]),
            val_split=of(run.val_split, [1] * 5 + [2] * 3),
        )


@pytest.mark.parametrize("kept", [False, True])
def test_other_canvases_count_by_their_pixels(
    several: OpenRun, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    programs = Timed()
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: programs.now))
    monkeypatch.setattr(loop, "first_variables", programs.first_variables)
    first = SimpleNamespace(params={}, batch_stats={})
    monkeypatch.setattr(OpenRun, "first_state", lambda *_: first)
    monkeypatch.setattr(speed, "on_devices", lambda run, state: state)
    made = Programs(step=programs.step, validate=programs.validate)
    monkeypatch.setattr(speed, "make_programs", lambda run, index, state: made)
    monkeypatch.setattr(speed, "Predictor", lambda run, mesh: programs)
    monkeypatch.setattr(
        speed, "results_of_split", lambda _, split, plan: [sum(len(p.images) for p in plan)]
    )
    monkeypatch.setattr(speed, "evaluation_of", programs.compare)
    monkeypatch.setattr(speed, "_saving", programs.save)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "folder" if kept else "")
    pixels = 96 * 96 / (64 * 96)  # of the third canvas, as a multiple of the first and second

    found, prepared = measure(several)
    assert prepared == Prepared({"params": {}, "batch_stats": {}}, made)
    assert found == Speed(
        step=pytest.approx(2 * (5 + pixels) / 6),
        compiling=0.0,  # all is compiled, a call for each canvas
        validation=pytest.approx(0.5 * (2 + pixels)),
        evaluation=0.0,
        loading=0.0,  # the clock stands still
        saving=4.0,
    )
    # Three steps of two seconds last longer than 5 s; of validation, eight batches are asked for.
    assert programs.calls == {"step": 1 + 3 + 2, "validate": 1 + 7 + 1}
    assert programs.shapes == {
        *(("step", (2, *canvas, 3)) for canvas in CANVASES),
        *(("validate", (3, *canvas, 3)) for canvas in CANVASES[1:]),
    }

    run = replace(several, config=replace(several.config, evaluate_every_epochs=2))
    assert measure(run)[0].evaluation == 0.0  # of a stage that trains no masks
    (stage,) = run.config.stages
    run = replace(run, config=replace(run.config, stages=(replace(stage, losses=("mask",)),)))
    programs.calls.clear()
    more, _ = measure(run)
    assert more.evaluation == pytest.approx(6 * (2 + pixels) + 8 / 2)
    assert more.compiling == pytest.approx((1 if kept else 2) * 8)
    assert programs.calls["predict"] == 1 + 3


def test_slow_loading_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only the batches that were loaded while the program was compiled."""
    now = 0.0

    def batches(run: Any, stage: Any, split: Any, plan: Any) -> Iterator[int]:
        nonlocal now
        for number in plan:
            now += 0.0 if 1 <= number <= 4 else 4.0
            yield number

    def call(batch: int) -> None:
        nonlocal now
        now += 1.5

    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(speed, "batches", batches)
    config = SimpleNamespace(stages=[None], data=SimpleNamespace(threads=2))
    run: Any = SimpleNamespace(config=config)
    timed = speed._timed(run, None, range(50), call)  # type: ignore[arg-type]
    assert (timed.loading, timed.each) == (4.0, 5.5)


def test_a_run_that_was_measured_has_the_same_bits(
    tiny_config: Config, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny run's own programs, evaluation included; nothing is left in the folder."""
    monkeypatch.setattr(watch, "curves", lambda *_: None)
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    config = replace(
        tiny_config,
        init_from=str(tiny_run),
        stages=tiny_config.stages[2:],
        evaluate_every_epochs=1,
    )
    loop.train(config, tmp_path / "plain")
    found: list[Speed] = []
    left: list[set[str]] = []

    def settle(run: OpenRun) -> tuple[Config, Prepared]:
        rates, prepared = measure(run)
        found.append(rates)
        left.append({path.name for path in run.workdir.iterdir()})
        return run.config, prepared

    monkeypatch.delattr(loop, "make_programs")  # training takes over those that were measured
    loop.train(config, tmp_path / "measured", settle=settle)
    ((rates,), (names,)) = found, left
    assert all(value > 0 for name, value in asdict(rates).items() if name != "compiling")  # kept
    assert names <= {".lock", "data"}
    plain, measured = (tmp_path / name / "metrics.jsonl" for name in ("plain", "measured"))
    assert plain.read_bytes() == measured.read_bytes()
    assert "segm/AP" in read_metrics(tmp_path / "measured")[-1]
