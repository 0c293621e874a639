"""The report's experiments: a job whose table is what its runs left behind, however often it was
stopped. (What it plans: test_variants.py.)"""

from __future__ import annotations

import json
import os
import signal
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orbax.checkpoint as ocp
import pytest

from mrcnn_jax import cli
from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.commands import experiments
from mrcnn_jax.commands.experiment_job import Record
from mrcnn_jax.commands.experiment_table import by_stage, seconds_per_epoch, spread
from mrcnn_jax.commands.experiments import Arguments
from mrcnn_jax.commands.variants import VARIANTS, load_recipe, plan
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.figures import comparison
from mrcnn_jax.training import loop, watch

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "tiny.py"
WORKDIR = Path("job")


def arguments(workdir: Path, data: Path, *only: str) -> Arguments:
    return Arguments(workdir, recipe=str(TINY), only=only, data_root=str(data))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\0" * 9,
        "[" * 100_000,
        "[]",
        '{"training_seconds": "1"}',
        '{"training_seconds": NaN}',
        '{"date": 3}',
        '{"dat\xe9": "2026"}',
        '{"training_seconds": ' + "1" * 400 + "}",
    ],
    ids=lambda text: ascii(text[:30]),
)
def test_notes_that_are_damaged(content: str, tmp_path: Path) -> None:
    run: Any = SimpleNamespace(folder=tmp_path)
    notes = Record(training_seconds=2, date="2026-11-28")
    notes.save(run)
    assert Record.of(run) == notes
    (tmp_path / "experiment.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/experiment\.json: [^\n]*$"):
        Record.of(run)


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "experiment.json").read_text())


def arrays(run: Path) -> dict[str, bytes]:
    """Parameters, statistics and optimiser state of a run's last checkpoint, as they lie on the
    disk."""
    checkpoint = max((run / "checkpoints").iterdir())
    reader = ocp.PyTreeCheckpointer()
    return {
        path: leaf.tobytes()
        for item in ("model", "training")
        for path, leaf in reader.restore(checkpoint / item).items()
    }


@pytest.fixture(scope="module")
def job(tiny_data: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that was stopped twice: by SIGTERM between the RPN's epochs, and in an
    evaluation that had its figures. Its programs are those of the tiny run."""
    workdir = tmp_path_factory.mktemp("experiments") / "job"
    baseline = workdir / "seed0" / "baseline"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "curves", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(cli.Stopped, match="stage rpn, step 6 is saved in"):
            experiments.work(arguments(workdir, tiny_data, "mask_activation"))
    before = record(baseline / "rpn")["training_seconds"]

    def stop(*_: Any) -> None:
        raise cli.Stopped("stopped by SIGTERM", signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "proposals_figure", stop)
        with pytest.raises(cli.Stopped):
            experiments.work(arguments(workdir, tiny_data, "mask_activation"))
    assert 0 < before < record(baseline / "rpn")["training_seconds"]
    before = record(baseline / "mask")["evaluation_seconds"]
    (baseline / "mask" / "eval" / "metrics.json").write_text("{}")  # a stop could have cut it short

    experiments.work(arguments(workdir, tiny_data, "mask_activation"))
    assert 0 < before < record(baseline / "mask")["evaluation_seconds"]
    return workdir


def test_shared_stages_are_trained_once(job: Path) -> None:
    rows = {
        str(path.parent.relative_to(job)): path.read_text().splitlines()
        for path in job.glob("seed*/*/*/timing.jsonl")
    }
    assert {run: [json.loads(line)["epoch"] for line in lines] for run, lines in rows.items()} == {
        "seed0/baseline/box": [1],
        "seed0/baseline/mask": [1],
        "seed0/baseline/rpn": [1, 2],
        "seed0/mask_activation-softmax/mask": [1],
    }


def test_the_table_is_what_the_runs_left(job: Path, tiny_data: Path) -> None:
    """Its figures against eval/metrics.json, the times against timing.jsonl, the parameters against
    the checkpoints' arrays."""
    table = json.loads((job / "table.json").read_text())
    lines = (job / "table.md").read_text().splitlines()
    cells = {
        line.split(" | ")[0].removeprefix("| "): line.removeprefix("| ").split(" | ")[1:]
        for line in lines[2:4]
    }
    assert (
        list(cells)
        == [row["variant"] for row in table["rows"]]
        == ["baseline", "mask_activation softmax"]
    )
    names = ["recall@16", "recall@16/small", "recall@16/medium", "recall@16/large"]
    names += ["bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50", "segm/AP75"]
    for row, folder in zip(table["rows"], ("baseline", "mask_activation-softmax"), strict=True):
        run = job / "seed0" / folder / "mask"
        metrics = json.loads((run / "eval" / "metrics.json").read_text())
        assert row["runs"] == [str(run)]
        assert row["metrics"] == {name: [metrics.get(name)] for name in names}
        shown = cells[row["variant"]]
        assert [cell == "-" for cell in shown[:9]] == [metrics.get(name, -1) < 0 for name in names]
        assert [float(cell) for cell in shown[:9] if cell != "-"] == [
            pytest.approx(metrics[name], abs=5.1e-4) for name in names if metrics.get(name, -1) >= 0
        ]

        chain = {"rpn": job / "seed0/baseline/rpn", "box": job / "seed0/baseline/box", "mask": run}
        for stage, path in chain.items():
            rows = [json.loads(line) for line in (path / "timing.jsonl").read_text().splitlines()]
            assert row["seconds_per_epoch"][stage] == [
                pytest.approx(statistics.median(r["seconds"] for r in rows), abs=2e-3)
            ]
        (checkpoint,) = (run / "checkpoints").iterdir()
        leaves = ocp.PyTreeCheckpointer().restore(checkpoint / "model")
        assert row["parameters"] == sum(
            leaf.size for path, leaf in leaves.items() if path.startswith("params/")
        )
        assert shown[10] == f"{row['parameters']:,}"
        experiment = row["variant"].split()[0]
        assert row["command"] == (
            f"python -m mrcnn_jax experiments --workdir {job} --recipe {TINY} "
            f"--data-root {tiny_data} --only {experiment}"
        )
    timed = [
        json.loads(line)["seconds"]
        for path in job.glob("seed0/*/*/timing.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert sum(timed) < table["training_seconds"]
    records = [record(path) for path in job.glob("seed0/*/*")]
    for kind in ("training_seconds", "evaluation_seconds"):
        assert table[kind] == pytest.approx(sum(found[kind] for found in records), abs=0.1)


def test_a_finished_job_writes_the_same_table(
    job: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when fewer experiments are asked for."""
    tables = {path.name: path.read_bytes() for path in job.glob("table.*")}
    before = sorted((path, path.stat().st_mtime_ns) for path in (job / "seed0").rglob("*"))
    for path in job.glob("table.*"):
        path.unlink()
    experiments.work(arguments(job, tiny_data, "mask_activation"))
    output = capsys.readouterr().out
    assert output.startswith("6 pieces of work, 6 of them done\n")
    assert (job / "table.md").read_text() in output
    experiments.work(arguments(job, tiny_data, "baseline"))
    assert {path.name: path.read_bytes() for path in job.glob("table.*")} == tables
    assert sorted((path, path.stat().st_mtime_ns) for path in (job / "seed0").rglob("*")) == before


def test_another_recipe_in_the_same_folder_is_refused(
    job: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Before anything is trained, also of a variant that is not begun."""
    path = tmp_path / "recipe.py"
    path.write_text(TINY.read_text().replace("epochs=(2, 1, 1)", "epochs=(2, 1, 2)"))
    with pytest.raises(
        ConfigError, match=r"baseline/mask: holds a run of another config: stages.0.epochs: 1 -> 2 "
    ):
        experiments.work(replace(arguments(job, tiny_data, "training"), recipe=str(path)))
    assert not (job / "seed0" / "training-joint").exists()


@pytest.mark.parametrize(
    ("stage", "variant"),
    [("rpn", "roi_op pool"), ("box", "mask_activation softmax"), ("mask", "baseline")],
    ids=["rpn", "box", "mask"],
)
def test_shared_and_stopped_runs_have_the_bits_of_others(
    stage: str, variant: str, job: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Each stage of the baseline, trained without a stop by the whole config of a variant that
    shares it."""
    recipe = load_recipe(str(TINY), str(tiny_data))
    (shared,) = (run for run in plan(recipe, job, seeds=1)[0][0].runs if run.stage.name == stage)
    model = {variant.title: variant for variant in VARIANTS}[variant].change(recipe).model
    loop.train(replace(shared.config, model=model), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        shared.folder / "metrics.jsonl"
    ).read_bytes()
    assert arrays(tmp_path / "run") == arrays(shared.folder)
    if stage == "mask":
        evaluation.run(evaluation.Arguments(workdir=tmp_path / "run", figures=0))
        for name in ("metrics.json", "detections.json"):
            assert (tmp_path / "run" / "eval" / name).read_bytes() == (
                shared.folder / "eval" / name
            ).read_bytes()


def test_seconds_of_epochs_that_were_cut() -> None:
    """Whole epochs count; where there are none, what there is stands for its share of the steps."""
    cut, whole = (
        {"steps": 2, "seconds": 9.0},
        [{"steps": 6, "seconds": seconds} for seconds in (3.0, 5.0, 4.0)],
    )
    assert seconds_per_epoch([cut, *whole], steps=6) == 4.0
    assert seconds_per_epoch([cut], steps=6) == 27.0


def test_stages_that_are_not_those_of_the_head_are_named() -> None:
    head = ("rpn", "box", "mask")
    seconds = {"rpn": [1.0], "box": [2.0, 4.0], "mask": [3.0]}
    assert by_stage(seconds, head) == "1.0 / 3.0 ± 1.4 / 3.0"
    assert by_stage({"rpn": [1.0], "box2": [2.0]}, head) == "rpn 1.0 / box2 2.0"


@pytest.fixture
def handlers() -> Iterator[dict[signal.Signals, Any]]:
    """The handlers of both signals, which come back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_stop_the_job(handlers: dict[signal.Signals, Any]) -> None:
    """SIGTERM and the first Ctrl-C say so in one line; the second Ctrl-C is Python's own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests
    experiments.stop_when_asked(WORKDIR)
    for number in handlers:
        line = f"stopped by {number.name}: what is done is kept in job"
        with pytest.raises(cli.Stopped, match=line) as stopped:
            signal.raise_signal(number)
        assert stopped.value.number == number
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("handlers")
def test_ctrl_c_in_the_background_of_a_script_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    experiments.stop_when_asked(WORKDIR)
    signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_several_seeds_are_a_mean_and_a_standard_deviation() -> None:
    assert spread([0.1, 0.2, 0.6], "{:.3f}".format) == "0.300 ± 0.265"
    assert spread([0.25], "{:.3f}".format) == "0.250"
    assert spread([-1.0, -1.0], "{:.3f}".format) == spread([None], "{:.3f}".format) == "-"


def test_mistakes() -> None:
    with pytest.raises(
        ConfigError, match=r"^--only: roi: no such experiment \(baseline, backbone, roi_op, "
    ):
        Arguments(Path("job"), only=("mask_loss", "roi"))
    with pytest.raises(ConfigError, match=r"^--seeds: 0: must be at least 1$"):
        Arguments(Path("job"), seeds=0)
