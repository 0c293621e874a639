"""What a checkpoint says of itself comes back as it was; what is no such file is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.runs.meta import Meta, UnknownField, read_meta, write_meta

META = Meta(3, "rpn", 0, 3, False, ((1, "cell"), (7, "crown")), "0123456789abcdef")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / META.name).mkdir()
    write_meta(tmp_path / META.name, META)
    return tmp_path / META.name


def change(folder: Path, **fields: Any) -> None:
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_everything_comes_back(folder: Path) -> None:
    assert folder.name == "00000003-rpn"
    assert read_meta(folder) == META
    full = replace(
        META,
        environment={"cores": 2},
        ap=0.1 + 0.2,
        loaded=("resnet", "fpn"),
        images="ab",
        validated=False,
        has_masks=False,
        annotations={"train": "cd"},
    )
    write_meta(folder, full)
    assert read_meta(folder) == full


def test_fields_of_earlier_versions(folder: Path) -> None:
    content = json.loads((folder / "meta.json").read_text())
    del content["ap"]
    (folder / "meta.json").write_text(json.dumps(content | {"mask_ap": 0.5, "best_metric": None}))
    assert read_meta(folder) == replace(META, ap=0.5)


@pytest.mark.parametrize(
    "fields", [{"step": "3"}, {"stage_complete": 0}, {"environment": []}, {"categories": 1}]
)
def test_what_is_no_meta_is_damaged(folder: Path, fields: dict[str, Any]) -> None:
    change(folder, **fields)
    with pytest.raises(ConfigError, match=r"meta\.json: damaged: ") as caught:
        read_meta(folder)
    assert not isinstance(caught.value, UnknownField)


def test_that_of_another_checkpoint_is_damaged(folder: Path) -> None:
    change(folder, step=4)
    with pytest.raises(ConfigError, match="damaged: of 00000004-rpn"):
        read_meta(folder)


def test_a_field_more_is_not_damaged(folder: Path) -> None:
    change(folder, a=1)
    with pytest.raises(UnknownField, match=r"meta\.json: 'a': unknown field"):
        read_meta(folder)
