"""Checkpoints that are whole or do not exist.

    <workdir>/checkpoints/00000490-rpn/     global step, stage
        model/                              orbax: params, batch_stats and ema, all that evaluation
        needs training/                           orbax: opt_state, step, skipped, key
        config.json                         the resolved config, so that a checkpoint is complete in
        itself meta.json                           `Meta`
        manifest.json                       size and SHA-256 of every file above

Order of a save: everything is written and flushed to disk in a hidden folder; then the manifest,
under another name that is renamed; then the folder is renamed to its own name. A kill at any point
leaves either a whole checkpoint or a folder that has no manifest or a hidden name, which nobody
reads and the next save removes. The hashes are for what renames cannot promise, since orbax
restores a flipped bit in silence: a checkpoint is read only after every file was compared with the
manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from mrcnn_jax.config.files import save_config
from mrcnn_jax.config.schema import Config, ConfigError
from mrcnn_jax.output import text_table, whole_file
from mrcnn_jax.runs.state import TrainState
from mrcnn_jax.structures import Params

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_META = "meta.json"
_ITEMS = {
    "model": ("params", "batch_stats", "ema"),
    "training": ("opt_state", "step", "skipped", "key"),
}
Weights = Literal["raw", "ema"]
_SHOWN_LEAVES = 20  # of each kind, where a checkpoint does not fit
_NAME = re.compile(
    r"\d{8,}-[a-z0-9_]+"
)  # as `Meta.name` makes it: nothing else in the folder is ours to remove


def environment() -> dict[str, str | int]:
    """What bit-for-bit repetition of a run depends on beside the config: machine, cores, devices,
    libraries, XLA's flags."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processor": _processor(),
        "cpus": os.cpu_count() or 0,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 0,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


@dataclass(frozen=True)
class Meta:
    """What there is to know about a checkpoint without reading its arrays."""

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
    best_metric: float | None = None
    """None also stands for one that is not finite: a run must not die of it here, and JSON has no
    such number."""
    environment: dict[str, str | int] = dataclasses.field(default_factory=environment)
    mask_ap: float | None = None
    """COCO's mask AP of these parameters on the validation images, None where it was not measured
    (`evaluate_every_epochs`)."""

    def __post_init__(self) -> None:
        best = self.best_metric
        object.__setattr__(
            self, "best_metric", float(best) if best is not None and math.isfinite(best) else None
        )

    @property
    def name(self) -> str:
        """The checkpoint's folder."""
        return f"{self.step:08d}-{self.stage}"

    @property
    def order(self) -> tuple[int, int]:
        """Age: a stage's last step and the next stage's step 0 share a global step."""
        return self.step, self.stage_index


class Checkpoints:
    """The checkpoints of one run: `<workdir>/checkpoints`, made at the first save."""

    def __init__(self, workdir: Path, keep: int) -> None:
        """`keep`: newest checkpoints to keep beside the last one of every completed stage and the
        best one (at least 1)."""
        self.folder = workdir.absolute() / "checkpoints"  # orbax takes no relative path
        self.keep = keep
        self._checkpointer = _checkpointer()

    def save(self, state: TrainState, meta: Meta, config: Config | None = None) -> None:
        """Write a checkpoint (with `config`, if given) and remove those that retention lets go;
        returns when all of it is on disk.

        What is newer than `meta` is of a future that was given up (damaged, and the run went on
        from an older one): it goes too. OSError (disk full, quota, read-only) leaves the
        checkpoints as they were, and nothing of the new one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        final, hidden = self.folder / meta.name, self.folder / f".{meta.name}"
        hidden.mkdir()
        try:
            self._write(hidden, state, meta, config)
        except Exception as error:
            shutil.rmtree(hidden, ignore_errors=True)
            if isinstance(error, OSError) and error.errno is not None:
                raise OSError(error.errno, os.strerror(error.errno), str(final)) from error
            raise
        # the same step again, now complete for instance; between these two renames an older one
        # would take over
        if final.exists():
            final.rename(self.folder / f".{meta.name}.replaced")
        hidden.rename(final)
        _flush(self.folder)
        self._remove_unfinished()
        self._retain(meta)

    def _write(self, hidden: Path, state: TrainState, meta: Meta, config: Config | None) -> None:
        """A checkpoint, whole and flushed, in a folder that is not yet its own."""
        flat = flatten(state)
        for item, fields in _ITEMS.items():
            arrays = {
                path: np.asarray(jax.device_get(leaf))
                for path, leaf in flat.items()
                if path.split("/")[0] in fields
            }
            with _os_errors():
                self._checkpointer.save(hidden / item, arrays)
        if config is not None:
            save_config(config, hidden / "config.json")
        (hidden / _META).write_text(json.dumps(dataclasses.asdict(meta), indent=2, allow_nan=False))
        files = sorted(path for path in hidden.rglob("*") if path.is_file())
        manifest = {
            path.relative_to(hidden).as_posix(): {
                "size": path.stat().st_size,
                "sha256": _sha256(path),
            }
            for path in files
        }
        for path in (*files, *(path for path in hidden.rglob("*") if path.is_dir())):
            _flush(path)
        with whole_file(hidden / _MANIFEST) as part:
            part.write_text(json.dumps({"files": manifest}, indent=1))
            _flush(part)
        _flush(hidden)

    def latest(self) -> Meta | None:
        """The newest checkpoint that is intact, None if the run has none.

        A damaged one is skipped with one warning that names the file; ConfigError if there are
        checkpoints and all are damaged.
        """
        found = next(filter(self._intact, reversed(self._metas("skipped"))), None)
        if found is None and self._folders():
            raise ConfigError(
                f"{self.folder}: none of the {len(self._folders())} checkpoints is intact"
            )
        return found

    def best(self) -> Meta | None:
        """The intact checkpoint of the highest mask AP, of several the first; None if there is none
        whose AP was measured."""
        measured = [meta for meta in self._metas("skipped") if meta.mask_ap is not None]
        return next(filter(self._intact, sorted(measured, key=_mask_ap, reverse=True)), None)

    def restore(self, template: TrainState, meta: Meta) -> TrainState:
        """The state that was saved, bit for bit, as device arrays in the structure of `template`.

        `template` (arrays or `jax.ShapeDtypeStruct`) has the stage's own optimiser state.
        ConfigError if a file of the checkpoint is damaged, or, with a table, if the template's
        leaves are not the checkpoint's (names, shapes, dtypes). Another machine, number of cores or
        devices, library or XLA flag than at the save is warned of in one line: the run goes on, but
        not bit for bit.
        """
        folder = self._verified(meta)
        here = environment()
        there = {
            "devices": 1
        } | meta.environment  # which earlier versions, that used one, did not write
        changed = [
            f"{name} {there.get(name)!r} -> {here[name]!r}"
            for name in here
            if there.get(name) != here[name]
        ]
        if changed:
            log.warning(
                "%s: saved in another environment, results will differ in the last bits: %s",
                meta.name,
                ", ".join(changed),
            )
        saved = {
            path: leaf
            for item in _ITEMS
            for path, leaf in self._checkpointer.restore(folder / item).items()
        }
        wanted = flatten(template)
        _compare(saved, wanted, folder)
        # Copies: a donated buffer must not be memory that NumPy owns.
        return jax.tree.unflatten(
            jax.tree.structure(template), [jnp.array(saved[path]) for path in wanted]
        )

    def restore_params(self, meta: Meta, weights: Weights = "raw") -> tuple[Params, Params]:
        """(params, batch_stats) as NumPy arrays, from the folder alone.

        ConfigError if a file of the checkpoint is damaged, or if it has no moving average and that
        is asked for: "ema", which stands in for the parameters that it is of.
        """
        folder = self._verified(meta)
        flat = self._checkpointer.restore(folder / "model")
        average = {
            f"params/{path.removeprefix('ema/')}": flat.pop(path)
            for path in list(flat)
            if path.startswith("ema/")
        }
        if weights == "ema" and not average:
            raise ConfigError(
                f"{folder}: holds no moving average of its weights (stages.{meta.stage}.ema_decay)"
            )
        tree = unflatten_dict(flat | average if weights == "ema" else flat, sep="/")
        return tree["params"], tree.get("batch_stats", {})

    def _verified(self, meta: Meta) -> Path:
        folder = self.folder / meta.name
        damage = _damage(folder)
        if damage is not None:
            raise ConfigError(damage)
        return folder

    def _folders(self) -> list[Path]:
        """The checkpoints that exist: those with a manifest."""
        if not self.folder.is_dir():
            return []
        return sorted(
            path
            for path in self.folder.iterdir()
            if _NAME.fullmatch(path.name) and (path / _MANIFEST).is_file()
        )

    def _metas(self, fate: Literal["skipped", "removed"]) -> list[Meta]:
        """Those that can be read, by age; the fate of any other is warned of."""
        metas = []
        for folder in self._folders():
            try:
                metas.append(_read_meta(folder))
            except ConfigError as error:
                log.warning("%s: %s", error, fate)
                if fate == "removed":
                    _remove(folder)
        return sorted(metas, key=lambda meta: meta.order)

    def _intact(self, meta: Meta) -> bool:
        """Whether all of it is as it was saved; a warning names what is not."""
        damage = _damage(self.folder / meta.name)
        if damage is not None:
            log.warning("%s: skipped", damage)
        return damage is None

    def _remove_unfinished(self) -> None:
        for path in self.folder.iterdir():
            hidden = path.name.startswith(".") and _NAME.match(path.name[1:])
            if hidden or (_NAME.fullmatch(path.name) and not (path / _MANIFEST).is_file()):
                shutil.rmtree(path)

    def _retain(self, newest: Meta) -> None:
        metas = self._metas("removed")
        past = [meta for meta in metas if meta.order <= newest.order]
        stages = {meta.stage: meta for meta in past if meta.stage_complete}  # the last one of each
        between = [meta for meta in past if not meta.stage_complete][-self.keep :]
        best = max(
            (meta for meta in past if meta.mask_ap is not None), key=_mask_ap, default=newest
        )
        for meta in metas:
            if meta not in (*stages.values(), *between, best):
                _remove(self.folder / meta.name)


def refuse_taken(out: Path) -> None:
    """ConfigError if `out` is there and not an empty folder: a new run's folder is not made over
    another."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(
            f"{out}: is there already, and not an empty folder (choose another --out)"
        )


def write_run(
    out: Path,
    config: Config,
    variables: dict[str, Any],
    meta: Meta,
    texts: dict[str, str] | None = None,
) -> None:
    """A new folder of a run that was not trained there: parameters, statistics and config, and
    `texts` by file name.

    All of it, or nothing: it is made beside its place and then renamed. ConfigError if that is not
    possible.
    """
    nothing = {"opt_state": (), "step": jnp.int32(0), "key": jnp.zeros(2, jnp.uint32)}
    state = TrainState(params=variables["params"], batch_stats=variables["batch_stats"], **nothing)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            run = Path(folder) / "run"
            Checkpoints(run, keep=1).save(state, meta, config)
            save_config(config, run / "config.json")
            for name, text in (texts or {}).items():
                (run / name).write_text(text, encoding="utf-8")
            run.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None


def _checkpointer() -> ocp.Checkpointer:
    """One that waits for no other process: all of them read, the first one alone writes."""
    if jax.process_count() == 1:
        return ocp.PyTreeCheckpointer()
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
    )


def flatten(state: Any) -> dict[str, Any]:
    """{"params/rpn/conv1/kernel": leaf, "opt_state/inner_states/group0/...": leaf, ...}, in the
    order of `jax.tree.leaves`.

    By path, not as a tree: optax's states hold named tuples and empty nodes, which only a template
    can give back.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _compare(saved: dict[str, np.ndarray], wanted: dict[str, Any], folder: Path) -> None:
    """ConfigError with a table of the leaves that are missing in the checkpoint, not wanted from
    it, or of another shape or dtype."""

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


def _mask_ap(meta: Meta) -> float:
    assert meta.mask_ap is not None
    return meta.mask_ap


def _read_meta(folder: Path) -> Meta:
    try:
        values = json.loads((folder / _META).read_text())
        values["categories"] = tuple(
            (int(number), str(name)) for number, name in values["categories"]
        )
        meta = Meta(**values)
        if meta.name != folder.name:
            raise ValueError(f"of {meta.name}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{folder / _META}: damaged: {error}") from None
    return meta


def _damage(folder: Path) -> str | None:
    """One line that names the first file that is not what the manifest recorded, None if all
    are."""
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
        recorded = {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"{folder}: no such checkpoint (it has no {_MANIFEST})"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{folder / _MANIFEST}: damaged: {error}"
    for name, (size, digest) in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing from the checkpoint"
        if path.stat().st_size != size:
            return f"{path}: damaged: {path.stat().st_size} bytes, {size} when it was saved"
        if _sha256(path) != digest:
            return f"{path}: damaged: not the bytes that were saved (SHA-256 differs)"
    return None


@contextmanager
def _os_errors() -> Iterator[None]:
    """What the system refuses orbax, which logs a traceback and raises a ValueError that holds the
    error's number, as an OSError."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except ValueError as error:
        number = re.search(r"os_error_code='(\d+)'", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
    finally:
        logger.setLevel(level)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, manifest first: one that is half removed must not exist."""
    (folder / _MANIFEST).unlink()
    shutil.rmtree(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _processor() -> str:
    """The CPU's name: XLA compiles for the instructions that this one has."""
    try:
        names = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        names = None
    return names.group(1) if names else platform.processor() or platform.machine()
