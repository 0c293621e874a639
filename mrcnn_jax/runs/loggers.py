"""Where a run's numbers are shown besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow.

A service may be slow or out of reach: it is talked to in a thread of its own, and when it fails,
that is said once, nothing more is sent to it, and the training goes on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import to_dict
from mrcnn_jax.config.schema import Config
from mrcnn_jax.output import write_file

IDS = "loggers.json"  # in the run's folder: its ids at the services, so that it goes on there
PROJECT = "mrcnn_jax"  # unless $WANDB_PROJECT or $MLFLOW_EXPERIMENT_NAME names another
_PACKAGES = {"wandb": "'wandb>=0.31'", "mlflow": "'mlflow-skinny>=3'"}  # module -> what pip takes
_SECONDS = 60  # to wait in the end for what has not been sent
_MLFLOW_BATCH = 1000  # metrics; the limit of its API
_NOT_OF_MLFLOW = re.compile(r"[^/\w. -]")  # what its names of metrics may not have, as "@"

Row = tuple[int, Mapping[str, float]]


class Logger(Protocol):
    """Takes the numbers of a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers.

        Args:
            step: steps done within the stage.
            values: "<stage>/<split>/<metric>" ("rpn/train/loss/total") -> number.
        """

    def restart(self) -> bool:
        """Forgets what was logged, where that can be done; returns whether nothing is logged now.

        If so, it is given the rows of `metrics.jsonl` once more.
        """

    def sync(self) -> None:
        """Waits until what was logged is on the disk, if it goes there."""

    def close(self, *, failed: bool = False) -> None:
        """Ends the log of a run that has ended or, `failed`, was stopped."""


def refuse_missing(names: Sequence[str]) -> None:
    """Raises ConfigError if the package of a logger is not installed."""
    for name in names:
        if name in _PACKAGES:
            found = importlib.util.find_spec(name)
            # A folder of that name beside the script is found too (W&B makes ./wandb).
            if found is None or found.origin is None:
                raise ConfigError(
                    f"loggers: {name} is not installed (pip install {_PACKAGES[name]})"
                )


def open_loggers(config: Config, workdir: Path) -> list[Logger]:
    """Opens the loggers of a run (`config.loggers`), whose folder exists."""
    made: list[Logger] = []
    for name in config.loggers:
        if name == "tensorboard":
            made.append(TensorBoard(workdir / name))
        elif name == "wandb":
            made.append(Service(name, lambda: _Wandb(config, workdir)))
        else:
            made.append(Service(name, lambda: _MLflow(config, workdir)))
    return made


class TensorBoard:
    """Events in a folder, with a TensorBoard run per stage and split, so that splits share
    charts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Not tensorboardX.SummaryWriter: on a full disk its threads and exit handlers print
        # tracebacks of their own.
        self._writers: dict[str, EventsWriter] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        by_run: dict[str, list[Any]] = {}
        for name, number in values.items():
            stage, split, tag = name.split("/", 2)
            value = Summary.Value(tag=tag, simple_value=number)
            by_run.setdefault(f"{stage}/{split}", []).append(value)
        for run, found in by_run.items():
            if run not in self._writers:
                (self.folder / run).mkdir(parents=True, exist_ok=True)
                self._writers[run] = EventsWriter(str(self.folder / run / "events"))
            event = Event(wall_time=time.time(), step=step, summary=Summary(value=found))
            self._writers[run].write_event(event)

    def restart(self) -> bool:
        # Events cannot be taken back one by one: they are drawn again.
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    def sync(self) -> None:
        for writer in self._writers.values():
            writer.flush()

    def close(self, *, failed: bool = False) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


class _Session(Protocol):
    """A run at a service; every method may raise anything, or wait for the network."""

    new: bool
    """Whether the service knew nothing of the run."""

    def send(self, rows: Sequence[Row]) -> None: ...

    def end(self, failed: bool) -> None: ...


class Service:
    """A logger at a service. Nothing that it raises gets out of here.

    Args:
        name: of the service, for what is said of it.
        session: opens the run there.
        seconds: that `close` waits for what has not been sent.
    """

    def __init__(
        self, name: str, session: Callable[[], _Session], seconds: float = _SECONDS
    ) -> None:
        self.name, self._seconds = name, seconds
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._session: _Session | None = None
        self._failed = False
        self._thread = Thread(target=self._work, daemon=True)
        try:
            self._session = session()
        except Exception as error:
            self._give_up(error)
        else:
            self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._session is not None:
            self._rows.put((step, dict(values)))

    def restart(self) -> bool:
        session = self._session
        return session is not None and session.new

    def sync(self) -> None:
        pass

    def close(self, *, failed: bool = False) -> None:
        if self._thread.ident is None:  # it was never opened
            return
        self._failed = failed
        self._rows.put(None)
        self._thread.join(self._seconds)
        if self._thread.is_alive():
            self._session = None
            self._tell(f"not everything was sent in {self._seconds:g} s")

    def _work(self) -> None:
        open_ = True
        while open_:
            rows = [self._rows.get()]
            while not self._rows.empty():
                rows.append(self._rows.get())
            open_ = None not in rows
            session = self._session
            if session is None:
                continue
            try:
                if sent := [row for row in rows if row is not None]:
                    session.send(sent)
            except Exception as error:
                self._give_up(error)
                with suppress(Exception):
                    session.end(True)
                continue
            if not open_:
                try:
                    session.end(self._failed)
                except Exception as error:
                    self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._session = None
        reason = " ".join(str(error).split()) or type(error).__name__
        self._tell(f"{reason:.300}: nothing more is sent there")

    def _tell(self, text: str) -> None:
        tqdm.write(f"warning: loggers: {self.name}: {text}; metrics.jsonl has all numbers")


class _Wandb:
    """A run of Weights & Biases, whose x axes are the steps of each stage.

    Its own step only grows, so steps that are repeated after a kill would be refused by it.
    """

    def __init__(self, config: Config, workdir: Path) -> None:
        import wandb

        known = _read_id(workdir, "wandb")
        self.new, number = known is None, known or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or workdir.resolve().name,
            id=number,
            resume="allow",
            dir=str(workdir),
            config=to_dict(config),
            settings=wandb.Settings(console="off", finish_timeout=_SECONDS),
        )
        _keep_id(workdir, "wandb", number)
        for stage in config.stages:
            self._run.define_metric(f"{stage.name}/step", hidden=True)
            self._run.define_metric(f"{stage.name}/*", step_metric=f"{stage.name}/step")

    def send(self, rows: Sequence[Row]) -> None:
        for step, values in rows:
            stages = {name.partition("/")[0] for name in values}
            self._run.log({**values, **{f"{stage}/step": step for stage in stages}})

    def end(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """A run of MLflow, where $MLFLOW_TRACKING_URI says."""

    def __init__(self, config: Config, workdir: Path) -> None:
        # By default a request is repeated for minutes, and a run should not wait so long to begin.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        import mlflow

        self._mlflow, self._client = mlflow, mlflow.MlflowClient()
        known = _read_id(workdir, "mlflow")
        self.new = known is None
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self._run = known
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        run = self._client.create_run(number, run_name=workdir.resolve().name)
        self._run = run.info.run_id
        _keep_id(workdir, "mlflow", self._run)
        self._client.log_dict(self._run, to_dict(config), "config.json")

    def send(self, rows: Sequence[Row]) -> None:
        now = int(1000 * time.time())
        metrics = [
            self._mlflow.entities.Metric(_NOT_OF_MLFLOW.sub("_", name), value, now, step)
            for step, values in rows
            for name, value in values.items()
        ]
        for start in range(0, len(metrics), _MLFLOW_BATCH):
            self._client.log_batch(self._run, metrics=metrics[start : start + _MLFLOW_BATCH])

    def end(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "KILLED" if failed else "FINISHED")


def _ids(workdir: Path) -> dict[str, str]:
    try:
        content = json.loads((workdir / IDS).read_bytes())
    except (OSError, ValueError):  # none yet, or damaged: the run begins anew there
        return {}
    return content if isinstance(content, dict) else {}


def _read_id(workdir: Path, name: str) -> str | None:
    found = _ids(workdir).get(name)
    return found if isinstance(found, str) else None


def _keep_id(workdir: Path, name: str, number: str) -> None:
    write_file(workdir / IDS, json.dumps(_ids(workdir) | {name: number}))
