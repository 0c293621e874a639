"""Exports that `mrcnn train FOLDER` converts and splits, and the commands that it names instead."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from commands.choosing import chosen
from exports import PICTURES, as_labelme, picture

from mrcnn_jax import cli
from mrcnn_jax.commands import check, train
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import save_config
from mrcnn_jax.convert.supervisely import Supervisely
from mrcnn_jax.convert.via import Via
from mrcnn_jax.convert.write import convert
from mrcnn_jax.datasets.prepare import by_hand, is_changed
from mrcnn_jax.datasets.recognise import recognise
from mrcnn_jax.training import loop


def test_an_export_is_converted_and_split(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = {f"{n} {name}": drawn for n in range(4) for name, drawn in PICTURES.items()}
    folder = here / "photos"
    folder.mkdir()
    as_labelme(folder, pictures)
    for number, path in enumerate(sorted(folder.glob("*.png"))):  # no two of the same bytes
        path.write_bytes(path.read_bytes() + bytes([number]))
    config = chosen("photos", "--workdir", "runs/x", "--model.resnet.depth", 18)
    out = capsys.readouterr().out
    assert "photos: labelme: 12 JSON files\nkept 12 images" in out
    assert "runs/x/dataset: " in out
    made = here / "runs" / "x" / "dataset"
    assert config.data.train_annotations == str(made / "train.json")
    assert config.data.train_images == config.data.val_images == str(folder)
    assert config.model.resnet.depth == 18
    names = {
        side: {i["file_name"] for i in json.loads((made / f"{side}.json").read_text())["images"]}
        for side in ("train", "val")
    }
    assert names["val"]
    assert not names["train"] & names["val"]
    assert names["train"] | names["val"] == set(pictures)
    before = {path: path.read_bytes() for path in made.iterdir()}
    assert chosen("photos", "--workdir", "runs/x", "--model.resnet.depth=18") == config
    assert {path: path.read_bytes() for path in made.iterdir()} == before
    assert not is_changed(folder, Path("runs/x"))
    # A label is corrected, with as many letters: before training begins, it counts.
    content = (folder / "0 a.json").read_text()
    (folder / "0 a.json").write_text(content.replace("cell wall", "cell-wall"))
    assert is_changed(folder, Path("runs/x"))
    config = chosen("photos", "--workdir", "runs/x")
    assert not is_changed(folder, Path("runs/x"))
    assert len(config.data.class_names) == 3
    # Then it is told.
    monkeypatch.setattr(loop, "train", lambda *_: None)
    save_config(config, Path("runs", "x", "config.json"))
    train.run(train.parse(["photos", "--workdir", "runs/x"], "mrcnn train"))
    assert "has changed" not in capsys.readouterr().out
    (folder / "0 a.json").write_text(content)
    train.run(train.parse(["photos", "--workdir", "runs/x", "--seed", "1"], "mrcnn train"))
    assert (
        "photos: has changed since runs/x/dataset was made of it, which this run keeps; to train "
        "on what is there now: python -m mrcnn_jax train photos --workdir runs/x_2 --seed 1\n"
    ) in capsys.readouterr().out


def test_an_export_that_needs_an_option_is_converted_by_hand(here: Path) -> None:
    """The command is printed, and `train my/` takes what it makes."""
    folder = here / "my"
    entries = {}
    for number in range(4):
        picture(folder / "photos" / f"{number}.png", (40 + number, 52))
        shape = {"name": "rect", "x": 1, "y": 1, "width": 20, "height": 10}
        region = {"shape_attributes": shape, "region_attributes": {"kind": "a", "colour": "red"}}
        entries[f"{number}.png1"] = {"filename": f"{number}.png", "size": 1, "regions": [region]}
    (folder / "via.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError) as refused:
        chosen("my", "--model.resnet.depth", 18)
    command = cli.command(
        "convert", "via", "my/via.json", "--out", "my/via_coco.json", "--images", "my"
    )
    assert str(refused.value).endswith(f"(see --attribute); to give options: {command} ...")
    options = Via(
        Path("my/via.json"), Path("my/via_coco.json"), images=Path("my"), attribute="kind"
    )
    convert(options)
    assert chosen("my", "--model.resnet.depth", 18).data.class_names == ("a",)


def run_printed(mrcnn: Callable[..., int], message: str, *options: str) -> None:
    """Runs both commands that a message names, with these options."""
    commands = message.partition("; to give options: ")[2].partition(" (--cat")[0].split(" && ")
    assert len(commands) == 2
    for command in commands:
        assert command.endswith(" ...")
        words = shlex.split(command.removesuffix(" ..."))
        assert mrcnn(*words[words.index("convert") :], *options) == 0


@pytest.mark.parametrize("places", ["{}/via.json", "annotations/{}_via.json"])
def test_both_parts_of_an_export_are_converted_by_hand(
    places: str, here: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where one of them alone needs an option."""
    for part, attributes in (("train", {"kind": "a"}), ("val", {"kind": "a", "colour": "red"})):
        entries = {}
        for number in range(2):
            picture(here / "my" / part / f"{part}{number}.png")
            shape = {"name": "rect", "x": 1, "y": 1, "width": 20, "height": 10}
            region = {"shape_attributes": shape, "region_attributes": attributes}
            name = f"{part}{number}.png"
            entries[f"{name}1"] = {"filename": name, "size": 1, "regions": [region]}
        file = here / "my" / places.format(part)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match=r"see --attribute") as refused:
        chosen("my")
    with pytest.raises(ConfigError) as checked:
        check.run(check.Arguments(Path("my"), cache=here / "cache"))
    assert str(checked.value) == str(refused.value)
    run_printed(mrcnn, str(refused.value), "--attribute", "kind")
    capsys.readouterr()
    config = chosen("my", "--workdir", "runs/x")
    assert "; not used: " in capsys.readouterr().out  # of VIA
    for part, file in (
        ("train", config.data.train_annotations),
        ("val", config.data.val_annotations),
    ):
        assert Path(file).is_relative_to(here / "my")
        names = [image["file_name"] for image in json.loads(Path(file).read_text())["images"]]
        assert [Path(name).name for name in names] == [f"{part}0.png", f"{part}1.png"]


def test_parts_of_one_export_are_named_in_their_commands(
    here: Path, mrcnn: Callable[..., int]
) -> None:
    """Of YOLO and Supervisely, whose parts are in one file or folder."""
    for number, part in enumerate(("train", "val")):
        picture(here / "my" / "images" / part / f"{number}.png", (40, 52))
        labels = here / "my" / "labels" / part / f"{number}.txt"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text("1 0.25 0.25 0.5 0.25 0.5 0.75")
    (here / "my" / "data.yaml").write_text(
        "train: images/train\nval: images/val\nnames: [ape, bee]\n"
    )
    found = recognise(Path("my"))
    assert found.export is not None
    assert found.val_export is not None
    first, second = by_hand(found.export, found.val_export).split(" && ")
    words = [
        ("yolo", "my/data.yaml", "--out", f"my/{part}_data_coco.json", "--part", part)
        for part in ("train", "val")
    ]
    assert [first, second] == [f"{cli.command('convert', *its)} ..." for its in words]
    for its in words:
        assert mrcnn("convert", *its) == 0
    data = chosen("my").data
    assert data.train_annotations == str(here / "my" / "train_data_coco.json")
    assert data.val_annotations == str(here / "my" / "val_data_coco.json")
    (here / "cells").mkdir()
    sets = [Supervisely(Path("cells"), Path(), datasets=names) for names in (("a", "b"), ("val",))]
    first = "supervisely", "cells", "--out", "cells/train_annotations.json", "--datasets", "a", "b"
    second = "supervisely", "cells", "--out", "cells/val_annotations.json", "--datasets", "val"
    commands = (f"{cli.command('convert', *its)} ..." for its in (first, second))
    assert by_hand(*sets).startswith(" && ".join(commands))


def test_both_parts_of_an_export_are_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A data set of YOLO that is divided already, trained on twice; and as `check` sees it."""
    for number, part in enumerate(("train", "train", "val")):
        picture(here / "my" / "images" / part / f"{number}.png", (40 + number, 52))
        labels = here / "my" / "labels" / part / f"{number}.txt"
        labels.parent.mkdir(parents=True, exist_ok=True)
        labels.write_text("1 0.25 0.25 0.5 0.25 0.5 0.75")
    yaml = "train: images/train\nval: images/val\nnames: [ape, bee]\n"
    (here / "my" / "data.yaml").write_text(yaml)
    config = chosen("my")
    made = here / "runs" / "my" / "dataset"
    assert config.data.class_names == ("ape", "bee")
    assert config.data.train_annotations == str(made / "train.json")
    assert config.data.val_annotations == str(made / "val.json")
    assert config.data.train_images == config.data.val_images == str(here / "my" / "images")
    names = {
        side: [i["file_name"] for i in json.loads((made / f"{side}.json").read_text())["images"]]
        for side in ("train", "val")
    }
    assert names == {"train": ["train/0.png", "train/1.png"], "val": ["val/2.png"]}
    assert chosen("my") == config
    assert not is_changed(Path("my"), Path("runs/my"))
    capsys.readouterr()
    check.run(check.Arguments(Path("my"), cache=here / "cache"))
    out = capsys.readouterr().out
    assert "\ntraining:\nkept 2 images, 2 objects" in out
    assert "\nvalidation:\nkept 1 images, 1 objects" in out


def test_classes_that_validation_lacks_are_those_of_training(here: Path) -> None:
    """Of an export without a list of classes."""
    for number, (part, labels) in enumerate((("train", ("ape", "bee")), ("val", ("bee",)))):
        picture(here / "my" / part / f"{number}.png")
        regions = [
            {
                "shape_attributes": {"name": "rect", "x": 3, "y": 4, "width": 9, "height": 8},
                "region_attributes": {"label": label},
            }
            for label in labels
        ]
        entry = {"filename": f"{number}.png", "size": 9, "regions": regions}
        path = here / "my" / part / "via_region_data.json"
        path.write_text(json.dumps({f"{number}.png9": entry | {"file_attributes": {}}}))
    config = chosen("my")
    val = json.loads(Path(config.data.val_annotations).read_text())
    assert [category["name"] for category in val["categories"]] == ["ape", "bee"]
    assert [a["category_id"] for a in val["annotations"]] == [2]
    check.run(check.Arguments(Path("my"), cache=here / "cache"))
