"""A run that is handed on: the same parameters and nothing of this machine, and a card that says
what it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from write_run_fixture import FOLDER

from mrcnn_jax.commands import share
from mrcnn_jax.commands.model_card import model_card, without_folders, without_paths
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config, DataConfig, DistributedConfig
from mrcnn_jax.runs import hub, manifest
from mrcnn_jax.runs.run import load_run, write_run
from mrcnn_jax.weights.published import PUBLISHED

ROOT = Path(__file__).parents[2]
FIGURES = {
    "bbox/AP": 0.61,
    "bbox/AP50": 0.83,
    "bbox/AP75": 0.7,
    "segm/AP": 0.585,
    "segm/AP50": 0.8,
    "segm/AP75": -1.0,
    "segm/AP/disc": 0.4,
}


@pytest.fixture
def run(kept_run: Path, tmp_path: Path) -> Path:
    """A copy to write to, evaluated, that began with weights and was trained by a command that is
    known."""
    workdir, source = tmp_path / "run", load_run(kept_run)
    config = replace(source.config, init_from="/home/me/resnet18.npz")
    flags = {"xla_flags": "--xla_dump_to=/home/me/dump --xla_gpu_autotune_level=0"}
    meta = replace(source.meta, environment=source.meta.environment | flags)
    write_run(workdir, config, source.variables, meta)
    (workdir / "commands.txt").write_text(
        f"python {tmp_path}/train.py --config tiny.py --data.root='/home/me/my data' "
        "--workdir ../mine/run\nthe same again\n"
    )
    (workdir / "eval").mkdir()
    (workdir / "eval" / "metrics.json").write_text(
        json.dumps({"checkpoint": "00000072-mask"} | FIGURES)
    )
    return workdir


def hand_on(run: Path, out: Path, **options: str) -> None:
    share.run(share.Arguments(workdir=run, out=out, **options))  # type: ignore[arg-type]


def test_what_is_handed_on(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    hand_on(run, tmp_path / "out" / "shared", weights_licence="CC BY-NC 4.0")
    ours, theirs = load_run(run), load_run(tmp_path / "out" / "shared")
    assert (
        theirs.meta.categories
        == ours.meta.categories
        == ((5, "disc"), (7, "rectangle"), (90, "triangle"))
    )
    assert theirs.trained == ours.trained == {"rpn", "box", "mask"}
    assert theirs.config.model == ours.config.model
    here, there = flatten_dict(ours.variables), flatten_dict(theirs.variables)
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[path], there[path]) for path in here)

    texts = [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md")]
    assert {path.name for path in texts} >= {
        "config.json",
        "meta.json",
        "manifest.json",
        "README.md",
    }
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    for folder in (tmp_path, run.parent, tiny_data, "/home/me", ROOT, "../mine"):
        assert [path for path in written if str(folder).encode() in path.read_bytes()] == [], folder
    assert theirs.meta.environment["xla_flags"] == "--xla_dump_to=dump --xla_gpu_autotune_level=0"
    assert theirs.config.data.train_annotations == "instances_train.json"
    assert theirs.config.init_from == "resnet18.npz"


def test_what_is_handed_on_in_the_hubs_layout(run: Path, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "shared"
    share.run(share.Arguments(workdir=run, to=str(out), licence="Apache-2.0"))
    assert sorted(path.name for path in out.parent.rglob("*") if path.is_file()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    hand_on(run, tmp_path / "as_run")
    ours, theirs = load_run(tmp_path / "as_run"), load_run(out)
    assert (theirs.config, theirs.meta) == (ours.config, ours.meta)
    here, there = flatten_dict(load_run(run).variables), flatten_dict(theirs.variables)
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[path], there[path]) for path in here)
    for folder in (tmp_path, run.parent, tiny_data, "/home/me", ROOT, "../mine"):
        held = [path for path in out.iterdir() if str(folder).encode() in path.read_bytes()]
        assert held == [], folder
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: mrcnn_jax\n")
    assert card.endswith((tmp_path / "as_run" / "README.md").read_text())


def test_what_is_handed_on_to_the_hub(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mrcnn: Callable[..., int],
) -> None:
    """With a stand-in for the upload, which tests/runs/test_hub.py has."""
    sent: dict[str, bytes] = {}

    def upload(address: str, folder: Path) -> str:
        sent.update({path.name: path.read_bytes() for path in folder.iterdir()})
        return f"{address}@0f0f"

    monkeypatch.setattr(hub, "upload", upload)
    monkeypatch.setattr(hub, "refuse_unusable", lambda address: (address, None))
    assert mrcnn("share", "--workdir", run, "--to", "hf://org/name") == 0
    assert "hf://org/name@0f0f: model.safetensors, config.json" in capsys.readouterr().out
    share.run(share.Arguments(workdir=run, to=str(tmp_path / "here")))
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
    assert b"license: unknown" in sent["README.md"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "share: needs --out or --to, one of them"),
        (["--out", "a", "--to", "b"], "share: needs --out or --to, one of them"),
        (["--out", "a", "--licence", "MIT"], "--licence: goes with --to"),
        (["--to", "hf://org"], "hf://org: an address on the Hub is hf://org/name"),
        (["--to", "hf://org/name@main"], "leave @ out"),
        (["--out", "hf://org/name"], "to a model on the Hub goes --to hf://org/name"),
        (["--to", "."], ".: name a new folder"),
        (["--to", "hf:/org/name"], "to a model on the Hub goes --to hf://org/name"),
    ],
)
def test_mistakes_of_where_to(
    options: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mrcnn("share", "--workdir", run, *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_the_card_names_the_model_of_the_hub_that_a_run_started_from(
    kept_run: Path, tmp_path: Path
) -> None:
    source = load_run(kept_run)
    address = f"hf://org/name@{'0f' * 20}"
    meta = replace(source.meta, environment=source.meta.environment | {"weights": address})
    config = replace(source.config, init_from=f"/cache/models--org--name/snapshots/{'0f' * 20}")
    write_run(tmp_path / "run", config, source.variables, meta)
    hand_on(tmp_path / "run", tmp_path / "shared")
    assert f"`{address}`. Its licence: not st" in (tmp_path / "shared" / "README.md").read_text()


def test_the_card_of_a_start_from_published_weights(kept_run: Path, tmp_path: Path) -> None:
    source = load_run(kept_run)
    path = f"/cache/{PUBLISHED['torchvision-coco-v1'].file}"
    config = replace(source.config, init_from=path, init_without_classes=True)
    write_run(tmp_path / "run", config, source.variables, source.meta)
    hand_on(tmp_path / "run", tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    (line,) = (line for line in card.splitlines() if line.startswith("`maskrcnn_resnet50_fpn_coco"))
    address = "https://download.pytorch.org/models/maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth"
    assert f"published at {address}), without its outputs per class. Its licence: not st" in line


def test_the_card(run: Path, tmp_path: Path) -> None:
    hand_on(run, tmp_path / "shared", weights_licence="CC BY-NC 4.0")
    card = (tmp_path / "shared" / "README.md").read_text()
    size = sum(leaf.size for leaf in flatten_dict(load_run(run).variables["params"]).values())
    assert f"{size:,} parameters" in card
    assert "disc (5), rectangle (7), triangle (90)" in card
    assert "| 0.610 | 0.830 | 0.700 | 0.585 | 0.800 | - |" in card
    assert "Mask AP by class: disc 0.400." in card
    assert "`resnet18.npz`. Its licence: CC BY-NC 4.0." in card
    assert "| mask | mask |" in card
    command = "python train.py --config tiny.py '--data.root=my data' --workdir run"
    assert f"Command: `{command}`" in card
    assert '"detections": 8' in card  # of the config


def test_the_card_of_a_run_that_is_not_through_its_stages(kept_run: Path, tmp_path: Path) -> None:
    """What has yet to come is no part of its training, and what is random is said."""
    source = load_run(kept_run)
    meta = replace(source.meta, stage="box", stage_index=1, loaded=())
    write_run(tmp_path / "run", source.config, source.variables, meta)
    hand_on(tmp_path / "run", tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "| box | box |" in card
    assert "| mask | mask |" not in card
    random = "Checkpoint 00000072-box: not trained yet, so random: mask; masks are left out."
    assert f"\n{random}\n" in card


def test_the_card_of_a_run_that_was_shared_before(run: Path, tmp_path: Path) -> None:
    """It says what the first one says, but for the figures once it is evaluated again, or another
    licence that is named; a README of somebody else says nothing."""
    hand_on(run, tmp_path / "shared", weights_licence="CC BY-NC 4.0")
    hand_on(tmp_path / "shared", tmp_path / "again")
    first, second = (tmp_path / name / "README.md" for name in ("shared", "again"))
    assert second.read_text() == first.read_text()
    share.run(share.Arguments(workdir=tmp_path / "again", to=str(tmp_path / "hub")))
    hand_on(tmp_path / "hub", tmp_path / "third", weights_licence="MIT")
    third = (tmp_path / "third" / "README.md").read_text()
    assert third == first.read_text().replace("CC BY-NC 4.0", "MIT")
    (tmp_path / "again" / "eval").mkdir()
    figures = json.dumps({"checkpoint": "00000072-mask"} | FIGURES | {"bbox/AP": 0.1})
    metrics = tmp_path / "again" / "eval" / "metrics.json"
    metrics.write_text(figures.replace("-mask", "-box"))  # of another checkpoint
    hand_on(tmp_path / "again", tmp_path / "older")
    assert (tmp_path / "older" / "README.md").read_text() == first.read_text()
    metrics.write_text(figures)
    hand_on(tmp_path / "again", tmp_path / "evaluated")
    evaluated = (tmp_path / "evaluated" / "README.md").read_text()
    assert evaluated == first.read_text().replace("| 0.610 |", "| 0.100 |")
    second.write_text("# Mine\n\n## Training\n\nbadly\n")
    (tmp_path / "shared" / "README.md").write_text(second.read_text())
    for name, figures in (("again", "| 0.100 | 0.830 |"), ("shared", "Not evaluated.")):
        hand_on(tmp_path / name, tmp_path / f"{name} too")
        card = (tmp_path / f"{name} too" / "README.md").read_text()
        assert figures in card
        assert "badly" not in card


def test_what_the_card_does_not_know(run: Path, tmp_path: Path) -> None:
    """Figures of an older checkpoint are not this one's, and nobody but the user knows a
    licence."""
    (run / "eval" / "metrics.json").write_text(json.dumps({"checkpoint": "00000036-box"} | FIGURES))
    (run / "commands.txt").unlink()
    hand_on(run, tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "Not evaluated." in card
    assert "Its licence: not stated" in card
    assert "Command: not recorded" in card


def test_control_characters_do_not_reach_the_card(
    run: Path,
) -> None:
    hostile = "a\x1b[2J\u202eb"
    heading = "\n# A heading"
    (run / "commands.txt").write_bytes(hostile.encode() + b"\xff\n")
    source = load_run(run)
    categories = ((5, hostile + heading), *source.meta.categories[1:])
    renamed = replace(source, meta=replace(source.meta, categories=categories))
    card = model_card(renamed, run, weights_licence=hostile)
    assert r"a\x1b[2J\u202eb\n# A heading (5), rectangle (7)" in card
    assert heading not in card
    assert r"Command: `a\x1b[2J\u202eb\xff`" in card
    assert not {"\x1b", "\u202e"} & set(card)


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"checkpoint": "00000072-mask", "bb', '{"bbox/AP": "high"}']
)
def test_figures_that_are_damaged_are_one_line(
    content: str,
    run: Path,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (run / "eval" / "metrics.json").write_text(content)
    assert mrcnn("share", "--workdir", run, "--out", tmp_path / "shared") == 2
    assert f"error: {run / 'eval' / 'metrics.json'}: damaged: " in capsys.readouterr().err
    assert not (tmp_path / "shared").exists()


def test_a_flipped_digit_of_the_figures_is_found(run: Path, tmp_path: Path) -> None:
    manifest.write(run / "eval", ("metrics.json",))
    hand_on(run, tmp_path / "shared")
    path = run / "eval" / "metrics.json"
    path.write_text(path.read_text().replace("0.61", "0.71"))
    with pytest.raises(ConfigError, match=r"metrics\.json: damaged: .*\(evaluate again\)"):
        hand_on(run, tmp_path / "again")


@pytest.mark.parametrize(
    ("workdir", "out", "message"),
    [
        ("run", "taken", "exists and is not an empty folder"),
        ("nowhere", "shared", "is this a run's folder?"),
    ],
)
def test_mistakes(
    workdir: str,
    out: str,
    message: str,
    run: Path,
    tmp_path: Path,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert mrcnn("share", "--workdir", tmp_path / workdir, "--out", tmp_path / out) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "shared").exists()


def test_control_characters_do_not_reach_the_terminal(
    tmp_path: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in an error nor in what a command prints."""
    hostile = "a\x1b[2J\u202eb"
    assert mrcnn("share", "--workdir", tmp_path / hostile, "--out", tmp_path / "shared") == 2
    assert r"/a\x1b[2J\u202eb/config.json: no such file" in capsys.readouterr().err
    assert mrcnn("share", "--workdir", FOLDER, "--out", tmp_path / hostile) == 0
    out = capsys.readouterr().out
    assert r"/a\x1b[2J\u202eb: the run without its optimiser state" in out
    assert not {"\x1b", "\u202e"} & set(out)


def test_folders_of_this_machine_are_not_handed_on() -> None:
    data = DataConfig(train_images="/home/me/images", train_depth="/home/me/depth", val_depth="d")
    hosts = DistributedConfig("host0:1234", 2, 0)
    config = without_paths(Config(data=data, distributed=hosts))
    kept = config.data
    assert (kept.train_images, kept.train_depth, kept.val_depth) == ("images", "depth", "d")
    assert config.distributed == DistributedConfig()


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("mrcnn train --workdir runs/a", "mrcnn train --workdir runs/a"),
        ("/home/me/bin/mrcnn train --lr=1e-3", "mrcnn train --lr=1e-3"),
        ("a --x ~/y/z.json --y=~/z '~/q r/s'", "a --x z.json --y=z s"),
        ("""a '/home/o'"'"'brien/b c/' ../../d""", "a 'b c' d"),
        ("a 'b c' / \"d", "a 'b c' '' \"d"),
    ],
)
def test_commands_without_folders(command: str, shown: str) -> None:
    assert without_folders(command) == shown
