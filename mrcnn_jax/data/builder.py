"""The checked data set as tensorflow-datasets' ArrayRecord files, read without TensorFlow.

What is read back has the features that are written here. tfds would take them, and with them the
names of the modules that it imports, from the folder's own features.json: a built data set may come
with a run's folder or a shared cache, and must not be able to run code.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath
from tqdm import tqdm

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.data.cache import writing
from mrcnn_jax.data.images import VERSION
from mrcnn_jax.data.records import CocoDataset, ImageRecord
from mrcnn_jax.output import part_folder

SPLIT = "images"
FOLDER = "records"


class RandomAccess(Protocol):
    """A data source: record `i` is image `i` of the data set that it was built from."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


def make_record(image: ImageRecord, encoded: bytes, depth: bytes = b"") -> dict[str, Any]:
    """The stored form of an image.

    Args:
        image: the checked image.
        encoded: the bytes of its file.
        depth: those of its depth map, if it has one.

    Returns:
        `image` and `depth` (the bytes), `upright` (turn the pixels as EXIF says), `image_id`,
        `file_name` and `objects`, a list of `annotation_id`, `label` (1..K), `box` float32 (x1, y1,
        x2, y2) in original pixels, `iscrowd`, `counts` (compressed RLE, "" without a mask). Read
        back, texts are bytes and `objects` is a dict of arrays.
    """
    objects = [
        {
            "annotation_id": record.annotation_id,
            "label": record.label,
            "box": np.asarray(record.box, np.float32),
            "iscrowd": record.iscrowd,
            "counts": record.rle["counts"] if record.rle is not None else "",
        }
        for record in image.annotations
    ]
    return {
        "image": encoded,
        "depth": depth,
        "upright": image.upright,
        "image_id": image.id,
        "file_name": image.file_name,
        "objects": objects,
    }


@functools.cache
def _features() -> tfds.features.FeaturesDict:
    """The types of a record (`make_record`)."""
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "depth": tfds.features.Text(),  # bytes
            "upright": np.bool_,
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


class CocoBuilder(tfds.core.GeneratorBasedBuilder):
    """tfds builder of a `CocoDataset` whose images were checked."""

    VERSION = tfds.core.Version(VERSION)
    # tfds would look this up through importlib_resources, which it does not require.
    code_path = epath.Path(__file__)

    def __init__(self, *, dataset: CocoDataset, **kwargs: Any) -> None:
        self._dataset = dataset
        super().__init__(file_format=tfds.core.FileFormat.ARRAY_RECORD, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=_features(), disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {SPLIT: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        images, folder = self._dataset.images, self._dataset.images_dir
        shown = tqdm(images, desc="building", unit="img", disable=None, leave=False)
        for index, image in enumerate(shown):
            depth = b"" if image.depth_file is None else (folder / image.depth_file).read_bytes()
            yield index, make_record(image, (folder / image.file_name).read_bytes(), depth)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides tfds's progress bars (ours counts images) and its lines about downloads."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


def build(dataset: CocoDataset, folder: Path) -> RandomAccess:
    """The data source of a checked data set, built in its `folder` of the cache if it is not there.

    Args:
        dataset: as `data.images.check_split` returns it.
        folder: of the data set in the cache.

    Returns:
        Records as of `make_record`, of which number `i` is `dataset.images[i]`.

    Raises:
        ConfigError: `folder` is not writable, or what was built there is damaged.
    """
    built = folder / FOLDER
    if not built.is_dir():
        with writing(folder):
            _write(dataset, folder)
    try:
        source = _Records(built)
    except Exception as error:  # of array_record or its C++ code: any
        raise ConfigError(damaged(folder, error)) from None
    if len(source) != len(dataset.images):
        reason = f"{len(source)} records, but {len(dataset.images)} images"
        raise ConfigError(damaged(folder, reason))
    return source


def damaged(folder: Path, reason: object) -> str:
    """The line for a built data set that cannot be read, which says how to repair it."""
    text = " ".join(str(reason).split())
    return f"{folder}: the built data set is damaged; delete this folder: {text:.200}"


class _Records:
    """The records of a folder. Worker processes get a copy, which opens the files again."""

    def __init__(self, folder: Path) -> None:
        files = sorted(map(str, folder.glob("*.array_record-*")))
        if not files or not files[-1].endswith(f"-of-{len(files):05d}"):
            raise ValueError(f"{len(files)} files of records")
        self._folder = folder
        self._source = ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record: dict[str, Any] = _features().deserialize_example_np(
                self._source[index], decoders={"image": tfds.decode.SkipDecoding()}
            )
        except Exception as error:
            raise ConfigError(damaged(self._folder.parent, error)) from None
        return record


def _write(dataset: CocoDataset, folder: Path) -> None:
    """Builds beside the final place and renames, so that a killed build leaves nothing there."""
    with part_folder(folder / FOLDER) as temporary, _quiet():
        builder = CocoBuilder(dataset=dataset, data_dir=temporary)
        builder.download_and_prepare()
        try:
            os.rename(builder.data_dir, folder / FOLDER)
        except OSError:
            # Another process may have built the same in the meantime.
            if not (folder / FOLDER).is_dir():
                raise
