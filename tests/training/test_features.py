"""Features kept on the disk: the same training, without the frozen modules."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import AugmentConfig, Config
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
        pytest.raises(ConfigError, match="every stage trains the ResNet or the FPN"),
        open_run(first, tmp_path / "run"),
    ):
        pass


def test_the_oldest_features_go_first(tmp_path: Path) -> None:
    for age, name in enumerate(("features-c", "features-a", "features-b", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0-p2.npy").write_bytes(b"x" * 100)
        os.utime(tmp_path / name, (age, age))
    features._make_room(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features-a", "features-b", "other"]
    features._make_room(tmp_path, -1)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
