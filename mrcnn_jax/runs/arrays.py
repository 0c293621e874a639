"""The arrays of a state in folders of orbax, by their paths in the state."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.output import text_table

_SHOWN_LEAVES = 20  # of each kind, where a checkpoint does not fit


def flatten(state: Any) -> dict[str, Any]:
    """Flatten a state to {"params/rpn/conv1/kernel": leaf, ...} in the order of `jax.tree.leaves`.

    Checkpoints are stored by path, not as trees: optax's states hold named tuples and empty nodes,
    which only a template can give back.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class ArrayFolders:
    """Writes arrays into folders, and reads them; paths of folders are absolute."""

    def __init__(self) -> None:
        self._checkpointer = _checkpointer()

    def save(self, folder: Path, arrays: dict[str, np.ndarray]) -> None:
        """Write {path: array} into a new folder; returns when all is written.

        Raises:
            OSError: the system refuses it; what was written is left.
        """
        with _os_errors():
            self._checkpointer.save(folder, arrays)
            # Orbax writes the name of the folder into it, and looks only whether it is there.
            (folder / "commit_success.txt").write_text("saved\n")

    def restore(self, folder: Path) -> dict[str, np.ndarray]:
        """Read what was saved, bit for bit."""
        return self._checkpointer.restore(folder)


def _checkpointer() -> ocp.Checkpointer:
    """Create one that waits for no other process: all of them read, only the first one writes."""
    if jax.process_count() == 1:
        return ocp.PyTreeCheckpointer()
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    )


def refuse_other_leaves(saved: dict[str, np.ndarray], wanted: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError with a table of the leaves that are missing, extra or different.

    Args:
        saved: those of a checkpoint.
        wanted: those of a model and stage, or their `jax.ShapeDtypeStruct`.
        folder: of the checkpoint, to be named.
    """

    def kind(leaves: dict[str, Any], path: str) -> str:
        return (
            f"{np.dtype(leaves[path].dtype).name}[{', '.join(map(str, leaves[path].shape))}]"
            if path in leaves
            else "-"
        )

    kinds = {
        "missing": [path for path in wanted if path not in saved],
        "extra": [path for path in saved if path not in wanted],
        "differing": [
            path for path in wanted if path in saved and kind(saved, path) != kind(wanted, path)
        ],
    }
    if not any(kinds.values()):
        return
    rows = [("", "leaf", "checkpoint", "this model")]
    for what, paths in kinds.items():
        rows += [
            (what, path, kind(saved, path), kind(wanted, path)) for path in paths[:_SHOWN_LEAVES]
        ]
        if len(paths) > _SHOWN_LEAVES:
            rows.append((what, f"... and {len(paths) - _SHOWN_LEAVES} more", "", ""))
    counts = ", ".join(f"{len(paths)} {what}" for what, paths in kinds.items() if paths)
    raise ConfigError(
        "\n  ".join(
            [f"{folder}: does not fit this model and stage: {counts}", *text_table(rows, left=4)]
        )
    )


def _without_late_writers(hook: Callable[[Any], None], unraisable: Any) -> None:
    """Hide that threads of orbax, which still write other arrays, find nobody to report to."""
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


@contextmanager
def _os_errors() -> Iterator[None]:
    """Turn orbax's logged traceback and ValueError, which holds the error number, into OSError."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_without_late_writers, hook)
    try:
        yield
        sys.unraisablehook = hook  # after an error the threads go on
    except ValueError as error:
        number = re.search(r"os_error_code='(\d+)'", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
    finally:
        logger.setLevel(level)
