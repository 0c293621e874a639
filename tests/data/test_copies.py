"""Images that are there twice, by their bytes."""

from __future__ import annotations

from pathlib import Path

from findings import found

from mrcnn_jax.data.copies import END, note_copies
from mrcnn_jax.data.records import Category, CocoDataset, ImageRecord
from mrcnn_jax.data.report import Reason, Report


def dataset(folder: Path, *names: str) -> CocoDataset:
    images = tuple(ImageRecord(i, name, 8, 8, ()) for i, name in enumerate(names, 1))
    path = folder / "instances.json"
    return CocoDataset((Category(1, "a"),), images, Report(), path, folder, len(images))


def test_copies_in_one_file_and_in_both(tmp_path: Path) -> None:
    """Files of one size and one end may differ still; a name may be there for two images."""
    train, val = tmp_path / "train", tmp_path / "val"
    end = b"e" * END
    contents = {
        train / "a.png": b"1" + end,
        train / "b.png": b"2" + end,
        train / "copy of a.png": b"1" + end,
        train / "c.png": b"other",
        val / "a.png": b"3" + end,
        val / "renamed.png": b"2" + end,
        val / "again.png": b"2" + end,
        val / "d.png": b"third",
    }
    for path, content in contents.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    training = dataset(train, "a.png", "b.png", "copy of a.png", "c.png", "./c.png")
    validation = dataset(val, "a.png", "renamed.png", "again.png", "d.png", "../train/c.png")
    note_copies(training, validation)
    assert found(training) == {Reason.SAME_FILE: (1, [3])}
    assert found(validation) == {Reason.SAME_FILE: (1, [3]), Reason.IN_TRAINING: (3, [2, 3, 5])}
    (line,) = (line for line in validation.report.lines() if "too" in line)
    assert line == (
        f"noticed 3: images that are in {train / 'instances.json'}, too: trained on, they prove "
        "nothing (2, 3, 5)"
    )


def test_files_of_other_sizes_are_not_read(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"x" * number)
        (tmp_path / f"{number}.png").chmod(0)
    training = dataset(tmp_path, "0.png", "1.png", "2.png", "gone.png")
    note_copies(training)
    assert found(training) == {}
