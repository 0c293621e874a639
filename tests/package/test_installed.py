"""The wheel and the sdist of `make package`, each installed into an empty environment and used from
a folder that has nothing of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from write_run_fixture import FOLDER

import mrcnn_jax
from mrcnn_jax.commands import share
from mrcnn_jax.datasets.shapes import write_shapes

WHEEL, SDIST = "mrcnn_jax-*.whl", "mrcnn_jax-*.tar.gz"


class Installed:
    """An environment with what was built, beside a folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.work = folder / "env" / "bin", folder / "work"
        self.work.mkdir()
        kept = ("PIP_", "LANG", "SSL_", "REQUESTS_", "HTTP", "http", "NO_PROXY", "no_proxy")
        kept += ("TMPDIR", "LD_LIBRARY_PATH")  # Python itself may need the last
        self.environment = {
            name: value for name, value in os.environ.items() if name.startswith(kept)
        } | {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(folder),
            "JAX_PLATFORMS": "cpu",
            # A prediction is compiled once and used once.
            "XLA_FLAGS": "--xla_backend_optimization_level=0 "
            "--xla_llvm_disable_expensive_passes=true",
        }

    def pip(self, *words: str) -> None:
        environment = self.environment | {"HOME": os.environ.get("HOME", "")}  # its cache
        command = [self.bin / "python", "-m", "pip", "--quiet", *words]
        subprocess.run(command, cwd=self.work, env=environment, check=True)

    def call(self, *command: str) -> str:
        """The output of a command in the folder to work in."""
        done = subprocess.run(
            command, cwd=self.work, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


def test_an_environment_has_what_python_and_pip_need_and_nothing_of_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {"LD_LIBRARY_PATH": "/opt/python/lib", "no_proxy": "a.b", "https_proxy": "http://c.d"}
    for name, value in (needed | {"PYTHONPATH": "/a", "VIRTUAL_ENV": "/b"}).items():
        monkeypatch.setenv(name, value)
    environment = Installed(tmp_path).environment
    assert needed.items() <= environment.items()
    assert not {"PYTHONPATH", "VIRTUAL_ENV"} & set(environment)


def built(pattern: str) -> Path:
    """The one file of a kind."""
    dist = os.environ.get("MRCNN_DIST")
    if not dist:
        pytest.skip("$MRCNN_DIST is not set: see `make package`")
    (file,) = Path(dist).glob(pattern)
    return file


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    built(WHEEL)  # or skipped
    folder = tmp_path_factory.mktemp("package")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    return Installed(folder)


@pytest.fixture(scope="module", params=[WHEEL, SDIST], ids=["wheel", "sdist"])
def installed(request: pytest.FixtureRequest, empty: Installed) -> Iterator[Installed]:
    """The sdist finds the dependencies that the wheel brought."""
    empty.pip("install", str(built(request.param)))
    yield empty
    empty.pip("uninstall", "--yes", "mrcnn_jax")


def test_the_sdist_has_what_a_reader_looks_for() -> None:
    with tarfile.open(built(SDIST)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "constraints.txt"} <= names
    # And what README types and links to, but benchmarks and tests.
    assert {"Makefile", "train.py", "eval.py", "predict.py", "requirements.txt"} <= names
    links = re.findall(
        r"\]\((?!http)([^)#]+)", (Path(__file__).parents[2] / "README.md").read_text()
    )
    assert len(links) > 10
    assert {link for link in links if not link.startswith("benchmarks/")} <= names


def test_it_is_there_with_all_that_it_needs(installed: Installed) -> None:
    code = "import mrcnn_jax; print(mrcnn_jax.__version__, mrcnn_jax.__file__)"
    version, file = installed.call("python", "-c", code).split()
    assert version == mrcnn_jax.__version__
    assert Path(file).is_relative_to(installed.bin.parent)
    installed.pip("check")
    output = installed.call("mrcnn", "--help")
    assert output.startswith("usage: mrcnn ")
    assert "predict" in output


@pytest.fixture(scope="module")
def run_and_image(empty: Installed) -> tuple[Path, Path]:
    """A small run as `mrcnn share` hands it on, and an image."""
    run = empty.work / "run"
    share.run(share.Arguments(workdir=FOLDER, out=run))
    write_shapes(empty.work / "data", train=1, val=0)
    (image,) = empty.work.glob("data/images/*.png")
    return run, image


def test_a_shared_run_predicts(installed: Installed, run_and_image: tuple[Path, Path]) -> None:
    """As it does in the repository, with the versions of the other environment."""
    run, image = run_and_image
    out = installed.work / "out"
    shutil.rmtree(out, ignore_errors=True)
    installed.call("mrcnn", "predict", str(image), "--workdir", str(run), "--out", str(out))
    found: list[dict[str, Any]] = json.loads((out / "detections.json").read_text())
    expected = mrcnn_jax.load(run).predict(image).scores
    assert len(expected) > 0
    assert sorted(row["score"] for row in found) == pytest.approx(sorted(expected), abs=1e-3)
