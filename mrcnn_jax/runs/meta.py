"""A checkpoint without its arrays: when it was saved, and what its run knew then."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrcnn_jax.config.errors import OTHER_VERSION, ConfigError
from mrcnn_jax.runs.environment import environment

_FILE = "meta.json"


class UnknownField(ConfigError):
    """A checkpoint, perhaps of a newer version of this package, has a field more than `Meta`."""


@dataclass(frozen=True)
class Meta:
    """A checkpoint without its arrays."""

    step: int
    """Steps done since the run began, over all stages."""
    stage: str
    stage_index: int
    stage_step: int
    """Steps done within the stage."""
    stage_complete: bool
    categories: tuple[tuple[int, str], ...]
    """(id, name) of the data set's categories; the i-th one (from 0) has label i + 1."""
    config_hash: str
    environment: dict[str, str | int] = dataclasses.field(default_factory=environment)
    ap: float | None = None
    """COCO AP on the validation images, of masks, or of boxes where no object has a mask; None if
    not measured (`evaluate_every_epochs`)."""
    loaded: tuple[str, ...] | None = None
    """Modules whose parameters the run began with, all of them from other weights ("box_head" for
    example); None: not known, of a run that an earlier version began or that was not trained."""
    images: str | None = None
    """A hash of the training images that its steps are counted in; None: as of `loaded`."""
    validated: bool = True
    """False: of the end of an epoch whose validation has yet to come, which is saved before it."""
    has_masks: bool = True
    """False: no object that it was trained on has a mask, so losses of masks taught it nothing."""
    annotations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Hashes of the annotation files by their split, "train" and "val"; empty: not known."""

    @property
    def name(self) -> str:
        """The checkpoint's folder."""
        return f"{self.step:08d}-{self.stage}"

    @property
    def order(self) -> tuple[int, int]:
        """Age: a stage's last step and the next stage's step 0 share a global step."""
        return self.step, self.stage_index


def parse_meta(values: Any) -> Meta:
    """Inverse of `dataclasses.asdict`, after a way through JSON.

    Raises:
        UnknownField: it has a field more.
        ValueError, TypeError, KeyError: it is not that.
    """
    values["categories"] = tuple((int(number), str(name)) for number, name in values["categories"])
    if (loaded := values.get("loaded")) is not None:
        values["loaded"] = tuple(map(str, loaded))
    values.pop("best_metric", None)  # of earlier versions, which did not use it either
    values.setdefault("ap", values.pop("mask_ap", None))  # as earlier versions called it
    for name in sorted(values.keys() - {field.name for field in dataclasses.fields(Meta)}):
        raise UnknownField(f"{name!r:.80}: unknown field {OTHER_VERSION}")
    meta = Meta(**values)
    kinds: dict[str, type] = dict.fromkeys(("step", "stage_index", "stage_step"), int)
    kinds |= dict.fromkeys(("stage_complete", "validated", "has_masks"), bool)
    kinds |= {"config_hash": str, "environment": dict, "annotations": dict}
    for name, kind in kinds.items():
        if type(getattr(meta, name)) is not kind:
            raise TypeError(f"{name} is no {kind.__name__}")
    return meta


def write_meta(folder: Path, meta: Meta) -> None:
    """Write it to the folder of a checkpoint."""
    text = json.dumps(dataclasses.asdict(meta), indent=2, allow_nan=False)
    (folder / _FILE).write_text(text)


def read_meta(folder: Path) -> Meta:
    """Read it from the folder of a checkpoint.

    Raises:
        UnknownField: it has a field more.
        ConfigError: it is damaged, or that of another checkpoint.
    """
    try:
        meta = parse_meta(json.loads((folder / _FILE).read_bytes()))
        if meta.name != folder.name:
            raise ValueError(f"of {meta.name}")
    except UnknownField as error:
        raise UnknownField(f"{folder / _FILE}: {error}") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{folder / _FILE}: damaged: {error}") from None
    return meta
