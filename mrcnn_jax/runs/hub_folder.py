"""A model in the layout of the Hugging Face Hub: a folder of three files.

model.safetensors   all variables by path ("params/rpn/conv1/kernel"); its header has the `Meta`
config.json         the config, as in a run's folder
README.md           the model card, which begins with what the Hub reads (`front_matter`)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import yaml
from flax.traverse_util import flatten_dict, unflatten_dict

from mrcnn_jax.config.errors import ConfigError, refuse_pipe
from mrcnn_jax.config.files import load_config_json, save_config
from mrcnn_jax.config.schema import Config
from mrcnn_jax.models.initialise import variable_shapes
from mrcnn_jax.models.mask_rcnn import Variables
from mrcnn_jax.output import listed, part_folder
from mrcnn_jax.runs.meta import Meta, UnknownField, parse_meta

WEIGHTS, CONFIG, CARD = FILES = ("model.safetensors", "config.json", "README.md")
_HEADER = "checkpoint"  # key of the Meta in the header of WEIGHTS
# Where huggingface_hub keeps what it has fetched: models--org--name/snapshots/<commit>.
_SNAPSHOT = re.compile(r".*/models--(.+?)--(.+)/snapshots/([0-9a-f]{40})")
# Licences by the Hub's ids; any other is "other" to it, with a name.
_LICENCES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "gpl-3.0", "agpl-3.0"),
    *(f"cc-by{kind}-4.0" for kind in ("", "-sa", "-nc", "-nd", "-nc-sa", "-nc-nd")),
}


@dataclass(frozen=True)
class Source:
    """Which model it is."""

    name: str
    """hf://org/name@commit, if the Hub's own cache holds it; otherwise the folder's name."""
    sha256: str
    """Of model.safetensors."""

    def __str__(self) -> str:
        return f"{self.name}, SHA-256 {self.sha256}"


def is_hub_folder(folder: Path) -> bool:
    """Whether a folder holds a model in this layout, and not a run."""
    return (folder / WEIGHTS).is_file() and not (folder / "checkpoints").exists()


def source_of(folder: Path) -> Source:
    """Says which model a folder in this layout holds; its weights are read for the hash."""
    found = _SNAPSHOT.fullmatch(folder.absolute().as_posix())
    name = f"hf://{found[1]}/{found[2]}@{found[3]}" if found else folder.resolve().name
    with (folder / WEIGHTS).open("rb") as file:
        return Source(name, hashlib.file_digest(file, "sha256").hexdigest())


def write_hub_folder(
    out: Path, config: Config, variables: Variables, meta: Meta, card: str
) -> None:
    """Writes a folder, completely or not at all.

    Args:
        out: the new folder; it may be there already, but empty.
        config: of the run, without paths of this machine.
        variables: params and batch_stats.
        meta: of the checkpoint.
        card: the text of README.md.

    Raises:
        ConfigError: it cannot be written.
    """
    leaves = flatten_dict(variables, sep="/")
    tensors = {path: np.ascontiguousarray(leaf) for path, leaf in leaves.items()}
    # One entry: safetensors writes several in any order, and the file would have another hash.
    header = {_HEADER: json.dumps(dataclasses.asdict(meta))}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with part_folder(out) as folder:
            made = folder / "made"
            made.mkdir()
            (made / WEIGHTS).write_bytes(safetensors.numpy.save(tensors, header))
            save_config(config, made / CONFIG)
            (made / CARD).write_text(card, encoding="utf-8")
            made.replace(out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None


def read_hub_folder(folder: Path) -> tuple[Config, Meta, Variables]:
    """Reads what `write_hub_folder` wrote, every tensor once.

    Raises:
        ConfigError: names the file and what is wrong with it: damaged, not of mrcnn_jax, or a
            tensor that the config's network does not have, lacks, or has in another shape or type.
    """
    path = folder / WEIGHTS
    meta, tensors = _read(path)
    config = load_config_json(folder / CONFIG)
    if len(meta.categories) != config.model.num_classes:
        raise ConfigError(
            f"{path}: of {len(meta.categories)} categories, but model.num_classes in "
            f"{folder / CONFIG} is {config.model.num_classes}"
        )
    wanted = flatten_dict(variable_shapes(config.model), sep="/")
    for kind, names in (
        ("lacks", wanted.keys() - tensors.keys()),
        ("has besides", tensors.keys() - wanted.keys()),
    ):
        if names:
            raise ConfigError(
                f"{path}: {kind} {listed(sorted(names), 1)}, for the network of {folder / CONFIG}"
            )
    for name, leaf in wanted.items():
        found, should = ((of.shape, np.dtype(of.dtype).name) for of in (tensors[name], leaf))
        if found != should:
            raise ConfigError(f"{path}: {name}: {_kind(*found)}, and not {_kind(*should)}")
    variables = {"batch_stats": {}} | unflatten_dict(tensors, sep="/")
    return config, meta, variables


def _read(path: Path) -> tuple[Meta, dict[str, np.ndarray]]:
    refuse_pipe(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged or hostile file can raise any
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{path}: not a readable .safetensors file: {reason:.300}") from None
    if _HEADER not in header:
        raise ConfigError(
            f"{path}: not written by mrcnn_jax (to start from weights of another project, name the "
            "file, not its folder)"
        )
    try:
        return parse_meta(json.loads(header[_HEADER])), tensors
    except UnknownField as error:
        raise ConfigError(f"{path}: the checkpoint in its header: {error}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(f"{path}: the checkpoint in its header is damaged: {error}") from None


def _kind(shape: tuple[int, ...], dtype: str) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def front_matter(licence: str | None) -> str:
    """The YAML at the top of a card.

    Args:
        licence: of the model, as its user writes it ("CC BY-NC 4.0"); None if nobody said.
    """
    fields: dict[str, object] = {"license": "unknown"}
    if licence is not None:
        number = re.sub(r"[\s_]+", "-", licence.strip().lower())
        fields = {"license": number}
        if number not in _LICENCES:
            fields = {"license": "other", "license_name": licence.strip()}
    fields |= {
        "library_name": "mrcnn_jax",
        "pipeline_tag": "image-segmentation",
        "tags": ["mask-rcnn", "instance-segmentation", "object-detection", "jax", "flax"],
    }
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, width=1000)}---\n"
