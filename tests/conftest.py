"""What every test shares: a persistent compilation cache, the data folder, strict promotion for the
pure code."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

# Before jax is imported anywhere: a test process is several times faster with the programs of the
# last run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
import tiny

from mrcnn_jax.__main__ import main
from mrcnn_jax.config.schema import Config

# Files that keep a core busy for a minute or more come first, the longest before the others: no
# core then waits for another at the end.
LONG = (
    "test_parallel",
    "test_loop",
    "test_experiments",
    "test_precision",
    "test_overfit",
    "test_kill_and_resume",
    "test_tutorial",
)
STRICT = (
    "ops",
    "models",
)  # folders under tests/ whose tests run under strict dtype and rank promotion


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    if Path(request.node.path).parent.name not in STRICT:
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """$MRCNN_DATA; the test is skipped, with that reason, where it is unset."""
    folder = os.environ.get("MRCNN_DATA")
    if not folder:
        pytest.skip("$MRCNN_DATA is not set: this test reads real images and weights")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of tests/tiny.py."""
    root = tmp_path_factory.mktemp("tiny_data")
    tiny.write_data(root)
    return root


@pytest.fixture(scope="session")
def tiny_config(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The config of tests/tiny.py on its data, built once for all runs."""
    config = tiny.get_config()
    return replace(
        config,
        data=replace(
            config.data, root=str(tiny_data), cache=str(tmp_path_factory.mktemp("tiny_cache"))
        ),
    )


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `tiny_config` that was never interrupted; not to be written to."""
    from mrcnn_jax.training.loop import train  # late: most tests do without it

    workdir = tmp_path_factory.mktemp("tiny_run") / "run"
    train(tiny_config, workdir)
    return workdir


@pytest.fixture(scope="session")
def kept_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/fixtures/run_v1, with the data of tests/tiny.py: a run that need not be trained first.
    Not to be written to."""
    workdir = shutil.copytree(
        Path(__file__).parent / "fixtures" / "run_v1", tmp_path_factory.mktemp("kept") / "run"
    )
    config = json.loads((workdir / "config.json").read_text())
    config["data"] |= {"root": str(tiny_data), "cache": str(tmp_path_factory.mktemp("kept_cache"))}
    for split in ("train", "val"):
        config["data"] |= {
            f"{split}_annotations": str(tiny.annotations(tiny_data, split)),
            f"{split}_images": str(tiny_data / "images"),
        }
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir


@pytest.fixture
def mrcnn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `mrcnn COMMAND ...` in this process, and gives its exit status."""

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["mrcnn", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        return status

    return call
