from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as rle_ops
from pycocotools.coco import COCO

from mrcnn_jax.config import ConfigError
from mrcnn_jax.data import check
from mrcnn_jax.data.coco import Report, _rle, _runs, read_coco, refuse_lost_images


def test_everything_comes_through(mixed_file: Path) -> None:
    dataset = read_coco(mixed_file, mixed_file.parent / "images")
    assert [image.id for image in dataset.images] == list(range(11, 18))
    assert dataset.class_names == ("three", "seven", "ninety")
    assert [dataset.category_id(label) for label in (1, 2, 3)] == [3, 7, 90]
    for label in (0, 4, -1):
        with pytest.raises(ValueError, match=str(label)):
            dataset.category_id(label)
    first = dataset.images[0].objects
    assert [(o.annotation_id, o.label, o.box, o.iscrowd) for o in first] == [
        (0, 3, (20.0, 10.0, 50.0, 30.0), False),
        (5, 1, (0.0, 0.0, 12.5, 20.25), False),
    ]
    assert first[1].rle is None
    half = rle_ops.decode(dataset.images[1].objects[0].rle)
    assert (half == (np.arange(60)[None, :] >= 30) * np.ones((80, 1))).all()
    assert dataset.report.findings == {}
    assert dataset.report.kept == {"images": 7, "objects": 6, "crowds": 1}


def test_to_coco_is_what_pycocotools_reads_from_the_file(mixed_file: Path, mixed_content: dict[str, Any]) -> None:
    ours = read_coco(mixed_file, mixed_file.parent / "images").to_coco()
    theirs = COCO(str(mixed_file))
    assert {a["id"] for a in ours["annotations"]} == set(theirs.anns)
    for a in ours["annotations"]:
        raw = theirs.anns[a["id"]]
        for key in ("image_id", "category_id", "area", "iscrowd", "bbox"):
            assert a[key] == raw[key], key
        assert ("segmentation" in a) == ("segmentation" in raw)
        if "segmentation" in a:
            assert (rle_ops.decode(a["segmentation"]) == theirs.annToMask(raw)).all()
    assert {(c["id"], c["name"]) for c in ours["categories"]} == {(3, "three"), (7, "seven"), (90, "ninety")}
    json.dumps(ours)


def _without(key: str) -> Any:
    return lambda content: {k: v for k, v in content.items() if k != key}


def _repeat(key: str) -> Any:
    return lambda content: {**content, key: [*content[key], content[key][0]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("images"), "'images' is missing"),
        (_without("annotations"), "'annotations' is missing"),
        (_without("categories"), "'categories' is missing"),
        (_repeat("images"), "images: id 17 occurs more than once"),
        (_repeat("annotations"), "annotations: id 0 occurs more than once"),
        (_repeat("categories"), "categories: id 90 occurs more than once"),
        (lambda c: {**c, "categories": []}, "'categories' is empty"),
        (lambda c: {**c, "categories": c["categories"][:2]}, "annotation 6: unknown category_id 7"),
        (lambda c: {**c, "images": []}, "no usable image"),
        (lambda c: {**c, "images": [{**i, "file_name": "no.png"} for i in c["images"]]}, "7 of 7 images are missing"),
        (lambda c: [c], "a JSON object is needed, this is a list"),
        (lambda c: 3, "a JSON object is needed, this is a int"),
    ],
)
def test_refused_in_one_line(
    tmp_path: Path, write_json: Callable[[Any], Path], mixed_content: dict[str, Any], change: Any, message: str
) -> None:
    path = write_json(change(mixed_content))
    with pytest.raises(ConfigError, match=message) as caught:
        read_coco(path, tmp_path / "images")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_broken_files_are_refused(tmp_path: Path, mixed_file: Path) -> None:
    whole = mixed_file.read_bytes()
    for content in (b"", whole[:-10], whole[: len(whole) // 2], b"\xff\xfe\x00", b"[" * 100_000):
        mixed_file.write_bytes(content)
        with pytest.raises(ConfigError, match="not JSON") as caught:
            read_coco(mixed_file, tmp_path / "images")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no such annotation file"):
        read_coco(tmp_path / "none.json", tmp_path / "images")
    mixed_file.write_bytes(whole)
    with pytest.raises(ConfigError, match="no such image folder"):
        read_coco(mixed_file, tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "outcome", "reason"),
    [
        ({"image_id": 99}, "dropped", "unknown image_id"),
        ({"bbox": [20, 10, 0, 20]}, "dropped", "degenerate"),
        ({"bbox": [20, 10, 30, -3]}, "dropped", "degenerate"),
        ({"bbox": [80, 10, 30, 20]}, "dropped", "degenerate"),
        ({"bbox": [20, 10, 0.09, 20]}, "dropped", "degenerate"),
        ({"bbox": [20, 10, 30, 20], "segmentation": {"size": [80, 60], "counts": [4800]}}, "dropped", "unusable segmentation"),
        ({"segmentation": {"size": [60, 80], "counts": [4000, 700]}}, "dropped", "unusable segmentation"),
        ({"segmentation": {"size": [60, 80], "counts": [-1, 4801]}}, "dropped", "unusable segmentation"),
        ({"segmentation": {"size": [60, 80], "counts": "garbage"}}, "dropped", "unusable segmentation"),
        ({"segmentation": [[1, 1, 5, 5]]}, "dropped", "unusable segmentation"),
        ({"segmentation": [[1, 1, 5, 5, 6, 1, 3]]}, "dropped", "unusable segmentation"),
        ({"segmentation": "garbage"}, "dropped", "unusable segmentation"),
        ({"segmentation": [[1, 1, 5, 5, 6, 1], [1, 2]]}, "dropped", "polygons"),
        ({"bbox": [70, 50, 20, 20]}, "clipped", "leaves the image"),
        ({"bbox": None}, "repaired", "taken from the mask"),
        ({"bbox": [1, 2, float("nan"), 3]}, "repaired", "taken from the mask"),
        ({"bbox": None, "segmentation": None}, "dropped", "without a usable bbox"),
        ({"area": None}, "repaired", "without an area"),
    ],
)
def test_nothing_is_dropped_in_silence(
    tmp_path: Path, write_json: Callable[[Any], Path], mixed_content: dict[str, Any], change: dict, outcome: str, reason: str
) -> None:
    mixed_content["annotations"][0].update(change)
    dataset = read_coco(write_json(mixed_content), tmp_path / "images")
    (((found, text), finding),) = dataset.report.findings.items()
    assert found == outcome
    assert reason in text
    assert (finding.count, finding.first_ids) == (1, [0])
    survives = outcome != "dropped" or reason == "polygons"
    assert dataset.report.kept["objects"] == 6 - (not survives)
    objects = {o.annotation_id: o for o in dataset.images[0].objects}
    assert (0 in objects) == survives
    if reason == "leaves the image":
        assert objects[0].box == (70, 50, 80, 60)
    if reason == "taken from the mask":
        assert objects[0].box == (20, 10, 50, 30)
    if reason == "without an area":
        assert objects[0].area == 550


def test_lost_images(
    tmp_path: Path, write_json: Callable[[Any], Path], mixed_content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images" / "photo 0.png").unlink()
    path = write_json(mixed_content)
    with pytest.raises(ConfigError, match=r"1 of 7 images are missing.*photo 0\.png"):
        read_coco(path, tmp_path / "images")
    monkeypatch.setattr("mrcnn_jax.data.coco.LOST_IMAGES", 0.2)
    mixed_content["images"][0]["file_name"] = "../instances.json"
    mixed_content["images"][1]["height"] = None
    dataset = read_coco(write_json(mixed_content), tmp_path / "images")
    found = {reason: (f.count, f.first_ids) for (_, reason), f in dataset.report.findings.items()}
    assert found["images whose file is missing"] == (1, [11])
    assert found["images whose file_name is missing or leaves the image folder"] == (1, [17])
    assert found["images without a size"] == (1, [16])
    assert found["annotations of a dropped image"] == (3, [0, 5, 4])
    assert [image.id for image in dataset.images] == [12, 13, 14, 15]


def test_one_image_in_a_hundred_may_be_lost(tmp_path: Path) -> None:
    refuse_lost_images(tmp_path, ["a"], 100, "are lost")
    with pytest.raises(ConfigError, match="2 of 199 images are lost: a, b"):
        refuse_lost_images(tmp_path, ["a", "b"], 199, "are lost")


def test_report_keeps_the_first_ten_ids() -> None:
    report = Report(kept={"images": 3})
    for number in range(25):
        report.add("dropped", "because", number)
    assert report.lines() == ["kept 3 images", "dropped 25: because (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)"]
    assert report.to_dict()["findings"] == [{"outcome": "dropped", "reason": "because", "count": 25, "first_ids": list(range(10))}]


@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1)))
@settings(deadline=None, max_examples=60)
def test_run_lengths_are_those_of_a_loop(mask: np.ndarray) -> None:
    runs, value = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    assert _runs(rle_ops.encode(np.asfortranarray(mask))["counts"].decode()) == runs


@given(st.text(max_size=30) | st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=30))
@settings(deadline=None, max_examples=200)
def test_garbage_is_no_mask(counts: str) -> None:
    rle = _rle({"size": [9, 7], "counts": counts}, 9, 7, 1, Report())
    assert rle is None or rle_ops.decode(rle).shape == (9, 7)


def test_five_thousand_annotations_take_less_than_five_seconds(
    tmp_path: Path, write_json: Callable[[Any], Path], mixed_content: dict[str, Any]
) -> None:
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    polygon = np.stack([40 + 20 * np.cos(angles), 30 + 20 * np.sin(angles)], 1).ravel().tolist()
    template = {"image_id": 11, "category_id": 3, "bbox": [20, 10, 40, 40], "area": 1256, "iscrowd": 0, "segmentation": [polygon]}
    mixed_content["annotations"] = [{**template, "id": number} for number in range(5000)]
    path = write_json(mixed_content)
    start = time.perf_counter()
    assert read_coco(path, tmp_path / "images").report.kept["objects"] == 5000
    assert time.perf_counter() - start < 5


def test_check_command(mixed_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check._main(mixed_file, mixed_file.parent / "images", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["objects_by_class"] == {"three": 2, "seven": 2, "ninety": 2}
    assert found["images_by_size"] == {"60 x 80": 3, "80 x 60": 1, "64 x 64": 1, "50 x 96": 1, "96 x 50": 1}
    assert (found["max_objects_per_image"], found["images_without_objects"], found["objects_without_mask"]) == (2, 2, 1)
    check._main(mixed_file, mixed_file.parent / "images")
    assert "three 2, seven 2, ninety 2" in capsys.readouterr().out


def test_check_command_refuses_with_status_2(mixed_file: Path) -> None:
    mixed_file.write_text("{")
    command = [sys.executable, "-m", "mrcnn_jax.data.check", "--annotations", str(mixed_file), "--images", str(mixed_file.parent)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(mixed_file) in done.stderr
