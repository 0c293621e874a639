"""The checked data set as a tensorflow-datasets folder of ours: ArrayRecord files that are read at random, without TensorFlow.

A built folder is named by a hash of what it was made from (the annotation file, names, sizes and times of the images, this file's
VERSION), so that nothing stale is ever read. It is written beside its place and renamed, so that a killed build leaves none.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from mrcnn_jax.data.coco import CocoDataset, ImageRecord, refuse_lost_images
from mrcnn_jax.data.transforms import decode_image

VERSION = "1.0.0"  # of the records: raise it whenever they change
SPLIT = "images"
DROPPED_FILE = "dropped.json"


class RandomAccess(Protocol):
    """A data source: record `i` is image `i` of the data set it was built from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Built:
    """A data source and the data set without the images that could not be decoded: record `i` is `dataset.images[i]`.

    A record holds `image` (encoded bytes), `image_id`, `file_name`, and per object, in `objects`: `annotation_id`, `label` (1..K),
    `box` float32 (x1, y1, x2, y2) in original pixels, `iscrowd`, `counts` (compressed RLE, b"" without a mask).
    """

    dataset: CocoDataset
    source: RandomAccess


class CocoBuilder(tfds.core.GeneratorBasedBuilder):
    """tfds builder of a `CocoDataset`; images that cannot be decoded, or to another size than annotated, go to `dropped`."""

    VERSION = tfds.core.Version(VERSION)
    # tfds would find this through importlib_resources, which it does not list among its requirements.
    code_path = epath.Path(__file__)

    def __init__(self, *, dataset: CocoDataset, **kwargs: Any) -> None:
        self._dataset = dataset
        self.dropped: dict[int, str] = {}
        super().__init__(file_format=tfds.core.FileFormat.ARRAY_RECORD, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "image_id": np.int64,
                "file_name": tfds.features.Text(),
                "objects": tfds.features.Sequence(
                    {
                        "annotation_id": np.int64,
                        "label": np.int32,
                        "box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                        "iscrowd": np.bool_,
                        "counts": tfds.features.Text(),
                    }
                ),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, image in enumerate(tqdm(self._dataset.images, desc="checking images", unit="img", disable=None, leave=False)):
            encoded = (self._dataset.images_dir / image.file_name).read_bytes()
            problem = _problem(encoded, image)
            if problem is not None:
                self.dropped[image.id] = problem
                continue
            objects = [
                {
                    "annotation_id": record.annotation_id,
                    "label": record.label,
                    "box": np.asarray(record.box, np.float32),
                    "iscrowd": record.iscrowd,
                    "counts": record.rle["counts"] if record.rle is not None else "",
                }
                for record in image.objects
            ]
            yield index, {"image": encoded, "image_id": image.id, "file_name": image.file_name, "objects": objects}


def _problem(encoded: bytes, image: ImageRecord) -> str | None:
    """Why the image cannot be used, or None."""
    try:
        height, width = decode_image(encoded).shape[:2]
    except ValueError:
        return "images that cannot be decoded"
    if (height, width) != (image.height, image.width):
        return "images whose decoded size (EXIF orientation ignored) is not the annotated one"
    return None


def _key(dataset: CocoDataset) -> str:
    files = []
    for image in dataset.images:
        stat = (dataset.images_dir / image.file_name).stat()
        files.append((image.file_name, stat.st_size, stat.st_mtime_ns))
    digest = hashlib.sha256(dataset.annotations_path.read_bytes())
    digest.update(json.dumps([VERSION, files]).encode())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without tfds's progress bars (ours counts images) and its lines about downloads (there are none)."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def build(dataset: CocoDataset, cache: Path) -> Built:
    """The data source of a data set, from `cache` if it was built before. Every image is fully decoded once, here.

    Images that cannot be decoded are dropped and counted in the result's report; ConfigError if they are more than 1 %.
    """
    dataset = replace(dataset, report=copy.deepcopy(dataset.report))
    folder = cache / f"{dataset.annotations_path.stem}-{_key(dataset)}"
    if not (folder / DROPPED_FILE).is_file():
        _write(dataset, folder)
    # JSON keeps keys as text.
    dropped = {int(image_id): reason for image_id, reason in json.loads((folder / DROPPED_FILE).read_text()).items()}
    for image_id, reason in dropped.items():
        dataset.report.add("dropped", reason, image_id)
    lost = [image.file_name for image in dataset.images if image.id in dropped]
    refuse_lost_images(dataset.annotations_path, lost, len(dataset.images), "cannot be decoded or have another size than annotated")
    if dropped:
        dataset = dataset.with_images(image for image in dataset.images if image.id not in dropped)
    with _quiet():
        reader = tfds.builder_from_directory(folder)
        source = reader.as_data_source(split=SPLIT, decoders={"image": tfds.decode.SkipDecoding()})
    assert len(source) == len(dataset.images)
    return Built(dataset, source)


def _write(dataset: CocoDataset, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent, ignore_cleanup_errors=True) as temporary, _quiet():
        builder = CocoBuilder(dataset=dataset, data_dir=temporary)
        builder.download_and_prepare()
        built = Path(builder.data_dir)
        (built / DROPPED_FILE).write_text(json.dumps(builder.dropped))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.rename(built, folder)
        except OSError:
            # Another process built the same meanwhile.
            if not (folder / DROPPED_FILE).is_file():
                raise
