"""`mrcnn train FOLDER`, from the command line up to a run that is open: nothing is compiled."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import state_dicts
import tiny
from commands.choosing import chosen
from commands.test_initial_weights import resnet_file
from training.whole_runs import latest

from mrcnn_jax import cli
from mrcnn_jax.choices import devices
from mrcnn_jax.commands import own_folder, train
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json, resolve_paths, save_config
from mrcnn_jax.config.heads import MaskIoUHeadConfig
from mrcnn_jax.config.schema import Config, DataConfig, DistributedConfig, ParamGroup
from mrcnn_jax.data import reading
from mrcnn_jax.data.split import write_record
from mrcnn_jax.datasets.prepare import refuse_other_folder
from mrcnn_jax.runs import hub, manifest
from mrcnn_jax.training.open import _began_with, open_run
from mrcnn_jax.weights import network


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each annotation file is parsed."""
    count: Counter[str] = Counter()
    load = reading.load_coco

    def counted(path: Path, *rest: object) -> object:
        count[path.name] += 1
        return load(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reading, "load_coco", counted)
    return count


def test_a_chosen_config_opens_as_a_run(
    tiny_data: Path, here: Path, loaded: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the data sets that were read to choose it."""
    words = [str(tiny_data), "--model.box-head.hidden", "16", "--model.fpn-channels=16"]
    request = train.parse(words, "mrcnn train")
    assert isinstance(request, own_folder.Request)
    assert request.workdir == Path("runs", tiny_data.name)
    config, _, known, _ = own_folder.chosen_config(request)
    assert (config.model.box_head.hidden, config.model.fpn_channels) == (16, 16)
    assert config.data.class_names == ("disc", "rectangle", "triangle")
    assert config.model.num_classes == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tiny_data}: COCO's format: annotations/instances_train.json")
    assert lines[1].startswith(
        "training starts from random weights, a poor start on photographs; better: --weights "
        "torchvision-resnet50-v2 --download (https://"
    )
    assert lines[2] == "device: cpu"
    assert lines[3].split() == ["chosen", "value", "why", "changed", "by"]
    with open_run(config, request.workdir, read_before=known) as run:
        assert len(run.train_split.plans) == tiny.TRAIN
    assert loaded == {"instances_train.json": 1, "instances_val.json": 1}


def test_the_batch_follows_the_memory_of_this_machine(
    tiny_data: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for gib, size in ((90, 8), (1, 1)):
        monkeypatch.setattr(devices, "device_memory", lambda gib=gib: gib * 2**30)
        assert chosen(tiny_data).data.batch_size == size
    assert re.search(
        r"\n *batch +1 images +8 need about \d\.\d GiB, over 80% of 1.0 ", capsys.readouterr().out
    )
    assert chosen(tiny_data, "--data.batch-size", "6").data.batch_size == 6


def test_weights_set_their_fields_in_what_is_chosen(
    tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a ResNet-18 as timm writes it; and with the published name of weights nobody fetched."""
    resnet_file(here / "r18.safetensors", 18)
    config = chosen(tiny_data, "--weights", "r18.safetensors", "--model.resnet.norm-epsilon", "0.1")
    assert (config.model.resnet.depth, config.init_from) == (18, str(here / "r18.safetensors"))
    assert (config.model.resnet.norm_epsilon, config.init_without_classes) == (0.1, False)
    out = capsys.readouterr().out
    assert "\n  model.resnet.depth: 18\n" in out
    assert "ResNet-18, FPN of 128 channels " in out  # in the table
    assert re.search(r"\n *box heads +3 .* --model.box-head.cascade\n", out)
    (stage,) = config.stages
    assert stage.losses == ("rpn", "box", "box2", "box3", "mask")
    assert {"box_head2/.*", "box_head3/.*"} < set(stage.patterns)
    words = ("--weights", "r18.safetensors", "--model.box-head.cascade")
    single = chosen(tiny_data, *words, "--model.box-head.no-class-agnostic")
    assert single.stages[0].losses == ("rpn", "box", "mask")
    assert single.model.box_head.cascade == ()
    run = here / "runs" / tiny_data.name
    run.mkdir(parents=True)
    save_config(resolve_paths(config), run / "config.json")
    for words, line in (
        (("--init-from", "a"), "--weights: not with --init-from, which it sets"),
        ((), r"--weights: runs/.* holds a run that began from .*r18.safetensors \(choose another"),
    ):
        resnet_file(here / "other.safetensors", 18)
        with pytest.raises(ConfigError, match=line):
            own_folder.run(  # type: ignore[arg-type]
                train.parse(
                    [str(tiny_data), "--weights", "other.safetensors", *words], "mrcnn train"
                )
            )
    with pytest.raises(ConfigError, match="--download: needs --weights"):
        chosen(tiny_data, "--download")


def test_a_file_of_a_convnext_chooses_its_trunk(
    tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = state_dicts.tensors(state_dicts.convnext_timm())
    safetensors.numpy.save_file(tensors, "c.safetensors")
    config = chosen(tiny_data, "--weights", "c.safetensors", "--model.fpn-channels", "8")
    assert (config.model.trunk, config.model.convnext.channels) == ("convnext", (4, 6, 8, 10))
    assert config.init_from == str(here / "c.safetensors")
    out = capsys.readouterr().out
    assert "\n  model.convnext.channels: (4, 6, 8, 10)\n" in out
    assert "ConvNeXt, FPN of 8 channels " in out  # in the table
    with open_run(config, here / "run") as run:
        assert set(run.initial["params"]) == {"convnext"}
    with pytest.raises(
        ConfigError, match=r"^model\.trunk: resnet, but .* needs a config with conv"
    ):
        chosen(tiny_data, "--weights", "c.safetensors", "--model.trunk", "resnet")


def test_a_whole_network_sets_how_images_shrink(
    tiny_data: Path,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also by --init-from, which tells nothing of the other fields; an option is more."""
    monkeypatch.setattr(network, "family_of", state_dicts.narrow_family_of)
    np.savez("w.npz", **state_dicts.tensors(state_dicts.published()))  # type: ignore[arg-type]
    for option, given, shrink in (
        ("--weights", (), "bilinear"),
        ("--weights", ("--data.shrink", "area"), "area"),
        ("--init-from", (), "bilinear"),
        ("--init-from", ("--data.shrink", "area"), "area"),
    ):
        assert chosen(tiny_data, option, "w.npz", *given).data.shrink == shrink
        lines = capsys.readouterr().out.splitlines()
        (row,) = (line.split() for line in lines if "made smaller by" in line)
        assert row[:4] == ["made", "smaller", "by", shrink]
        assert ("given" in row) == bool(given)
        how = f"{shrink}, as given (presumably bilinear in these weights)" if given else shrink
        assert (f"  data.shrink: {how}" in lines) == (option == "--weights")


def test_a_begun_run_chooses_nothing_again(
    tiny_data: Path, here: Path, loaded: Counter[str]
) -> None:
    config = replace(chosen(tiny_data, "--seed", 5), name="as it was")
    several = replace(config, distributed=DistributedConfig("host0:1234", 2, 0))
    Path("runs", tiny_data.name).mkdir(parents=True)
    save_config(several, Path("runs", tiny_data.name, "config.json"))
    loaded.clear()
    for words in ((), ("--seed", 5), ("--workdir", f"runs/{tiny_data.name}")):
        request = train.parse([str(tiny_data), *map(str, words)], "mrcnn train")
        assert isinstance(request, own_folder.Request)
        assert request.begun
        assert request.config == config
    request = train.parse([str(tiny_data), "--data.short-side", "90"], "mrcnn train")
    assert isinstance(request, own_folder.Request)
    assert request.config.data.short_side == 90  # which `open_run` will refuse
    assert not loaded
    (here / "other" / tiny_data.name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"holds a run on .*, not on .*choose another --workdir"):
        train.parse([str(here / "other" / tiny_data.name)], "mrcnn train")


def test_moved_folders_behind_links_are_those_of_the_run(here: Path) -> None:
    (here / "my").mkdir()
    made = here / "runs" / "a" / "dataset"
    made.mkdir(parents=True)
    config = Config(data=DataConfig(train_annotations=str(made / "train.json")))
    write_record(here / "my", made, here / "my", {})
    for name in ("runs", "my"):
        Path(name).rename(f"moved {name}")
        Path(name).symlink_to(f"moved {name}")
    refuse_other_folder(config, Path("my"), Path("runs", "a"))
    Path("other").mkdir()
    with pytest.raises(ConfigError, match=r"is of .*my, not of other"):
        refuse_other_folder(config, Path("other"), Path("runs", "a"))


def test_losses_given_again_are_those_of_the_run(tiny_data: Path, here: Path) -> None:
    """Which has those of the further heads, too."""
    words = (tiny_data, "--stages.0.losses", "rpn", "box")
    config = chosen(*words)
    assert config.stages[0].losses == ("rpn", "box", "box2", "box3")
    Path("runs", tiny_data.name).mkdir(parents=True)
    save_config(config, Path("runs", tiny_data.name, "config.json"))
    request = train.parse([str(word) for word in words], "mrcnn train")
    assert isinstance(request, own_folder.Request)
    assert request.begun
    assert request.config == config
    named = ("rpn", "box", "box2", "box3")
    assert chosen(tiny_data, "--workdir", "b", "--stages.0.losses", *named).stages == config.stages


def test_a_run_has_the_name_that_is_given(tiny_data: Path, here: Path) -> None:
    assert chosen(tiny_data, "--name", "bins").name == "bins"


def test_weights_that_are_gone_are_fetched_if_asked(
    tiny_data: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a run without a checkpoint: its error would name an option that was given."""

    def fetch(address: str, *, download: bool) -> Path:
        if not download:
            raise ConfigError("not fetched yet; with --download it would be")
        return here / "model"

    monkeypatch.setattr(hub, "fetch", fetch)
    folder = Path("runs", tiny_data.name)
    folder.mkdir(parents=True)
    config = replace(chosen(tiny_data), init_from=str(here / "model"))
    save_config(config, folder / "config.json")
    words = [str(tiny_data), "--weights", "hf://org/name"]
    for more in ([], ["--download"]):
        request = train.parse([*words, *more], "mrcnn train")
        assert isinstance(request, own_folder.Request)
        if more:
            own_folder._refuse_other_weights(request)
        else:
            with pytest.raises(ConfigError, match="with --download it would be"):
                own_folder._refuse_other_weights(request)


def test_weights_that_are_gone_are_not_missed(
    tiny_data: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not before there is a checkpoint, though."""
    config = replace(chosen(tiny_data), init_from="/gone/resnet50.pth")
    folder = Path("runs", tiny_data.name)
    folder.mkdir(parents=True)
    save_config(config, folder / "config.json")
    words = [str(tiny_data), "--weights", "gone.pth"]
    request = train.parse(words, "mrcnn train")
    assert isinstance(request, own_folder.Request)
    with pytest.raises(ConfigError, match=r"gone\.pth: no such file or run"):
        own_folder._refuse_other_weights(request)
    (folder / "checkpoints" / "00000001-joint").mkdir(parents=True)
    own_folder._refuse_other_weights(request)
    gone = str(here / "gone.pth")  # as a relative name is saved
    save_config(replace(config, init_from=gone), folder / "config.json")
    request = train.parse([str(tiny_data), "--init-from", "gone.pth"], "mrcnn train")
    assert isinstance(request, own_folder.Request)
    assert _began_with(request.config.init_from, folder) == gone
    monkeypatch.setenv("MRCNN_DATA", str(here))
    monkeypatch.chdir("/")
    assert _began_with("gone.pth", here / folder) == gone
    assert _began_with("other.pth", here / folder) is None


def test_another_config_is_refused_with_the_way_on(
    tiny_data: Path, kept_run: Path, here: Path
) -> None:
    run = shutil.copytree(kept_run, here / "run")
    request = train.parse([str(tiny_data), "--workdir", str(run), "--seed", "99"], "mrcnn train")
    assert isinstance(request, own_folder.Request)
    with pytest.raises(ConfigError) as refused:
        own_folder.run(request)
    again, start = cli.command("train", "--resume", run), cli.command("train", tiny_data)
    assert str(refused.value).endswith(
        f" -> 99 (choose another --workdir); as it was begun: {again}; a new run from its "
        f"weights: {start} --weights {run} --workdir {run}_2 --seed 99"
    )
    # Stopped while the first step was compiled: the command that goes on is no way.
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError) as refused:
        own_folder.run(request)
    assert str(refused.value).endswith(
        f" -> 99 (choose another --workdir); as it was begun: {start} --workdir {run}; nothing is "
        f"trained there yet: to choose again, remove {run}"
    )


def test_a_longer_training_is_told_how_to_go_on(
    tiny_data: Path, kept_run: Path, here: Path
) -> None:
    run = shutil.copytree(kept_run, here / "run")
    config = load_config_json(run / "config.json")
    save_config(replace(config, stages=config.stages[2:]), run / "config.json")

    def told(*words: object) -> str:
        words = (tiny_data, "--workdir", run, *words)
        request = train.parse([str(word) for word in words], "mrcnn train")
        assert isinstance(request, own_folder.Request)
        with pytest.raises(ConfigError) as refused:
            own_folder.run(request)
        return str(refused.value)

    longer = f"; to train it longer: {cli.command('train', '--resume', run)} --epochs 30; "
    assert longer in told("--stages.0.epochs", 30)
    assert "to train it" not in told("--stages.0.epochs", 0.5)
    assert "to train it" not in told("--stages.0.epochs", 30, "--seed", 3)
    assert "--minutes 5" in told("--minutes", 5, "--seed", 3)
    for given in (("--model.fpn-channels", 24), ("--data.shrink", "bilinear")):
        assert "from its weights" not in told(*given)
    assert "from its weights" in told("--model.mask-head.class-agnostic")
    save_config(config, run / "config.json")
    assert "to train it" not in told("--stages.2.epochs", 30)
    save_config(replace(config, stages=config.stages[2:]), run / "config.json")
    checkpoint = run / "checkpoints" / latest(run).name
    content = json.loads((checkpoint / "meta.json").read_text())
    (checkpoint / "meta.json").write_text(json.dumps(content | {"stage_complete": False}))
    (checkpoint / manifest.NAME).unlink()
    manifest.write(checkpoint)
    line = told("--stages.0.epochs", 30)
    assert "to train it" not in line
    assert "from its weights" in line


@pytest.mark.parametrize(
    "given", [("--model.box-head.no-class-agnostic",), ("--model.box-head.foreground-iou", 0.65)]
)
def test_a_cascade_that_nobody_asked_for_gives_way(
    given: tuple[object, ...], tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen(tiny_data).model.box_head.cascade == (0.6, 0.7)
    capsys.readouterr()
    assert chosen(tiny_data, *given).model.box_head.cascade == ()
    assert re.search(r"\n *box heads +1 ", capsys.readouterr().out)
    asked = ("--model.box-head.cascade", 0.7, 0.8)
    head = chosen(tiny_data, "--model.box-head.foreground-iou", 0.65, *asked).model.box_head
    assert (head.foreground_iou, head.cascade) == (0.65, (0.7, 0.8))
    asked = ("--model.box-head.cascade", 0.4, 0.6)
    head = chosen(tiny_data, "--model.box-head.foreground-iou", 0.3, *asked).model.box_head
    assert (head.foreground_iou, head.cascade) == (0.3, (0.4, 0.6))


@pytest.mark.parametrize("of", ["file", "run"])
def test_what_the_table_names_can_be_given(
    of: str, tiny_data: Path, kept_run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each option with another value; what weights fix names them instead."""
    weights = kept_run
    if of == "file":
        weights = here / "r18.safetensors"
        resnet_file(weights, 18)
    plain = chosen(tiny_data, "--weights", weights)
    table = capsys.readouterr().out
    assert " other --weights" in table
    others: dict[str, tuple[object, ...]] = {
        "--data.short-side": (96,),
        "--data.long-side": (160,),
        "--data.canvases": (160, 160),
        "--data.augment.flip": (0.25,),
        "--data.augment.scale": (0.9, 1.1),
        "--data.max-objects": (24,),
        "--data.shrink": ("bilinear",),
        "--model.resnet.depth": (34,),
        "--model.fpn-channels": (32,),
        "--model.box-head.cascade": (0.7,),
        "--model.rpn.scales": (4, 8, 16, 32, 64),
        "--model.roi.canonical-size": (20,),
        "--model.rpn.proposals": (300,),
        "--model.box-head.samples": (48,),
        "--model.box-head.detections": (120,),
        "--model.mask-head.samples": (9,),
        "--data.batch-size": (3,),
        "--stages.0.epochs": (7,),
        "--stages.0.optimizer.learning-rate": (0.5,),
        "--stages.0.optimizer.warmup-steps": (1,),
        "--validate-every-epochs": (3,),
        "--evaluate-every-epochs": (3,),
        "--data.repeat-threshold": (0.5,),
    }
    named = set(re.findall(r"--[a-z0-9.-]+", table.partition("changed by")[2]))
    named -= {"--minutes", "--weights", "--init-without-classes"}
    assert named <= others.keys()
    assert ("--model.fpn-channels" in named, "--model.resnet.depth" in named) == (
        of == "file",
        False,
    )
    for option in sorted(named):
        assert chosen(tiny_data, "--weights", weights, option, *others[option]) != plain, option


def test_given_fields_replace_choices(
    tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--data.short_side", 96, "--stages.0.epochs", 1, "--data.max-objects", 40)
    config = chosen(tiny_data, *given, "--data.no-keep-empty")
    assert (config.data.short_side, config.data.max_objects) == (96, 40)
    assert config.data.canvases == ((96, 96),)
    assert not config.data.keep_empty
    lines = capsys.readouterr().out.splitlines()
    told = [line.split("  ")[0] for line in lines if " given " in line]
    assert told == ["image sides, px", "most objects", "epochs"]


def test_a_mask_iou_head_that_is_given_is_trained_with_the_rest(
    tiny_data: Path, here: Path
) -> None:
    (plain,) = chosen(tiny_data).stages
    config = chosen(tiny_data, "--model.mask-iou-head.enabled", "--model.mask-iou-head.hidden", 64)
    (stage,) = config.stages
    assert config.model.mask_iou_head == MaskIoUHeadConfig(enabled=True, hidden=64)
    assert stage.losses == (*plain.losses, "mask_iou")
    assert stage.train == (*plain.train, ParamGroup("mask_iou_head/.*"))
    assert (stage.epochs, stage.optimizer) == (plain.epochs, plain.optimizer)


def test_the_weights_give_their_constants(tiny_data: Path, kept_run: Path, here: Path) -> None:
    config = chosen(tiny_data, "--init-from", kept_run)
    kept = load_config_json(kept_run / "config.json")
    assert config.model.fpn_channels == kept.model.fpn_channels
    assert config.model.resnet == kept.model.resnet
    assert not config.init_without_classes  # the same three
    config = chosen(tiny_data, "--init-from", kept_run, "--init-without-classes")
    assert config.init_without_classes
    with pytest.raises(ConfigError, match=r"^model.roi.aligned: False, but .* has True"):
        chosen(tiny_data, "--weights", kept_run, "--model.roi.no-aligned")


def test_a_folder_of_links_is_known_again(tiny_data: Path, here: Path) -> None:
    (here / "my").mkdir()
    (here / "my" / "images").symlink_to(tiny_data / "images")
    for split in ("train", "val"):
        file = tiny_data / "annotations" / f"instances_{split}.json"
        (here / "my" / f"{split}.json").symlink_to(file)
    config = chosen("my")
    (here / "runs" / "my").mkdir(parents=True)
    save_config(resolve_paths(config), here / "runs" / "my" / "config.json")
    request = train.parse(["my"], "mrcnn train")
    assert isinstance(request, own_folder.Request)
    assert request.begun


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("nowhere",), "nowhere: no such folder"),
        (("a.py",), "a.py: no such folder (a config goes with --config a.py)"),
        (
            ("my", "--config", "shapes"),
            "--config: a config is chosen for my: give either the folder",
        ),
        (("my",), "my: looked for COCO's JSON"),
        (("my", "--init-from", "no"), "init_from: no: no such file or run ($MRCNN_DATA is not"),
        (("my.json",), "my.json: no such folder (a file: name its folder)"),
        (("my", "--workdir", "./my/"), "--workdir: my is the folder of the data: name another"),
        (("--seed", "1", "my"), "my: a folder of data comes first: "),
        (("my", "--data.val-images", "x"), "data.val_images: the folder says which files: leave"),
        (("my", "--data.root", "x"), "data.root: the folder says which files: leave it out, or"),
    ],
)
def test_mistakes(
    words: tuple[str, ...],
    line: str,
    here: Path,
    mrcnn: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MRCNN_DATA", raising=False)
    (here / "my").mkdir()
    (here / "my.json").touch()
    assert mrcnn("train", *words) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {line}")
    assert errors.count("\n") == 1
    assert not (here / "runs").exists()


def test_a_typo_is_answered_before_anything_is_read(
    here: Path, mrcnn: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "my").mkdir()
    assert mrcnn("train", "my", "--stages.0.epohcs", "3") == 2
    assert "--stages.0.epochs" in capsys.readouterr().err
