"""Loggers: what they are given, runs that go on, and services that fail.

W&B and MLflow are stood in for where the package begins, by modules that record the calls; where
the packages are installed, they are tried too, without a network.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config
from mrcnn_jax.runs import loggers
from mrcnn_jax.runs.loggers import Service, TensorBoard, open_loggers, refuse_missing
from mrcnn_jax.runs.metrics import MetricsLog

ROWS = [
    ("rpn", 1, "train", {"loss/total": 0.5, "learning_rate": 0.1}),
    ("rpn", 1, "val", {"loss/total": 0.25, "recall@16": 0.75}),
    ("box", 1, "train", {"loss/total": 2.0}),
]
FAILED = "nothing more is sent there; metrics.jsonl has all numbers\n"


def config(*names: Any) -> Config:
    return replace(tiny.get_config(), loggers=names)


def write(log: MetricsLog, rows: Sequence[Any] = ROWS) -> None:
    for stage, step, split, values in rows:
        log.write(stage=stage, step=step, epoch=1, split=split, values=values)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="stand-in")
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


class Wandb:
    """Stands in for the package wandb."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: list[Mapping[str, float]] = []
        self.ends: list[int] = []
        self.axes: dict[str, str] = {}
        stand_in(monkeypatch, "wandb", init=self.init, Settings=dict)
        for variable in ("WANDB_PROJECT", "WANDB_NAME"):
            monkeypatch.delenv(variable, raising=False)

    def init(self, **options: Any) -> Any:
        self.runs.append(options)
        return SimpleNamespace(
            log=self.log,
            finish=lambda exit_code: self.ends.append(exit_code),
            define_metric=self.define_metric,
        )

    def define_metric(self, name: str, step_metric: str = "", hidden: bool = False) -> None:
        self.axes |= {name: step_metric} if step_metric else {}

    def log(self, values: Mapping[str, float]) -> None:
        self.logged.append(values)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    return Wandb(monkeypatch)


class MLflow:
    """Stands in for the package mlflow, with one server's runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.metrics: list[tuple[str, str, float, int]] = []
        self.sizes: list[int] = []
        self.status: dict[str, str] = {}
        self.experiments: list[str] = []
        self.files: dict[str, Any] = {}
        entities = SimpleNamespace(Metric=lambda *fields: fields)
        stand_in(monkeypatch, "mlflow", MlflowClient=lambda: self, entities=entities)
        monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id=name) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments.append(name)
        return name

    def create_run(self, experiment: str, run_name: str) -> Any:
        number = f"{experiment}-{run_name}-{len(self.status)}"
        self.status[number] = "RUNNING"
        return SimpleNamespace(info=SimpleNamespace(run_id=number))

    def update_run(self, run: str, status: str) -> None:
        assert run in self.status
        self.status[run] = status

    set_terminated = update_run

    def log_dict(self, run: str, content: Any, name: str) -> None:
        self.files[name] = content

    def log_batch(self, run: str, metrics: Any) -> None:
        self.sizes.append(len(metrics))
        self.metrics += [(run, name, value, step) for name, value, _, step in metrics]


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> MLflow:
    return MLflow(monkeypatch)


def run(workdir: Path, *names: str, resume: bool = False, rows: Sequence[Any] = ROWS) -> None:
    """A start of a run, as training makes one."""
    workdir.mkdir(exist_ok=True)
    with MetricsLog(workdir) as log:
        log.truncate(("rpn", "box", "mask"), *((1, 1) if resume else (0, -1)))
        log.add(open_loggers(config(*names), workdir))
        write(log, rows)


def test_wandb_is_given_every_row(wandb: Wandb, tmp_path: Path) -> None:
    run(tmp_path / "mine", "wandb")
    assert wandb.logged == [
        {"rpn/train/loss/total": 0.5, "rpn/train/learning_rate": 0.1, "rpn/step": 1},
        {"rpn/val/loss/total": 0.25, "rpn/val/recall@16": 0.75, "rpn/step": 1},
        {"box/train/loss/total": 2.0, "box/step": 1},
    ]
    assert wandb.axes == {f"{stage}/*": f"{stage}/step" for stage in ("rpn", "box", "mask")}
    (options,) = wandb.runs
    assert (options["project"], options["name"]) == ("mrcnn_jax", "mine")
    assert options["dir"] == str(tmp_path / "mine")
    assert options["config"]["stages"][0]["name"] == "rpn"
    assert wandb.ends == [0]


def test_mlflow_is_given_every_row(mlflow: MLflow, tmp_path: Path) -> None:
    run(tmp_path / "mine", "mlflow")
    number = "mrcnn_jax-mine-0"
    assert mlflow.metrics == [
        (number, "rpn/train/loss/total", 0.5, 1),
        (number, "rpn/train/learning_rate", 0.1, 1),
        (number, "rpn/val/loss/total", 0.25, 1),
        (number, "rpn/val/recall_16", 0.75, 1),  # MLflow has no @
        (number, "box/train/loss/total", 2.0, 1),
    ]
    assert mlflow.files["config.json"]["stages"][0]["name"] == "rpn"
    assert mlflow.status == {number: "FINISHED"}


def test_a_resumed_run_goes_on_at_its_services(
    wandb: Wandb, mlflow: MLflow, tmp_path: Path
) -> None:
    """Under the same ids, and without the rows that were sent."""
    run(tmp_path / "mine", "wandb", "mlflow")
    last = ("box", 2, "train", {"loss/total": 1.0})
    run(tmp_path / "mine", "wandb", "mlflow", resume=True, rows=[last])
    first, second = wandb.runs
    assert first["id"] == second["id"]
    assert (first["resume"], second["resume"]) == ("allow", "allow")
    assert [values.get("box/train/loss/total") for values in wandb.logged] == [None, None, 2, 1]
    assert mlflow.experiments == ["mrcnn_jax"]
    assert mlflow.status == {"mrcnn_jax-mine-0": "FINISHED"}
    assert mlflow.metrics[-1] == ("mrcnn_jax-mine-0", "box/train/loss/total", 1.0, 2)
    assert len(mlflow.metrics) == 6
    run(tmp_path / "other", "wandb")
    assert wandb.runs[2]["id"] != first["id"]


def test_a_service_that_is_added_on_resume_is_given_the_earlier_rows(
    wandb: Wandb, tmp_path: Path
) -> None:
    run(tmp_path, "tensorboard")
    run(tmp_path, "wandb", resume=True, rows=[])
    assert [values["rpn/step"] for values in wandb.logged[:2]] == [1, 1]
    assert len(wandb.logged) == len(ROWS)


@pytest.mark.parametrize("content", ["", "[1]", '{"wandb": 3}'])
def test_ids_that_are_damaged_begin_a_new_run(content: str, wandb: Wandb, tmp_path: Path) -> None:
    (tmp_path / loggers.IDS).write_text(content)
    run(tmp_path, "wandb")
    run(tmp_path, "wandb", resume=True, rows=[])
    assert wandb.runs[0]["id"] == wandb.runs[1]["id"] != 3


def test_a_run_that_was_stopped_says_so(wandb: Wandb, mlflow: MLflow, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.add(open_loggers(config("wandb", "mlflow"), tmp_path))
    with pytest.raises(KeyboardInterrupt), log:
        raise KeyboardInterrupt
    assert wandb.ends == [1]
    assert list(mlflow.status.values()) == ["KILLED"]


def test_mlflow_is_sent_no_more_metrics_at_once_than_it_takes(
    mlflow: MLflow, tmp_path: Path
) -> None:
    session = loggers._MLflow(config("mlflow"), tmp_path)
    session.send([(step, {"rpn/train/loss/total": 1.0}) for step in range(2001)])
    assert mlflow.sizes == [1000, 1000, 1]
    assert [step for *_, step in mlflow.metrics] == list(range(2001))


# -- services that fail ----------------------------------------------------------------------------


def test_a_service_that_fails_is_told_once(
    wandb: Wandb, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    called = []

    def fail(values: Any) -> None:
        called.append(values)
        raise OSError("no route\nto host")

    monkeypatch.setattr(wandb, "log", fail)
    with MetricsLog(tmp_path) as log:
        log.add(open_loggers(config("wandb", "tensorboard"), tmp_path))
        write(log)
        log.loggers[0]._thread.join(0.5)  # type: ignore[attr-defined]
        write(log)
    assert len(called) == 1
    assert wandb.ends == [1]  # as failed
    assert capsys.readouterr().out == f"warning: loggers: wandb: no route to host: {FAILED}"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2 * len(ROWS)
    assert len(list((tmp_path / "tensorboard").glob("*/*/events*"))) == 3


def test_a_service_that_cannot_be_opened_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> Any:
        raise ConnectionError

    with MetricsLog(tmp_path) as log:
        log.truncate(("rpn", "box"), 0, -1)
        log.add([Service("wandb", refused)])
        write(log)
    assert capsys.readouterr().out == f"warning: loggers: wandb: ConnectionError: {FAILED}"


def test_a_service_that_hangs_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    freed = threading.Event()
    session = SimpleNamespace(new=True, send=lambda rows: freed.wait(60), end=lambda failed: None)
    try:
        with MetricsLog(tmp_path) as log:
            log.add([Service("mlflow", lambda: session, seconds=0.1)])
            write(log)
    finally:
        freed.set()
    assert capsys.readouterr().out == (
        "warning: loggers: mlflow: not everything was sent in 0.1 s; metrics.jsonl has all "
        "numbers\n"
    )


# -- packages that are not installed ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.parametrize("folder", [False, True])
def test_a_package_that_is_not_installed_is_one_line(
    name: str, folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of its name, such as W&B's own beside a script, is not the package."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    if folder:
        (tmp_path / name).mkdir()
    assert (importlib.util.find_spec(name) is not None) == folder
    with pytest.raises(ConfigError, match=rf"^loggers: {name} is not .*pip install '{name}.*'\)$"):
        refuse_missing(("tensorboard", name))


def test_a_package_that_is_there_is_not_refused(wandb: Wandb, mlflow: MLflow) -> None:
    refuse_missing(("tensorboard", "wandb", "mlflow"))


def test_only_what_is_asked_for_is_opened(tmp_path: Path) -> None:
    assert open_loggers(config(), tmp_path) == []
    (made,) = open_loggers(config("tensorboard"), tmp_path)
    assert isinstance(made, TensorBoard)


# -- the packages themselves -----------------------------------------------------------------------


def test_wandb_itself_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, "wandb")
    (first,) = (tmp_path / "wandb").glob("offline-run-*-*/*.wandb")
    names = (b"rpn/train/loss/total", b"rpn/val/loss/total", b"box/step", b"0.25")
    end = time.monotonic() + 60  # a process of its own writes them, on a busy machine later
    while not all(name in first.read_bytes() for name in names):
        assert time.monotonic() < end
        time.sleep(0.1)
    run(tmp_path, "wandb", resume=True, rows=[])
    numbers = {path.stem for path in (tmp_path / "wandb").glob("offline-run-*-*/*.wandb")}
    assert numbers == {first.stem}


def test_mlflow_itself_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    run(tmp_path / "mine", "mlflow")
    run(tmp_path / "mine", "mlflow", resume=True, rows=[("box", 2, "train", {"loss/total": 1.0})])
    client = package.MlflowClient()
    experiment = client.get_experiment_by_name("mrcnn_jax")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    history = client.get_metric_history(found.info.run_id, "box/train/loss/total")
    assert [(metric.step, metric.value) for metric in history] == [(1, 2.0), (2, 1.0)]


def test_mlflow_itself_without_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run(tmp_path / "mine", "mlflow")
    out = capsys.readouterr().out
    assert out.startswith("warning: loggers: mlflow: ")
    assert out.endswith(FAILED)
    assert out.count("\n") == 1
