"""benchmarks/equal_minutes.py: what it starts, leaves out and reports, without training."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import equal_minutes
import pytest
import sides

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.datasets.recognise import recognise
from mrcnn_jax.training.watch import Watch

FIGURES = equal_minutes.equal_steps.FIGURES


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Of a command line whose data and weights exist."""
    (tmp_path / "things").mkdir()
    (tmp_path / "resnet.npz").touch()
    return [
        *("--data", str(tmp_path / "things"), "--weights", str(tmp_path / "resnet.npz")),
        *("--workdir", str(tmp_path / "work"), "--minutes", "2", "--seeds", "0", "4"),
    ]


class Processes:
    """Stands for what `call` starts: leaves the files that the processes leave."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def __call__(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> tuple[float, float]:
        name = Path(command[1]).stem
        if name == "eval":
            folder = Path(command[command.index("--workdir") + 1])
            self._metrics(folder, 0.3)
            self.started.append(f"eval {folder.name}")
            return 1.0, 1.0
        arguments = equal_minutes.parse(command[2:])
        side, seed = arguments.child, arguments.seed
        folder = equal_minutes.run_folder(arguments, seed, side)
        assert not folder.exists()
        folder.mkdir(parents=True)
        self.started.append(f"{side} {seed} {' '.join(arguments.options)}".rstrip())
        if side == "ours":
            assert list(Path(environment["JAX_COMPILATION_CACHE_DIR"]).iterdir()) == []
            rows = [json.dumps({"steps": steps}) for steps in (7, 8)]
            (folder / "timing.jsonl").write_text("\n".join(rows))
            used = {"seconds": 10.0, "process_seconds": 18.0}
            (folder / "validation.json").write_text(json.dumps(used))
            return 130.0 + seed, 240.0 + seed
        times = equal_minutes.times_of(arguments, seed, "ours")
        assert times is not None
        self._metrics(folder, 0.2)
        done = {"asked": equal_minutes.asked(arguments, side), "steps": 30, "seconds": 125.0}
        done["process_seconds"] = times["process_seconds"] + 0.6
        (folder / "times.json").write_text(json.dumps(done))
        return 150.0, 290.0

    @staticmethod
    def _metrics(folder: Path, value: float) -> None:
        (folder / "eval").mkdir()
        metrics = dict.fromkeys(FIGURES, value + int(folder.parent.name[-1]) / 40)
        (folder / "eval" / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    fake = Processes()
    monkeypatch.setattr(equal_minutes, "call", fake)
    monkeypatch.setattr(equal_minutes.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(equal_minutes.signal, "signal", lambda *_: None)
    monkeypatch.setattr(equal_minutes.importlib.util, "find_spec", lambda name: name)
    return fake


def called(
    words: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """The last line of the benchmark."""
    monkeypatch.setattr(sys, "argv", ["equal_minutes.py", *words])
    equal_minutes.main()
    last: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return last


def test_the_same_command_again_only_reports(
    options: list[str],
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = called(options, monkeypatch, capsys)
    one_seed = ["ours {0}", "eval ours", "torchvision {0}"]
    assert processes.started == [line.format(seed) for seed in (0, 4) for line in one_seed]
    assert called(options, monkeypatch, capsys) == first
    assert len(processes.started) == 6

    row = first["segm/AP"]
    assert row["ours"] == [0.3, 0.4]
    assert row["torchvision_mean"] == 0.25
    assert row["ours_spread"] == pytest.approx(0.1 / 2**0.5, abs=1e-5)
    assert row["ratio"] == 1.4
    # Without 18 seconds of validation: (240 - 18) / 60, which torchvision's side was given.
    assert first["process_minutes"] == {"ours": [3.7, 3.767], "torchvision": [3.71, 3.777]}
    assert first["clock_minutes"] == {"ours": [2.0, 2.067], "torchvision": [2.083, 2.083]}
    assert first["validation_process_minutes"] == {"ours": [0.3, 0.3]}
    assert first["steps"] == {"ours": [15, 15], "torchvision": [30, 30]}
    assert first["minutes"] == 2


def test_another_label_trains_ours_alone(
    options: list[str],
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    called(options, monkeypatch, capsys)
    del processes.started[:]
    lever = ["--label", "slow", "--", "--stages.0.optimizer.learning-rate", "1e-4"]
    row = called([*options, *lever], monkeypatch, capsys)
    given = " ".join(lever[3:])
    assert processes.started == [f"ours 0 {given}", "eval slow", f"ours 4 {given}", "eval slow"]
    assert (row["label"], row["options"]) == ("slow", lever[3:])
    with pytest.raises(ConfigError, match="made with other options"):
        called([*options, "--label", "slow"], monkeypatch, capsys)


def test_what_was_stopped_begins_anew_and_an_evaluation_is_made_up_for(
    options: list[str],
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    called(options, monkeypatch, capsys)
    seeds = next(Path(options[5]).iterdir())
    (seeds / "seed0" / "ours" / "eval" / "metrics.json").unlink()
    (seeds / "seed0" / "ours" / "eval").rmdir()
    for side in ("ours", "torchvision"):
        (seeds / "seed4" / side / "times.json").unlink()
    del processes.started[:]
    called(options, monkeypatch, capsys)  # the fakes refuse a folder that is not new
    assert processes.started == ["eval ours", "ours 4", "eval ours", "torchvision 4"]


def test_torchvision_waits_for_our_time_and_is_not_needed(
    options: list[str],
    processes: Processes,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigError, match="ours has not been trained"):
        called([*options, "--side", "torchvision"], monkeypatch, capsys)
    monkeypatch.setattr(equal_minutes.importlib.util, "find_spec", lambda name: None)
    row = called(options, monkeypatch, capsys)
    assert row["process_minutes"] == {"ours": [3.7, 3.767]}
    assert "ratio" not in row["bbox/AP"]
    with pytest.raises(ConfigError, match="not installed"):
        called([*options, "--side", "torchvision"], monkeypatch, capsys)


def test_process_time_is_that_of_the_process() -> None:
    busy = "import time\nwhile time.process_time() < .4: pass\ntime.sleep(.5)"
    seconds, used = equal_minutes.call([sys.executable, "-c", busy], {})
    assert 0.4 <= used <= seconds - 0.4
    failing = "import os, sys; sys.exit(int(os.environ['STATUS']))"
    with pytest.raises(SystemExit) as left:
        equal_minutes.call([sys.executable, "-c", failing], {"STATUS": "3"})
    assert left.value.code == 3


def test_ours_is_train_py_whose_validation_is_timed(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end_epoch(watch: object) -> dict[str, float]:
        until = time.process_time() + 0.1
        while time.process_time() < until:
            pass
        return {"loss": 1.5}

    (tmp_path / "train.py").write_text(
        "import pathlib, sys\n"
        "from mrcnn_jax.training.watch import Watch\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--workdir') + 1])\n"
        "folder.mkdir(parents=True)\n"
        "ends = [Watch.end_epoch(None)['loss'] for _ in range(2)]\n"
        "(folder / 'argv').write_text(' '.join(sys.argv[1:]) + f' {ends}')\n"
    )
    monkeypatch.setattr(Watch, "end_epoch", end_epoch)
    monkeypatch.setattr(sides, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["equal_minutes.py"])
    words = ["--child", "ours", "--seed", "4", *options, "--label", "a", "--", "--ema-decay", ".9"]
    arguments = equal_minutes.parse(words)
    equal_minutes.ours(arguments)
    folder = equal_minutes.run_folder(arguments, 4, "ours")
    used = json.loads((folder / "validation.json").read_text())
    assert 0.2 <= used["process_seconds"] <= used["seconds"] + 0.1
    assert (folder / "argv").read_text() == (
        f"{tmp_path / 'things'} --workdir {folder} --weights {tmp_path / 'resnet.npz'} --seed 4 "
        "--minutes 2 --ema-decay .9 [1.5, 1.5]"
    )


def test_coco_mini_is_a_folder_that_train_py_recognises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "shared" / "coco_mini"
    (source / "annotations").mkdir(parents=True)
    (source / "images").mkdir()
    for number, name in enumerate(("train", "val", "train_extra")):
        (source / "images" / f"{number}.jpg").touch()
        content = {"images": [{"id": 1, "file_name": f"{number}.jpg"}], "annotations": []}
        for classes in ("3cls", "full80"):
            content["categories"] = [{"id": 1, "name": classes}]
            text = json.dumps(content)
            (source / "annotations" / f"{name}_{classes}.json").write_text(text)
    monkeypatch.setenv("MRCNN_DATA", str(tmp_path / "shared"))
    for _ in range(2):
        folder = equal_minutes.data_folder("coco_mini", tmp_path / "work")
    found = recognise(folder)
    for part, number in ((found.train, 0), (found.val, 1)):
        assert part is not None
        assert '"3cls"' in part.annotations.read_text()
        assert f'"{number}.jpg"' in part.annotations.read_text()
        assert part.images.resolve() == source / "images"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--minutes", "0"], "--minutes: must be above 0"),
        (["--data", "nowhere"], "--data: nowhere: no such folder"),
        (["--label", "torchvision"], "--label: torchvision"),
        (["--label", "a/b"], "--label: a/b"),
        (["--", "--ema-decay", ".9"], "--label: options for train.py"),
    ],
)
def test_what_cannot_be_used_is_refused(options: list[str], words: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        equal_minutes.parse([*options, *words])
