"""A short run of the fuzzer, and proof that it notices failures."""

from __future__ import annotations

import functools
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

from tools import fuzz


def test_a_short_run_ends_well() -> None:
    cases: list[tuple[fuzz.Kind, int]] = [("annotations", i) for i in range(150)] + [
        ("images", i) for i in range(100)
    ]
    result = fuzz.run(cases, seed=1, limit=20, processes=1)
    assert result.failures == []
    assert sum(result.outcomes.values()) == len(cases)
    # Mutations go far enough, and not too far: every outcome occurs.
    assert set(result.outcomes) >= {
        "annotations: usable",
        "annotations: usable in part",
        "annotations: refused",
        "images: usable",
        "images: dropped",
    }


def test_cases_are_pure_and_differ() -> None:
    for make in (fuzz.annotation_case, fuzz.image_case):
        cases = [make(3, i) for i in range(50)]
        assert cases == [make(3, i) for i in range(50)]
        assert len(set(cases)) > 45
        assert cases[0] != make(4, 0)


def _misbehave(case: bytes, folder: Path, *, first: list[bytes]) -> str:
    match first.index(case):
        case 0:
            os.abort()
        case 1:
            time.sleep(60)
        case 2:
            raise KeyError("missing")
        case 3:
            return str(len(bytearray(64 << 30)))
    return "usable"


def serve_badly(connection: Connection, seed: int) -> None:
    first = [fuzz.annotation_case(seed, i) for i in range(5)]
    fuzz.serve(connection, seed, {"annotations": functools.partial(_misbehave, first=first)})


def test_crashes_hangs_and_untyped_errors_are_seen() -> None:
    result = fuzz.run(
        [("annotations", i) for i in range(5)], seed=0, limit=2, processes=1, target=serve_badly
    )
    assert result.outcomes == {"annotations: usable": 1}
    crash, hang, untyped, memory = result.failures
    assert crash == "annotations 0: crash: exit status -6"
    assert hang == "annotations 1: hang: over 2 s"
    assert untyped.startswith("annotations 2: error: KeyError: 'missing' (test_fuzz.py:")
    assert memory.startswith("annotations 3: error: MemoryError")
