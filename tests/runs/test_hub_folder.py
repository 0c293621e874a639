"""The Hub's layout: what is written is read back, and what is not exactly that is refused in one
line."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml
from flax.traverse_util import flatten_dict
from write_run_fixture import FOLDER

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs.hub_folder import (
    front_matter,
    is_hub_folder,
    read_hub_folder,
    source_of,
    write_hub_folder,
)
from mrcnn_jax.runs.run import Run, load_run

KERNEL = "params/rpn/conv1/kernel"


@pytest.fixture(scope="module")
def source() -> Run:
    return load_run(FOLDER)


@pytest.fixture(scope="module")
def written(source: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    folder = tmp_path_factory.mktemp("hub") / "made" / "model"
    write_hub_folder(folder, source.config, source.variables, source.meta, "a card\n")
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy."""
    return shutil.copytree(written, tmp_path / "model")


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a .safetensors file, by hand: length u64, JSON, data."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_three_files_with_every_variable_under_its_path(source: Run, written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert list(written.parent.iterdir()) == [written]
    header, data = parts(written / "model.safetensors")
    meta = header.pop("__metadata__")
    assert list(meta) == ["checkpoint"]  # of several, the order is left to chance
    assert json.loads(meta["checkpoint"])["categories"] == [
        [5, "disc"],
        [7, "rectangle"],
        [90, "triangle"],
    ]
    leaves = flatten_dict(source.variables, sep="/")
    assert header.keys() == leaves.keys()
    assert KERNEL in header
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        leaf = np.asarray(leaves[name])
        assert (entry["dtype"], tuple(entry["shape"])) == ("F32", leaf.shape)
        assert data[start:end] == leaf.tobytes()


def test_it_is_loaded_as_a_run(source: Run, written: Path) -> None:
    found = load_run(written)
    assert (found.config, found.meta) == (source.config, source.meta)
    assert found.trained == source.trained
    ours, theirs = (flatten_dict(run.variables, sep="/") for run in (source, found))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)
    digest = hashlib.sha256((written / "model.safetensors").read_bytes()).hexdigest()
    assert found.source is not None
    assert (found.source.name, found.source.sha256) == ("model", digest)
    assert source.source is None


def test_a_folder_of_the_hubs_cache_is_named_by_its_commit(written: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--my--name" / "snapshots" / ("0f" * 20)
    shutil.copytree(written, snapshot)
    assert source_of(snapshot).name == f"hf://org/my--name@{'0f' * 20}"


def test_a_run_with_such_a_file_in_it_stays_a_run(written: Path, tmp_path: Path) -> None:
    assert is_hub_folder(written)
    assert not is_hub_folder(FOLDER)
    run = shutil.copytree(FOLDER, tmp_path / "run")
    shutil.copy(written / "model.safetensors", run)
    assert not is_hub_folder(run)


# -- what is refused -------------------------------------------------------------------------------


def rewritten(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    """The file with other tensors."""

    def apply(path: Path) -> None:
        meta = parts(path)[0]["__metadata__"]
        tensors = safetensors.numpy.load_file(path)
        change(tensors)
        safetensors.numpy.save_file(tensors, path, meta)

    return apply


def with_header(change: Callable[[dict[str, Any]], str]) -> Callable[[Path], object]:
    """The file with the header that `change` returns as JSON."""

    def apply(path: Path) -> None:
        header, data = parts(path)
        text = change(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return apply


def twice(header: dict[str, Any]) -> str:
    """A tensor that is there twice; both entries take its bytes."""
    return json.dumps(header)[:-1] + f', "{KERNEL}": {json.dumps(header[KERNEL])}}}'


def twice_instead_of_another(header: dict[str, Any]) -> str:
    """One name for two tensors, so that all bytes are used."""
    other = header.pop("params/fpn/lateral2/kernel")
    return json.dumps(header)[:-1] + f', "{KERNEL}": {json.dumps(other)}}}'


def foreign(header: dict[str, Any]) -> str:
    del header["__metadata__"]
    return json.dumps(header)


def harmed(header: dict[str, Any]) -> str:
    header["__metadata__"]["checkpoint"] = '{"categories": [[5, "disc"]]}'
    return json.dumps(header)


def more(header: dict[str, Any]) -> str:
    """As a newer version might write it."""
    meta = json.loads(header["__metadata__"]["checkpoint"])
    header["__metadata__"]["checkpoint"] = json.dumps(meta | {"new": 1})
    return json.dumps(header)


def fewer(header: dict[str, Any]) -> str:
    meta = json.loads(header["__metadata__"]["checkpoint"])
    meta["categories"] = meta["categories"][:2]
    header["__metadata__"]["checkpoint"] = json.dumps(meta)
    return json.dumps(header)


def half(tensors: dict[str, np.ndarray]) -> None:
    tensors[KERNEL] = tensors[KERNEL].astype(np.float16)


def flat(tensors: dict[str, np.ndarray]) -> None:
    tensors[KERNEL] = tensors[KERNEL].reshape(-1)


def nan(tensors: dict[str, np.ndarray]) -> None:
    tensors[KERNEL].flat[3] = np.nan


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (rewritten(lambda tensors: tensors.pop(KERNEL)), f"lacks {KERNEL}, for the network of "),
        (
            rewritten(lambda tensors: tensors.update(a=np.zeros(1), b=np.zeros(1))),
            "has besides a and 1 more, for the network of ",
        ),
        (rewritten(half), f"{KERNEL}: float16[3, 3, 8, 8], and not float32[3, 3, 8, 8]"),
        (rewritten(flat), f"{KERNEL}: float32[576], and not float32[3, 3, 8, 8]"),
        (rewritten(nan), f"{KERNEL}: 1 of 576 numbers are not finite"),
        (with_header(foreign), "not written by mrcnn_jax (to start from weights of another "),
        (with_header(harmed), "the checkpoint in its header is damaged: "),
        (with_header(more), "the checkpoint in its header: 'new': unknown field (written by anoth"),
        (with_header(fewer), "of 2 categories, but model.num_classes in "),
        (with_header(twice_instead_of_another), "not a readable .safetensors file: "),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a readable .safetensors fi"),
        (lambda path: path.write_bytes(b""), "not a readable .safetensors file: "),
    ],
)
def test_what_is_not_exactly_that_is_one_line(
    harm: Callable[[Path], object], line: str, folder: Path
) -> None:
    path = folder / "model.safetensors"
    harm(path)
    with pytest.raises(ConfigError) as error:
        load_run(folder)
    assert str(error.value).startswith(f"{path}: {line}")
    assert "\n" not in str(error.value)


def test_a_tensor_that_is_named_twice_alike_is_that_tensor(source: Run, folder: Path) -> None:
    with_header(twice)(folder / "model.safetensors")
    _, _, variables = read_hub_folder(folder)
    found = flatten_dict(variables, sep="/")[KERNEL]
    np.testing.assert_array_equal(found, flatten_dict(source.variables, sep="/")[KERNEL])


@pytest.mark.parametrize(
    ("content", "line"), [(None, "no such file"), ("{", "not JSON"), ('{"a": 1}', "a: unknown")]
)
def test_a_config_that_is_not_one_is_named(content: str | None, line: str, folder: Path) -> None:
    path = folder / "config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match=rf"config\.json: {line}"):
        load_run(folder)


def test_it_has_one_checkpoint_and_no_average(written: Path) -> None:
    with pytest.raises(ConfigError, match="holds one checkpoint only"):
        load_run(written, "best")
    with pytest.raises(ConfigError, match="holds no moving average"):
        load_run(written, weights="ema")


def test_a_folder_that_cannot_be_written_is_one_line(source: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "model"
    with pytest.raises(ConfigError, match=r"model: cannot be written: "):
        write_hub_folder(out, source.config, source.variables, source.meta, "")


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        (None, {"license": "unknown"}),
        ("Apache-2.0", {"license": "apache-2.0"}),
        (" CC BY-NC 4.0", {"license": "cc-by-nc-4.0"}),
        ("Ours: ask\n--- a", {"license": "other", "license_name": "Ours: ask\n--- a"}),
    ],
)
def test_the_front_matter(licence: str | None, fields: dict[str, str]) -> None:
    """As YAML's own reader has it, between two lines of dashes."""
    lines = (front_matter(licence) + "# A card\n").split("\n")
    assert lines[0] == "---"
    end = lines.index("---", 1)
    assert lines[end + 1 :] == ["# A card", ""]
    found = yaml.safe_load("\n".join(lines[1:end]))
    assert found.pop("tags")[0] == "mask-rcnn"
    assert found == {
        **fields,
        "library_name": "mrcnn_jax",
        "pipeline_tag": "image-segmentation",
    }
