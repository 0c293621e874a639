"""The commands as a user calls them: help, and soon one line and exit status 2 for a mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import tiny

from mrcnn_jax import cli
from mrcnn_jax.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests" / "tiny.py")
# of processor time: 5 by the clock are promised on a machine that does nothing else, and those that
# run tests are busy
SECONDS = 10.0


class Done(NamedTuple):
    status: int
    output: str
    errors: str


def call(*command: str | Path, cwd: Path) -> Done:
    environment = {name: value for name, value in os.environ.items() if name != "MRCNN_DATA"}
    environment["COLUMNS"] = "200"
    if command[0] in ("train.py", "eval.py", "predict.py"):
        command = (ROOT / command[0], *command[1:])
    before = os.times()
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    after = os.times()
    assert (
        after.children_user + after.children_system - before.children_user - before.children_system
        < SECONDS
    )
    assert "Traceback" not in done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def mistake(*command: str | Path, cwd: Path) -> str:
    """The one line that the mistake in a command is answered with."""
    done = call(*command, cwd=cwd)
    assert done.status == 2, done.errors
    assert done.errors.startswith("error: ")
    assert done.errors.count("\n") == 1
    return done.errors.removeprefix("error: ").rstrip("\n")


HELPS = """
import io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout

sys.path.insert(0, sys.argv.pop(1))
commands = json.loads(sys.argv.pop())
HEAVY = {"jax", "tensorflow_datasets", "matplotlib", "grain", "cv2"}
from mrcnn_jax.__main__ import main

imported = os.times()
found = []
for words in commands:
    sys.argv = ["mrcnn", *words, "--help"]
    started, text = os.times(), io.StringIO()
    with redirect_stdout(text), redirect_stderr(text):
        try:
            main()
        except SystemExit as end:
            status = end.code
    ended = os.times()
    seconds = ended.user + ended.system - started.user - started.system
    found.append([status, text.getvalue(), seconds, sorted(HEAVY & sys.modules.keys())])
print(json.dumps([imported.user + imported.system, found]))
"""
HELP = {  # what each help names
    (): list(COMMANDS),
    ("train",): [
        *("--config", "--workdir", "--resume", "--epochs", "--weights", "--download"),
        "mrcnn train --resume runs/a",
    ],
    ("train", "--config", "shapes"): [
        "--data.root",
        "--data.batch-size",
        "--model.resnet.depth",
        "--stages.0.epochs",
        "--stages.2.optimizer.clip-norm",
        "--init-from",
    ],
    ("train", "."): [
        *("--workdir", "--data.short-side", "--stages.0.epochs", "--init-from", "--minutes")
    ],
    ("eval",): ["--workdir", "--split", "--limit", "--annotations", "--images", "--report-images"],
    ("predict",): ["--workdir", "--out", "--min-score", "image.jpg"],
    ("check",): ["my/", "--annotations", "--images", "--json", "--strict", "--contact-sheet"],
    ("convert",): ["labelme", "cvat", "voc", "masks"],
    ("convert", "voc"): ["--out", "--split"],
    ("import",): [
        *("--out", "--categories", "--download", "--channel-order"),
        *("--data.short-side", "--model.pixel-mean", "--model.resnet.stride-in-1x1"),
    ],
    ("export",): ["--workdir", "--out", "--weights-licence"],
    ("share",): ["--workdir", "--out", "--weights-licence"],
    ("figures",): ["proposals", "box_targets", "--titles"],
    ("experiments",): ["--workdir", "--only", "--seeds"],
    ("replay",): ["failed_batch-rpn-120.npz"],
    ("generate",): ["shapes", "bins", "coco300"],
    ("generate", "bins"): ["--out", "--size", "--processes"],
    ("generate", "shapes"): ["--out", "--seed", "--depth"],
}


def test_every_help_comes_soon(tmp_path: Path) -> None:
    """And before anything is imported that takes long: one process asks for all of them."""
    assert {words[0] for words in HELP if words} == COMMANDS.keys()
    done = call("-c", HELPS, ROOT, json.dumps(list(HELP)), cwd=tmp_path)
    assert done.errors == ""
    start, found = json.loads(done.output)
    for (words, names), (status, text, seconds, heavy) in zip(HELP.items(), found, strict=True):
        assert (status, heavy) == (0, []), words
        assert text.startswith(f"usage: {' '.join(('mrcnn', *words[:1]))} "), words
        assert [name for name in names if name not in text] == [], words
        assert start + seconds < 1.5, words


@pytest.mark.parametrize(
    ("program", "command", "start"),
    [
        (("train.py",), "eval", "python eval.py"),
        (("train.py",), "replay", "python -m mrcnn_jax replay"),
        (("-m", "mrcnn_jax", "train"), "eval", "python -m mrcnn_jax eval"),
        (("/usr/bin/mrcnn", "train"), "eval", "mrcnn eval"),
        (("notebook.py",), "eval", "python -m mrcnn_jax eval"),
    ],
)
def test_a_command_is_named_as_it_was_typed(
    program: tuple[str, ...], command: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = program[0] == "-m"
    spec = SimpleNamespace(name="mrcnn_jax.__main__") if module else None
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", [*program[module:], "--workdir", "a run"])
    assert cli.command(command, "--workdir", Path("a run")) == f"{start} --workdir 'a run'"
    typed = " ".join(program) if module else Path(program[0]).name
    typed = f"python {typed}" if module or typed.endswith(".py") else f"{typed} train"
    assert cli.command_line() == f"{typed} --workdir 'a run'"


def test_a_command_that_is_misspelt(
    mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for name, answer in (
        ("tarin", "tarin: no such command (did you mean train?)"),
        ("x", f"x: no such command (one of {', '.join(COMMANDS)})"),
    ):
        assert mrcnn(name, "--workdir", "run") == 2
        assert capsys.readouterr().err == f"error: {answer}\n"


@pytest.mark.parametrize("script", ["train.py", "eval.py", "predict.py"])
def test_a_required_option_that_is_missing(script: str, tmp_path: Path) -> None:
    done = call(script, cwd=tmp_path)
    assert done.status == 2
    assert "--workdir" in done.errors
    assert f"python {script} --help" in done.errors


def test_a_reader_that_leaves_ends_a_command_quietly(tiny_data: Path, tmp_path: Path) -> None:
    """As in `... | head`: here it has left before the first line."""
    command = [
        sys.executable,
        "-m",
        "mrcnn_jax",
        "check",
        "--annotations",
        tiny.annotations(tiny_data, "train"),
        "--images",
    ]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*command, tiny_data / "images", "--cache", tmp_path],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# -- train.py --------------------------------------------------------------------------------------


def test_train_without_its_two_options(tmp_path: Path) -> None:
    missing = call("train.py", "--config", TINY, cwd=tmp_path)
    assert missing.status == 2
    assert "--workdir DIR" in missing.errors
    line = mistake("train.py", "--config", "nowhere.py", "--workdir", "run", cwd=tmp_path)
    assert line == "nowhere.py: no such config file"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (("--stages.0.epohcs", "3"), ("--stages.0.epohcs", "--stages.0.epochs")),  # did you mean
        (("--workdri", "run"), ("--workdri",)),
        (("--seed", "one"), ("--seed", "'one'")),
        (("--model.resnet.depth", "77"), ("--model.resnet.depth", "77", "101")),
        (("--data.batch-size", "0"), ("data.batch_size: must be at least 1",)),
    ],
    ids=lambda value: value[0],
)
def test_an_option_with_a_mistake(
    override: tuple[str, str], expected: tuple[str, ...], tmp_path: Path
) -> None:
    """Answered by the command line's library, in its box."""
    done = call("train.py", "--config", TINY, "--workdir", "run", *override, cwd=tmp_path)
    assert done.status == 2
    assert [text for text in expected if text not in done.errors] == []
    assert not (tmp_path / "run").exists()


def test_train_with_wrong_data(tiny_data: Path, tmp_path: Path) -> None:
    """One after the other in the same folder, as a user would find them: none of them may take
    it."""
    command = ("train.py", "--config", TINY, "--workdir", "run")
    assert mistake(*command, cwd=tmp_path).startswith(
        "data.root: not given, and $MRCNN_DATA is not set"
    )

    root = shutil.copytree(tiny_data, tmp_path / "data")
    path = tiny.annotations(root, "train")
    whole = path.read_text()
    path.write_text(whole[:1000])
    assert mistake(*command, "--data.root", root, cwd=tmp_path).startswith(
        f"{path}: not JSON (empty or cut off?): "
    )

    content = json.loads(whole)
    content["annotations"][3]["category_id"] = 6
    path.write_text(json.dumps(content))
    line = mistake(*command, "--data.root", root, cwd=tmp_path)
    assert line == f"{path}: annotation {content['annotations'][3]['id']}: unknown category_id 6"

    path.write_text(whole)
    line = mistake(*command, "--data.root", "data", "--model.num-classes", "80", cwd=tmp_path)
    assert line == f"model.num_classes: 80, but {path} has 3: disc, rectangle, triangle"

    path.unlink()
    line = mistake(*command, "--data.root", "data", cwd=tmp_path)
    assert (
        line == f"data.train_annotations: {Path('data', *path.parts[-2:])}: no such file or folder"
    )
    assert not (tmp_path / "run" / "config.json").exists()


# -- eval.py and predict.py ------------------------------------------------------------------------


def test_a_folder_without_a_run_or_checkpoint(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "image.png").touch()
    (tmp_path / "begun").mkdir()
    shutil.copy(tiny_run / "config.json", tmp_path / "begun")
    assert (
        mistake("eval.py", "--workdir", "nowhere", cwd=tmp_path)
        == "nowhere/config.json: no such file (is this a run's folder?)"
    )
    assert (
        mistake("eval.py", "--workdir", "begun", cwd=tmp_path) == "begun: holds no checkpoint yet"
    )
    assert (
        mistake("predict.py", "image.png", "--workdir", "begun", cwd=tmp_path)
        == "begun: holds no checkpoint yet"
    )
    assert not (tmp_path / "begun" / "checkpoints").exists()


def test_images_that_cannot_be_predicted(tiny_run: Path, tmp_path: Path) -> None:
    line = mistake("predict.py", "nowhere.jpg", "--workdir", tiny_run, cwd=tmp_path)
    assert line == "nowhere.jpg: no such file or folder"
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image")
    line = mistake("predict.py", "broken.jpg", "--workdir", tiny_run, cwd=tmp_path)
    assert line.startswith("broken.jpg: not an image that can be decoded: ")
