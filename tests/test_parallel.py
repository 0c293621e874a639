"""Many devices, in one process or two, do what one does: losses, checkpoints, evaluation; and what
cannot be spread is refused."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh

from mrcnn_jax import parallel
from mrcnn_jax.commands import eval as evaluation
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import to_dict
from mrcnn_jax.config.schema import Config, OptimizerConfig
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.runs.run import load_run
from mrcnn_jax.training.loop import train

ROOT = Path(__file__).parent.parent
STEPS, HALF = 12, 6
BOUND = 1e-5
STAGES = tuple(tiny.STAGES)
WORKER = str(ROOT / "tests" / "parallel_worker.py")


def virtual_devices(count: int, **variables: str) -> dict[str, str]:
    """The environment of a process in which JAX has so many CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={count}",
        **variables,
    }


def stage_config(config: Config, index: int, previous: Path | None) -> Config:
    """One stage of the tiny config, 12 steps of 8 images (3 in every other one), from the weights
    of another run.

    Each stage begins with the same parameters everywhere, so that what differs in the end did not
    begin in an earlier one. The ResNet with batch statistics of the whole batch trains in the first
    one, by SGD: what Adam divides by a gradient of almost nothing is rounding, and at its rate of
    1e-3 the losses of *one* device move by 4e-4 if the rows of the batches are reversed.
    """
    stage = replace(config.stages[index], epochs=HALF)
    if index == 0:
        stage = replace(
            stage,
            optimizer=OptimizerConfig(
                name="sgd", learning_rate=0.003, schedule="cosine", warmup_steps=1
            ),
        )
    data = replace(config.data, batch_size=8)
    init_from = None if previous is None else str(previous)
    return replace(
        config,
        data=data,
        stages=(stage,),
        init_from=init_from,
        save_every_steps=HALF,
        validate_every_epochs=HALF,
        keep_checkpoints=9,
    )


@pytest.fixture(scope="module")
def one(
    tiny_config: Config, programs: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Config, Path]]:
    """Stage -> its config and run, on one device."""
    assert jax.device_count() == 1
    folder = tmp_path_factory.mktemp("one")
    runs: dict[str, tuple[Config, Path]] = {}
    for index, name in enumerate(STAGES):
        config = stage_config(tiny_config, index, runs[STAGES[index - 1]][1] if index else None)
        train(config, folder / name)
        runs[name] = config, folder / name
    return runs


def train_job(config: Config, workdir: Path) -> dict[str, Any]:
    return {"config": to_dict(config), "workdir": str(workdir)}


def halfway(run: Path, copy: Path) -> Path:
    """A copy of a run as it was after half of its steps."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if not checkpoint.name.startswith(f"{HALF:08d}-"):
            shutil.rmtree(checkpoint)
    return copy


@pytest.fixture(scope="module")
def eight(
    one: dict[str, tuple[Config, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The folder of runs that one process made on 8 devices, and what it printed."""
    folder = tmp_path_factory.mktemp("eight")
    rpn, first = one["rpn"]
    jobs = [train_job(config, folder / name) for name, (config, _) in one.items()]
    jobs += [train_job(replace(rpn, shard_parameters=True), halfway(first, folder / "resumed"))]
    jobs += [{"workdir": str(one["mask"][1]), "out": str(folder / "eval")}]
    jobs += [{"workdir": str(one["mask"][1]), "collectives": True}]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, WORKER, str(folder / "jobs.json")],
        env=virtual_devices(8),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def two(
    one: dict[str, tuple[Config, Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The folder of runs that two processes of a device each made together, and what they
    printed."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [train_job(replace(one["rpn"][0], shard_parameters=True), folder / "rpn")]
    jobs += [{"workdir": str(one["mask"][1]), "out": str(folder / "eval")}]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(folder / "jobs.json"), str(index)],
            env=virtual_devices(1, PORT=port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        ends = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(
        errors for _, errors in ends
    )
    return folder, [output for output, _ in ends]


def assert_same_losses(run: Path, reference: Path) -> None:
    """Losses of every step, and of the validation; a count that differs is told, since then a
    choice fell otherwise."""
    ours, theirs = read_metrics(run), read_metrics(reference)
    assert [(row["step"], row["split"]) for row in ours] == [
        (row["step"], row["split"]) for row in theirs
    ]
    assert [row["step"] for row in ours if row["split"] == "train"] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.startswith("loss/"):
                flips = [
                    (count, a[count], b[count])
                    for count in a
                    if count.endswith("left_out") and a[count] != b[count]
                ]
                assert abs(a[name] - b[name]) <= BOUND, (
                    f"{a['split']}, step {a['step']}, {name}: "
                    f"{a[name]} and {b[name]}; flips: {flips}"
                )


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STAGES, "resumed"])
def test_eight_devices_have_the_losses_of_one(
    name: str, one: dict[str, tuple[Config, Path]], eight: tuple[Path, str]
) -> None:
    """`resumed`: from the checkpoint that one device wrote after half of the steps, with spread
    parameters and optimiser state."""
    reference = one[name if name in one else "rpn"][1]
    assert_same_losses(eight[0] / name, reference)
    # They are others in the last bits: it was not one device that computed them.
    assert (eight[0] / name / "metrics.jsonl").read_bytes() != (
        reference / "metrics.jsonl"
    ).read_bytes()


def test_two_processes_have_the_losses_of_one(
    one: dict[str, tuple[Config, Path]], two: tuple[Path, list[str]]
) -> None:
    """With parameters and optimiser state spread over both."""
    assert_same_losses(two[0] / "rpn", one["rpn"][1])


def test_checkpoints_of_many_devices_resume_on_one(
    one: dict[str, tuple[Config, Path]],
    eight: tuple[Path, str],
    two: tuple[Path, list[str]],
    tmp_path: Path,
) -> None:
    config, reference = one["rpn"]
    for folder in (eight[0], two[0]):
        run = halfway(folder / "rpn", tmp_path / folder.name)
        train(config, run)
        assert_same_losses(run, reference)


def test_spread_parameters_take_less_memory(eight: tuple[Path, str]) -> None:
    """Nearly an eighth: of the tiny network's leaves, a few have no axis that divides by 8."""
    sizes = {
        name: float(size)
        for name, size in re.findall(
            r"^== (\w+)\n(?:.*\n)*?8 devices, ([\d.]+) MiB", eight[1], re.MULTILINE
        )
    }
    assert sizes.keys() == {*STAGES, "resumed"}
    assert sizes["resumed"] < sizes["rpn"] / 6


def test_devices_exchange_sums_and_nothing_else(eight: tuple[Path, str]) -> None:
    """No device is sent another's rows: neither feature maps nor what `top_k` searches."""
    assert re.findall(r"^collectives: (.*)$", eight[1], re.MULTILINE) == ['["all-reduce"]']


@pytest.mark.parametrize("kind", ["dense", "roi"])
def test_a_depth_head_has_the_loss_of_one_device(kind: str, eight: tuple[Path, str]) -> None:
    (found,) = re.findall(rf"^depth {kind}: (.*)$", eight[1], re.MULTILINE)
    assert json.loads(found)["exchanges"] == ["all-reduce"]
    assert json.loads(found)["error"] < BOUND


def test_one_of_two_processes_speaks(two: tuple[Path, list[str]]) -> None:
    speaks, is_silent = two[1]
    assert speaks.count("done; next: ") == 1
    assert is_silent == ""
    rows = [json.loads(line) for line in (two[0] / "rpn" / "timing.jsonl").read_text().splitlines()]
    assert [row["steps"] for row in rows] == [2] * HALF


# -- evaluation ------------------------------------------------------------------------------------


def test_evaluation_sees_each_image_once(
    one: dict[str, tuple[Config, Path]],
    eight: tuple[Path, str],
    two: tuple[Path, list[str]],
    tmp_path: Path,
) -> None:
    metrics = evaluation.run(evaluation.Arguments(workdir=one["mask"][1], figures=0, out=tmp_path))
    results = json.loads((tmp_path / "detections.json").read_text())
    assert len(results) > tiny.VAL
    for folder in (eight[0], two[0]):
        theirs = json.loads((folder / "eval" / "detections.json").read_text())
        for key in ("image_id", "category_id"):
            assert [result[key] for result in theirs] == [result[key] for result in results]
        for key, bound in (("bbox", 1e-2), ("score", 1e-5)):
            np.testing.assert_allclose(
                [result[key] for result in theirs], [result[key] for result in results], atol=bound
            )
        found = json.loads((folder / "eval" / "metrics.json").read_text())
        assert found.pop("checkpoint") == load_run(one["mask"][1]).meta.name
        own = json.loads((tmp_path / "metrics.json").read_text())
        assert found.pop("confusion") == own["confusion"]
        assert found.keys() == metrics.keys()
        np.testing.assert_allclose(list(found.values()), list(metrics.values()), atol=1e-3)


# -- messages --------------------------------------------------------------------------------------


def test_what_is_gathered_arrives_to_the_bit() -> None:
    random = np.random.default_rng(0)
    value = {
        "scores": [0.1 + 0.2, 1e-320, float("-inf"), -0.0, 2**60, True, None, "ä\n\x1b"],
        "arrays": [
            random.normal(size=(2, 3)).astype(np.float32),
            np.zeros((0, 4)),
            np.array(7, np.int16),
            np.array([[True], [False]]),
            np.arange(6, dtype=np.uint8).reshape(2, 3).T,
            np.array([np.nan, -np.nan]),
        ],
    }
    found = parallel._unpacked(parallel._packed(value))
    assert found["scores"] == value["scores"]
    assert [type(each) for each in found["scores"]] == [type(each) for each in value["scores"]]
    assert np.signbit(found["scores"][3])
    for ours, theirs in zip(value["arrays"], found["arrays"], strict=True):
        assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
        assert theirs.tobytes() == ours.tobytes()
        assert theirs.flags.writeable


def test_a_value_is_given_once_the_next_one_is_dispatched() -> None:
    events = []

    def dispatched() -> Iterator[int]:
        for value in range(3):
            events.append(f"dispatch {value}")
            yield value

    for value in parallel.one_ahead(dispatched()):
        events.append(f"read {value}")
    assert events == ["dispatch 0", "dispatch 1", "read 0", "dispatch 2", "read 1", "read 2"]
    assert list(parallel.one_ahead([])) == []


def test_a_message_is_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processes, of which the other one's message is longer."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(parallel, "_AT_ONCE", 7)
    theirs = parallel._packed("a longer message than the own one")
    sent: list[int] = []

    def allgather(value: np.ndarray) -> np.ndarray:
        if value.dtype == np.int32:
            return np.stack([value, np.array(divmod(len(theirs), 7), np.int32)])
        start = sum(sent)
        sent.append(len(value))
        part = np.frombuffer(theirs[start : start + len(value)], np.uint8)
        return np.stack([value, part])

    monkeypatch.setattr(parallel.multihost_utils, "process_allgather", allgather)
    assert parallel.gather([1.5, "short"]) == [[1.5, "short"], "a longer message than the own one"]
    assert max(sent) == 7


class Evil:
    def __reduce__(self) -> Any:
        return print, ("ran",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil()),
        b"",
        b"[" * 100_000 + b"\n",
        b'{"array": ["|O", [1]]}\n12345678',
        b'{"array": ["<f4", [-1]]}\n',
        b'{"array": ["<f4", [99999999999]]}\n1234',
        b'{"array": ["<f4", [1]]}\n12345678',
        b'{"array": 3}\n',
    ],
)
def test_a_message_cannot_run_code_or_take_memory(
    content: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(parallel, "_packed", lambda value: content)
    gathered = parallel.multihost_utils
    monkeypatch.setattr(gathered, "process_allgather", lambda value: np.stack([value, value]))
    with pytest.raises(ConfigError, match=r"^distributed: a process sent what is no message: "):
        parallel.gather(None)
    assert capsys.readouterr().out == ""


def test_what_cannot_be_sent_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (Evil(), np.array([None]), {1, 2}):
        with pytest.raises(TypeError, match="cannot be sent to other processes"):
            parallel._packed(value)


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "nearest"), [(3, "8 does"), (10, "8 and 16 do"), (23, "16 and 24 do")]
)
def test_a_batch_that_does_not_divide_is_refused(size: int, nearest: str) -> None:
    mesh: Any = AbstractMesh((8,), ("data",))
    with pytest.raises(ConfigError) as error:
        parallel.refuse_uneven(size, mesh)
    assert (
        str(error.value) == f"data.batch_size: {size} images do not divide by 8 devices ({nearest})"
    )
    parallel.refuse_uneven(16, mesh)
    parallel.refuse_uneven(size, None)


def test_a_run_goes_on_with_fewer_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batch stays, so the message names the devices that share it evenly."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    line = r"\(4 and 8 do\); CUDA_VISIBLE_DEVICES=0,1,2 before the command trains on 3 of them$"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match=line):
        parallel.refuse_uneven(6, AbstractMesh((4,), ("data",)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")  # others are somebody else's
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=4,5,6 before"):
        parallel.refuse_uneven(6, AbstractMesh((4,), ("data",)))


def test_a_run_with_such_a_batch_is_refused_before_it_reads_anything(
    tiny_data: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--config",
        str(ROOT / "tests" / "tiny.py"),
        "--workdir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [*command, "--data.root", str(tiny_data)],
        env=virtual_devices(8),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: data.batch_size: 2 images do not divide by 8 devices (8 does)\n"
    assert not (tmp_path / "run").exists()


# -- processes that die ----------------------------------------------------------------------------

PEER = """if True:
    import os, signal, sys, time
    from mrcnn_jax import cli, parallel
    from mrcnn_jax.config.errors import ConfigError
    from mrcnn_jax.config.schema import DistributedConfig
    index, victim, how, busy = int(sys.argv[1]), *sys.argv[2:]
    def main():
        coordinator = f"127.0.0.1:{os.environ['PORT']}"
        parallel.join(DistributedConfig(coordinator=coordinator, processes=2, index=index))
        parallel.gather(0)
        def refuse():
            raise ConfigError("data: for all")
        if how == "all":
            parallel.in_turn(refuse)
        if index == int(victim) and how == "error":
            raise ConfigError("data: only here")
        if index == int(victim):
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(600):
            time.sleep(0.1) if busy == "alone" else parallel.gather(0)
    cli.run(main)
"""
DIED = "error: another process of this run has died: see its own last lines\n"


@pytest.mark.parametrize(
    ("victim", "how", "busy"),
    [
        ("0", "killed", "alone"),
        ("1", "killed", "together"),
        ("1", "error", "together"),
        ("0", "all", "together"),
    ],
)
def test_the_death_of_a_process_ends_the_others_in_one_line(
    victim: str, how: str, busy: str
) -> None:
    """At once, where they exchange something or the first one died; JAX would write pages. Those
    that compute alone learn of another than the first one by its heartbeat."""
    assert parallel._HEARTBEAT_SECONDS < 30
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    dying, other = (
        subprocess.Popen(
            [sys.executable, "-c", PEER, index, victim, how, busy],
            env=virtual_devices(1, PORT=port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for index in (victim, "10"[int(victim)])
    )
    try:
        own, (_, errors) = dying.communicate(timeout=60)[1], other.communicate(timeout=30)
    finally:
        dying.kill()
        other.kill()
    lines = errors.splitlines(keepends=True)
    lines = [line for line in lines if line.strip() and not line.startswith("[Gloo]")]
    assert lines == (["error: data: for all\n"] if how == "all" else [DIED])
    assert other.returncode != 0
    if how == "error":
        assert (dying.returncode, own.splitlines()[-1]) == (2, "error: data: only here")
