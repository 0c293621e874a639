"""Shared by all tests: compilation cache, data folder, strict promotion for the pure code."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before jax is imported anywhere: a test process is several times faster with the programs of the
# last run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs of tests are compiled in an eighth of the time (4.5 s of processor time for 35, a joint
# step of tests/tiny.py), which outweighs what slower code costs on networks of this size. XLA's
# passes over the program stay those of every run; the machine code comes from its older code
# generator, where jaxlib still has it, with little effort by LLVM. Processes that a test starts
# inherit it. tests/parity has the usual code generator, and what asks for `optimised` compiles as
# users do.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    # jaxlib 0.12.0.1 ends the process at a flag that it no longer has
    + " --xla_cpu_use_fusion_emitters=false"
    * version("jaxlib").startswith("0.10."),
)

import jax
import pytest
import tiny

from mrcnn_jax.__main__ import main
from mrcnn_jax.config.schema import Config

# Files that keep a core busy for a minute or more come first, the longest before the others: no
# core then waits for another at the end. The last five are of tests/parity.
LONG = (
    "test_parallel",
    "test_loop",
    "test_watch",
    "test_disks",
    "test_precision",
    "test_experiments",
    "test_overfit",
    "test_kill_and_resume",
    "test_open",
    "test_resume",
    "test_step",
    "test_tutorial",
    "test_forward",
    "test_gradients",
    "test_training_steps",
    "test_shrinking",
    "test_state_dicts",
)
# Folders under tests/, and files of others, whose tests run under strict dtype and rank promotion.
STRICT = {
    "ops",
    "models",
    "test_cascade_stages",
    "test_depth_stage",
    "test_mask_iou_stage",
    "test_step",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    if STRICT.isdisjoint({request.node.path.parent.name, request.node.path.stem}):
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
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def pytest_collection_finish() -> None:
    """Training collects garbage after each validation: not among all modules and tests."""
    gc.collect()
    gc.freeze()


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`, made by the first worker that asks for it; the others wait."""
    with path.with_suffix(".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():
            make(path)
            lock.write("made")
            lock.flush()
    return path


@pytest.fixture(scope="session")
def tiny_data(shared: Path) -> Path:
    """The data set of tests/tiny.py; not to be written to."""
    return made_once(shared / "tiny_data", tiny.write_data)


@pytest.fixture(scope="session")
def tiny_config(tiny_data: Path, shared: Path) -> Config:
    """The config of tests/tiny.py on its data, built once for all runs."""
    config = tiny.get_config()
    cache = str(shared / "tiny_cache")
    return replace(config, data=replace(config.data, root=str(tiny_data), cache=cache))


@pytest.fixture
def optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training steps, which donate their state, get the machine code that users have: worth its
    compiling from some hundred steps on."""
    from mrcnn_jax.training import programs  # late: most tests do without it

    chosen = programs.compile_options

    def compile_options(**options: Any) -> dict[str, Any]:
        found = chosen(**options)
        if "donate_argnums" not in options:
            return found
        effort = {
            "xla_backend_optimization_level": 3,
            "xla_llvm_disable_expensive_passes": False,
        }
        return found | {"compiler_options": (found["compiler_options"] or {}) | effort}

    monkeypatch.setattr(programs, "compile_options", compile_options)


@pytest.fixture(scope="session")
def programs() -> Iterator[None]:
    """From here on this process traces and compiles each stage once, and each network, however
    often it trains or predicts with them: most of the time of a run of 6 steps is theirs."""
    from mrcnn_jax.choices import speed  # late: most tests do without them
    from mrcnn_jax.inference.predictor import Predictor
    from mrcnn_jax.training import loop, programs

    initialise, make, init = loop.initialise, programs.make_programs, Predictor.__init__
    variables: dict[Any, Any] = {}
    steps: dict[Any, Any] = {}
    networks: dict[Any, Any] = {}

    def initialised(model: Any, batch: Any, *, seed: int) -> Any:
        key = model.config, batch.images.shape, seed
        if key not in variables:
            variables[key] = initialise(model, batch, seed=seed)
        return variables[key]

    def make_once(run: Any, index: int, state: Any) -> Any:
        config, stage = run.config, replace(run.config.stages[index], epochs=1)
        key = config.model, stage, config.skip_non_finite, config.deterministic
        key += run.mesh, config.shard_parameters
        key += programs.make_train_step, programs.compile_options  # which a test may replace
        if key not in steps:
            steps[key] = make(run, index, state)
        return steps[key]

    def prepared(self: Any, run: Any, mesh: Any = None) -> None:
        init(self, run, mesh)
        if mesh is None:
            key = run.network, run.config.deterministic
            self._apply = networks.setdefault(key, self._apply)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "initialise", initialised)
        for module in (loop, speed):
            patch.setattr(module, "make_programs", make_once)
        patch.setattr(Predictor, "__init__", prepared)
        yield


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Config, shared: Path, programs: None) -> Path:
    """The folder of a run of `tiny_config` that was never interrupted; not to be written to.

    What trains the same network asks for it too, if only to find its programs compiled.
    """
    from mrcnn_jax.training.loop import train  # late: most tests do without it

    return made_once(shared / "tiny_run", lambda workdir: train(tiny_config, workdir))


@pytest.fixture(scope="session")
def kept_run(tiny_data: Path, programs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
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
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which the test works in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
