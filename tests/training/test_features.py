"""Features kept on the disk: the same training, without the frozen modules."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import AugmentConfig, Config
from mrcnn_jax.data.loader import load, plan_once
from mrcnn_jax.models.initialise import initialise
from mrcnn_jax.models.mask_rcnn import MaskRCNN, example_batch
from mrcnn_jax.runs.metrics import read_metrics
from mrcnn_jax.training import features
from mrcnn_jax.training.loop import train
from mrcnn_jax.training.open import open_run


@pytest.fixture
def cached_config(mask_config: Config, tmp_path: Path) -> Config:
    """The mask stage of the tiny run, with its features kept in a cache of its own."""
    assert mask_config.data.cache is not None
    cache = tmp_path / "cache"
    shutil.copytree(
        mask_config.data.cache, cache, ignore=shutil.ignore_patterns("features-*"), symlinks=True
    )
    data = replace(mask_config.data, cache=str(cache))
    return replace(mask_config, data=data, cache_features="float32")


def losses(run: Path) -> list[dict[str, float]]:
    names = ("loss/", "gradient_norm", "step")
    return [
        {name: value for name, value in row.items() if name.startswith(names)}
        for row in read_metrics(run)
    ]


def test_training_is_the_same_and_computes_features_once(
    mask_config: Config, cached_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, first, second, rounded = (tmp_path / name for name in ("a", "b", "c", "d"))
    train(mask_config, plain)
    train(cached_config, first)
    for ours, theirs in zip(losses(first), losses(plain), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, err_msg=name)

    # float16 has its own files, and rounds: near, and not equal.
    train(replace(cached_config, cache_features="float16"), rounded)
    pairs = list(zip(losses(rounded), losses(plain), strict=True))
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours["loss/mask"], theirs["loss/mask"], rtol=0.02)
    assert any(ours != theirs for ours, theirs in pairs)

    # Another run reads what the first one kept, to the bit.
    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(features, "_write", never)
    train(cached_config, second)
    assert losses(second) == losses(first)


@pytest.mark.parametrize(
    ("changes", "data", "line"),
    [
        ({}, {"augment": AugmentConfig(flip=0.5)}, "cache_features: images are augmented"),
        ({"feature_cache_gib": 1e-4}, {}, r"cache_features: 0.0\d GiB .*feature_cache_gib is"),
    ],
)
def test_refusals(
    cached_config: Config,
    changes: dict[str, float],
    data: dict[str, AugmentConfig],
    line: str,
    tmp_path: Path,
) -> None:
    config = replace(cached_config, data=replace(cached_config.data, **data), **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=line), open_run(config, tmp_path / "run"):
        pass


def test_stages_that_train_the_features_are_refused(tiny_config: Config, tmp_path: Path) -> None:
    first = replace(tiny_config, stages=tiny_config.stages[:1], cache_features="float16")
    with (
        pytest.raises(ConfigError, match="every stage trains the backbone or the FPN"),
        open_run(first, tmp_path / "run"),
    ):
        pass


def test_the_oldest_features_go_first(tmp_path: Path) -> None:
    for age, name in enumerate(("features-c", "features-a", "features-b", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0-p2.npy").write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (age, age))
    features._make_room(tmp_path, 500, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features-a", "features-b", "other"]
    features._make_room(tmp_path, 500, 500)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_damaged_features_are_computed_again(
    cached_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_run(cached_config, tmp_path / "run") as run:
        variables = initialise(run.model, example_batch(run.config.data.canvases[0]), seed=0)

        def rows() -> tuple[bytes, str]:
            stage, split = run.config.stages[0], run.val_split
            kept = features.cached_features(run.config, stage, run.model, variables, split)
            assert kept is not None
            (plan,) = plan_once(split, len(split.plans))
            (batch,) = load(split, [plan], run.config.data)
            read = kept.of(batch, plan.canvas)
            leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(read)]
            return b"".join(leaves), capsys.readouterr().out

        first, _ = rows()
        assert rows() == (first, "")
        (folder,) = run.val_split.folder.glob("features-*")
        file = folder / "0-p2.npy"
        whole = file.read_bytes()
        for damage in (
            file.unlink,
            lambda: file.write_bytes(whole[:-9]),
            lambda: file.write_bytes(whole[:4096] + bytes(512) + whole[4608:]),  # a lost block
            (folder / "checksums.json").unlink,
        ):
            damage()
            assert rows() == (first, f"{folder}: damaged; computed again\n")


def test_room_that_other_features_take_counts_as_free(
    cached_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**18))
    monkeypatch.setattr("mrcnn_jax.training.open._refuse_full_disk", lambda *_: None)
    with (
        pytest.raises(ConfigError, match=r"0\.0\d GiB of features .*has 0\.00 GiB free"),
        open_run(cached_config, tmp_path / "run"),
    ):
        pass
    assert cached_config.data.cache is not None
    for folder in Path(cached_config.data.cache).iterdir():
        (folder / "features-old").mkdir()
        with (folder / "features-old" / "0-p2.npy").open("wb") as file:
            file.truncate(2**26)
    with open_run(cached_config, tmp_path / "run") as run:
        features._make_room(run.val_split.folder, math.inf, 2**19)
        assert not (run.val_split.folder / "features-old").exists()


def test_the_files_are_those_of_the_frozen_weights(cached_config: Config) -> None:
    """A run from other weights, or on other sizes, must not read them; the heads do not matter."""
    model = MaskRCNN(cached_config.model)
    variables = jax.tree.map(np.array, initialise(model, example_batch((128, 128)), seed=0))
    modules = features.cacheable_modules(cached_config.stages[0], variables, cached_config)
    assert modules is not None

    def key(config: Config = cached_config, path: str = "", kind: str = "params") -> str:
        leaves = flatten_dict(variables[kind], sep="/")
        if path:
            leaves |= {path: leaves[path] + 1}
        changed = variables | {kind: unflatten_dict(leaves, sep="/")}
        return features._key(config, changed, modules)

    assert key(path="mask_head/logits/kernel") == key(path="box_head/fc1/bias") == key()
    others = [
        key(path="resnet/stem/kernel"),
        key(path="fpn/output3/bias"),
        key(path="rpn/logits/bias"),
        key(path="resnet/stem/mean", kind="batch_stats"),
        key(replace(cached_config, cache_features="float16")),
        key(replace(cached_config, data=replace(cached_config.data, short_side=96))),
        key(replace(cached_config, data=replace(cached_config.data, short_side=96, long_side=120))),
        key(replace(cached_config, data=replace(cached_config.data, canvases=((160, 160),)))),
        key(replace(cached_config, model=replace(cached_config.model, pixel_mean=(1.0, 2.0, 3.0)))),
        key(replace(cached_config, data=replace(cached_config.data, shrink="bilinear"))),
    ]
    assert len({key(), *others}) == 1 + len(others)


def test_proposals_are_kept_as_training_has_them_unless_a_loss_reads_the_rpn(
    cached_config: Config,
) -> None:
    rpn = replace(cached_config.model.rpn, train_proposals=7)
    config = replace(cached_config, model=replace(cached_config.model, rpn=rpn))
    model, stage = MaskRCNN(config.model), config.stages[0]
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), example_batch((128, 128))))
    modules = features.cacheable_modules(stage, variables, config)
    assert modules is not None
    assert modules.proposals
    layout = features._layout(config, model, variables, modules, 0)
    assert layout["boxes"].shape == (1, 7, 4)
    both = features.cacheable_modules(replace(stage, losses=("rpn", "mask")), variables, config)
    assert both == replace(modules, proposals=False)
