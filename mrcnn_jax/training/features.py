"""What frozen modules make of each image, computed once and read from the disk in every epoch.

The report's second and third stage train a head on features and proposals that never change
(`cache_features`). Both stages read the same files, as does another run on the same data from the
same weights.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from mrcnn_jax import parallel
from mrcnn_jax.cli import Failure
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import AugmentConfig, Config, StageConfig
from mrcnn_jax.data.cache import is_sealed, seal, writing
from mrcnn_jax.data.loader import Split, load, plan_once
from mrcnn_jax.models.mask_rcnn import MaskRCNN, Variables, modules_of, select_proposals
from mrcnn_jax.output import part_folder, progress_bar
from mrcnn_jax.runtime import compile_options
from mrcnn_jax.structures import Batch, Instances, blank_batch
from mrcnn_jax.training.memory import GIB
from mrcnn_jax.training.stages import trained_modules
from mrcnn_jax.training.step import CachedFeatures

VERSION = 1  # of what they compute: raise it when trunks, RPN or proposals compute otherwise


@dataclass(frozen=True)
class Modules:
    """The frozen modules that a stage needs no further than their results."""

    trunk: frozenset[str]
    proposals: bool
    """Whether the RPN's proposals are among the results."""

    @property
    def names(self) -> frozenset[str]:
        return self.trunk | ({"rpn"} if self.proposals else frozenset())


def cacheable_modules(stage: StageConfig, variables: Variables, config: Config) -> Modules | None:
    """What of a stage can be computed before; None if it trains the features themselves.

    Args:
        variables: of the network; only their names are read.
    """
    trained = trained_modules(stage, variables["params"])
    trunk = frozenset(modules_of("rpn", config.model) - {"rpn"})
    if trained & trunk:
        return None
    return Modules(trunk, proposals="rpn" not in trained and "rpn" not in stage.losses)


def refuse_unusable_cache(
    config: Config, model: MaskRCNN, shapes: Variables, splits: tuple[Split, Split]
) -> None:
    """Checks `cache_features` against the rest of the config, the devices and the disk.

    Raises:
        ConfigError: nothing can be kept, or more than `feature_cache_gib` or the disk hold, or the
            cache is read-only.
    """
    if config.cache_features == "off":
        return
    wanted = {m for stage in config.stages if (m := cacheable_modules(stage, shapes, config))}
    if not wanted:
        raise ConfigError("cache_features: every stage trains the backbone or the FPN")
    if config.data.augment != AugmentConfig():
        raise ConfigError(
            "cache_features: images are augmented (data.augment), so no features come twice"
        )
    if jax.device_count() > 1:
        raise ConfigError(f"cache_features: needs one device, there are {jax.device_count()}")
    size = sum(
        _bytes(config, split, _layout(config, model, shapes, modules, canvas), canvas)
        for modules in wanted
        for split in splits
        for canvas in _canvases(split)
    )
    line = f"cache_features: {size / GIB:.2f} GiB of features ({config.cache_features})"
    if size > config.feature_cache_gib * GIB:
        raise ConfigError(f"{line}, but feature_cache_gib is {config.feature_cache_gib:g}")
    folders = [split.folder for split in splits]
    free = shutil.disk_usage(folders[0]).free + sum(map(_size, map(_kept, folders)))
    if size > free:
        raise ConfigError(f"{line}, but {folders[0]} has {free / GIB:.2f} GiB free")
    for folder in folders:
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"cache_features: {folder}: cannot be written to")
    print(f"{line} will be kept in {folders[0].parent}")


class FeatureFiles:
    """The files of one split and one state of the frozen modules."""

    def __init__(self, folder: Path, split: Split, layout: dict[int, dict[str, Any]]) -> None:
        self._layout = layout
        self._places = _places(split)
        self._arrays = {
            canvas: {
                name: np.load(folder / f"{canvas}-{name}.npy", mmap_mode="r") for name in layouts
            }
            for canvas, layouts in layout.items()
        }

    def of(self, batch: Batch, canvas: int) -> CachedFeatures:
        """Reads the rows of a batch, NumPy arrays; rows without an image hold 0."""
        valid, indices = np.asarray(batch.valid), np.asarray(batch.indices)
        places = [self._places[index] for index in indices[valid]]
        rows = {}
        for name, array in self._arrays[canvas].items():
            rows[name] = np.zeros((len(valid), *array.shape[1:]), array.dtype)
            rows[name][valid] = array[places]
        return _cached(rows)

    def shapes(self, count: int, canvas: int) -> CachedFeatures:
        """The shapes of the rows of a batch of `count` images."""
        return _cached(
            {
                name: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype)
                for name, leaf in self._layout[canvas].items()
            }
        )


@dataclass(frozen=True)
class _WithCachedFeatures:
    """A jitted step that is handed the cached features of each batch."""

    program: Any
    features: FeatureFiles
    canvases: tuple[tuple[int, int], ...]

    def __call__(self, first: Any, batch: Batch, *rest: Any) -> Any:
        return self.program(first, batch, *rest, self.features.of(batch, self._canvas(batch)))

    def lower(self, first: Any, batch: Batch, *rest: Any) -> Any:
        """As of a jitted function: only shapes are read."""
        cached = self.features.shapes(len(batch.valid), self._canvas(batch))
        return self.program.lower(first, batch, *rest, cached)

    def _canvas(self, batch: Batch) -> int:
        return self.canvases.index(tuple(batch.images.shape[1:3]))


def with_cached_features(
    program: Any,
    config: Config,
    stage: StageConfig,
    model: MaskRCNN,
    variables: Variables,
    split: Split,
) -> Any:
    """Hands the jitted step of a stage the features of its batches, if they are to be kept.

    Args:
        program: (state or variables, batch, ...) of which the last argument is `CachedFeatures`.
        variables: of the network, as the stage begins with them.
        split: the images of the batches.

    Returns:
        `program` itself if `cache_features` is off or the stage trains the features.

    Raises:
        ConfigError: the cache cannot be written.
        Failure: a number does not fit in the dtype.
    """
    features = cached_features(config, stage, model, variables, split)
    if features is None:
        return program
    return _WithCachedFeatures(program, features, config.data.canvases)


def cached_features(
    config: Config, stage: StageConfig, model: MaskRCNN, variables: Variables, split: Split
) -> FeatureFiles | None:
    """The features of a split for a stage, computed unless the cache holds them.

    Args:
        variables: of the network, as the stage begins with them.

    Returns:
        None if `cache_features` is off, or the stage trains the features.

    Raises:
        ConfigError: the cache cannot be written.
        Failure: a number does not fit in the dtype.
    """
    modules = cacheable_modules(stage, variables, config)
    if config.cache_features == "off" or modules is None:
        return None
    layout = {
        canvas: _layout(config, model, variables, modules, canvas) for canvas in _canvases(split)
    }
    folder = split.folder / f"features-{_key(config, variables, modules)}"
    if not is_sealed(folder):
        size = sum(_bytes(config, split, leaves, canvas) for canvas, leaves in layout.items())
        with writing(split.folder):
            if folder.exists():
                print(f"{folder}: damaged; computed again")
                shutil.rmtree(folder)
            _make_room(split.folder, config.feature_cache_gib * GIB, size)
            with part_folder(folder) as part:
                _write(part, config, model, variables, modules, split, layout)
                try:
                    part.rename(folder)
                except OSError:
                    # Another run may have computed the same in the meantime.
                    if not is_sealed(folder):
                        raise
    return FeatureFiles(folder, split, layout)


def _make_room(folder: Path, limit: float, size: int) -> None:
    """Deletes features of other weights, the oldest first, until `size` bytes more fit.

    Args:
        folder: of a data set in the cache.
        limit: the most bytes to keep; at most as many as the disk has.
        size: of what is to be written.
    """
    others = sorted(_kept(folder), key=lambda path: path.stat().st_mtime)
    limit = min(limit, shutil.disk_usage(folder).free + _size(others))
    while others and _size(others) + size > limit:
        shutil.rmtree(others.pop(0))


def _kept(folder: Path) -> list[Path]:
    return list(folder.glob("features-*"))


def _size(folders: Sequence[Path]) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.iterdir())


def _write(
    folder: Path,
    config: Config,
    model: MaskRCNN,
    variables: Variables,
    modules: Modules,
    split: Split,
    layout: dict[int, dict[str, Any]],
) -> None:
    places, canvases = _places(split), _canvases(split)
    files = {
        canvas: {
            name: np.lib.format.open_memmap(
                folder / f"{canvas}-{name}.npy",
                mode="w+",
                dtype=leaf.dtype,
                shape=(canvases[canvas], *leaf.shape[1:]),
            )
            for name, leaf in layouts.items()
        }
        for canvas, layouts in layout.items()
    }
    for path in folder.iterdir() if hasattr(os, "posix_fallocate") else ():
        with path.open("r+b") as part:  # a disk that is full later would kill the program: SIGBUS
            os.posix_fallocate(part.fileno(), 0, path.stat().st_size)
    program = jax.jit(_results(config, model, modules), **compile_options())
    plan = plan_once(split, config.data.batch_size)
    with progress_bar(len(split.plans), f"features of {split.name}") as bar:
        for planned, batch in zip(plan, load(split, plan, config.data), strict=True):
            for name, rows in jax.device_get(program(variables, batch)).items():
                for index, row in zip(planned.images, rows, strict=False):
                    if not np.isfinite(row).all():
                        file = split.dataset.images[index].file_name
                        raise Failure(
                            f"cache_features: features of {file} do not fit in "
                            f"{config.cache_features}"
                        )
                    files[planned.canvas][name][places[index]] = row
            bar.update(len(planned.images))
    for layouts in files.values():
        for array in layouts.values():
            array.flush()
    seal(folder)


def _results(config: Config, model: MaskRCNN, modules: Modules) -> Any:
    """(variables, batch) -> {name: rows}, as they are kept."""

    def results(variables: Variables, batch: Batch) -> dict[str, jax.Array]:
        def forward(module: MaskRCNN) -> dict[str, jax.Array]:
            features = module.features(batch)
            rows = {
                name: leaf.astype(config.cache_features) for name, leaf in sorted(features.items())
            }
            if modules.proposals:
                output = module.rpn_output(features, batch)
                found = select_proposals(output, batch, config.model, train=True)
                assert found.scores is not None
                rows |= {"boxes": found.boxes, "scores": found.scores, "valid": found.valid}
            return rows

        kept: dict[str, jax.Array] = nn.apply(forward, model)(variables)
        return kept

    return results


def _cached(rows: dict[str, Any]) -> CachedFeatures:
    proposals = None
    if "boxes" in rows:
        boxes, scores, valid = (rows[name] for name in ("boxes", "scores", "valid"))
        proposals = Instances(boxes=boxes, scores=scores, valid=valid)
    features = {name: leaf for name, leaf in rows.items() if name[1:].isdigit()}
    return CachedFeatures(features, proposals)


def _layout(
    config: Config, model: MaskRCNN, variables: Variables, modules: Modules, canvas: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes [1, ...] and dtypes of what is kept of an image."""
    image = blank_batch(1, config.data.canvases[canvas])
    shapes: dict[str, jax.ShapeDtypeStruct] = jax.eval_shape(
        _results(config, model, modules), variables, image
    )
    return shapes


def _bytes(config: Config, split: Split, layout: dict[str, Any], canvas: int) -> int:
    each = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in layout.values())
    return _canvases(split)[canvas] * each


def _canvases(split: Split) -> dict[int, int]:
    """The number of images on each canvas that has any."""
    numbers = [plan.canvas for plan in split.plans]
    return {canvas: numbers.count(canvas) for canvas in sorted(set(numbers))}


def _places(split: Split) -> list[int]:
    """The row of each image among those of its canvas."""
    counters: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)
    return [next(counters[plan.canvas]) for plan in split.plans]


def _key(config: Config, variables: Variables, modules: Modules) -> str:
    """A hash of all that features depend on beside the images."""
    digest = hashlib.sha256()
    data = config.data
    fields = {
        "version": VERSION,
        "dtype": config.cache_features,
        "model": asdict(config.model),
        "proposals": modules.proposals,
        "size": (data.short_side, data.long_side, data.canvases),
        "shrink": data.shrink,
    }
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for kind, tree in sorted(parallel.to_host(variables).items()):
        kept = {name: leaves for name, leaves in tree.items() if name in modules.names}
        for path, leaf in sorted(flatten_dict(kept, sep="/").items()):
            digest.update(f"{kind}/{path} {leaf.dtype} {leaf.shape}".encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
