from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mrcnn_jax.cli import Failure
from mrcnn_jax.config.schema import DataConfig
from mrcnn_jax.data import loader
from mrcnn_jax.data.builder import RandomAccess
from mrcnn_jax.data.caps import caps
from mrcnn_jax.data.loader import Split, load, open_split, plan_once
from mrcnn_jax.data.order import PlannedBatch, plan_epoch
from mrcnn_jax.data.reading import read_coco
from mrcnn_jax.data.records import CocoDataset
from mrcnn_jax.data.report import Reason
from mrcnn_jax.pixels.transforms import plan_for
from mrcnn_jax.structures import Batch


@pytest.fixture(scope="session")
def shapes_split(
    shapes_folder: Path, shapes_data: DataConfig, tmp_path_factory: pytest.TempPathFactory
) -> Split:
    annotations = shapes_folder / "annotations" / "instances_train.json"
    dataset = read_coco(annotations, shapes_folder / "images", shapes_data)
    return open_split("train", dataset, cache=tmp_path_factory.mktemp("cache"), data=shapes_data)


def _open_mixed(file: Path, data: DataConfig, name: str = "train") -> Split:
    dataset = read_coco(file, file.parent / "images", data)
    return open_split(name, dataset, cache=file.parent / "cache", data=data)


def _plan(split: Split, size: int = 2, **options: Any) -> list[PlannedBatch]:
    return plan_epoch(
        [p.canvas for p in split.plans], size, **{"seed": 0, "epoch": 0, "shuffle": True, **options}
    )


def test_the_whole_pipeline_on_shapes(
    shapes_split: Split, shapes_folder: Path, shapes_data: DataConfig
) -> None:
    """At scale 1 every pixel, box and mask of the files is in the batches, each image once."""
    raw = COCO(str(shapes_folder / "annotations" / "instances_train.json"))
    seen: Counter[int] = Counter()
    crowds = 0
    for batch in load(shapes_split, _plan(shapes_split, 4), shapes_data):
        assert batch.images.shape == (4, 128, 160, 3)
        for row in np.flatnonzero(batch.valid):
            image = shapes_split.dataset.images[batch.indices[row]]
            seen[image.id] += 1
            pixels = np.asarray(Image.open(shapes_folder / "images" / image.file_name))
            assert (batch.images[row, :128, :128] == pixels).all()
            assert not batch.images[row, :, 128:].any()
            assert batch.scales[row].tolist() == [1, 1]
            truth = batch.ground_truth
            expected = [a for a in raw.imgToAnns[image.id] if not a["iscrowd"]]
            assert truth.valid[row].tolist() == [True] * len(expected) + [False] * (
                8 - len(expected)
            )
            for place, a in enumerate(expected):
                x, y, w, h = a["bbox"]
                assert truth.boxes[row, place].tolist() == [x, y, x + w, y + h]
                assert truth.labels[row, place] == a["category_id"]
                assert truth.has_mask[row, place]
                # The mean of the coverage is the share of the box that the mask fills.
                assert truth.masks[row, place].mean() / 255 == pytest.approx(
                    a["area"] / (w * h), abs=0.02
                )
                # And enlarged to the box again it is the mask.
                again = (
                    cv2.resize(truth.masks[row, place], (w, h), interpolation=cv2.INTER_AREA) >= 128
                )
                assert (again == raw.annToMask(a)[y : y + h, x : x + w]).mean() > 0.9
            ignored = [a["bbox"] for a in raw.imgToAnns[image.id] if a["iscrowd"]]
            assert batch.ignore.boxes[row, : len(ignored)].tolist() == [
                [x, y, x + w, y + h] for x, y, w, h in ignored
            ]
            assert batch.ignore.valid[row].sum() == len(ignored)
            crowds += len(ignored)
    assert seen == Counter(image.id for image in shapes_split.dataset.images)
    assert crowds == 1


def test_annotations_that_are_saved_between_reading_and_opening(
    mixed_content: dict[str, Any], write_json: Callable[[Any], Path], mixed_data: DataConfig
) -> None:
    """What was read is built, and is not taken for the new file at the next start."""
    root = write_json(mixed_content).parent

    def read() -> CocoDataset:
        return read_coco(root / "instances.json", root / "images", mixed_data)

    def box(dataset: CocoDataset) -> list[float]:
        """Of annotation 5, the second of the first image, as it is built."""
        split = open_split("train", dataset, cache=root / "cache", data=mixed_data)
        return list(split.source[0]["objects"]["box"][1])

    earlier = read()
    mixed_content["annotations"][1]["bbox"] = [1, 2, 30, 40]
    write_json(mixed_content)
    assert box(earlier) == [0, 0, 12.5, 20.25]
    assert box(read()) == [1, 2, 31, 42]


def test_whether_there_is_depth_is_not_asked_of_every_image_in_every_batch(
    shapes_split: Split, shapes_data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, made = [], []

    class Flags(tuple[bool, ...]):
        def __iter__(self) -> Iterator[bool]:
            looks.append(len(self))
            return super().__iter__()

    def batches(*fields: Any) -> Any:
        made.append(loader_batches(*fields))
        return made[-1]

    loader_batches = loader._Batches
    monkeypatch.setattr(loader, "_Batches", batches)
    plan = _plan(shapes_split, 4)
    next(load(shapes_split, plan, shapes_data, depth=True))
    flagged = dataclasses.replace(made[0], has_depth=Flags(made[0].has_depth))
    assert [flagged[position].depth for position in range(3)] == [None] * 3
    assert len(looks) <= 1


def test_images_shrink_as_the_config_says(
    shapes_split: Split, shapes_folder: Path, shapes_data: DataConfig
) -> None:
    """To a quarter: means of 16 pixels, or of the 4 in their middle."""
    small = dataclasses.replace(shapes_data, short_side=32, long_side=32, canvases=((32, 32),))
    plans = tuple(plan_for(128, 128, small) for _ in shapes_split.plans)
    split, plan = dataclasses.replace(shapes_split, plans=plans), [PlannedBatch(0, (0, 1))]
    for shrink, cells in (("area", slice(0, 4)), ("bilinear", slice(1, 3))):
        (batch,) = load(split, plan, dataclasses.replace(small, shrink=shrink))  # type: ignore[arg-type]
        for row, index in enumerate(batch.indices):
            name = split.dataset.images[index].file_name
            whole = np.asarray(Image.open(shapes_folder / "images" / name)).astype(float)
            means = whole.reshape(32, 4, 32, 4, 3)[:, cells, :, cells].mean((1, 3))
            assert np.abs(batch.images[row] - means).max() <= 0.5


def test_scaled_images_of_several_sizes(
    mixed_file: Path, mixed_content: dict[str, Any], mixed_data: DataConfig
) -> None:
    split = _open_mixed(mixed_file, mixed_data)
    by_id = {image["id"]: image for image in mixed_content["images"]}
    ids = {3: 1, 7: 2, 90: 3}
    found = 0
    for batch in load(split, _plan(split), mixed_data):
        for row in np.flatnonzero(batch.valid):
            raw = by_id[split.dataset.images[batch.indices[row]].id]
            height, width = batch.image_sizes[row]
            assert batch.original_sizes[row].tolist() == [raw["height"], raw["width"]]
            assert np.allclose(
                batch.scales[row], [height / raw["height"], width / raw["width"]], rtol=1e-6
            )
            picture = Image.open(mixed_file.parent / "images" / raw["file_name"])
            resized = np.asarray(
                picture.resize((int(width), int(height)), Image.Resampling.BILINEAR)
            ).astype(int)
            assert np.abs(batch.images[row, :height, :width] - resized).mean() < 1
            assert not batch.images[row, height:].any()
            assert not batch.images[row, :, width:].any()
            expected = [
                a
                for a in mixed_content["annotations"]
                if a["image_id"] == raw["id"] and not a["iscrowd"]
            ]
            truth = batch.ground_truth
            assert truth.valid[row].sum() == len(expected)
            for place, a in enumerate(expected):
                x, y, w, h = a["bbox"]
                sy, sx = batch.scales[row]
                assert np.allclose(
                    truth.boxes[row, place], [x * sx, y * sy, (x + w) * sx, (y + h) * sy], atol=1e-3
                )
                assert truth.labels[row, place] == ids[a["category_id"]]
                assert truth.has_mask[row, place] == ("segmentation" in a)
                found += 1
    assert found == 6


def test_dtypes_and_padding_of_incomplete_batches(mixed_file: Path, mixed_data: DataConfig) -> None:
    split = _open_mixed(mixed_file, mixed_data)
    batches = list(load(split, _plan(split, 4), mixed_data))
    # Five images on the first canvas, two on the second: 4 + 1 and 2.
    assert sorted(int(batch.valid.sum()) for batch in batches) == [1, 2, 4]
    for batch in batches:
        assert batch.images.dtype == np.uint8
        assert (
            batch.scales.dtype
            == batch.ground_truth.boxes.dtype
            == batch.ignore.boxes.dtype
            == np.float32
        )
        assert (
            batch.indices.dtype
            == batch.image_sizes.dtype
            == batch.original_sizes.dtype
            == batch.ground_truth.labels.dtype
            == np.int32
        )
        assert batch.ground_truth.masks.dtype == np.uint8
        assert batch.ground_truth.masks.shape == (4, 4, 28, 28)
        assert batch.ignore.boxes.shape == (4, 1, 4)
        for row in np.flatnonzero(~batch.valid):
            assert not batch.images[row].any()
            assert not batch.ground_truth.valid[row].any()
            assert not batch.ignore.valid[row].any()
            assert (batch.scales[row] > 0).all()


def _equal(a: Batch, b: Batch) -> bool:
    return all(
        x.dtype == y.dtype and np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_the_order_is_the_plan_s_from_anywhere_and_with_any_threads(
    shapes_split: Split, shapes_data: DataConfig
) -> None:
    plan = _plan(shapes_split, 3, epoch=5)
    whole = list(load(shapes_split, plan, shapes_data))
    for planned, batch in zip(plan, whole, strict=True):
        assert [
            i if ok else -1 for i, ok in zip(batch.indices.tolist(), batch.valid, strict=True)
        ] == list(planned.indices)
    many = dataclasses.replace(shapes_data, threads=7)
    for a, b in zip(whole[4:], load(shapes_split, plan[4:], many), strict=True):
        assert _equal(a, b)


def test_too_many_objects_are_counted_and_the_largest_kept(
    tmp_path: Path,
    write_json: Callable[[Any], Path],
    mixed_content: dict[str, Any],
    mixed_data: DataConfig,
) -> None:
    sides = [10, 30, 20, 40, 15, 25]
    mixed_content["annotations"] = [
        {
            "id": 50 + n,
            "image_id": 11,
            "category_id": 3,
            "bbox": [n, n, side, side],
            "area": side**2,
            "iscrowd": int(crowd),
        }
        for crowd in (False, True)
        for n, side in enumerate(sides, 10 * crowd)
    ]
    split = _open_mixed(write_json(mixed_content), mixed_data)
    found = [(cap.field, cap.limit, cap.most) for cap in caps(split.dataset, mixed_data)]
    assert found == [("data.max_objects", 4, 6), ("data.max_ignored", 1, 6)]
    assert len(split.dataset.to_coco()["annotations"]) == 12, "evaluation sees them all"
    (batch,) = load(split, [PlannedBatch(0, (0,))], mixed_data)
    x1, _, x2, _ = batch.ground_truth.boxes[0].T / batch.scales[0, 1]
    assert np.round(x2 - x1).tolist() == [30, 20, 40, 25], "in the order of the file"
    x1, _, x2, _ = batch.ignore.boxes[0].T / batch.scales[0, 1]
    assert np.round(x2 - x1).tolist() == [40]


def test_a_mask_that_covers_nothing_leaves_the_box(
    write_json: Callable[[Any], Path], mixed_content: dict[str, Any], mixed_data: DataConfig
) -> None:
    """A mask of two pixels in opposite corners of its box, each less than half a cell; and an empty
    one."""
    mixed_content["annotations"][0].update(
        bbox=[0, 0, 80, 60], segmentation={"size": [60, 80], "counts": [0, 1, 4798, 1]}
    )
    mixed_content["annotations"][1].update(
        bbox=[0, 0, 80, 60], segmentation=[[10, 10, 10.2, 10, 10.2, 10.2]]
    )
    split = _open_mixed(write_json(mixed_content), mixed_data)
    (batch,) = load(split, [PlannedBatch(0, (0,))], mixed_data)
    assert batch.ground_truth.valid[0].tolist() == [True, True, False, False]
    assert batch.ground_truth.has_mask[0].tolist() == [False, False, False, False]


@pytest.mark.parametrize("count", [0, 4, 5, 3000])
def test_any_number_of_objects(
    write_json: Callable[[Any], Path],
    mixed_content: dict[str, Any],
    mixed_data: DataConfig,
    count: int,
) -> None:
    """None, the static count (4), one more, very many: the largest are in the batch, all in the
    data set."""
    template = {**mixed_content["annotations"][0], "segmentation": None, "area": 1}
    boxes = [[n % 60, n % 40, 2 + n % 18, 3] for n in range(count)]
    mixed_content["annotations"] = [
        {**template, "id": n, "bbox": box} for n, box in enumerate(boxes)
    ]
    split = _open_mixed(write_json(mixed_content), mixed_data)
    (batch,) = load(split, [PlannedBatch(0, (0,))], mixed_data)
    truth = batch.ground_truth
    assert truth.valid[0].sum() == min(count, 4)
    assert len(split.dataset.images[0].annotations) == count
    widths = (truth.boxes[0, :, 2] - truth.boxes[0, :, 0])[truth.valid[0]] / batch.scales[0, 1]
    assert np.allclose(sorted(widths), sorted(box[2] for box in boxes)[-4:])
    found = [cap.most for cap in caps(split.dataset, mixed_data)]
    assert found == ([count] if count > 4 else [])


@pytest.mark.parametrize(
    ("height", "width", "name", "resized"),
    [
        (1, 1, "one pixel.png", (800, 800)),
        (1, 5000, "sub\\Zeile ü 日本.png", (1, 1088)),
        (5000, 1, "a b.png", (1088, 1)),
        (4000, 8000, "large.jpg", (544, 1088)),
        (8000, 4000, "large.jpg", (1088, 544)),
    ],
)
def test_images_of_any_shape(
    tmp_path: Path,
    write_json: Callable[[Any], Path],
    height: int,
    width: int,
    name: str,
    resized: tuple[int, int],
) -> None:
    """Filled by one object, with the default config: values are finite, the mask is full."""
    path = tmp_path / "images" / name.replace("\\", "/")
    path.parent.mkdir(parents=True)
    Image.new("RGB", (width, height), (10, 200, 30)).save(path)
    box = [0, 0, width, height]
    annotation = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": box,
        "area": width * height,
        "iscrowd": 0,
    }
    annotation["segmentation"] = {"size": [height, width], "counts": [0, width * height]}
    image = {"id": 1, "file_name": name, "height": height, "width": width}
    data = DataConfig(max_objects=2)
    split = _open_mixed(
        write_json(
            {
                "images": [image],
                "annotations": [annotation],
                "categories": [{"id": 1, "name": "all"}],
            }
        ),
        data,
    )
    (batch,) = load(split, plan_once(split, 1), data)
    h, w = batch.image_sizes[0]
    assert (h, w) == resized
    assert np.abs(batch.images[0, :h, :w].astype(int) - [10, 200, 30]).max() <= 2
    assert batch.ground_truth.boxes[0, 0].tolist() == [0, 0, w, h]
    assert batch.ground_truth.has_mask[0].tolist() == [True, False]
    assert (batch.ground_truth.masks[0, 0] == 255).all()


def test_images_are_turned_as_the_check_decided(
    tmp_path: Path,
    write_json: Callable[[Any], Path],
    mixed_content: dict[str, Any],
    mixed_data: DataConfig,
) -> None:
    """Two files with the same pixels and EXIF (a quarter turn), annotated as seen and as stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((80, 60, 3), np.uint8)
    stored[:, :30] = 250  # seen, that is the upper half
    names = ("photo 0.png", "photo 1.png")  # of 60 x 80 and 80 x 60
    for name in names:
        Image.fromarray(stored).save(tmp_path / "images" / name, exif=exif)
    split = _open_mixed(write_json(mixed_content), mixed_data)
    as_seen, as_stored = (
        next(iter(load(split, [PlannedBatch(canvas, (i,))], mixed_data)))
        for i, canvas in ((0, 0), (1, 1))
    )
    height, width = as_seen.image_sizes[0]
    assert as_seen.images[0, : height // 2 - 2, :width].min() > 245
    assert as_seen.images[0, height // 2 + 2 : height, :width].max() < 5
    height, width = as_stored.image_sizes[0]
    assert as_stored.images[0, :height, : width // 2 - 2].min() > 245
    assert as_stored.images[0, :height, width // 2 + 2 : width].max() < 5


def test_empty_images_are_left_out_of_training_only(
    mixed_file: Path, mixed_data: DataConfig
) -> None:
    data = dataclasses.replace(mixed_data, keep_empty=False)
    split = _open_mixed(mixed_file, data)
    assert [image.id for image in split.dataset.images] == [11, 12, 13, 14, 15]
    ((_, finding),) = (
        (reason, f)
        for (reason, _), f in split.dataset.report.findings.items()
        if reason is Reason.NEGATIVE
    )
    assert finding.first_ids == [16, 17]
    assert sum(int(b.valid.sum()) for b in load(split, _plan(split), data)) == 5
    assert len(_open_mixed(mixed_file, data, "val").dataset.images) == 7


def test_gaps_in_category_ids_come_back(
    mixed_file: Path, mixed_content: dict[str, Any], mixed_data: DataConfig
) -> None:
    split = _open_mixed(mixed_file, mixed_data)
    found = set()
    for batch in load(split, _plan(split), mixed_data):
        for row, place in np.argwhere(batch.ground_truth.valid):
            image = split.dataset.images[batch.indices[row]].id
            found.add(
                (image, split.dataset.category_id(int(batch.ground_truth.labels[row, place])))
            )
    assert found == {
        (a["image_id"], a["category_id"]) for a in mixed_content["annotations"] if not a["iscrowd"]
    }


@dataclasses.dataclass(frozen=True)
class Tampered:
    """A source that changes record 1, and can insist on being read in a clean worker process."""

    source: RandomAccess
    damage: str = ""
    not_in_process: int | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from jax._src import xla_bridge

        if self.not_in_process is not None:
            assert os.getpid() != self.not_in_process, "not a worker process"
            assert not xla_bridge.backends_are_initialized(), "a worker started a device backend"
        record = self.source[index]
        if index == 1 and self.damage == "bytes":
            return {**record, "image": record["image"][:50]}
        if index == 1 and self.damage == "label":
            return {**record, "objects": {**record["objects"], "label": [np.int32(4)]}}
        if index == 1 and self.damage == "order":
            return {**record, "image_id": 99}
        return record


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bytes", "photo 1.png: .*decoded"),
        ("label", r"photo 1.png: annotation 6: label 4 is outside 1\.\.3"),
        ("order", "photo 1.png: record 1 is image 99, not 12"),
    ],
)
def test_failures_name_the_file(
    mixed_file: Path, mixed_data: DataConfig, damage: str, message: str
) -> None:
    split = _open_mixed(mixed_file, mixed_data)
    broken = dataclasses.replace(split, source=Tampered(split.source, damage))
    with pytest.raises(Failure, match=message):
        list(load(broken, _plan(split), mixed_data))


def test_worker_processes(mixed_file: Path, mixed_data: DataConfig) -> None:
    """Workers load the same batches in the same order, without a device backend; failures name the
    file."""
    jax.devices()  # here there is a backend, so that a forked process would have one
    split = _open_mixed(mixed_file, mixed_data)
    plan = _plan(split) * 8  # more than workers have ahead
    in_workers = dataclasses.replace(mixed_data, workers=2)
    elsewhere = dataclasses.replace(
        split, source=Tampered(split.source, not_in_process=os.getpid())
    )
    pairs = zip(load(split, plan, mixed_data), load(elsewhere, plan, in_workers), strict=True)
    for number, (a, b) in enumerate(pairs, start=1):
        assert _equal(a, b)
        if number == 2:  # each worker has begun: Ctrl-C in a terminal is for all processes
            for worker in multiprocessing.active_children():
                os.kill(worker.pid or 0, signal.SIGINT)
    assert number == len(plan)
    broken = dataclasses.replace(split, source=Tampered(split.source, "bytes"))
    with pytest.raises(Failure, match=r"photo 1\.png"):
        list(load(broken, plan, dataclasses.replace(mixed_data, workers=1)))


def test_batches_are_plain_data(shapes_split: Split, shapes_data: DataConfig) -> None:
    (batch,) = load(shapes_split, _plan(shapes_split)[:1], shapes_data)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(batch))
    assert json.dumps(shapes_split.dataset.report.to_dict())
