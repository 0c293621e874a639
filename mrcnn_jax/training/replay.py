"""Keeps the batch on which a loss or gradient was not finite, and computes that step again.

The file is complete: it holds the arrays `batch/...`, `params/...`, `batch_stats/...` and `key`,
and `about`, a JSON text with the resolved config. Its parameters are those before the step if the
step ended the run, and those after the following step if it was skipped (`skip_non_finite`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.serialization import to_state_dict
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Bool

from mrcnn_jax.config.errors import ConfigError, refuse_pipe
from mrcnn_jax.config.files import from_dict, to_dict
from mrcnn_jax.config.schema import Config
from mrcnn_jax.models.mask_rcnn import MaskRCNN
from mrcnn_jax.output import listed, whole_file
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.runtime import compile_options
from mrcnn_jax.structures import Batch, Instances
from mrcnn_jax.training.step import make_train_step
from mrcnn_jax.weights.npz import read_npz

_SHOWN_IDS = 10


@dataclass(frozen=True)
class FailedStep:
    """The description of a training step that was not finite."""

    stage_index: int
    step: int
    """In its stage, from 1."""
    not_finite: tuple[str, ...]
    """Names of its metrics."""
    images: Mapping[int, Sequence[int]]
    """Image id -> annotation ids, in the order of the rows of the batch."""

    def __str__(self) -> str:
        return f"step {self.step}: {', '.join(self.not_finite)} not finite; " + ", ".join(
            map(self.describe, self.images)
        )

    def describe(self, image: int) -> str:
        """The ids of an image and of its first annotations."""
        ids = self.images[image]
        shown = listed([str(number) for number in ids], _SHOWN_IDS)
        return f"image {image} ({f'annotations {shown}' if ids else 'no annotations'})"


def write_failed(
    path: Path, failed: FailedStep, config: Config, batch: Batch, state: TrainState
) -> None:
    """Writes a failed step into one file, which is there whole or not at all.

    Args:
        path: the .npz file.
        batch: the whole batch, NumPy arrays.
        state: of the failed step, see above; the optimiser's state is not written.
    """
    arrays = {
        "batch": to_state_dict(batch),
        "params": state.params,
        "batch_stats": state.batch_stats,
        "key": state.key,
    }
    flat = flatten_dict(arrays, sep="/").items()
    contents: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in flat if leaf is not None}
    about = {
        "config": to_dict(config),
        "stage_index": failed.stage_index,
        "step": failed.step,
        "not_finite": failed.not_finite,
        "images": list(failed.images.items()),
    }
    with whole_file(path) as part, part.open("wb") as file:
        np.savez(file, about=np.array(json.dumps(about)), **contents)


def read_failed(path: Path) -> tuple[FailedStep, Config, Batch, TrainState]:
    """Reads what `write_failed` wrote; ConfigError if `path` is no such file."""
    refuse_pipe(path)
    try:
        arrays = read_npz(path)
        about: dict[str, Any] = json.loads(str(arrays.pop("about")))
        failed = FailedStep(
            about["stage_index"], about["step"], tuple(about["not_finite"]), dict(about["images"])
        )
        tree = unflatten_dict(arrays, sep="/")
        sets = {n: Instances(**tree["batch"].pop(n)) for n in ("ground_truth", "ignore")}
        batch = Batch(**tree["batch"], **sets)
        state = TrainState(
            tree["params"],
            tree.get("batch_stats", {}),
            opt_state=(),
            step=jnp.int32(failed.step - 1),
            key=tree["key"],
        )
        config = from_dict(about["config"])
        if failed.stage_index not in range(len(config.stages)):
            raise ValueError(f"stage {failed.stage_index} of {len(config.stages)}")
    except Exception as error:  # a damaged file can raise any
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: not a failed batch: {reason:.300}") from None
    return failed, config, batch, state


def rows_of(failed: FailedStep, batch: Batch) -> dict[str, Bool[np.ndarray, " b"]]:
    """The rows to compute the step on, by a name: all of them, and those of each image.

    An image may be in a batch more than once (`data.repeat_threshold`).
    """
    # In the order of the rows, once each, as in `failed.images`.
    indices = dict.fromkeys(batch.indices[batch.valid].tolist())
    alone = {
        f"{failed.describe(image)} alone": batch.indices == index
        for index, image in zip(indices, failed.images, strict=True)
    }
    return {"all images": np.ones(len(batch.valid), bool)} | alone


def replay(path: Path) -> list[tuple[str, dict[str, float]]]:
    """Computes the metrics of a failed step again and prints them.

    Returns:
        (name, metrics) for all images and for each image alone.
    """
    failed, config, batch, state = read_failed(path)
    stage = config.stages[failed.stage_index]
    print(f"stage {stage.name}, {failed}")
    # Nothing is applied: an optimiser without state and updates.
    model = MaskRCNN(config.model, deterministic=config.deterministic)
    step = make_train_step(model, stage, state.params, optax.set_to_zero())
    metrics = jax.jit(
        lambda state, batch: step(state, batch)[1],
        **compile_options(deterministic=config.deterministic),
    )
    found = []
    for name, chosen in rows_of(failed, batch).items():
        found_now = jax.device_get(metrics(state, batch.replace(valid=batch.valid & chosen)))
        values = {key: float(value) for key, value in found_now.items()}
        print(f"{name}: " + "  ".join(f"{key} {value:g}" for key, value in values.items()))
        found.append((name, values))
    return found
