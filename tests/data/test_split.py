"""The laws of the split, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data.images import check_split
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.split import (
    MOST,
    SHARE,
    Part,
    chance,
    divide,
    existing_split,
    groupings,
    merged,
    split,
)

GROUP = st.sampled_from([f"group {n}" for n in range(12)])
IMAGES = st.lists(st.tuples(GROUP, st.frozensets(st.integers(1, 4))), min_size=2, max_size=60)


def sides(images: list[tuple[str, frozenset[int]]]) -> tuple[frozenset[str], tuple[str, ...]]:
    division = divide([group for group, _ in images], [classes for _, classes in images])
    return division.val, division.moved


@settings(deadline=None)
@given(IMAGES)
def test_what_every_division_has(images: list[tuple[str, frozenset[int]]]) -> None:
    groups = {group for group, _ in images}
    if len(groups) < 2:
        return
    val, moved = sides(images)
    assert val
    assert groups - val
    with_objects = {group for group, classes in images if classes}
    assert len(with_objects) < 2 or with_objects & val
    assert not with_objects or with_objects - val
    assert sides(images[::-1]) == (val, moved)
    # Nothing but the hash decides, where nothing had to be moved.
    assert {group for group in groups if chance(group) < SHARE} ^ val == set(moved)
    size = sum(group in val for group, _ in images)
    assert size <= MOST * len(images) or len(val) == 1
    # A class of two images or more is in training, unless a group had to go that holds it whole.
    for label in (1, 2, 3, 4):
        having = [group for group, classes in images if label in classes]
        if len(having) > 1 and not set(having) - val:
            assert len(val & with_objects) == 1
            spared = [
                group
                for group in with_objects
                if all(
                    {g for g, classes in images if k in classes} != {group}
                    for k in (1, 2, 3, 4)
                    if sum(k in classes for _, classes in images) > 1
                )
            ]
            assert spared == []


def test_a_fifth_and_stable_with_many_images() -> None:
    """Counted: of 1000 images one by one nothing is moved, and 500 more move none of them."""
    names = [f"image {n}" for n in range(1500)]
    first, then = (divide(names[:n], [{1}] * n) for n in (1000, 1500))
    assert first.moved == then.moved == ()
    assert first.val == then.val & set(names[:1000])
    assert 160 < len(first.val) < 240  # three standard deviations


def test_the_hash_is_sha256() -> None:
    """By `sha256sum`: printf a | sha256sum begins with ca978112ca1bbdca."""
    assert chance("a") == 0xCA978112CA1BBDCA / 2**64


@pytest.mark.parametrize(
    ("names", "by", "groups"),
    [
        ([f"{c}/{n}.png" for c in "abcde" for n in (1, 2)], "by subfolder", list("aabbccddee")),
        (
            [f"x/{c}_{n:04}.png" for c in "abcde" for n in (1, 22)],
            "by video",
            [f"x/{c}" for c in "aabbccddee"],
        ),
        ([f"{c}{n}.png" for c in "abcd" for n in (1, 2)], "one by one", None),  # four videos
        ([f"{c}/{n}.png" for c in "abcd" for n in (1, 2)], "one by one", None),
        ([f"{c}{n}.png" for c in "abcde" for n in (1, 2)], "by video", list("aabbccddee")),
        (["cat.png", "dog.png", "emu.png", "fox.png", "gnu.png", "hen.png"], "one by one", None),
        ([f"{n:06}.jpg" for n in range(9)], "one by one", None),
        (
            [f"{c}_jpg.rf.{32 * d}.jpg" for c in ("x1", "y2") for d in "a0"],
            "one by one",
            ["x1", "x1", "y2", "y2"],  # versions of an image by Roboflow
        ),
        (
            [f"{n}a{n}a{n}a{n}a-{c}_{n:04}.png" for c in "abcde" for n in (1, 2)],
            "by video",
            list("aabbccddee"),  # uploads to Label Studio
        ),
        ([f"{n}a{n}a{n}a{n}a-image1.png" for n in range(9)], "one by one", None),
        (
            [f"x/{c}_{n}/00000_{x:05}.png" for c in "abcde" for n in (1, 2) for x in (0, 896)],
            "by video",
            [f"x/{c}" for c in "aaaabbbbccccddddeeee"],
        ),
        (
            [f"{c}/{y:05}_{x:05}.png" for c in "abc" for y in (0, 896) for x in (0, 896, 1100)],
            "one by one",
            list("aaaaaabbbbbbcccccc"),  # tiles of three images
        ),
    ],
)
def test_what_belongs_together(names: list[str], by: str, groups: list[str] | None) -> None:
    found = next(groupings(names))
    assert found[0].startswith(by)
    assert found[1] == (groups or [name.rpartition(".")[0] for name in names])


def test_copies_may_leave_too_few_groups() -> None:
    names = [f"{c}{n}.png" for c in "abcde" for n in (1, 2)]
    by, groups = next(groupings(names, [[0, 2]]))
    assert by == "one by one"
    assert groups == ["a1", "a2", "a1", "b2", "c1", "c2", "d1", "d2", "e1", "e2"]


@given(st.lists(st.sampled_from("abcdef"), min_size=1), st.data())
def test_copies_join_their_groups(groups: list[str], data: st.DataObject) -> None:
    """Beside a flood over all pairs of images."""
    number = st.integers(0, len(groups) - 1)
    copies = data.draw(st.lists(st.lists(number, min_size=2), max_size=5))
    joined = merged(groups, copies)
    near = [[a == b for b in groups] for a in groups]
    for numbers in copies:
        for a in numbers:
            for b in numbers:
                near[a][b] = True
    for start in range(len(groups)):
        reached, fresh = set(), {start}
        while fresh:
            reached |= fresh
            fresh = {b for a in fresh for b, is_near in enumerate(near[a]) if is_near} - reached
        together = {place for place, group in enumerate(joined) if group == joined[start]}
        assert together == reached
        assert joined[start] == min(groups[place] for place in reached)


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def part(mixed_file: Path) -> Part:
    """Seven images: those named "photo 0.png" to "photo 6.png" of the mixed data set."""
    return Part(mixed_file, mixed_file.parent / "images")


def read(part: Part) -> dict[str, Any]:
    return json.loads(part.annotations.read_text())


def test_a_side_without_a_readable_image_is_refused(part: Part, tmp_path: Path) -> None:
    """By the names of its files: neither side is left out in silence."""
    sides = split(part, tmp_path, tmp_path / "out")[:2]
    data = DataConfig()
    for side in sides:
        dataset = read_coco(side.annotations, side.images, data)
        for image in dataset.images:
            file = side.images / image.file_name
            file.write_bytes(file.read_bytes()[:-60])
        first = dataset.images[0].file_name
        with pytest.raises(
            ConfigError, match=rf"{side.annotations.name}: no us.*; {first} \(.*cut off\)"
        ):
            check_split(dataset, cache=tmp_path / "cache", data=data, keep_empty=True)


def test_both_files_have_the_whole(part: Part, tmp_path: Path) -> None:
    training, validation, line = split(part, tmp_path, tmp_path / "out")
    whole, halves = read(part), [read(training), read(validation)]
    assert halves[0]["categories"] == halves[1]["categories"] == whole["categories"]
    for section in ("images", "annotations"):
        rows = [row for half in halves for row in half[section]]
        assert sorted(rows, key=lambda row: row["id"]) == sorted(
            whole[section], key=lambda row: row["id"]
        )
    ids = [{image["id"] for image in half["images"]} for half in halves]
    assert all(ids)
    for half, inside in zip(halves, ids, strict=True):
        assert {a["image_id"] for a in half["annotations"]} <= inside
    for side in (training, validation):
        assert not read_coco(side.annotations, side.images, DataConfig()).lost
    counts = [len(found) for found in ids]
    assert f"{counts[0]} images for training and {counts[1]} for validation" in line
    record = json.loads((tmp_path / "out" / "split.json").read_text())
    assert (record["training_images"], record["validation_images"]) == tuple(counts)
    assert "SHA-256" in record["rule"]


def in_folders(part: Part, *places: str) -> None:
    """Moves the images, by their order, to these relative paths."""
    content = read(part)
    assert len(places) == len(content["images"])
    for image, place in zip(content["images"], places, strict=True):
        (part.images / place).parent.mkdir(parents=True, exist_ok=True)
        (part.images / image["file_name"]).rename(part.images / place)
        image["file_name"] = place
    part.annotations.write_text(json.dumps(content))


def names_of(part: Part) -> list[str]:
    return sorted(image["file_name"] for image in read(part)["images"])


def test_folders_named_train_val_and_test_divide(part: Part, tmp_path: Path) -> None:
    places = [f"{folder}/{n}.png" for n, folder in enumerate(["train", "test", "val"] * 2)]
    in_folders(part, *places, "train/x/6.png")
    training, validation, line = split(part, tmp_path, tmp_path / "out")
    assert names_of(training) == ["train/0.png", "train/3.png", "train/x/6.png"]
    assert names_of(validation) == ["val/2.png", "val/5.png"]
    for side in (training, validation):
        ids = {image["id"] for image in read(side)["images"]}
        assert {a["image_id"] for a in read(side)["annotations"]} <= ids
    assert line.endswith(
        "out: 3 images for training and 2 for validation, divided as their folders say (the rule "
        "is in split.json); not used: 2 images of test/"
    )
    record = json.loads((tmp_path / "out" / "split.json").read_text())
    assert record["rule"] == ("As the folders of the images say. Not used: 2 images of test/.")
    assert (record["training_images"], record["validation_images"]) == (3, 2)


def test_images_of_tests_are_not_trained_on(part: Part, tmp_path: Path) -> None:
    """Without images for validation, the others are divided."""
    places = [f"my/{folder}/{n}.png" for n, folder in enumerate(["training", "Test"] * 3)]
    in_folders(part, *places, "my/training/6.png")
    training, validation, line = split(part, tmp_path, tmp_path / "out")
    both = [*names_of(training), *names_of(validation)]
    assert sorted(both) == [f"my/training/{n}.png" for n in (0, 2, 4, 6)]
    assert names_of(validation)
    assert "divided one by one" in line
    assert line.endswith("; not used: 3 images of my/Test/")


def test_validation_images_that_are_not_annotated_are_not_used(part: Part, tmp_path: Path) -> None:
    """AP would be -1; training on them as if they were empty would be worse."""
    places = [f"{folder}/{n}.png" for n, folder in enumerate(["train", "test", "val"] * 2)]
    in_folders(part, *places, "train/x/6.png")
    content = read(part)
    empty = [image["id"] for image in content["images"] if image["file_name"][:3] == "val"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in empty]
    part.annotations.write_text(json.dumps(content))
    training, validation, line = split(part, tmp_path, tmp_path / "out")
    both = [*names_of(training), *names_of(validation)]
    assert sorted(both) == ["train/0.png", "train/3.png", "train/x/6.png"]
    assert read(validation)["annotations"]
    told = "2 images of val/ (none has an object), 2 images of test/"
    assert line.endswith(f"; not used: {told}")
    record = json.loads((tmp_path / "out" / "split.json").read_text())
    assert record["rule"].endswith(f"Not used: {told}.")


@pytest.mark.parametrize("other", ["bus", "train"])
def test_folders_that_do_not_say_all(other: str, part: Part, tmp_path: Path) -> None:
    """One is named after a class; or the only image to train on would have no object."""
    in_folders(part, f"{other}/0.png", *(f"test/{n}.png" for n in range(6)))
    first = read(part)["images"][0]["id"]
    assert first not in {a["image_id"] for a in read(part)["annotations"]}
    training, validation, line = split(part, tmp_path, tmp_path / "out")
    assert len([*names_of(training), *names_of(validation)]) == 7
    assert "not used" not in line


def test_missing_images_are_on_neither_side(part: Part, tmp_path: Path) -> None:
    """Two of 200: few enough for the whole, perhaps not for a side. Other annotations stay."""
    content = read(part)
    pixels = (part.images / content["images"][0]["file_name"]).read_bytes()
    first = content["images"][0]
    for number in range(100, 293):
        name = f"x{number}.png"
        (part.images / name).write_bytes(pixels + bytes([number % 256]))
        content["images"].append(first | {"id": number, "file_name": name})
    lost = {100, 101}
    for number in lost:
        (part.images / f"x{number}.png").unlink()
    annotation = content["annotations"][0]
    content["annotations"] += [
        annotation | {"id": 9000 + number, "image_id": number} for number in (*lost, 7777)
    ]
    part.annotations.write_text(json.dumps(content))
    training, validation, line = split(part, tmp_path, tmp_path / "out")
    images, annotations = [], []
    for side in (training, validation):
        assert not read_coco(side.annotations, side.images, DataConfig()).lost
        images += [image["id"] for image in read(side)["images"]]
        annotations += [a["image_id"] for a in read(side)["annotations"]]
    assert len(images) == 198
    assert not lost & {*images, *annotations}
    assert 7777 in annotations  # which the reading of that side reports
    assert (
        "; left out: 2 of 200 listed images: 'x100.png' (images whose file is missing), "
        "'x101.png' (images whose file is missing)"
    ) in line


def test_tiles_of_one_image_cannot_be_divided(part: Part, tmp_path: Path) -> None:
    in_folders(
        part, *(f"a/{y:05}_{x:05}.png" for y in (0, 448) for x in (0, 448, 896, 900)[y // 448 :])
    )
    with pytest.raises(
        ConfigError, match=r"its 7 images are tiles of one, which overlap: none can"
    ):
        split(part, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", ["{}/{}.png", "{}_{}.png"])
def test_folders_and_names_of_classes_do_not_divide(name: str, part: Part, tmp_path: Path) -> None:
    """Five images of each of five classes, which their folder or name says, and five of none."""
    content = read(part)
    pixels = (part.images / content["images"][0]["file_name"]).read_bytes()
    first = content["images"][0] | {"height": 60, "width": 80}
    box = {"bbox": [1, 2, 30, 20], "area": 600, "iscrowd": 0, "segmentation": None}
    labels = [f"class {n}" for n in range(5)]
    content = {
        "categories": [{"id": n, "name": label} for n, label in enumerate(labels)],
        "images": [],
        "annotations": [],
    }
    for number in range(30):
        file = name.format([*labels, "good"][number % 6], number // 6)
        (part.images / file).parent.mkdir(exist_ok=True)
        (part.images / file).write_bytes(pixels + bytes([number]))  # no two are copies
        content["images"].append(first | {"id": number, "file_name": file})
        if number % 6 < 5:
            annotation = {"id": number, "image_id": number, "category_id": number % 6}
            content["annotations"].append(annotation | box)
    part.annotations.write_text(json.dumps(content))
    training, validation, line = split(part, tmp_path, tmp_path / "out")
    assert "divided one by one" in line
    assert {a["category_id"] for a in read(training)["annotations"]} == set(range(5))
    assert read(validation)["annotations"]
    defects = [a for a in content["annotations"] if a["category_id"] == 0]  # all in one group
    part.annotations.write_text(json.dumps(content | {"annotations": defects}))
    both = split(part, tmp_path, tmp_path / "defects")[:2]
    assert all(read(side)["annotations"] for side in both)
    assert any(image["file_name"].startswith("good") for image in read(training)["images"])


def test_a_split_is_the_same_again(part: Part, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert existing_split(tmp_path, out) is None
    split(part, tmp_path, out, fingerprint="f1")
    before = [path.read_bytes() for path in sorted(out.iterdir())]
    found = existing_split(tmp_path, out)
    assert found is not None
    assert found["fingerprint"] == "f1"
    split(part, tmp_path, out, fingerprint="f1")
    assert [path.read_bytes() for path in sorted(out.iterdir())] == before
    with pytest.raises(ConfigError, match=r"is of .*, not of .* \(choose another --workdir\)"):
        existing_split(part.images, out)


def test_copies_are_on_one_side(part: Part, tmp_path: Path) -> None:
    """Ten more images, of which each is a copy of "photo 0.png"."""
    content = read(part)
    first = content["images"][0]
    names = {first["file_name"]}
    for number in range(100, 110):
        name = f"{number}x.png"
        (part.images / name).write_bytes((part.images / first["file_name"]).read_bytes())
        content["images"].append(first | {"id": number, "file_name": name})
        names.add(name)
    part.annotations.write_text(json.dumps(content))
    assert len({chance(name[:-4]) < SHARE for name in names}) == 2  # alone, they would be on both
    training, validation, _ = split(part, tmp_path, tmp_path / "out")
    for side in (training, validation):
        there = {image["file_name"] for image in read(side)["images"]}
        assert names & there in (set(), names)


def test_a_fault_leaves_nothing_behind(part: Part, tmp_path: Path) -> None:
    """And names the user's file."""
    content = read(part)
    content["annotations"][0]["category_id"] = 12345
    part.annotations.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"^{part.annotations}: annotation .* 12345"):
        split(part, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_image_cannot_be_divided(part: Part, tmp_path: Path) -> None:
    content = read(part)
    used = content["annotations"][0]["image_id"]
    content["images"] = [image for image in content["images"] if image["id"] == used]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == used]
    part.annotations.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"1 images, of which no two differ: too few"):
        split(part, tmp_path, tmp_path / "out")
