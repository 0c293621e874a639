from __future__ import annotations

import threading
from pathlib import Path

import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.cache import each, is_sealed, keep, kept, seal


def test_what_is_kept_comes_back_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "found.json"
    assert kept(path) is None
    found = {"maps": [1, 2], "least": float("inf"), "name": "é"}
    keep(path, found)
    assert kept(path) == found
    whole = path.read_bytes()
    for place in range(whole.index(b"found"), len(whole)):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        )
        assert kept(path) is None
    path.write_bytes(whole[:-9])
    assert kept(path) is None


def test_harm_to_a_sealed_folder_is_noticed(tmp_path: Path) -> None:
    assert not is_sealed(tmp_path / "absent")
    for name in ("a.npy", "b.npy"):
        (tmp_path / name).write_bytes(bytes(range(200)))
    assert not is_sealed(tmp_path)
    seal(tmp_path)
    assert is_sealed(tmp_path)
    (tmp_path / "b.npy").write_bytes(bytes(range(199)) + b"x")
    assert not is_sealed(tmp_path)
    seal(tmp_path)
    (tmp_path / "c.npy").touch()
    assert not is_sealed(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/cache: Not a directory$"):
        keep(tmp_path / "file" / "cache" / "found.json", {})


def test_threads_give_results_in_order() -> None:
    both = threading.Barrier(2, timeout=10)  # passed only if two items are worked on at a time

    def double(number: int) -> int:
        both.wait()
        return 2 * number

    assert list(each(range(6), double, threads=2, what="doubling")) == [
        (number, 2 * number) for number in range(6)
    ]
