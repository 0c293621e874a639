"""Configs as files: Python configs are loaded, resolved ones are saved as JSON, read back and
compared."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import typing
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from mrcnn_jax.config.schema import Config, ConfigError, _require
from mrcnn_jax.output import whole_file

# Beside the package in a checkout, inside it where it is installed.
RECIPES = next(
    folder
    for folder in (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")
    if folder.is_dir()
)


def load_config_file(path: str | Path) -> Config:
    """The Config of a config file, or of a recipe of configs/ by its name; ConfigError if there is
    none or it has no `get_config`."""
    path = Path(path)
    if path.name == str(path) and not path.suffix:
        recipes = {recipe.stem: recipe for recipe in sorted(RECIPES.glob("*.py"))}
        if path.name not in recipes:
            raise ConfigError(
                f"{path}: no config file (*.py), and no recipe of configs/: {', '.join(recipes)}"
            )
        path = recipes[path.name]
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    spec = importlib.util.spec_from_file_location(f"mrcnn_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file (*.py)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except ConfigError:
        raise
    except (
        Exception
    ) as error:  # the file is the user's: whatever it raises is theirs to read in one line
        raise ConfigError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not Config")
    try:
        return from_dict(to_dict(config))  # Python does not check the types of a dataclass
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def resolve_paths(config: Config) -> Config:
    """`config` with every file name absolute; ConfigError names what is missing."""
    shared = os.environ.get("MRCNN_DATA")
    data = config.data
    root = data.root
    if root is None and shared and data.folder:
        root = str(Path(shared) / data.folder)
    names: dict[str, Any] = {}
    for name in ("train_annotations", "train_images", "val_annotations", "val_images"):
        value = Path(getattr(data, name))
        if not value.is_absolute():
            if root is None:
                raise ConfigError(
                    f"data.root: not given, and $MRCNN_DATA is not set (needed for data.{name} = {value})"
                )
            value = Path(root) / value
        if not value.exists():
            raise ConfigError(f"data.{name}: {value}: no such file or folder")
        names[name] = str(value.resolve())
    init_from = config.init_from
    if init_from is not None:
        candidates = [Path(init_from)] + ([Path(shared) / init_from] if shared else [])
        found = next((candidate for candidate in candidates if candidate.exists()), None)
        if found is None:
            hint = "" if shared else " ($MRCNN_DATA is not set)"
            raise ConfigError(f"init_from: {init_from}: no such file or run{hint}")
        init_from = str(found.resolve())
    return dataclasses.replace(config, data=dataclasses.replace(data, **names), init_from=init_from)


def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], cls: type = Config, where: str = "") -> Any:
    """The inverse of `to_dict` through JSON; an unknown or missing field, or a value of another
    type, is a ConfigError that names it."""
    _require(
        isinstance(values, dict),
        f"{where.rstrip('.') or 'config'}: {values!r} is not a table of fields",
    )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        _require(name in fields, f"{where}{name}: unknown field")
    for name, f in fields.items():
        _require(name in values or f.default is not dataclasses.MISSING, f"{where}{name}: missing")
    return cls(
        **{name: _from_json(value, hints[name], f"{where}{name}") for name, value in values.items()}
    )


def _from_json(value: Any, hint: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(value, hint, f"{where}.")  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{where}: {value!r} is not a list")
        kinds = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        _require(len(value) == len(kinds), f"{where}: {value!r}: {len(kinds)} values are needed")
        return tuple(
            _from_json(v, kind, f"{where}.{i}")
            for i, (v, kind) in enumerate(zip(value, kinds, strict=True))
        )
    if origin in (typing.Union, UnionType):
        return (
            None
            if value is None
            else _from_json(value, next(a for a in args if a is not type(None)), where)
        )
    if origin is Literal:
        _require(value in args, f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if hint is float and type(value) is int:
        return float(value)
    _require(type(value) is hint, f"{where}: {value!r} is not of type {hint.__name__}")
    return value


def save_config(config: Config, path: Path) -> None:
    """Written beside its place and renamed: a run that is killed here keeps the config that it
    had."""
    with whole_file(path) as part:
        part.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load_config_json(path: Path) -> Config:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (is this a run's folder?)") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _fixed_fields(config: Any, prefix: str = "") -> dict[str, Any]:
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
    """One line for each field that differs and may not differ on resume."""
    a, b = _fixed_fields(old), _fixed_fields(new)
    return [
        f"{name}: {a.get(name)!r} -> {b.get(name)!r}"
        for name in sorted(a | b)
        if a.get(name) != b.get(name)
    ]


def config_hash(config: Config) -> str:
    """Hash of the fields that may not differ on resume."""
    return hashlib.sha256(repr(sorted(_fixed_fields(config).items())).encode()).hexdigest()[:16]
