"""`train --weights`: from a file to a run that is open, with the config that the file needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import state_dicts
import tiny
from flax.traverse_util import flatten_dict

from mrcnn_jax.commands import train
from mrcnn_jax.commands.initial_weights import with_weights
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import save_config
from mrcnn_jax.config.schema import Config
from mrcnn_jax.runs import hub
from mrcnn_jax.training.open import OpenRun, open_run
from mrcnn_jax.weights import network, published
from mrcnn_jax.weights.choice import Choice


def chosen(arguments: train.Arguments) -> tuple[Config, Choice | None]:
    if arguments.weights is None:
        return arguments.config, None
    return with_weights(
        arguments.config,
        arguments.workdir,
        arguments.weights,
        arguments.given,
        download=arguments.download,
    )


@pytest.fixture
def begin(tiny_data: Path, tmp_path: Path, shared: Path) -> Callable[..., OpenRun]:
    """Opens the run of a command, as far as its compiling, and leaves what a start leaves."""

    def begin(*words: object, workdir: str = "run") -> OpenRun:
        own = "--config", tiny.__file__, "--workdir", tmp_path / workdir, "--data.root", tiny_data
        cache = "--data.cache", shared / "tiny_cache"
        arguments = train.parse([str(word) for word in (*own, *cache, *words)], "train")
        config, choice = chosen(arguments)
        with open_run(config, arguments.workdir, choice) as run:
            save_config(run.config, run.workdir / "config.json")
            return run

    return begin


def resnet_file(path: Path, depth: int) -> dict[str, np.ndarray]:
    """A ResNet with timm's names, which are torchvision's, and random values."""
    random = np.random.default_rng(depth)
    tensors = {
        name: random.uniform(0.5, 1.5, shape).astype(np.float32)
        for name, shape in state_dicts.resnet(depth).items()
    }
    safetensors.numpy.save_file(tensors, path)
    return tensors


def test_a_resnet_of_timm(
    begin: Callable[..., OpenRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    tensors = resnet_file(path, 50)
    stated = {"architecture": "resnet50", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.4, 1, 1]}}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    run = begin("--weights", path, "--model.resnet.norm-epsilon", "1e-3")
    model = run.config.model
    assert (model.resnet.depth, model.resnet.width) == (50, state_dicts.WIDTH)
    assert (model.pixel_mean, model.pixel_std) == ((0.5, 0.5, 0.5), (0.4, 1.0, 1.0))
    assert (model.resnet.norm_epsilon, model.resnet.norm) == (1e-3, "live")
    assert (run.config.init_from, run.config.init_without_classes) == (str(path), False)
    loaded = flatten_dict(run.initial, sep="/")
    np.testing.assert_array_equal(
        loaded["params/resnet/layer4/block2/conv3/kernel"],
        tensors["layer4.2.conv3.weight"].transpose(2, 3, 1, 0),
    )
    assert {leaf.split("/")[1] for leaf in loaded} == {"resnet"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[:7] == [
        f"weights: {path}: resnet50 (torchvision or timm)",
        "  model.resnet.depth: 50 (the config has 10)",
        "  model.resnet.width: 4 (the config has 8)",
        "  model.resnet.stride_in_1x1: False",
        "  model.resnet.norm_epsilon: 0.001, as given (presumably 1e-05 in these weights)",
        "  model.pixel_mean: (0.5, 0.5, 0.5) (the config has (0.485, 0.456, 0.406))",
        "  model.pixel_std: (0.4, 1.0, 1.0) (the config has (0.229, 0.224, 0.225))",
    ]
    assert "outputs per class" not in "\n".join(lines)


def test_a_whole_network_and_the_same_command_again(
    begin: Callable[..., OpenRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(network, "family_of", state_dicts.narrow_family_of)
    path = tmp_path / "weights.npz"
    np.savez(path, **state_dicts.tensors(state_dicts.published()))  # type: ignore[arg-type]
    run = begin("--weights", path)
    model = run.config.model
    assert (model.resnet.depth, model.resnet.norm_epsilon) == (50, 0.0)
    assert (model.rpn.batch_norm, model.mask_head.deconv_kernel) == (False, 2)
    assert (model.num_classes, run.config.init_without_classes) == (3, True)
    assert run.config.data.shrink == "bilinear"
    assert model.rpn.scales == (16, 32, 64, 128, 256)  # those of the config's images
    loaded = flatten_dict(run.initial, sep="/")
    assert "params/box_head/fc2/kernel" in loaded
    assert not {leaf for leaf in loaded if "head/logits" in leaf or "head/deltas" in leaf}
    printed = capsys.readouterr().out
    why = "the outputs per class of these weights are left out: 90 classes there, 3 here\n"
    assert why in printed
    assert "  model.mask_head.deconv_kernel: 2 (the config has 3)\n" in printed
    assert "  data.shrink: bilinear (the config has area)\n" in printed

    # Nothing is chosen again: not even by a file that has changed meanwhile.
    resnet_file(path.with_suffix(".safetensors"), 18)
    path.with_suffix(".safetensors").replace(path)
    arguments = ["--config", tiny.__file__, "--workdir", str(tmp_path / "run"), "--weights"]
    config, choice = chosen(train.parse([*arguments, str(path)], "train"))
    assert choice is None
    assert (config.model, config.init_without_classes) == (model, True)
    assert config.data.shrink == "bilinear"
    assert "weights: " not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r": holds a run of another config: model\.rpn\.convs: 1"):
        begin("--weights", path, "--model.rpn.convs", "2", "--model.rpn.no-batch-norm")


def test_the_same_command_again_takes_no_newer_model_of_the_hub(
    kept_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be another start, and the run's folder refused for it."""
    newest = tmp_path / "newest"
    monkeypatch.setattr(hub, "fetch", lambda _, *, download: newest if download else kept_run)
    asked = Config(), tmp_path / "run", "hf://org/name", ()
    config, choice = with_weights(*asked, download=False)
    assert (config.init_from, choice is None) == (str(kept_run.resolve()), False)
    (tmp_path / "run").mkdir()
    save_config(config, tmp_path / "run" / "config.json")
    again, choice = with_weights(*asked, download=True)
    assert (again.init_from, choice) == (config.init_from, None)


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("weights", ["file", "hf://org/name", "torchvision-resnet18"])
def test_the_same_command_again_when_the_weights_are_gone(
    weights: str, download: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with checkpoints needs and fetches them no more; one without them fetches, if asked."""
    missing = ConfigError("not fetched yet; with --download it would be")
    fetched = []

    def fetch(name: str, *, download: bool = True) -> Path:
        if not download:
            raise missing
        fetched.append(name)
        return tmp_path / "again"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(published, "fetch", fetch)
    path, workdir = tmp_path / "w.safetensors", tmp_path / "run"
    resnet_file(path, 18)
    begun, _ = with_weights(Config(), workdir, str(path), (), download=False)
    workdir.mkdir()
    path.unlink()
    name, began = (
        (str(path), path) if weights == "file" else (weights, tmp_path / "models--org--name")
    )
    if weights in published.PUBLISHED:
        began = tmp_path / published.PUBLISHED[weights].file
    begun = replace(begun, init_from=str(began))
    save_config(begun, workdir / "config.json")
    (workdir / "checkpoints").mkdir()  # of a first one that was not written

    def again() -> Config:
        return with_weights(Config(), workdir, name, (), download=download)[0]

    if download and weights != "file":
        assert (again().init_from, fetched) == (str(tmp_path / "again"), [name])
    else:
        with pytest.raises(ConfigError):
            again()
    (workdir / "checkpoints" / "00000001-rpn").mkdir()
    fetched.clear()
    assert (again(), fetched) == (begun, [])
    for other in (None, str(tmp_path / "other")):  # these weights are not what it began with
        save_config(replace(begun, init_from=other), workdir / "config.json")
        if not download:
            with pytest.raises(ConfigError):
                again()


@pytest.mark.parametrize("changed", [False, True])
def test_a_run_of_the_same_classes_or_others(
    changed: bool,
    begin: Callable[..., OpenRun],
    kept_run: Path,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As many of them: their names decide."""
    files = []
    for split in ("train", "val"):
        path = tmp_path / f"{split}.json"
        text = tiny.annotations(tiny_data, split).read_text()
        path.write_text(text.replace('"rectangle"', '"square"' if changed else '"rectangle"'))
        files += [f"--data.{split}-annotations", path]
    run = begin("--weights", kept_run, *files)
    assert run.config.init_without_classes == changed
    leaves = flatten_dict(run.initial, sep="/")
    assert ("params/mask_head/logits/kernel" in leaves) != changed
    why = "other classes: 2 is 'rectangle' there, 'square' here"
    assert (why in capsys.readouterr().out) == changed
    if changed:  # the user may know that they are the same, and says so each time
        for _ in range(2):
            words = ("--weights", kept_run, *files, "--no-init-without-classes")
            run = begin(*words, workdir="renamed")
            assert not run.config.init_without_classes
        assert "params/mask_head/logits/kernel" in flatten_dict(run.initial, sep="/")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--weights", "W", "--init-from", "W"), "--weights: not with --init-from, which it sets"),
        (("--download",), "--download: needs --weights with the name of published ones"),
        (("--weights", "W", "--download"), "--download: W is a path, and nothing to fetch"),
        (("--weights", "w.pth"), "--weights: w.pth: no such file or run, and none of the publi"),
        (("--weights", "torchvision-coco-v1"), "--weights: torchvision-coco-v1: not fetched yet"),
        (
            ("--weights", "W", "--model.resnet.depth", "50"),
            "model.resnet.depth: 50, but W (resnet18 (torchvision or timm)) has 18: leave out",
        ),
        (("--weights", "RUN", "--model.fpn-channels", "9"), "model.fpn_channels: 9, but RUN (chec"),
        (
            ("--weights", "RUN", "--data.shrink", "bilinear"),
            "data.shrink: bilinear, but RUN (chec",
        ),
        (("--init-from", "W"), "init_from: W: has a ResNet-18, but model.resnet.depth is 10: --m"),
    ],
)
def test_refusals(
    words: tuple[str, ...],
    line: str,
    begin: Callable[..., OpenRun],
    kept_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    places = {"W": str(tmp_path / "resnet18.safetensors"), "RUN": str(kept_run)}
    resnet_file(tmp_path / "resnet18.safetensors", 18)
    for name, place in places.items():
        line = line.replace(f" {name}", f" {place}")
    with pytest.raises(ConfigError) as error:
        begin(*(places.get(word, word) for word in words))
    assert str(error.value).startswith(line)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{", "beside the weights, and not JSON: "),
        ('{"mean": [0.5, 0.5]}', "mean: [0.5, 0.5]: three numbers are needed"),
        ('{"pretrained_cfg": {"std": [1, 0, 1]}}', "std: [1, 0, 1]: three numbers are needed"),
        ('{"mean": [1, 1, NaN]}', "mean: [1, 1, nan]: three numbers are needed"),
        ('{"architecture": "resnetaa50"}', "architecture: resnetaa50: the tensors are those of a"),
        ('{"architecture": "resnetblur18"}', "architecture: resnetblur18: the tensors are those"),
    ],
)
def test_what_is_stated_and_cannot_be_used(content: str, line: str, tmp_path: Path) -> None:
    resnet_file(tmp_path / "model.safetensors", 18)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as error:
        network.read_network(tmp_path / "model.safetensors")
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {line}")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"pretrained_cfg": 3, "hidden_size": 4, "architecture": "resnet18"}']
)
def test_pixels_that_are_not_stated(content: str, tmp_path: Path) -> None:
    resnet_file(tmp_path / "model.safetensors", 18)
    (tmp_path / "config.json").write_text(content)
    assert not network.read_network(tmp_path / "model.safetensors").pixels_stated
