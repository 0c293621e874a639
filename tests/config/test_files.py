"""Config files: Python, JSON and back, one line for every mistake, what may differ on resume."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from mrcnn_jax import __version__
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import (
    PATHS,
    config_hash,
    differences,
    from_dict,
    load_config_file,
    load_config_json,
    resolve_paths,
    save_config,
    to_dict,
    with_fields,
)
from mrcnn_jax.config.schema import (
    Config,
    DataConfig,
    OptimizerConfig,
    ParamGroup,
    StageConfig,
)

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
NAMES = ("train_annotations", "train_images", "val_annotations", "val_images")


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    return text


# -- files and JSON --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_survives_json(path: Path, tmp_path: Path) -> None:
    config = load_config_file(path)
    tables = {
        "torchvision_coco": ["joint"],
        "timm_coco": ["joint"],
        "convnext": ["joint"],
        "finetune": ["joint"],
        "finetune_cpu": ["joint"],
        "scratch": ["joint"],
        "bins": ["joint", "depth"],
        "shapes_depth": ["joint", "depth"],
        "shapes_scoring": ["rpn", "box", "mask", "mask_iou"],
        "bins_depth": ["depth"],
        "shapes_cascade": ["rpn", "box", "box2", "box3", "mask"],
    }
    expected = tables.get(path.stem, ["rpn", "box", "mask"])
    assert [stage.name for stage in config.stages] == expected
    assert config.name == path.stem
    save_config(config, tmp_path / "config.json")
    again = load_config_json(tmp_path / "config.json")
    assert again == config
    # Tuples, not lists: modules that hold a config are hashed by jax.jit.
    assert hash(again) == hash(config)
    assert config_hash(again) == config_hash(config)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_there_are_configs() -> None:
    assert {"shapes", "coco300", "coco300_cpu"} <= {path.stem for path in CONFIGS}


def test_optional_values_survive_json() -> None:
    stage = StageConfig(
        "joint", ("rpn", "box"), (ParamGroup(".*", 0.5),), optimizer=OptimizerConfig(clip_norm=2.5)
    )
    config = Config(init_from="runs/a", stages=(stage,), data=DataConfig(root="/data"))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"def get_config(:", "SyntaxError: invalid syntax"),
        (b"\xff\xfe\x00", "SyntaxError: "),
        (b"x = 1\0", ""),
        (b"# \xe9t\xe9\n", ""),
        (b"(" * 5000, ""),
        (b"import sys; sys.exit(3)", "SystemExit: 3"),
        (b"raise OSError('two\\nlines')", "OSError: two lines"),
        (b"def get_config(): return get_config()", "RecursionError: "),
        (b"", "defines no get_config()"),
        (b"get_config = 3", "TypeError: "),
    ],
    ids=lambda value: value[:30].decode("latin-1") if isinstance(value, bytes) else None,
)
def test_a_config_file_that_fails_is_told_in_one_line(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "damaged.py"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config_file(file)
    assert one_line(error).startswith(f"{file}: {reason}")


def edited(path: str, value: Any) -> dict[str, Any]:
    """Returns the tiny config as a dict with one value set, at a path spelt as in messages."""
    values = json.loads(json.dumps(to_dict(tiny.get_config())))
    *parents, name = (int(part) if part.isdigit() else part for part in path.split("."))
    place: Any = values
    for parent in parents:
        place = place[parent]
    place[name] = value
    return values


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seeed", 1),
        ("model.resnet.depht", 50),
        ("stages.1.optimizer.lr", 0.1),
        ("stages.0.train.1.scale", 0.1),
        ("seed", "one"),
        ("seed", 1.5),
        ("seed", True),
        ("init_from", 3),
        ("init_without_classes", True),
        ("model.num_classes", None),
        ("model.resnet.depth", 77),
        ("model.resnet", 50),
        ("model.rpn.batch_norm", 1),
        ("model.rpn.scales", 32),
        ("model.pixel_mean", [0.5, 0.5]),
        ("model.rpn.ratios.1", "wide"),
        ("data.canvases.0", [128]),
        ("stages.1.losses.0", "keypoints"),
        ("stages.2.optimizer.clip_norm", "none"),
        ("stages.0", "rpn"),
    ],
)
def test_a_wrong_field_or_value_in_json_is_named(path: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(edited(path, value)))
    with pytest.raises(ConfigError) as error:
        load_config_json(file)
    assert one_line(error).startswith(f"{file}: {path}: ")


def test_an_unknown_field_may_be_of_another_version(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(edited("model.rpn.conv", 2)))
    with pytest.raises(ConfigError) as error:
        load_config_json(file)
    version = f"(written by another version of mrcnn_jax? this is {__version__})"
    assert one_line(error) == f"{file}: model.rpn.conv: unknown field {version}"


def test_a_missing_field_in_json_is_named() -> None:
    values = edited("seed", 0)
    del values["stages"][1]["losses"]
    with pytest.raises(ConfigError) as error:
        from_dict(values)
    assert one_line(error) == "stages.1.losses: missing"


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_file_that_is_no_config_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        load_config_json(file)
    assert one_line(error).startswith(f"{file}: ")


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"config\.json: no such file \(is this a run's folder\?\)"
    ):
        load_config_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.py", None, "no such config file"),
        ("a.txt", "", "not a Python file"),
        ("a.py", "def get_config(:", "SyntaxError"),
        ("a.py", "import nowhere", "ModuleNotFoundError"),
        ("a.py", "x = 1", "get_config"),
        ("a.py", "def get_config(): return {}", "returned dict, not Config"),
        (
            "a.py",
            "from mrcnn_jax.config.schema import *\ndef get_config(): return Config(sed=1)",
            "unexpected keyword argument 'sed'",
        ),
        (
            "a.py",
            "from mrcnn_jax.config.schema import *\n"
            "def get_config(): return Config(save_every_steps=0)",
            "save_every_steps: must be at least 1",
        ),
        (
            "a.py",
            "from mrcnn_jax.config.model import *\nfrom mrcnn_jax.config.schema import *\n"
            "def get_config(): return Config(model=ModelConfig(resnet=ResNetConfig(depth=19)))",
            "19",
        ),
        (
            "a.py",
            "from mrcnn_jax.config.schema import *\ndef get_config(): return Config(name=1)",
            "name: 1 is not of type str",
        ),
    ],
)
def test_a_config_file_with_a_mistake_is_named(
    name: str, content: str | None, expected: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as error:
        load_config_file(tmp_path / name)
    assert expected in one_line(error)


# -- what may differ on resume ---------------------------------------------------------------------


def variants(config: Any, prefix: str = "") -> list[tuple[str, bool, Any]]:
    """Returns (field, whether it may differ, `config` with another value in it) for every field."""
    found: list[tuple[str, bool, Any]] = []
    for f in dataclasses.fields(config):
        value, runtime = getattr(config, f.name), bool(f.metadata.get("runtime"))
        name = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(value):
            inner = variants(value, f"{name}.")
            found += [
                (inside, free, copied(config, f.name, changed)) for inside, free, changed in inner
            ]
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, item in enumerate(value):
                for inside, free, changed in variants(item, f"{name}.{i}."):
                    found.append(
                        (
                            inside,
                            free,
                            copied(config, f.name, (*value[:i], changed, *value[i + 1 :])),
                        )
                    )
        else:
            found.append((name, runtime, copied(config, f.name, ("another", value))))
    return found


def copied(config: Any, name: str, value: Any) -> Any:
    """A copy with one field changed, unchecked: the values here mean nothing."""
    new = object.__new__(type(config))
    for f in dataclasses.fields(config):
        object.__setattr__(new, f.name, value if f.name == name else getattr(config, f.name))
    return new


def test_differences_sees_every_field_but_the_runtime_ones() -> None:
    config = tiny.get_config()
    found = variants(config)
    assert len(found) > 90
    for name, runtime, changed in found:
        lines = differences(config, changed)
        assert [line.split(": ")[0] for line in lines] == ([] if runtime else [name])
        assert (config_hash(changed) == config_hash(config)) == runtime
    assert {name for name, runtime, _ in found if runtime} == {
        "data.root",
        "data.cache",
        "data.class_names",
        "data.max_pixels",
        "data.eval_batch_size",
        "data.threads",
        "data.workers",
        "save_every_steps",
        "keep_checkpoints",
        "validate_every_epochs",
        "evaluate_every_epochs",
        "feature_cache_gib",
        "deterministic",
        "loggers",
        "profile",
        "skip_non_finite",
        "shard_parameters",
        "distributed.coordinator",
        "distributed.processes",
        "distributed.index",
        *(f"stages.{i}.optimizer.batch_size" for i in range(3)),
    }


def test_differences_says_from_what_to_what() -> None:
    config = tiny.get_config()
    assert differences(config, config) == []
    assert differences(config, replace(config, seed=3)) == ["seed: 0 -> 3"]
    fewer = replace(config, stages=config.stages[:2])
    assert differences(config, fewer) == ["stages.length: 3 -> 2"]
    assert differences(fewer, config) == []
    none = replace(config, stages=())
    assert differences(none, config) == ["stages.length: 0 -> 3"]
    assert differences(none, none) == []


def test_a_link_at_the_old_place_of_a_moved_folder_is_no_difference(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "train.json").touch()
    config = tiny.get_config()

    def at(folder: Path) -> Config:
        data = replace(config.data, train_annotations=str(folder / "train.json"))
        return replace(config, data=data, init_from=str(folder / "weights"))

    saved = at(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    begun = at(tmp_path / "new")
    assert [line.split(":")[0] for line in differences(saved, begun)] == [
        "data.train_annotations",
        "init_from",
    ]
    (tmp_path / "old").symlink_to(tmp_path / "new")
    assert differences(saved, begun) == []


def test_whole_epochs_are_written_and_hashed_as_whole_numbers(tmp_path: Path) -> None:
    """As they were before epochs could be parts: old runs keep their hash."""
    config = tiny.get_config()

    def of(epochs: float) -> Config:
        return replace(config, stages=(replace(config.stages[0], epochs=epochs),))

    save_config(of(20.0), tmp_path / "config.json")
    assert '"epochs": 20,' in (tmp_path / "config.json").read_text()
    assert load_config_json(tmp_path / "config.json") == of(20)
    assert config_hash(of(20.0)) == config_hash(of(20))
    assert differences(of(2.0), of(2.5)) == ["stages.0.epochs: 2 -> 2.5"]
    assert from_dict(json.loads(json.dumps(to_dict(of(2.5))))) == of(2.5)


# -- paths -----------------------------------------------------------------------------------------


def make_files(folder: Path) -> None:
    data = DataConfig()
    for name in NAMES:
        path = folder / getattr(data, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True) if name.endswith("images") else path.touch()


def test_paths_come_from_the_root_or_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path / "shared" / "cells")
    make_files(tmp_path / "own")
    (tmp_path / "shared" / "weights.npz").touch()
    monkeypatch.setenv("MRCNN_DATA", str(tmp_path / "shared"))
    config = Config(data=DataConfig(folder="cells"), init_from="weights.npz")
    by_environment = resolve_paths(config)
    assert by_environment.data.val_annotations == str(
        tmp_path / "shared/cells/annotations/instances_val.json"
    )
    assert by_environment.data.train_images == str(tmp_path / "shared/cells/images")
    assert by_environment.init_from == str(tmp_path / "shared/weights.npz")
    assert resolve_paths(by_environment) == by_environment

    monkeypatch.chdir(tmp_path)
    by_root = resolve_paths(
        replace(config, data=replace(config.data, root="own"))
    )  # --data.root goes first
    assert by_root.data.train_annotations == str(tmp_path / "own/annotations/instances_train.json")
    absolute = replace(config.data, **{name: getattr(by_root.data, name) for name in NAMES})
    monkeypatch.delenv("MRCNN_DATA")
    assert resolve_paths(Config(data=absolute)).data == absolute


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MRCNN_DATA", raising=False)
    config = Config(data=DataConfig(folder="cells"))
    with pytest.raises(ConfigError) as error:
        resolve_paths(config)
    assert one_line(error).startswith("data.root: not given, and $MRCNN_DATA is not set")

    make_files(tmp_path / "cells")
    monkeypatch.setenv("MRCNN_DATA", str(tmp_path))
    lost = tmp_path / "cells" / "annotations" / "instances_val.json"
    lost.unlink()
    with pytest.raises(ConfigError) as error:
        resolve_paths(config)
    assert one_line(error) == f"data.val_annotations: {lost}: no such file or folder"

    lost.touch()
    with pytest.raises(ConfigError) as error:
        resolve_paths(replace(config, init_from="weights/a.npz"))
    assert one_line(error) == "init_from: weights/a.npz: no such file or run"


def test_folders_of_depth_maps_are_paths_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MRCNN_DATA", raising=False)
    make_files(tmp_path / "own")
    config = Config(data=DataConfig(root=str(tmp_path / "own"), train_depth="depth"))
    with pytest.raises(ConfigError) as error:
        resolve_paths(config)
    folder = tmp_path / "own" / "depth"
    assert one_line(error) == f"data.train_depth: {folder}: no such file or folder"
    folder.mkdir()
    found = resolve_paths(config).data
    assert (found.train_depth, found.val_depth) == (str(folder), None)


def test_a_start_that_is_not_needed_is_found_or_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same name, so that a command typed again compares as what its run saved."""
    monkeypatch.setenv("MRCNN_DATA", str(tmp_path))
    (tmp_path / "r50.npz").touch()
    files = {name: str(tmp_path) for name in PATHS if not name.endswith("_depth")}
    for name, found in (("r50.npz", str(tmp_path / "r50.npz")), ("gone.npz", "gone.npz")):
        config = Config(data=DataConfig(**files), init_from=name)  # type: ignore[arg-type]
        assert resolve_paths(config, needs_start=False).init_from == found


def test_fields_that_fit_only_together_are_set_together() -> None:
    config = with_fields(Config(), {"model.rpn.convs": 2, "model.rpn.batch_norm": False, "seed": 3})
    rpn = replace(Config().model.rpn, convs=2, batch_norm=False)
    assert config == replace(Config(), seed=3, model=replace(Config().model, rpn=rpn))
    with pytest.raises(ConfigError, match=r"^model\.rpn\.convs: more than one needs"):
        with_fields(Config(), {"model.rpn.convs": 2})
    with pytest.raises(ConfigError, match=r"^model\.rpn\.conv: unknown field$"):
        with_fields(Config(), {"model.rpn.conv": 2})
    for name in ("modle.rpn.convs", "model.rpn.scales.first", "model.rpn.convs.more"):
        with pytest.raises(ConfigError, match=rf"^{re.escape(name)}: unknown field$"):
            with_fields(Config(), {name: 2})
    # 2.0 == 2, but no kernel has a side of 2.0.
    with pytest.raises(ConfigError, match=r"^model\.mask_head\.deconv_kernel: 2\.0 is not one of"):
        with_fields(Config(), {"model.mask_head.deconv_kernel": 2.0})
