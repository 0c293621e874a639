"""The scripts as a user calls them: help, and one line and exit status 2, soon, for each
mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny

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
    before = os.times()
    done = subprocess.run(
        [sys.executable, str(ROOT / command[0]), *map(str, command[1:])],
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


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (("train.py",), ("--config", "--workdir", "--init-from")),
        (
            ("train.py", "--config", TINY),
            (
                "--data.root",
                "--data.batch-size",
                "--model.resnet.depth",
                "--stages.0.epochs",
                "--stages.2.optimizer.clip-norm",
                "--init-from",
            ),
        ),
        (
            ("eval.py",),
            (
                "--workdir",
                "--split",
                "--limit",
                "--annotations",
                "--images",
                "--figures",
                "--report-images",
                "--out",
            ),
        ),
        (("predict.py",), ("--workdir", "--out", "--min-score", "image.jpg")),
    ],
    ids=lambda value: (
        " ".join(Path(part).name for part in value) if value[0].endswith(".py") else ""
    ),
)
def test_help(command: tuple[str, ...], options: tuple[str, ...], tmp_path: Path) -> None:
    done = call(*command, "--help", cwd=tmp_path)
    assert done.status == 0
    assert done.errors == ""
    assert [option for option in options if option not in done.output] == []


@pytest.mark.parametrize("script", ["eval.py", "predict.py"])
def test_a_required_option_that_is_missing(script: str, tmp_path: Path) -> None:
    done = call(script, cwd=tmp_path)
    assert done.status == 2
    assert "--workdir" in done.errors


def test_a_reader_that_leaves_ends_a_command_quietly(tiny_data: Path, tmp_path: Path) -> None:
    """As in `... | head`: here it has left before the first line."""
    command = [
        sys.executable,
        "-m",
        "mrcnn_jax.commands.check",
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


def test_another_broken_pipe_is_no_reader_that_left() -> None:
    program = "import mrcnn_jax.cli as cli\ndef main(): raise BrokenPipeError('of a loader')\ncli.run(main)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.endswith("BrokenPipeError: of a loader\n")


# -- train.py --------------------------------------------------------------------------------------


def test_train_without_its_two_options(tmp_path: Path) -> None:
    assert mistake("train.py", "--workdir", "run", cwd=tmp_path).startswith("--config: ")
    assert (
        mistake("train.py", "--config", "nowhere.py", "--workdir", "run", cwd=tmp_path)
        == "nowhere.py: no such config file"
    )
    assert mistake("train.py", "--config", TINY, cwd=tmp_path).startswith("--workdir: ")


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
