"""The files of a folder by hand."""

from __future__ import annotations

import json
import os
import random
import unicodedata
from pathlib import Path

import pytest

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.datasets import tree
from mrcnn_jax.datasets.tree import Tree, fingerprint, json_kind, normal, walk, xml_root


def test_files_are_found_once_and_hidden_ones_and_runs_never(tmp_path: Path) -> None:
    for name in (
        "a/x.JPG",
        "a/x.json",
        "b/c/x.jpg",
        ".hidden/x.jpg",
        "__MACOSX/x.jpg",
        "a/.x.jpg",
        "run/checkpoints/x.jpg",
        "run/config.json",
        "d/checkpoints/y.jpg",  # of no run
        "other/x.jpg",
        "gro\u0308\u00dfe.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    tree = Tree(tmp_path, tuple(walk(tmp_path, tmp_path / "other")))
    assert sorted(map(normal, tree.files)) == [
        "a/x.JPG",
        "a/x.json",
        "b/c/x.jpg",
        "d/checkpoints/y.jpg",
        "gr\u00f6\u00dfe.png",
    ]
    images = ["a/x.JPG", "b/c/x.jpg", "d/checkpoints/y.jpg", "gr\u00f6\u00dfe.png"]
    assert sorted(map(normal, tree.images)) == images
    assert tree.by_name["x.jpg"] == ["b/c/x.jpg"]
    assert len(tree.by_name["gr\u00f6\u00dfe.png"]) == 1
    assert tree.only(["a"], "files") == "a"
    with pytest.raises(ConfigError, match="several files: a, b, c and 1 more: name a folder"):
        tree.only(["a", "b", "c", "d"], "files")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"images": [], "annotations": [], "categories": []}, "coco"),
        ({"images": [], "annotations": [], "result": 0, "to_name": 1, "categories": []}, "coco"),
        ({"images": [], "annotations": []}, "coco"),
        ({"images": []}, None),
        ({"shapes": [], "imagePath": "a.png"}, "labelme"),
        ({"a": {"regions": [{"shape_attributes": {}}]}}, "via"),
        ({"_via_img_metadata": {}}, "via"),
        ([{"annotations": [{"result": [{"to_name": "image"}]}]}], "label_studio"),
        ({"categories": {"label": {"labels": []}}, "items": [{"annotations": []}]}, "datumaro"),
        (
            {"project": {}, "config": {}, "attribute": {}, "file": {}, "metadata": {}, "view": {}},
            "via3",
        ),
        ({"objects": [], "size": {}}, None),
        ({"name": "package"}, None),
    ],
)
def test_what_wrote_a_json_file(content: object, kind: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert json_kind(tmp_path / "a.json") == kind


def test_annotations_of_supervisely_lie_in_ann(tmp_path: Path) -> None:
    path = tmp_path / "ann" / "a.png.json"
    path.parent.mkdir()
    path.write_text('{"size": {"height": 1, "width": 1}, "objects": []}')
    assert json_kind(path) == "supervisely"


def test_the_first_element(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    for text, root in (
        ('<?xml version="1.0"?>\n<!-- x -->\n<annotations a="1">', "annotations"),
        ("<annotation>", "annotation"),
        ("", None),
        ("no markup", None),
    ):
        path.write_text(text)
        assert xml_root(path) == root


def test_a_fingerprint_reads_what_texts_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many large ones, which hold images: their size counts as a whole."""
    monkeypatch.setattr(tree, "READ", 20)
    monkeypatch.setattr(tree, "LEAST_READ", 2)
    found = []
    for text in ("0123456789abc", "0123456789xyz", "x123456789xyz", "x123456789xyz+"):
        (tmp_path / "a.json").write_text(text)
        (tmp_path / "b.json").write_text("{}")
        found.append(fingerprint(tmp_path, None))
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_a_fingerprint_changes_with_what_annotations_are_made_from(tmp_path: Path) -> None:
    """Not with when a file was written."""
    (tmp_path / "a.json").write_text('{"label": "a"}')
    (tmp_path / "a.png").write_bytes(b"12")
    found = [fingerprint(tmp_path, None)]
    os.utime(tmp_path / "a.json", (0, 0))
    assert fingerprint(tmp_path, None) == found[0]
    (tmp_path / "a.json").write_text('{"label": "b"}')
    found.append(fingerprint(tmp_path, None))
    (tmp_path / "a.png").write_bytes(b"123")
    found.append(fingerprint(tmp_path, None))
    (tmp_path / "a.png").rename(tmp_path / "b.png")
    found.append(fingerprint(tmp_path, None))
    assert len(set(found)) == 4
    (tmp_path / "nohup.out").write_text("not of the data")
    assert fingerprint(tmp_path, None) == found[-1]
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    found.append(fingerprint(tmp_path, None))
    assert found[-1] != found[-2]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x.json").write_text("{}")
    assert fingerprint(tmp_path, tmp_path / "runs") == found[-1]


def test_images_by_the_end_of_their_path(tmp_path: Path) -> None:
    """As texts end. Parts have characters on both sides of the slash, and both Unicode forms."""
    draw = random.Random(0)
    words = ["a", "ab", "a-b", "a0", "a.b", "\u00fc", "u\u0308", "b"]
    files = {
        "/".join([*draw.choices(words, k=draw.randrange(4)), f"{draw.choice(words)}.png"])
        for _ in range(400)
    }
    tree = Tree(tmp_path, (*files, "a.txt"))
    ends = {unicodedata.normalize("NFC", file) for file in files}
    ends |= {file.split("/", 1)[1] for file in ends if "/" in file}
    for end in (*ends, "png", ".png", "b.pn", "", "/", "..", "//a.png", "c/a.png", "a.txt"):
        expected = [f for f in files if f"/{unicodedata.normalize('NFC', f)}".endswith(f"/{end}")]
        assert sorted(tree.ending_in(end)) == sorted(expected), end
