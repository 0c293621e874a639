"""Where the images of a COCO file are. (The layouts of tools: test_recognise.py.)"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets.test_recognise import coco, image
from datasets.test_recognise import found as places

from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.data.report import Reason
from mrcnn_jax.datasets import coco_images
from mrcnn_jax.datasets.recognise import recognise
from mrcnn_jax.datasets.tree import Tree


def found(folder: Path, *, lost: bool = False) -> CocoDataset:
    part = recognise(folder).train
    assert part is not None
    return read_coco(part.annotations, part.images, DataConfig(), lost_images=lost)


def test_names_in_another_unicode_form(tmp_path: Path) -> None:
    """As macOS writes them: longer than in the file."""
    coco(tmp_path / "mine.json", "\u00fcber/gr\u00f6\u00dfe.png")
    image(tmp_path / "photos" / "u\u0308ber" / "gro\u0308\u00dfe.png")
    assert places(tmp_path) == ("mine.json", "photos")


def test_one_file_with_images_anywhere(tmp_path: Path) -> None:
    coco(tmp_path / "labels" / "mine.json", "1.png", "2.png", images=tmp_path / "photos" / "new")
    image(tmp_path / "thumbnails" / "1.png")
    assert places(tmp_path) == ("labels/mine.json", "photos/new")


@pytest.mark.parametrize("other", ["masks", "depth", "seg_labels", "demo", "gt/images"])
def test_pictures_with_the_names_of_the_images(other: str, tmp_path: Path) -> None:
    """Masks, depth maps, and a folder of examples, with the first fifty of sixty names."""
    names = [f"{number:02}.png" for number in range(60)]
    coco(tmp_path / "mine.json", *names, images=tmp_path / "images")
    for name in names[:50] if other == "demo" else names:
        image(tmp_path / other / name)
    assert places(tmp_path) == ("mine.json", "images")


def test_the_folder_of_the_annotations_says_nothing_of_the_images(tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    coco(folder / "mine.json", "1.png", "2.png", images=folder / "images")
    for name in ("1.png", "2.png"):
        image(tmp_path / "originals" / name)
    assert places(tmp_path) == ("annotations/mine.json", "annotations/images")


def test_images_in_a_folder_that_is_named_like_masks(tmp_path: Path) -> None:
    coco(tmp_path / "mine.json", "1.png", "2.png", "3.png", images=tmp_path / "masks of faces")
    image(tmp_path / "thumbnails" / "1.png")
    assert places(tmp_path) == ("mine.json", "masks of faces")


def test_paths_of_another_machine(tmp_path: Path) -> None:
    coco(tmp_path / "mine.json", "C:\\me\\1.png", "C:\\me\\2.png")
    image(tmp_path / "photos" / "1.png")
    image(tmp_path / "photos" / "2.png")
    assert places(tmp_path) == ("mine.json", ".")


def test_names_without_a_folder_in_several(tmp_path: Path) -> None:
    """As of LIVECell: 60 of one type, which are more than are looked at first, and then 9."""
    names = [f"a{number}.png" for number in range(60)] + [f"b{number}.png" for number in range(9)]
    coco(tmp_path / "livecell_coco_val.json", *names)
    for name in names:
        image(tmp_path / "images" / "livecell_train_val_images" / name[0] / name)
    (dataset,) = (found(tmp_path),)
    assert dataset.images_dir == tmp_path / "images" / "livecell_train_val_images"
    assert [i.file_name for i in dataset.images] == [f"{name[0]}/{name}" for name in names]
    assert [reason for reason, _ in dataset.report.findings] == [Reason.IN_SUBFOLDER]


@pytest.mark.parametrize(
    "others", [("old/9.png",), ("c/8.png", "d/8.png", "c/9.png", "d/9.png"), ("test/9.png",)]
)
def test_other_pictures_of_a_name_are_not_taken(others: tuple[str, ...], tmp_path: Path) -> None:
    """One of 100 may be missing; a name that fits two; the images of another part."""
    count = 100 if others == ("old/9.png",) else 10
    names = [f"{number}.png" for number in range(count)]
    folder = "train" if others == ("test/9.png",) else "photos"
    coco(tmp_path / "train.json", *names, images=tmp_path / folder)
    for name in {other.rpartition("/")[2] for other in others}:
        (tmp_path / folder / name).unlink()
    for other in others:
        image(tmp_path / other)
    dataset = found(tmp_path, lost=True)
    assert dataset.images_dir == tmp_path / folder
    assert len(dataset.images) + len(dataset.lost) == count
    assert dataset.lost


@pytest.mark.parametrize("place", ["coco/train2017", "coco", "."])
def test_names_in_urls(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of LVIS: a gigabyte, which is not read to its end again for what they say themselves."""
    listed, ends = coco_images._file_names, []

    def counted(path: Path) -> Iterator[str]:
        yield from listed(path)
        ends.append(path)

    monkeypatch.setattr(coco_images, "_file_names", counted)
    file = coco(tmp_path / "lvis_v1_train.json", "1.png", "2.png", images=tmp_path / place)
    content = json.loads(file.read_text())
    for one in content["images"]:
        one["coco_url"] = f"http://images.cocodataset.org/train2017/{one.pop('file_name')}"
    file.write_text(json.dumps(content))
    dataset = found(tmp_path)
    assert len(ends) == 1  # of two names, all are looked at first
    assert [Path(i.file_name).name for i in dataset.images] == ["1.png", "2.png"]
    assert dataset.images_dir == tmp_path / place.removesuffix("/train2017")
    (finding,) = (f for (r, _), f in dataset.report.findings.items() if r is Reason.FROM_URL)
    assert finding.count == 2


def test_one_name_in_thousands_of_folders(tmp_path: Path) -> None:
    """As of recordings, with masks of the same names: comparing each name with all of their files
    took minutes."""
    count = 10_000
    names = [f"{number:05}/rgb.png" for number in range(count)]
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"file_name": n} for n in names]}))
    tree = Tree(tmp_path, tuple(f"{kind}/{n}" for kind in ("images", "masks") for n in names))
    begun = time.process_time()
    assert coco_images.coco_part(tree, "a.json").images == tmp_path / "images"
    places, _ = coco_images._places(tree, ["rgb.png"] * count)
    assert len(places) == 2 * count
    assert set(places.values()) == {count}
    assert time.process_time() - begun < 15
