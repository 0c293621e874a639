"""Checkpoints that are complete or do not exist.

    <workdir>/checkpoints/00000490-rpn/   global step, stage
        model/          orbax: params, batch_stats and ema, all that evaluation needs
        training/       orbax: opt_state, step, skipped, key
        config.json     the resolved config, so that the checkpoint needs no other file
        logs.json       what the run's logs held (`runs.logs`)
        meta.json       `runs.meta.Meta`
        manifest.json   size and SHA-256 of every file above (`runs.manifest`)

A save writes and flushes everything in a hidden folder, adds the manifest under another name,
renames it, and then renames the folder; a checkpoint that is removed is renamed back first. A kill
at any point leaves either a complete checkpoint or a folder with a hidden name: nobody reads it and
the next save removes it. A folder with a checkpoint's name but no manifest was copied in part: it
is never read, never removed, and no training goes on beside it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import load_config_json, save_config
from mrcnn_jax.config.schema import Config
from mrcnn_jax.runs import logs, manifest
from mrcnn_jax.runs.arrays import ArrayFolders, flatten, refuse_other_leaves
from mrcnn_jax.runs.environment import changes
from mrcnn_jax.runs.meta import Meta, UnknownField, read_meta, write_meta
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Params

log = logging.getLogger(__name__)

_REPLACED = "replaced"  # ends the hidden name of a checkpoint that is being saved again
_ITEMS = {
    "model": ("params", "batch_stats", "ema"),
    "training": ("opt_state", "step", "skipped", "key"),
}
Weights = Literal["raw", "ema"]
_NAME = re.compile(r"\d{8,}-[a-z0-9_]+")  # `Meta.name`: nothing else is ours to remove


class Checkpoints:
    """The checkpoints of one run in `<workdir>/checkpoints`, which the first save creates."""

    def __init__(self, workdir: Path, keep: int) -> None:
        """Keep the newest `keep` (at least 1), the last of each completed stage and the best."""
        self.folder = workdir.absolute() / "checkpoints"  # orbax takes no relative path
        self.keep = keep
        self._arrays = ArrayFolders()

    def save(self, state: TrainState, meta: Meta, config: Config | None = None) -> None:
        """Write a checkpoint, then remove those that are no longer kept.

        Returns when everything is on the disk. Checkpoints newer than `meta` are removed too: they
        belong to a future that was given up when the run went on from an older one.

        Args:
            state: the arrays.
            meta: names the checkpoint.
            config: saved beside them, if given.

        Raises:
            OSError: disk full, quota or read-only; the earlier checkpoints are as they were.
            ConfigError: a folder without a manifest has its name.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(self.folder)
        final, hidden = self.folder / meta.name, self.folder / f".{meta.name}"
        if final.exists():
            _refuse_incomplete(final)
        hidden.mkdir()
        try:
            self._write(hidden, state, meta, config)
        except Exception as error:
            shutil.rmtree(hidden, ignore_errors=True)
            if isinstance(error, OSError) and error.errno is not None:
                raise OSError(error.errno, os.strerror(error.errno), str(final)) from error
            raise
        # The same step may be saved again, for instance as complete. After a kill between these two
        # renames it is put back.
        if final.exists():
            manifest.hide(final, _REPLACED)
        hidden.rename(final)
        manifest.flush(self.folder)
        _remove_unfinished(self.folder)
        self._retain(meta)

    def _write(self, hidden: Path, state: TrainState, meta: Meta, config: Config | None) -> None:
        """Write all of a checkpoint to a folder that does not have its final name yet."""
        flat = flatten(state)
        for item, fields in _ITEMS.items():
            arrays = {
                path: np.asarray(jax.device_get(leaf))
                for path, leaf in flat.items()
                if path.split("/")[0] in fields
            }
            self._arrays.save(hidden / item, arrays)
        if config is not None:
            save_config(config, hidden / "config.json")
        logs.record(self.folder.parent, hidden)
        write_meta(hidden, meta)
        manifest.write(hidden)

    def latest(self) -> Meta | None:
        """Find the newest intact checkpoint; None if the run has none at all.

        A damaged one is skipped with a warning that names the file.

        Raises:
            ConfigError: there are checkpoints, and all of them are damaged, or one is of a version
                with other fields.
        """
        metas = reversed(self._metas("skipped"))
        found = next((meta for meta in metas if _intact(self.folder / meta.name)), None)
        folders = _folders(self.folder)
        if found is None and folders:
            why = manifest.damage(folders[-1]) or "damaged"
            raise ConfigError(
                f"{self.folder}: none of the {len(folders)} checkpoints is intact: {why}"
            )
        return found

    def refuse_incomplete(self) -> None:
        """Raise ConfigError if a folder with a checkpoint's name has no manifest.

        Call before training, which would go on from an older checkpoint and in time save over it.
        One that a kill caught while it was saved again gets its name back.
        """
        for hidden, final in self._replaced():
            if not final.exists():
                with suppress(FileNotFoundError):  # another process was faster
                    hidden.rename(final)
        for folder in _folders(self.folder):
            _refuse_incomplete(folder)

    def is_replacing(self) -> bool:
        """Whether a checkpoint is being saved again, or a kill caught it there."""
        return any(not final.exists() for _, final in self._replaced())

    def _replaced(self) -> list[tuple[Path, Path]]:
        """The checkpoints that are being saved again: hidden folder and the one that it was."""
        found = [
            (hidden, hidden.with_name(hidden.name[1:].removesuffix(f".{_REPLACED}")))
            for hidden in self.folder.glob(f".*.{_REPLACED}")
        ]
        return [(hidden, final) for hidden, final in found if _NAME.fullmatch(final.name)]

    def config(self, meta: Meta) -> Config | None:
        """Read the config that was saved with a checkpoint; None if none was.

        Raises:
            ConfigError: it is no valid config.
        """
        path = self.folder / meta.name / "config.json"
        return load_config_json(path) if path.exists() else None

    def best(self) -> Meta | None:
        """Find the intact checkpoint of highest AP, if any has one."""
        ranked = _by_ap(self._metas("skipped"))
        return next((meta for meta in ranked if _intact(self.folder / meta.name)), None)

    def refuse_damaged_log(self, meta: Meta, name: str) -> None:
        """Raise ConfigError if a log of the run has changed since an intact checkpoint was saved.

        Args:
            meta: the checkpoint.
            name: of the log, one of those in `runs.logs`.
        """
        logs.refuse_damaged(self.folder.parent / name, self.folder / meta.name)

    def restore(self, template: TrainState, meta: Meta) -> TrainState:
        """Read the state that was saved, bit for bit.

        Logs one warning if machine, cores, devices, libraries or XLA flags differ from those of the
        save: the run goes on, but not bit for bit.

        Args:
            template: arrays or `jax.ShapeDtypeStruct`, with the stage's own optimiser state.
            meta: which checkpoint.

        Returns:
            Device arrays in the structure of `template`.

        Raises:
            ConfigError: a file is damaged; or, with a table, names, shapes or dtypes of the leaves
                are not those of `template`.
        """
        folder = _verified(self.folder / meta.name)
        if changed := changes(meta.environment):
            log.warning(
                "%s: saved in another environment, results will differ in the last bits: %s",
                meta.name,
                ", ".join(changed),
            )
        saved = {
            path: leaf
            for item in _ITEMS
            for path, leaf in self._arrays.restore(folder / item).items()
        }
        wanted = flatten(template)
        refuse_other_leaves(saved, wanted, folder)
        # Copies: a donated buffer must not be memory that NumPy owns.
        return jax.tree.unflatten(
            jax.tree.structure(template), [jnp.array(saved[path]) for path in wanted]
        )

    def restore_weights(self, meta: Meta) -> dict[Weights, dict[str, Params]]:
        """Read the network's variables as NumPy arrays; no template is needed.

        Returns:
            {"params", "batch_stats"} of "raw" and, if the checkpoint holds a moving average, of
            "ema": it stands in for the parameters that it averages.

        Raises:
            ConfigError: a file of the checkpoint is damaged.
        """
        flat = self._arrays.restore(_verified(self.folder / meta.name) / "model")
        average = {
            f"params/{path.removeprefix('ema/')}": flat.pop(path)
            for path in list(flat)
            if path.startswith("ema/")
        }
        versions: dict[Weights, dict[str, Any]] = {"raw": flat}
        if average:
            versions["ema"] = flat | average
        return {
            name: {"batch_stats": {}} | unflatten_dict(leaves, sep="/")
            for name, leaves in versions.items()
        }

    def _metas(self, fate: Literal["skipped", "removed"]) -> list[Meta]:
        """The readable ones, oldest first; each other one is skipped or removed with a warning."""
        metas = []
        for folder in _folders(self.folder):
            if (fault := manifest.lacks(folder)) is not None:
                log.warning("%s: skipped", fault)
                continue
            try:
                metas.append(read_meta(folder))
            except UnknownField:  # not damaged: nothing is done beside it, let alone to it
                raise
            except ConfigError as error:
                log.warning("%s: %s", error, fate)
                if fate == "removed":
                    manifest.remove(folder)
        return sorted(metas, key=lambda meta: meta.order)

    def _retain(self, newest: Meta) -> None:
        metas = self._metas("removed")
        past = [meta for meta in metas if meta.order <= newest.order]
        stages = {meta.stage: meta for meta in past if meta.stage_complete}  # the last one of each
        # One that is not validated yet will be replaced, and does not take a place until then.
        keep = self.keep + (not newest.validated)
        between = [meta for meta in past if not meta.stage_complete][-keep:]
        # By today's validation annotations, and by any: an edit may have changed nothing in them.
        best = _by_ap(past)
        best = [*best[:1], max(best, key=_ap, default=newest)]
        for meta in metas:
            if meta not in (*stages.values(), *between, *best):
                manifest.remove(self.folder / meta.name)


def _by_ap(metas: Sequence[Meta]) -> list[Meta]:
    """Those with an AP, best first.

    The last of equals is before the others: a stage that trains the depth head alone does not
    change the AP. Where the validation annotations have changed, those by the newest one's come
    first: an AP by others says nothing beside it.

    Args:
        metas: oldest first.
    """
    measured = [meta for meta in metas[::-1] if meta.ap is not None]
    now = measured[0].annotations.get("val") if measured else None
    return sorted(
        measured,
        key=lambda meta: (meta.annotations.get("val", now) == now, _ap(meta)),
        reverse=True,
    )


def _folders(folder: Path) -> list[Path]:
    """All folders with the name of a checkpoint."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _verified(folder: Path) -> Path:
    damage = manifest.damage(folder)
    if damage is not None:
        raise ConfigError(damage)
    return folder


def _intact(folder: Path) -> bool:
    """Whether every file is as it was saved; a warning names the first that is not."""
    damage = manifest.damage(folder)
    if damage is not None:
        log.warning("%s: skipped", damage)
    return damage is None


def _refuse_incomplete(folder: Path) -> None:
    if (fault := manifest.lacks(folder)) is not None:
        raise ConfigError(
            f"{fault}; copy all of it again, or move it out of {folder.parent} to go on without it"
        )


def _remove_unfinished(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name.startswith(".") and _NAME.match(path.name[1:]):
            shutil.rmtree(path)


def _ap(meta: Meta) -> float:
    assert meta.ap is not None
    return meta.ap
