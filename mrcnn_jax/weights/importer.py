"""Imports a weights file of another project as the folder of a run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import config_hash
from mrcnn_jax.config.model import ModelConfig
from mrcnn_jax.config.schema import Config
from mrcnn_jax.config.tables import COCO_CANVASES
from mrcnn_jax.evaluation.coco_categories import Categories
from mrcnn_jax.output import listed
from mrcnn_jax.runs.checkpoints import Meta
from mrcnn_jax.runs.run import refuse_taken, write_run
from mrcnn_jax.weights.family import Family
from mrcnn_jax.weights.network import FileNetwork, read_network, unnamed


def import_weights(
    source: Path, out: Path, *, categories: Path | None = None, norm_epsilon: float | None = None
) -> None:
    """Writes a folder that eval, predict and --weights accept as a run; prints its content.

    Args:
        source: a file of one of `families.FAMILIES`.
        out: the new folder.
        categories: a COCO file whose categories are the classes, in the order of the names that
            `source` states, or else of their ids; None: those that `source` states, else those of
            the family's published file or, if their number differs, class1, class2, ...
        norm_epsilon: epsilon of the ResNet's batch norm; None: the family's.

    Raises:
        ConfigError: `out` is not empty; `source` cannot be read, is of no known family or does not
            fill its network exactly; or there are not as many categories as classes, or others
            than it states. Nothing is written then.
    """
    refuse_taken(out)
    network = read_network(source, norm_epsilon=norm_epsilon)
    if network.model.trunk == "convnext" and norm_epsilon is not None:
        raise ConfigError(f"--norm-epsilon: {source}: a ConvNeXt has no batch norm")
    family, model, tensors, name = network.family, network.model, network.tensors, network.name
    variables = network.variables()

    known = _categories(network, categories)
    config = Config(name=name, data=replace(COCO_CANVASES, shrink=family.shrink), model=model)
    meta = Meta(
        step=0,
        stage="imported",
        stage_index=0,
        stage_step=0,
        stage_complete=True,
        categories=known,
        config_hash=config_hash(config),
    )
    write_run(out, config, variables, meta)
    print(
        f"{source}: {network.title}, {len(tensors)} tensors, {len(network.assigned)} of them used"
    )
    _print_choices(family, tensors, model)
    if not network.has_heads:
        words = ("--config", "CONFIG", "--workdir", "DIR", "--weights", out)
        print(f"next: {cli.command('train', *words)}")
    else:
        print(f"{len(known)} classes: {listed([name for _, name in known])}")
        data = ("--annotations", "JSON", "--images", "DIR")
        print(f"next: {cli.command('predict', 'IMAGE', '--workdir', out, '--out', 'DIR')}")
        print(f"      {cli.command('eval', '--workdir', out, *data)}")


def _print_choices(family: Family, names: Iterable[str], model: ModelConfig) -> None:
    """Prints what was left out, and what a user might have to choose differently."""
    for pattern, reason in family.left_out.items():
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            print(f"left out: {listed(found, 2)}: {reason}")
    for remark in family.remarks:
        print(remark)
    if model.trunk == "convnext":
        print("norms of the backbone's four maps, which a classifier lacks: ones and zeros")
        return
    print(f"batch norm: epsilon {model.resnet.norm_epsilon:g}")
    if model.resnet.norm_epsilon == 0:
        print("  for the published file and models trained from it;")
        print("  use --norm-epsilon 1e-5 for models trained from ImageNet weights")
    if family.model is not None:
        print(f"data.shrink: {family.shrink}, the nearest to how {family.project} shrinks images")


def _categories(network: FileNetwork, file: Path | None) -> Categories:
    """Returns the classes, from a COCO file if there is one."""
    count = network.model.num_classes
    if not network.has_heads:
        if file is not None:
            raise ConfigError(f"--categories: {file}: a {network.family.name} has no classes here")
        return ()
    if file is None:
        return network.categories or unnamed(count)
    try:
        listed = json.loads(file.read_bytes())["categories"]
        found = tuple(sorted((int(each["id"]), str(each["name"])) for each in listed))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"--categories: {file}: not a COCO file with categories: {error}"
        ) from None
    if len(dict(found)) != len(found):
        raise ConfigError(f"--categories: {file}: two categories have the same id")
    if len(found) != count:
        raise ConfigError(
            f"--categories: {file}: {len(found)} categories, but the network has {count} classes"
        )
    if network.family.categories_stated and network.categories:
        return _as_stated(found, [name for _, name in network.categories], file, network.path)
    return found


def _as_stated(found: Categories, names: list[str], file: Path, source: Path) -> Categories:
    """Returns `found`, of `file`, in the order of the names that `source` gives to its labels."""
    by_name = sorted(found, key=lambda category: category[1])
    own, stated = Counter(name for _, name in found), Counter(names)
    if own != stated:
        here, there = map(listed, (own - stated, stated - own))
        raise ConfigError(
            f"--categories: {file}: has {here}, where {source} itself names its classes {there}: "
            "leave --categories out, or name them so"
        )
    # Of equal names, the one with the smaller id goes first.
    rank = sorted(range(len(names)), key=lambda label: names[label])
    return tuple(category for _, category in sorted(zip(rank, by_name, strict=True)))
