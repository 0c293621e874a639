"""Config files: Python ones are loaded; resolved ones saved as JSON, read back and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import runpy
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from mrcnn_jax.config.errors import OTHER_VERSION, ConfigError, refuse_pipe, require
from mrcnn_jax.config.schema import Config, DataConfig, DistributedConfig
from mrcnn_jax.output import write_file

# Folder of the recipes, the configs that come with the project: beside the package in a checkout,
# inside it where it is installed.
RECIPES = next(
    folder
    for folder in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
    if folder.is_dir()
)
_UNKNOWN = "unknown field"


def load_config_file(path: str | Path) -> Config:
    """Loads a config file.

    Args:
        path: a Python file that defines `get_config() -> Config`, the name of a recipe, or a run's
            config.json, of which all is taken but how its processes found each other.

    Raises:
        ConfigError: there is no such file or recipe, it fails, or returns no valid Config.
    """
    path = Path(path)
    if path.name == str(path) and not path.suffix:
        recipes = {recipe.stem: recipe for recipe in sorted(RECIPES.glob("*.py"))}
        if path.name not in recipes:
            raise ConfigError(
                f"{path}: no config file (*.py), and no recipe of configs/: {', '.join(recipes)}"
            )
        path = recipes[path.name]
    recipe = RECIPES / path.name
    hint = f" (the recipe is --config {path.stem})" if recipe.is_file() else ""
    require(path.is_file(), f"{path}: no such config file{hint}")
    if path.suffix == ".json":
        return dataclasses.replace(load_config_json(path), distributed=DistributedConfig())
    require(path.suffix == ".py", f"{path}: not a Python file (*.py), nor a run's config.json")
    try:
        names = runpy.run_path(str(path))
        require("get_config" in names, "defines no get_config()")
        config = names["get_config"]()
        require(
            isinstance(config, Config),
            f"get_config() returned {type(config).__name__}, not Config",
        )
        return from_dict(to_dict(config))  # Python does not check the types of a dataclass
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        text = " ".join(str(error).split())
        raise ConfigError(f"{path}: {type(error).__name__}: {text}") from None


# Fields of `DataConfig` that name a file or folder of the data set.
PATHS = (
    "train_annotations",
    "train_images",
    "val_annotations",
    "val_images",
    "train_depth",
    "val_depth",
)


def data_root(data: DataConfig) -> str | None:
    """The folder that relative names of a data set are relative to; None if nothing says which."""
    shared = os.environ.get("MRCNN_DATA")
    if data.root is None and shared and data.folder:
        return str(Path(shared, data.folder))
    return data.root


def resolve_paths(config: Config, *, needs_start: bool = True) -> Config:
    """Returns `config` with every file name absolute.

    Args:
        config: with names as a user gave them.
        needs_start: whether `init_from` has to be there.

    Raises:
        ConfigError: names a file that is missing.
    """
    data = config.data
    root = data_root(data)
    names: dict[str, Any] = {}
    for name in PATHS:
        if getattr(data, name) is None:
            continue
        value = Path(getattr(data, name))
        require(
            root is not None or value.is_absolute(),
            f"data.root: not given, and $MRCNN_DATA is not set (needed for data.{name} = {value})",
        )
        value = Path(root or "", value)
        require(value.exists(), f"data.{name}: {value}: no such file or folder")
        names[name] = str(value.resolve())
    init_from = config.init_from
    if init_from is not None:
        with contextlib.nullcontext() if needs_start else contextlib.suppress(ConfigError):
            init_from = str(find_start(init_from))
    return dataclasses.replace(config, data=dataclasses.replace(data, **names), init_from=init_from)


def find_start(init_from: str) -> Path:
    """Returns the absolute path of weights to start from; ConfigError if there are none."""
    shared = os.environ.get("MRCNN_DATA")
    found = [path for path in (Path(init_from), Path(shared or "", init_from)) if path.exists()]
    hint = "" if shared else " ($MRCNN_DATA is not set)"
    require(len(found) > 0, f"init_from: {init_from}: no such file or run{hint}")
    return found[0].resolve()


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the fields of `config` as nested dicts, as JSON holds them."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """Inverse of `to_dict`, also after a way through JSON.

    Raises:
        ConfigError: names a field that is unknown, missing, or of another type.
    """
    config: Config = _parse(values, Config, "")
    return config


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns `config` with other values in some fields, all set before any is checked.

    Args:
        config: to start from.
        values: by dotted name, "model.resnet.depth" or "stages.0.epochs" for example.

    Raises:
        ConfigError: names a field that is unknown or has a value that it may not have.
    """
    fields = to_dict(config)
    for name, value in values.items():
        *tables, last = name.split(".")
        try:
            functools.reduce(_entry, tables, fields)[last] = value
        except (LookupError, TypeError, ValueError):
            raise ConfigError(f"{name}: {_UNKNOWN}") from None
    return from_dict(fields)


def values_of(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """Returns the fields of `config` among dotted names, as `with_fields` takes them."""
    fields, found = to_dict(config), {}
    for name in names:
        with contextlib.suppress(LookupError, TypeError, ValueError):
            found[name] = functools.reduce(_entry, name.split("."), fields)
    return found


def _entry(table: Any, name: str) -> Any:
    return table[int(name)] if isinstance(table, list | tuple) else table[name]


def _parse(value: Any, hint: Any, where: str) -> Any:
    """Turns a value as in JSON into one of type `hint`; `where` is its field, for messages."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        require(isinstance(value, dict), f"{where or 'config'}: {value!r} is not a table of fields")
        hints, prefix = typing.get_type_hints(hint), f"{where}." if where else ""
        fields = {f.name: f for f in dataclasses.fields(hint)}
        for name in value:
            require(name in fields, f"{prefix}{name}: {_UNKNOWN}")
        for name, f in fields.items():
            require(
                name in value or f.default is not dataclasses.MISSING, f"{prefix}{name}: missing"
            )
        return hint(**{k: _parse(v, hints[k], f"{prefix}{k}") for k, v in value.items()})
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{where}: {value!r} is not a list")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        require(len(value) == len(kinds), f"{where}: {value!r}: {len(kinds)} values are needed")
        return tuple(
            _parse(v, kind, f"{where}.{i}")
            for i, (v, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if origin in (typing.Union, UnionType):  # of a type and None
        kind = next(a for a in args if a is not type(None))
        return None if value is None else _parse(value, kind, where)
    if origin is Literal:
        known = any(type(value) is type(a) and value == a for a in args)  # 2.0 is not 2
        require(known, f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    require(type(value) is hint, f"{where}: {value!r} is not of type {hint.__name__}")
    return value


def save_config(config: Config, path: Path) -> None:
    """Writes `config` as JSON; a run killed here keeps the file that it had."""
    write_file(path, json.dumps(to_dict(config), indent=2) + "\n")


def load_config_json(path: Path) -> Config:
    """Reads what `save_config` wrote.

    Raises:
        ConfigError: the file is missing or no valid config.
    """
    refuse_pipe(path)
    try:
        values = json.loads(
            path.read_bytes(), object_pairs_hook=_once_each, parse_constant=_constant
        )
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (is this a run's folder?)") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # also of the UTF-8 decoder
        raise ConfigError(f"{path}: not JSON: {error}") from None
    try:
        return from_dict(values)
    except (ValueError, TypeError, ArithmeticError) as error:  # also of numbers far too large
        hint = f" {OTHER_VERSION}" if str(error).endswith(f": {_UNKNOWN}") else ""
        raise ConfigError(f"{path}: {error}{hint}") from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(
            name for name, times in Counter(name for name, _ in pairs).items() if times > 1
        )
        raise ValueError(f"{twice!r} is there twice")
    return values


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is not a number")
    return float(name)  # an infinity


def _fixed_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns dotted name -> value of the fields that may not differ on resume."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        if f.metadata.get("runtime"):
            continue
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= _fixed_fields(value, f"{prefix}{f.name}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            flat[f"{prefix}{f.name}.length"] = len(value)
            for i, item in enumerate(value):
                flat |= _fixed_fields(item, f"{prefix}{f.name}.{i}.")
        else:
            flat[f"{prefix}{f.name}"] = value
    return flat


def differences(old: Config, new: Config) -> list[str]:
    """Returns a line for each field that differs, but may not when a run is resumed.

    Rows that were added at the end of the stage table are no difference: what is trained before
    them is the same.
    """
    a, b = _fixed_fields(old), _fixed_fields(new)
    places = {"init_from", *(f"data.{name}" for name in PATHS)}
    before, now = len(old.stages), len(new.stages)
    # Rows that only one of them has are told by their number, not by each of their fields.
    rows = tuple(f"stages.{i}." for i in range(min(before, now), max(before, now)))
    a, b = (
        {name: value for name, value in fields.items() if not name.startswith(rows)}
        for fields in (a, b)
    )
    a, b = (fields | {"stages": None, "stages.length": n} for fields, n in ((a, before), (b, now)))
    if 0 < before < now:
        b["stages.length"] = before
    return [
        f"{name}: {a.get(name)!r} -> {b.get(name)!r}"
        for name in sorted(a | b)
        if a.get(name) != b.get(name)
        and not (name in places and _is_one_place(a.get(name), b.get(name)))
    ]


def _is_one_place(*names: Any) -> bool:
    """Whether names lead to one file: where a folder was moved, a link may be at its old place."""
    paths = [name for name in names if isinstance(name, str) and "\0" not in name]
    return len(paths) == len(names) and len(set(map(os.path.realpath, paths))) == 1


def config_hash(config: Config) -> str:
    """Returns a hash, 16 hex digits, of the fields that may not differ when a run is resumed."""
    return hashlib.sha256(repr(sorted(_fixed_fields(config).items())).encode()).hexdigest()[:16]
