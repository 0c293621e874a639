from __future__ import annotations

import errno
import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mrcnn_jax.data import superseded
from mrcnn_jax.data.superseded import HeldFolder, remove_earlier, tell_earlier

SHARES = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 1); print(flush=True); input()"
MIB = bytes(2**20)


def held(folder: Path, file: str = "data/train.json", split: str = "train") -> HeldFolder:
    """A folder with a MiB of records."""
    found = HeldFolder(folder, split, folder.parent / file, folder.parent / "data")
    (folder / "records").mkdir(exist_ok=True)
    (folder / "records" / "images").write_bytes(MIB)
    return found


def key(number: int) -> str:
    return f"train-{number:016x}"


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_earlier_versions_are_removed_and_all_else_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        held(tmp_path / key(number))
    (tmp_path / key(3) / "records").mkdir(parents=True)  # as releases before left them
    others = [
        held(tmp_path / key(4), split="val"),
        held(tmp_path / key(5), "test/train.json"),
        held(tmp_path / "train-old-00000000000000aa"),
        held(tmp_path / "train-copy"),
    ]
    folders = [other.folder.name for other in others]
    del others
    now = held(tmp_path / key(0))
    remove_earlier([now])
    assert names(tmp_path) == sorted([*folders, key(0)])
    assert (now.folder / "records" / "images").read_bytes() == MIB
    line = (
        f"{tmp_path}: removed what was built from earlier versions of these annotations or images"
    )
    assert capsys.readouterr().out == f"{line}: 3 folders, 2 MiB\n"
    remove_earlier([now])
    assert capsys.readouterr().out == ""


def test_two_splits_of_one_file_keep_each_other(tmp_path: Path) -> None:
    """Training leaves images without objects out, validation does not; or both are the same."""
    for splits in (("train", "val"), ("train", "train")):
        both = [held(tmp_path / key(number), split=splits[number]) for number in (0, 1)]
        remove_earlier(both)
        assert names(tmp_path) == [key(0), key(1)]


def test_a_data_set_that_was_moved_is_known_by_its_new_place(tmp_path: Path) -> None:
    held(tmp_path / key(1), "old/train.json")
    held(tmp_path / key(1), "new/train.json")
    remove_earlier([held(tmp_path / key(0), "old/train.json")])
    assert names(tmp_path) == [key(0), key(1)]
    remove_earlier([held(tmp_path / key(0), "new/train.json")])
    assert names(tmp_path) == [key(0)]


def test_what_is_read_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By this process, and by another one until it ends."""
    read = held(tmp_path / key(1))
    held(tmp_path / key(2))
    command = [sys.executable, "-c", SHARES, str(tmp_path / key(2) / superseded.MADE_FROM)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        now = held(tmp_path / key(0))
        remove_earlier([now])
        assert names(tmp_path) == [key(0), key(1), key(2)]
        assert capsys.readouterr().out == ""
        reader.communicate(b"\n")
    remove_earlier([now])
    assert names(tmp_path) == [key(0), key(1)]
    del read
    remove_earlier([now])
    assert names(tmp_path) == [key(0)]


def test_a_folder_that_is_removed_while_it_is_taken_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening its file and the lock on it."""
    left = [tmp_path / key(1), tmp_path / key(1)]
    flock = fcntl.flock

    def late(descriptor: int, lock: int) -> None:
        if left:
            shutil.rmtree(left.pop())
        flock(descriptor, lock)

    with monkeypatch.context() as patch:
        patch.setattr(superseded.fcntl, "flock", late)
        read = held(tmp_path / key(1))
    assert not left
    remove_earlier([held(tmp_path / key(0))])
    assert names(tmp_path) == [key(0), key(1)], "its file is locked"
    del read
    remove_earlier([held(tmp_path / key(0))])
    assert names(tmp_path) == [key(0)]


def test_nothing_is_removed_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(superseded.fcntl, "flock", flock)
    held(tmp_path / key(1))
    remove_earlier([held(tmp_path / key(0))])
    assert names(tmp_path) == [key(0), key(1)]


def test_earlier_versions_in_a_shared_cache_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = held(tmp_path / key(0))
    (tmp_path / key(3)).mkdir()
    tell_earlier([now])
    assert capsys.readouterr().out == ""
    for number in (1, 2):
        held(tmp_path / key(number))
    tell_earlier([now])
    assert capsys.readouterr().out == (
        f"{tmp_path}: also has what was built from earlier versions of these annotations or "
        f"images: 2 folders, 2 MiB: {key(1)}, {key(2)} (delete what no other run uses)\n"
    )
    assert names(tmp_path) == [key(number) for number in range(4)]
