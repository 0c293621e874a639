"""The training and the validation file of a user's folder: found, or made of an export."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.schema import Config
from mrcnn_jax.convert.common import Options
from mrcnn_jax.convert.write import convert
from mrcnn_jax.data.json_values import read_json
from mrcnn_jax.data.names import Role, role
from mrcnn_jax.data.split import RECORD, TRAIN, VAL, Part, existing_split, split, write_record
from mrcnn_jax.datasets.recognise import recognise
from mrcnn_jax.datasets.tree import fingerprint
from mrcnn_jax.output import write_file

DATASET = "dataset"  # in a run's folder: what was converted and divided for it
ANNOTATIONS = "annotations.json"  # in it, of an export
CLASSES = "classes_of_training.txt"  # in it, of an export in two parts


def prepare(folder: Path, workdir: Path) -> tuple[Part, Part]:
    """Finds the training and the validation file of a folder, or makes them in `workdir`, of a run
    that has not begun.

    Prints what was found and done. Of several processes the first one makes them.

    Raises:
        ConfigError: the folder is not understood, or cannot be converted or divided.
    """
    from mrcnn_jax import parallel  # loads jax, which `check` does without

    out = workdir / DATASET
    record = existing_split(folder, out)  # refuses that of another folder
    if record is not None and not parallel.is_first():
        images = Path(record["images"])
        return Part(out / TRAIN, images), Part(out / VAL, images)
    found = recognise(folder, without=workdir)
    print(found.told)
    if found.train is not None and found.val is not None:
        (out / RECORD).unlink(missing_ok=True)  # of a start before one of them was there
        return found.train, found.val
    state = fingerprint(folder, workdir)
    if found.export is not None and found.val_export is not None:
        both = found.export, found.val_export
        training = converted(found.export, out / TRAIN, both)
        export = with_classes_of(training, found.val_export, out / CLASSES)
        validation = converted(export, out / VAL, both)
        record = {"rule": "As the export divides them.", "fingerprint": state}
        write_record(folder, out, training.images, record)
        return training, validation
    part = found.train
    if part is None:
        assert found.export is not None
        part = converted(found.export, out / ANNOTATIONS)
    training, validation, line = split(part, folder, out, fingerprint=state)
    print(line)
    return training, validation


def is_changed(folder: Path, workdir: Path) -> bool:
    """Whether a folder is not any more what `prepare` made the files of a run from.

    Raises:
        ConfigError: they are of another folder, or damaged.
    """
    recorded = (existing_split(folder, workdir / DATASET) or {}).get("fingerprint")
    return recorded is not None and recorded != fingerprint(folder, workdir)


def refuse_other_folder(config: Config, folder: Path, workdir: Path) -> None:
    """Raises ConfigError if a run was not begun on this folder."""
    annotations, made = Path(config.data.train_annotations).resolve(), workdir / DATASET
    if annotations.is_relative_to(made.resolve()):
        existing_split(folder, made)
    elif not (annotations.is_relative_to(folder.resolve()) or _links_to(folder, annotations)):
        raise ConfigError(
            f"{workdir}: holds a run on {annotations}, not on {folder} (choose another --workdir)"
        )


def _links_to(folder: Path, annotations: Path) -> bool:
    """Whether the training file of a folder is a link to another one."""
    try:
        part = recognise(folder).train
    except ConfigError:
        return False
    return part is not None and part.annotations.resolve() == annotations


def with_classes_of(training: Part, export: Options, file: Path) -> Options:
    """The validation part of an export, with the classes of training, which are written to `file`,
    if it lists none itself."""
    if export.class_names() is not None:  # else those that it has objects of may not be all
        return export
    names = [category["name"] for category in read_json(training.annotations)["categories"]]
    write_file(file, "".join(f"{name}\n" for name in names))
    return replace(export, categories=file)


def converted(export: Options, out: Path, parts: Sequence[Options] = ()) -> Part:
    """Converts an export that was recognised; the file is `out`.

    Args:
        export: as it was recognised, perhaps with categories.
        out: a path.
        parts: all that was recognised, training first; by default `export` alone.

    Raises:
        ConfigError: it cannot be used; where options would help, with the commands that take them.
    """
    try:
        convert(replace(export, out=out), hint=False)
    except ConfigError as error:
        line = str(error)
        if "--" not in line or line.startswith("--out"):
            raise
        ways = by_hand(*(parts or (export,)))
        raise ConfigError(f"{line}; to give options: {ways}") from None
    return Part(out, export.open_images().folder)


def by_hand(training: Options, validation: Options | None = None) -> str:
    """The commands that convert what was recognised into its own folder, each with "..." for more
    options. Their files are recognised there, with their parts: both are to be written, or one
    would be trained on alone."""
    if validation is None:
        return f"{_command(training, None)} ..."
    ways = f"{_command(training, 'train')} ... && {_command(validation, 'val')} ..."
    if validation.class_names() is None:
        ways += " (--categories FILE, a class a line, for both, if validation lacks a class)"
    return ways


def _command(export: Options, part: Role | None) -> str:
    folder, stem = export.input, Path(ANNOTATIONS).stem
    if not folder.is_dir():
        folder, stem = folder.parent, f"{export.input.stem}_coco"
    if part is not None and role(stem) != part:
        stem = f"{part}_{stem}"
    if (folder / f"{stem}.json").exists():
        stem += "_2"
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(export).__name__).lower()
    words: list[object] = [kind, export.input, "--out", folder / f"{stem}.json"]
    for option in ("images", "layout", "class_name", "part", "datasets", "skip"):
        value = getattr(export, option, None)
        if value:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{option.replace('_', '-')}", *values]
    return cli.command("convert", *words)
