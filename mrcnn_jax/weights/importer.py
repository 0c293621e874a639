"""Imports a weights file of another project as the folder of a run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mrcnn_jax import cli
from mrcnn_jax.config.errors import ConfigError
from mrcnn_jax.config.files import config_hash, values_of, with_fields
from mrcnn_jax.config.schema import Config, DataConfig
from mrcnn_jax.config.tables import COCO_CANVASES, canvases_for
from mrcnn_jax.evaluation.coco_categories import Categories
from mrcnn_jax.output import listed
from mrcnn_jax.runs.meta import Meta
from mrcnn_jax.runs.run import refuse_taken, write_run
from mrcnn_jax.weights.choice import CONVNEXT, RESNET
from mrcnn_jax.weights.family import ChannelOrder
from mrcnn_jax.weights.network import FileNetwork, as_text, read_network, unnamed


def import_weights(
    source: Path,
    out: Path,
    *,
    categories: Path | None = None,
    values: Mapping[str, Any] | None = None,
    channel_order: ChannelOrder | None = None,
) -> None:
    """Writes a folder that eval, predict and --weights accept as a run; prints its content.

    Args:
        source: a file of one of `families.FAMILIES`.
        out: the new folder.
        categories: a COCO file whose categories are the classes, in the order of the names that
            `source` states, or else of their ids; None: those that `source` states, else those of
            the family's published file or, if their number differs, class1, class2, ...
        values: fields of the run's config, by their dotted names, in place of what is presumed.
        channel_order: of the images that the network was trained on; None: the family's.

    Raises:
        ConfigError: `out` is not empty; `source` cannot be read, is of no known family, does not
            fill its network exactly, or states something else than is given; or there are not as
            many categories as classes, or others than it states. Nothing is written then.
    """
    refuse_taken(out)
    values = dict(values or {})
    network = read_network(source, values=values, channel_order=channel_order)
    _refuse_not_of_trunk(network, values)
    given = [*values, *(["channel_order"] if channel_order is not None else [])]
    try:
        variables = network.variables()
    except ConfigError as error:
        fields = [name for name in values if name.startswith("model.")]
        if not fields:
            raise
        raise ConfigError(f"{error} (with {listed(fields)} as given)") from None

    known = _categories(network, categories)
    published = Config(
        name=network.name,
        data=replace(COCO_CANVASES, shrink=network.family.shrink),
        model=network.published,
    )
    config = with_fields(published, values | _canvases(published.data, values))
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
    used = f"{len(network.tensors)} tensors, {len(network.assigned)} of them used"
    print(f"{source}: {network.short_title}, {used}")
    _print_remarks(network)
    _print_presumed(network, published, config, given)
    if not network.has_heads:
        words = ("--config", "CONFIG", "--workdir", "DIR", "--weights", out)
        print(f"next: {cli.command('train', *words)}")
    else:
        print(f"{len(known)} classes: {listed([name for _, name in known])}")
        data = ("--annotations", "JSON", "--images", "DIR")
        print(f"next: {cli.command('predict', 'IMAGE', '--workdir', out, '--out', 'DIR')}")
        print(f"      {cli.command('eval', '--workdir', out, *data)}")


def _refuse_not_of_trunk(network: FileNetwork, values: Iterable[str]) -> None:
    """Raises ConfigError if a field is none that a ResNet or ConvNeXt alone decides."""
    resnet = network.published.trunk == "resnet"
    trunk, other = (RESNET, "convnext.") if resnet else (CONVNEXT, "resnet.")
    for name in values:
        part = name.removeprefix("model.")
        if part.startswith(other) or not (network.has_heads or part in trunk):
            raise ConfigError(f"{name}: {network.path}: a {network.name} alone does not decide it")


def _canvases(data: DataConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """Canvases for the sides that are given, unless they are given too."""
    short = values.get("data.short_side", data.short_side)
    long = values.get("data.long_side", data.long_side)
    if "data.canvases" in values or (short, long) == (data.short_side, data.long_side):
        return {}
    return {"data.canvases": canvases_for(short, long)}


def _print_remarks(network: FileNetwork) -> None:
    """Prints what was left out, and what was changed."""
    for pattern, reason in network.family.left_out.items():
        found = [name for name in network.tensors if re.fullmatch(pattern, name)]
        if found:
            print(f"left out: {listed(found, 2)}: {reason}")
    for remark in network.family.remarks:
        print(remark)
    if network.channel_order == "bgr":
        print("the first kernel was turned from BGR to RGB")
    if network.model.trunk == "convnext":
        print("norms of the backbone's four maps, which a classifier lacks: ones and zeros")


def _print_presumed(
    network: FileNetwork, published: Config, config: Config, given: Collection[str]
) -> None:
    """Prints the fields that were given, and those that the file does not state."""
    was, now = (
        {**values_of(of, (*network.presumed, *given)), "channel_order": order}
        for of, order in (
            (published, network.family.channel_order),
            (config, network.channel_order),
        )
    )
    why = {"data.shrink": f"the nearest to how {network.family.project} shrinks images"}
    if published.model.resnet.norm_epsilon == 0:
        why["model.resnet.norm_epsilon"] = "1e-5 for models trained from ImageNet weights"
    if network.family.project == "mmdetection":
        why["data.short_side"] = "the scale of a config's Resize is not read"
        if network.family.presumed:
            why["channel_order"] = network.family.presumed
    if given:
        print("given:")
    for name in given:
        value, instead = as_text(now[name]), as_text(was[name])
        print(f"  {name}: {value}{f' (in place of {instead})' if value != instead else ''}")
    presumed = [name for name in network.presumed if name not in given]
    if presumed:
        print("presumed, since the file does not state them (options of their names change them):")
    for name in presumed:
        print(f"  {name}: {as_text(now[name])}{f' ({why[name]})' if name in why else ''}")
    if "data.canvases" not in given and config.data.canvases != published.data.canvases:
        canvases = ", ".join(f"{height} x {width}" for height, width in config.data.canvases)
        print(f"canvases: {canvases}")


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
