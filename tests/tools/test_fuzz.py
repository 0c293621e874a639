"""A short run of the fuzzer, and proof that it notices failures."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tools import fuzz
from tools.kinds import annotations, converters, depth, images
from tools.kinds.mutations import WrongError

COUNTS: dict[fuzz.Kind, int] = {
    "annotations": 150,
    "images": 100,
    "depth": 100,
    "runs": 30,
    "converters": 60,
}


def test_a_short_run_ends_well() -> None:
    cases = [(kind, i) for kind, count in COUNTS.items() for i in range(count)]
    result = fuzz.run(cases, seed=1, limit=20, processes=1)
    assert result.failures == []
    assert sum(result.outcomes.values()) == len(cases)
    # Damage goes far enough, and not too far: every outcome occurs.
    assert set(result.outcomes) >= {f"{kind}: refused" for kind in COUNTS}
    assert set(result.outcomes) >= {f"{kind}: right" for kind in COUNTS if kind != "runs"}
    ends = {"annotations", "images", "converters"}
    assert set(result.outcomes) >= {f"{kind}: told" for kind in ends}


def test_cases_are_pure_and_differ() -> None:
    for kind in fuzz.KINDS.values():
        cases = [kind.case(3, i) for i in range(50)]
        assert cases == [kind.case(3, i) for i in range(50)]
        assert len({case.content for case in cases}) > 35
        assert cases[0] != kind.case(4, 0)


# -- what is wrong is seen -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    annotations.prepare(folder)
    images.prepare(folder)
    return folder


def changed(key: str, value: Any) -> bytes:
    content = annotations.whole_file()
    content["annotations"][3][key] = value
    return json.dumps(content).encode()


def test_a_wrong_object_is_seen(folder: Path) -> None:
    """Another class: nothing tells. A mask that is not in its box is told, and a box that is not
    around its mask comes from it."""
    case = annotations.Case(changed("category_id", 3), "changed")
    with pytest.raises(WrongError, match="changed: 1 of 24 objects are wrong, and nothing tells"):
        annotations.outcome(case, folder)
    polygon = [[0, 0, 9, 0, 9, 9, 0, 9]]
    told = annotations.Case(changed("segmentation", polygon), "moved")
    assert annotations.outcome(told, folder) == "told"
    assert annotations.outcome(annotations.Case(changed("bbox", [0, 0, 9, 9])), folder) == "right"
    harmless = annotations.Case(changed("image_id", 99), "lost", harmless=True)
    with pytest.raises(WrongError, match="lost: 1 of 24"):
        annotations.outcome(harmless, folder)
    assert (
        annotations.outcome(annotations.Case(changed("area", 7), "area", True), folder) == "right"
    )


def test_an_object_whose_own_entries_are_whole_is_compared(folder: Path) -> None:
    mixed = annotations.mixed_file()
    assert annotations._untouched(json.dumps(mixed).encode()) == set(range(7))
    mixed["annotations"][2]["area"] = 1
    del mixed["images"][0], mixed["categories"][0]  # of annotations 0, 3, 6; and 1, 3, 5
    assert annotations._untouched(json.dumps(mixed).encode()) == {4}
    assert annotations._untouched(b"[]") == annotations._untouched(b"{") == set()


def test_other_pixels_are_seen(folder: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(255 - np.asarray(images.picture())).save(buffer, "PNG")
    with pytest.raises(WrongError, match="PNG: cut off: other pixels, and nothing tells"):
        images.outcome(images.Case(buffer.getvalue(), "cut off", "PNG"), folder)
    whole = images.forms()["PNG"].content
    assert images.outcome(images.Case(whole, "whole", "PNG"), folder) == "right"
    with pytest.raises(WrongError, match="PNG: whole, but refused"):
        images.outcome(images.Case(whole[:99], "whole", "PNG"), folder)


def test_other_depths_are_seen(tmp_path: Path) -> None:
    depth.prepare(tmp_path)
    whole = depth.forms()["PNG"]
    assert depth.outcome(depth.Case(whole, "whole", "PNG"), tmp_path) == "right"
    buffer = io.BytesIO()
    Image.fromarray(depth.millimetres() + np.uint16(200)).save(buffer, "PNG")
    with pytest.raises(WrongError, match="PNG: a bit: other depths, and nothing tells"):
        depth.outcome(depth.Case(buffer.getvalue(), "a bit", "PNG"), tmp_path)
    shutil.rmtree(tmp_path / "cache")
    assert depth.outcome(depth.Case(whole[:99], "cut off", "PNG"), tmp_path) == "refused"


def test_another_box_of_a_converter_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = {"moved": lambda content: content.replace(b"[25, 30]", b"[20, 20]")}
    monkeypatch.setitem(converters.CHANGES, "labelme", moved | {"same": lambda content: content})
    assert converters.outcome(converters.Case("labelme", "same", 0), tmp_path) == "right"
    moved["moved"] = lambda content: content.replace(b"[25, ", b"[35, ")
    monkeypatch.setitem(converters.CHANGES, "labelme", moved)
    with pytest.raises(WrongError, match=r"labelme: moved: image .*, and nothing tells"):
        converters.outcome(converters.Case("labelme", "moved", 0), tmp_path)


def _misbehave(case: annotations.Case, folder: Path, *, first: list[annotations.Case]) -> str:
    match first.index(case):
        case 0:
            os.abort()
        case 1:
            time.sleep(60)
        case 2:
            raise KeyError("missing")
        case 3:
            return str(len(bytearray(64 << 30)))
        case 4:
            raise WrongError("another value")
    return "right"


def serve_badly(connection: Connection, seed: int) -> None:
    first = [annotations.case(seed, i) for i in range(6)]
    fuzz.serve(connection, seed, {"annotations": functools.partial(_misbehave, first=first)})


def test_crashes_hangs_untyped_errors_and_wrong_answers_are_seen() -> None:
    result = fuzz.run(
        [("annotations", i) for i in range(6)], seed=0, limit=2, processes=1, target=serve_badly
    )
    assert result.outcomes == {"annotations: right": 1}
    crash, hang, untyped, memory, wrong = result.failures
    assert crash == "annotations 0: crash: exit status -6"
    assert hang == "annotations 1: hang: over 2 s"
    assert untyped.startswith("annotations 2: error: KeyError: 'missing' (test_fuzz.py:")
    assert memory.startswith("annotations 3: error: MemoryError")
    assert wrong == "annotations 4: wrong: another value"
